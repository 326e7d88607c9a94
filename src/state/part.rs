//! Parts of a state dict: lists its tensors and boxes, and makes a state dict of some of them.

use super::boxes::Key;
use super::dict::{StateDict, Tensor};
use super::dtype::Dtype;
use crate::error::Result;

/// The description of a tensor, or of a box of a tensor, in a state dict.
pub(crate) struct BoxInfo<'s> {
    pub name: &'s str,
    pub dtype: Dtype,
    /// The shape of the whole tensor.
    pub shape: &'s [usize],
    /// Where the box begins. None: the box is the whole tensor.
    pub at: Option<&'s [usize]>,
    /// The shape of the box.
    pub extent: &'s [usize],
}

impl StateDict<'_> {
    /// The tensors and boxes, in order, without aliases.
    pub(crate) fn held(&self) -> impl ExactSizeIterator<Item = BoxInfo<'_>> {
        self.tensors.iter().map(|(name, Tensor { layout, place, .. })| {
            let extent = &layout.shape[..];
            let (shape, at) = place.as_ref().map_or((extent, None), |p| (&p.global[..], Some(&p.at[..])));
            BoxInfo { name, dtype: layout.dtype, shape, at, extent }
        })
    }

    /// Keeps the tensors, boxes and values for all ranks for which `keep` returns true. For a value, `keep`
    /// gets no begin. An alias stays with its holder.
    ///
    /// # Errors
    /// None for names that were accepted before.
    pub(crate) fn kept(self, keep: impl Fn(&str, Option<&[usize]>) -> bool) -> Result<Self> {
        let (metadata, rank_values) = (self.metadata, self.rank_values);
        let mut kept = Self { metadata, rank_values, ..Self::with_capacity(self.tensors.len()) };
        kept.values = self.values.into_iter().filter(|(name, _)| keep(name, None)).collect();
        for (Key { name, .. }, Tensor { layout, capture, source, place, .. }) in self.tensors {
            let begin = || vec![0; layout.shape.len()];
            let at = place.as_ref().map_or_else(begin, |place| place.at.to_vec());
            if keep(&name, Some(&at)) {
                kept.insert(name, source, capture, place)?;
            }
        }
        for (alias, holder) in self.aliases {
            if kept.tensor_named(&holder).is_some() {
                kept.alias(alias, &holder)?;
            }
        }
        Ok(kept)
    }
}
