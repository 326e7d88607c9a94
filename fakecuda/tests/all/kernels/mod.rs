//! Tests of the project's kernels, compiled for the CPU from their source, against plain Rust.

mod digest;
mod fence;
mod gather;
mod ptx;
mod training;

/// `struct View`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct View {
    pub shape: [u64; 8],
    pub stride: [i64; 8],
    pub dims: u32,
    pub item: u32,
}

/// `struct Piece`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct Piece {
    pub from: u64,
    pub to: u64,
    pub skip: u64,
    pub bytes: u32,
    pub view: u32,
    pub chunk: u32,
    pub unused: u32,
}

impl View {
    pub fn new(shape: &[u64], stride: &[i64], item: u32) -> Self {
        let mut view = Self { dims: shape.len() as u32, item, ..Self::default() };
        view.shape[..shape.len()].copy_from_slice(shape);
        view.stride[..stride.len()].copy_from_slice(stride);
        view
    }

    /// The packed bytes of the tensor whose first item is at `from` in `memory`.
    pub fn packed(&self, memory: &[u8], from: usize) -> Vec<u8> {
        let dims = self.dims as usize;
        let (mut out, mut index) = (Vec::new(), vec![0; dims]);
        for _ in 0..self.shape[..dims].iter().product::<u64>() {
            let at = (0..dims).map(|d| index[d] as i64 * self.stride[d]).sum::<i64>() + from as i64;
            out.extend_from_slice(&memory[at as usize..][..self.item as usize]);
            for d in (0..dims).rev() {
                index[d] += 1;
                if index[d] < self.shape[d] {
                    break;
                }
                index[d] = 0;
            }
        }
        out
    }
}

/// Bytes that repeat only after a long period.
pub fn noise(count: usize, seed: u64) -> Vec<u8> {
    let mut state = seed * 2 + 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..count).map(|_| next()).collect()
}
