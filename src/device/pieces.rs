//! Lists of parts of tensors, as kernels take them.

use smallvec::SmallVec;

/// How a tensor lies whose elements do not lie together: row-major over its dimensions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct View {
    /// Bytes of an element.
    pub item: u32,
    /// Size and stride, in bytes, of each dimension, outermost first; at most [`View::DIMS`].
    pub dims: SmallVec<[(u64, i64); 4]>,
}

impl View {
    /// The most dimensions that a kernel knows.
    pub const DIMS: usize = 8;
}

/// Part of a tensor, and where it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Where it is on the device; with a view, where the tensor is.
    pub from: u64,
    /// With a view, how many bytes of the packed tensor come before it.
    pub skip: u64,
    /// Where it goes: in the slot of its chunk, or an address.
    pub to: u64,
    /// How long it is.
    pub bytes: u64,
    /// How the tensor lies, by the number of its view; None for bytes that lie together.
    pub view: Option<u32>,
    /// The chunk, or whatever else pieces are put together by. They come in this order.
    pub chunk: usize,
}

/// Parts of tensors in the memory of one device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pieces {
    /// The parts.
    pub list: Vec<Piece>,
    /// How tensors lie that do not lie together.
    pub views: Vec<View>,
    /// How many chunks there are, some of which may have no piece.
    pub chunks: usize,
}
