//! The content of a save: named tensors, and values that are not tensors.
//!
//! A [`StateDict`] owns or borrows *sources* and never copies their bytes; the stager copies them. Names are
//! data: they become keys in files, never paths.

mod alias;
mod boxes;
mod dict;
mod dtype;
mod groups;
mod host;
mod part;
mod promised;
mod source;
mod strided;
mod value;

pub(crate) use boxes::{Key, Place};
pub(crate) use dict::{Aliases, OPEN, STILL, Tensor};
pub use dict::{Capture, StateDict};
#[cfg(test)]
pub(crate) use dtype::DTYPES;
pub use dtype::{Dtype, Element, Layout, Shape};
pub use host::{HostTensor, OwnedBytes, RawHost};
pub(crate) use part::BoxInfo;
pub use promised::{Promise, Promised, promise};
pub use source::{DeviceStream, MemoryLocation, RawDevice, Source};
pub(crate) use strided::{Axis, Block, Dims, Step, Strided, lie_apart, merged, rearrange};
pub(crate) use value::encode_named;
pub use value::{Kinds as Value, decode as decode_value, encode as encode_value};
