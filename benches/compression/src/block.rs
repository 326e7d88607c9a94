//! Codes a block by a scheme: a transform, a coder, and the choice of the planes that are worth coding.
//!
//! A coded block consists of the lengths of its planes, four bytes each, and the planes. A plane whose length
//! is unchanged is stored raw.

use crate::coder::{Code, Coder};
use crate::memory::Aligned;
use crate::planes::Transform;
use std::fmt;

/// The unit of coding. With its planes and the coder's tables it fits the second-level cache.
pub const BLOCK: usize = 256 << 10;

/// The maximum number of bytes by which a coded block is longer than its raw bytes.
pub const OVERHEAD_MAX: usize = 4 * LENGTH;

const LENGTH: usize = 4;

/// A plane is worth coding only if it shrinks at least to this share of its length.
const WORTH: f64 = 0.98;

/// How many blocks are coded to find the planes that are worth coding.
const PROBES: usize = 8;

#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Scheme {
    pub transform: Transform,
    pub code: Code,
    pub width: usize,
    /// Bit `i` is set when plane `i` is coded.
    pub coded: u8,
}

impl Scheme {
    /// Decides from some blocks of the data which planes to code. Storing planes that do not shrink saves
    /// most of the time.
    pub fn probed(transform: Transform, code: Code, width: usize, raw: &[u8], last: Option<&[u8]>) -> Self {
        let all = Self { transform, code, width, coded: u8::MAX };
        let mut codec = Codec::new(all);
        let mut out = vec![0; BLOCK + OVERHEAD_MAX];
        let mut lengths = vec![0; transform.planes(width)];
        for probe in 0..PROBES {
            let at = (raw.len() - BLOCK) / (PROBES - 1) * probe / width * width;
            codec.encode(&raw[at..at + BLOCK], last.map(|last| &last[at..at + BLOCK]), &mut out);
            for (i, length) in lengths.iter_mut().enumerate() {
                *length += read_length(&out, i);
            }
        }
        let whole = (PROBES * BLOCK / lengths.len()) as f64;
        let coded = lengths.iter().enumerate().filter(|&(_, &l)| (l as f64) < WORTH * whole).map(|(i, _)| 1 << i).sum();
        Self { coded, ..all }
    }
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let planes = self.transform.planes(self.width);
        let coded = (0..planes).filter(|i| self.coded & 1 << i != 0).count();
        match self.transform {
            Transform::Plain => write!(f, "plain")?,
            Transform::Planes => write!(f, "byte planes")?,
            Transform::Exponent => write!(f, "exponent split")?,
            Transform::Delta => write!(f, "delta, exponent split")?,
        }
        write!(f, ", {}", self.code)?;
        if planes > 1 { write!(f, " on {coded} of {planes}") } else { Ok(()) }
    }
}

/// A scheme ready for use on one thread.
pub struct Codec {
    pub scheme: Scheme,
    coder: Coder,
    planes: Aligned,
    difference: Aligned,
}

impl Codec {
    pub fn new(scheme: Scheme) -> Self {
        let coder = Coder::new(scheme.code, scheme.width);
        Self { scheme, coder, planes: Aligned::zeroed(BLOCK), difference: Aligned::zeroed(BLOCK) }
    }

    /// Codes `raw` into `out` and returns the length there.
    pub fn encode(&mut self, raw: &[u8], last: Option<&[u8]>, out: &mut [u8]) -> usize {
        let Scheme { transform, width, coded, .. } = self.scheme;
        let count = transform.planes(width);
        let raw = match (transform, last) {
            (Transform::Delta, Some(last)) => xor(raw, last, &mut self.difference[..raw.len()]),
            _ => raw,
        };
        let each = raw.len() / count;
        let planes = &mut self.planes[..raw.len()];
        // A single plane needs no splitting: it is coded, or stored, from the raw block.
        if count > 1 {
            let mut planes: Vec<&mut [u8]> = planes.chunks_mut(each).collect();
            transform.split(raw, width, &mut planes);
        }
        let mut end = count * LENGTH;
        for i in 0..count {
            let plane = if count > 1 { &planes[i * each..(i + 1) * each] } else { raw };
            let shrunk = match coded & 1 << i {
                0 => None,
                _ => self.coder.encode(plane, &mut out[end..end + each - 1]),
            };
            let length = shrunk.unwrap_or_else(|| {
                out[end..end + each].copy_from_slice(plane);
                each
            });
            out[i * LENGTH..(i + 1) * LENGTH].copy_from_slice(&(length as u32).to_le_bytes());
            end += length;
        }
        end
    }

