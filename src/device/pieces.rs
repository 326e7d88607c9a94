//! Lists of parts of tensors: the input of the kernels.

use crate::state::Dims;

/// The layout of a strided tensor: row-major order over dimensions with strides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct View {
    /// Size of an element in bytes.
    pub item: u32,
    /// Size and stride, in bytes, of each dimension, outermost first; at most [`View::DIMS`].
    pub dims: Dims,
}

impl View {
    /// The maximum number of dimensions that the kernels support.
    pub const DIMS: usize = 8;
}

/// A part of a tensor and its destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Source address on the device. With a view, it is the address of the tensor.
    pub from: u64,
    /// With a view, the offset of the part in the packed tensor, in bytes.
    pub skip: u64,
    /// Destination: an offset in the slot of its chunk, or an address.
    pub to: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// Index of the tensor's view; None for contiguous bytes.
    pub view: Option<u32>,
    /// Index of the chunk, or of another group. Pieces are sorted by it.
    pub chunk: usize,
}

/// Parts of tensors in the memory of one device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pieces {
    /// The parts.
    pub list: Vec<Piece>,
    /// Layouts of the strided tensors.
    pub views: Vec<View>,
    /// Number of chunks; some may have no piece.
    pub chunks: usize,
}
