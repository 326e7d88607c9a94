//! Tensors in the form that device kernels expect: parts, and the layout of strided tensors.

use crate::device::{Piece, Pieces, View};
use crate::error::{Error, Result};
use crate::state::{Layout, Tensor, merged};

/// Part of a tensor: its offset, length and destination.
pub(super) struct Part {
    pub at: u64,
    pub bytes: u64,
    pub to: u64,
    pub chunk: usize,
}

impl Pieces {
    /// Adds part of a tensor of a device.
    ///
    /// # Errors
    /// `Invalid`, naming the tensor, when no kernel supports its layout.
    pub(super) fn add(&mut self, name: &str, tensor: &Tensor<'_>, part: Part) -> Result<()> {
        let Part { at, bytes, to, chunk } = part;
        let view = match tensor.strides() {
            None => None,
            Some(strides) => {
                let wrong = |why: &str| Error::invalid(format!("{why}, make it contiguous tensor={name:?}"));
                let view = view(&tensor.layout, strides).ok_or_else(|| wrong("too many dimensions that lie apart"))?;
                if !at.is_multiple_of(u64::from(view.item)) {
                    return Err(wrong("elements would be cut"));
                }
                if self.views.last() != Some(&view) {
                    self.views.push(view);
                }
                Some(self.views.len() as u32 - 1)
            }
        };
        let before = self.list.len();
        tensor.read(&mut |from| {
            let from = from.addr() as u64;
            let (from, skip) = if view.is_some() { (from, at) } else { (from + at, 0) };
            self.list.push(Piece { from, skip, to, bytes, view, chunk });
        });
        if self.list.len() == before + 1 {
            return Ok(());
        }
        Err(Error::invalid(format!("a source did not hand out its bytes tensor={name:?}")))
    }
}

/// The layout of a strided tensor, in as few dimensions as possible.
fn view(layout: &Layout, strides: &[i64]) -> Option<View> {
    let (item, dims) = (layout.item()? as u32, merged(&layout.shape, strides));
    (dims.len() <= View::DIMS && item > 0).then_some(View { item, dims })
}