    /// Fills `raw` with the bytes from which `coded` was made.
    pub fn decode(&mut self, coded: &[u8], last: Option<&[u8]>, raw: &mut [u8]) {
        let Scheme { transform, width, .. } = self.scheme;
        let count = transform.planes(width);
        let each = raw.len() / count;
        let mut from = count * LENGTH;
        let mut lying: Vec<&[u8]> = Vec::with_capacity(count);
        let mut room = &mut self.planes[..raw.len()];
        for i in 0..count {
            let plane = &coded[from..from + read_length(coded, i)];
            from += plane.len();
            let (decoded, rest) = std::mem::take(&mut room).split_at_mut(each);
            room = rest;
            match (plane.len() == each, count) {
                (true, _) => lying.push(plane),
                (false, 1) => return self.coder.decode(plane, raw),
                (false, _) => {
                    self.coder.decode(plane, decoded);
                    lying.push(decoded);
                }
            }
        }
        match (transform, last) {
            (Transform::Delta, Some(last)) => {
                let difference = &mut self.difference[..raw.len()];
                transform.merge(&lying, width, difference);
                xor(difference, last, raw);
            }
            _ => transform.merge(&lying, width, raw),
        }
    }
}

fn read_length(coded: &[u8], plane: usize) -> usize {
    let (lengths, _) = coded.as_chunks::<LENGTH>();
    u32::from_le_bytes(lengths[plane]) as usize
}

fn xor<'a>(a: &[u8], b: &[u8], out: &'a mut [u8]) -> &'a [u8] {
    for ((a, b), out) in a.iter().zip(b).zip(&mut *out) {
        *out = a ^ b;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Elements whose highest byte is predictable and whose other bytes are random, with special values
    /// between them.
    fn elements(width: usize, seed: u32) -> Aligned {
        let mut all = Aligned::zeroed(BLOCK);
        let mut state = seed;
        for (i, element) in all.chunks_exact_mut(width).enumerate() {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let bits = if i % 1000 == 0 { u32::MAX } else { state & 0x83ff_ffff | 0x3800_0000 };
            element.copy_from_slice(&bits.to_le_bytes()[4 - width..]);
        }
        all
    }

    #[test]
    fn every_scheme_gives_every_bit_back() {
        for width in [2, 4] {
            let (raw, last) = (elements(width, 1), elements(width, 2));
            let codes = Code::OF_BYTES.iter().map(|&code| (Transform::ALL.to_vec(), code));
            for (transforms, code) in codes.chain([4, 8].map(|level| (vec![Transform::Plain], Code::Pco(level)))) {
                for transform in transforms {
                    for coded in [0, 1, 0b1010, u8::MAX] {
                        let mut codec = Codec::new(Scheme { transform, code, width, coded });
                        let (mut out, mut back) = (vec![0xaa; BLOCK + OVERHEAD_MAX], Aligned::zeroed(BLOCK));
                        let length = codec.encode(&raw, Some(&last), &mut out);
                        codec.decode(&out[..length], Some(&last), &mut back);
                        assert!(*back == *raw, "{} coded={coded:b}", codec.scheme);
                    }
                }
            }
        }
    }

    #[test]
    fn only_the_exponents_are_worth_coding() {
        for width in [2, 4] {
            let raw = elements(width, 1);
            let scheme = Scheme::probed(Transform::Exponent, Code::Huffman, width, &raw, None);
            assert_eq!(scheme.coded, 1, "{scheme}");
        }
    }
}
