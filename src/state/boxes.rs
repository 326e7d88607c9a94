//! Boxes: the parts of a tensor that the ranks of a job hold.

use super::dtype::{Dtype, Layout, Shape};
use crate::error::{Error, Result};
use std::fmt;
use std::ops::Deref;

/// Where a box lies in its tensor.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Place {
    /// The shape of the whole tensor.
    pub global: Shape,
    /// The index in the tensor of the first element of the box.
    pub at: Shape,
}

impl Place {
    /// Checks that a box of `layout` lies within its tensor, and that the box shares no byte with its
    /// neighbours.
    pub fn check(&self, layout: &Layout) -> Result<()> {
        let Self { global, at } = self;
        let whole = Layout { dtype: layout.dtype, shape: global.clone() };
        let refuse = |why: &str| {
            let (global, at, shape, dtype) = (&global[..], &at[..], &layout.shape[..], layout.dtype);
            Err(Error::invalid(format!("{why} dtype={dtype} shape={global:?} at={at:?} box={shape:?}")))
        };
        if at.len() != global.len() || layout.shape.len() != global.len() {
            return refuse("a box, its begin and its tensor need the same number of dimensions");
        }
        let mut ends = at.iter().zip(&layout.shape[..]).map(|(at, extent)| at.checked_add(*extent));
        if !global.iter().all(|dim| ends.next().flatten().is_some_and(|end| end <= *dim)) {
            return refuse("a box reaches beyond its tensor");
        }
        whole.bytes()?;
        if whole.dtype == Dtype::F4 && global.last().is_some_and(|last| last % 2 == 1)
            || cuts_a_byte(&whole, self, layout)
        {
            return refuse("a box cuts a byte of its tensor in two");
        }
        Ok(())
    }
}

/// Returns true if a row of the box begins or ends within a byte of the whole tensor.
fn cuts_a_byte(whole: &Layout, place: &Place, layout: &Layout) -> bool {
    let bits = whole.dtype.bitsize();
    if bits.is_multiple_of(8) || layout.elements() == Some(0) {
        return false;
    }
    // The size of the whole tensor in bits was checked, so nothing overflows. Positions of rows matter only
    // modulo 8.
    let (mut stride, mut run, mut contiguous) = (bits, bits, true);
    let dims = whole.shape.iter().zip(&place.at[..]).zip(&layout.shape[..]).rev();
    dims.fold(false, |cut, ((&dim, &at), &extent)| {
        let begins_within = at * stride % 8 != 0;
        let rows = !contiguous && extent > 1 && stride % 8 != 0;
        if contiguous {
            run = extent * stride;
            contiguous = extent == dim;
        }
        stride *= dim;
        cut || begins_within || rows
    }) || run % 8 != 0
}

/// The key of a tensor in a state dict: its name, and the number of the box if a name has several boxes.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub name: String,
    pub number: u32,
}

impl Deref for Key {
    type Target = str;

    fn deref(&self) -> &str {
        &self.name
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.name.fmt(f)
    }
}

impl indexmap::Equivalent<Key> for (&str, u32) {
    fn equivalent(&self, key: &Key) -> bool {
        (self.0, self.1) == (key.name.as_str(), key.number)
    }
}
