//! Typed state that a session restores and commits.
//!
//! In a checkpoint the field `f` of the type `a::B` is the value or the tensor `a::B.f`.

use super::errors::CheckpointSerializationError;
use crate::checkpoint;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::state::{Element, HostTensor, StateDict, encode_value};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::ops::Deref;
use std::sync::Arc;

/// A field of a state: its name, and its type as written in the source code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// The name.
    pub name: &'static str,
    /// The type.
    pub of: &'static str,
}

/// A type that can be bound to a session. [`checkpoint_state!`](super::checkpoint_state) implements it for a
/// struct.
pub trait CheckpointState: Send + 'static {
    /// The name of the type; every build that restores a state must use the same name.
    const ID: &'static str;

    /// The fields that are saved. A row restores only into a type with the same fields.
    const FIELDS: &'static [Field];

    /// Puts every field into `fields`.
    ///
    /// # Errors
    /// Those of [`Fields`].
    fn save(&self, fields: &mut Fields<'_>) -> Result<()>;

    /// Reads every field from `saved`. Changes nothing unless all fields are there.
    ///
    /// # Errors
    /// Those of [`Saved`].
    fn load(&mut self, saved: &Saved<'_>) -> Result<()>;
}

/// Implements [`CheckpointState`] for a struct. The macro lists the fields that are values, which serde
/// writes, with their types, and the fields that are [`Tensor`]s, with their element types.
#[doc(hidden)]
#[macro_export]
macro_rules! __checkpoint_state {
    ($type:ident { values: { $($value:ident: $of:ty),* $(,)? }, tensors: { $($tensor:ident: $element:ty),* $(,)? } $(,)? }) => {
        impl $crate::compat::earth2studio::CheckpointState for $type {
            const ID: &'static str = concat!(module_path!(), "::", stringify!($type));
            const FIELDS: &'static [$crate::compat::earth2studio::Field] = &[
                $($crate::compat::earth2studio::Field { name: stringify!($value), of: stringify!($of) },)*
                $($crate::compat::earth2studio::Field { name: stringify!($tensor), of: concat!("[", stringify!($element), "]") },)*
            ];

            fn save(&self, fields: &mut $crate::compat::earth2studio::Fields<'_>) -> $crate::Result<()> {
                let Self { $($value,)* $($tensor,)* } = self; // every field is named
                $(fields.value::<$of>(stringify!($value), $value)?;)*
                $(fields.tensor::<$element>(stringify!($tensor), $tensor)?;)*
                Ok(())
            }

            fn load(&mut self, saved: &$crate::compat::earth2studio::Saved<'_>) -> $crate::Result<()> {
                *self = Self {
                    $($value: saved.value::<$of>(stringify!($value))?,)*
                    $($tensor: saved.tensor::<$element>(stringify!($tensor))?,)*
                };
                Ok(())
            }
        }
    };
}

/// The digest of the names and types of a type's fields.
pub(super) fn schema_hash(fields: &[Field]) -> String {
    Digest::of(spelled(fields).join("\n").as_bytes()).to_string()
}

pub(super) fn spelled(fields: &[Field]) -> Vec<String> {
    fields.iter().map(|field| format!("{}: {}", field.name, field.of)).collect()
}

/// A tensor in host memory. A commit shares it and does not copy it.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor<T> {
    elements: Arc<Vec<T>>,
    shape: Vec<usize>,
}

impl<T: Element> Tensor<T> {
    /// A tensor of `shape`. A save checks its length.
    pub fn new(elements: impl Into<Arc<Vec<T>>>, shape: impl Into<Vec<usize>>) -> Self {
        Self { elements: elements.into(), shape: shape.into() }
    }

    /// Its dimensions, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Mutable access to the elements. They are copied first if a commit still reads them.
    pub fn make_mut(&mut self) -> &mut [T] {
        Arc::make_mut(&mut self.elements).as_mut_slice()
    }
}

impl<T> Deref for Tensor<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.elements
    }
}

/// Collects the fields of a state for a commit.
#[derive(Debug)]
pub struct Fields<'a> {
    pub(super) id: &'a str,
    pub(super) state: &'a mut StateDict<'static>,
}

impl Fields<'_> {
    /// Saves a value.
    ///
    /// # Errors
    /// `Invalid` from a [`CheckpointSerializationError`]: the value cannot be kept exactly.
    pub fn value<T: Serialize>(&mut self, name: &str, value: &T) -> Result<()> {
        let name = key(self.id, name);
        let refuse = |e: Error| CheckpointSerializationError { name: name.clone(), why: format!("{e:#}") }.error();
        let encoded = encode_value(value).map_err(refuse)?;
        self.state.values.insert(name, encoded);
        Ok(())
    }

    /// Saves a tensor.
    ///
    /// # Errors
    /// `Invalid` from a [`CheckpointSerializationError`]: its length is not the length of its shape.
    pub fn tensor<T: Element>(&mut self, name: &str, tensor: &Tensor<T>) -> Result<()> {
        let name = key(self.id, name);
        let source = HostTensor::new(tensor.elements.clone(), &tensor.shape);
        let put = self.state.tensor(&*name, source).map(drop);
        put.map_err(|e| CheckpointSerializationError { name, why: format!("{e:#}") }.error())
    }
}

/// Reads the saved fields of a state.
#[derive(Debug)]
pub struct Saved<'a> {
    pub(super) id: &'a str,
    pub(super) checkpoint: &'a checkpoint::Checkpoint,
}

impl Saved<'_> {
    /// Reads a value.
    ///
    /// # Errors
    /// `NotFound` when the value is missing, `Invalid` when it is not a `T`.
    pub fn value<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        self.checkpoint.value(&key(self.id, name))
    }

    /// Reads a tensor.
    ///
    /// # Errors
    /// `NotFound` when the tensor is missing, `Invalid` when its elements are not of type `T`, `Corrupt` when
    /// they differ from what was saved.
    pub fn tensor<T: Element>(&self, name: &str) -> Result<Tensor<T>> {
        let name = key(self.id, name);
        Ok(Tensor::new(self.checkpoint.read_as(&name)?, self.checkpoint.tensor(&name)?.shape))
    }
}

/// The name of a field in a checkpoint.
fn key(id: &str, field: &str) -> String {
    format!("{id}.{field}")
}
