//! Typed state that a session restores and commits.
//!
//! In a checkpoint the field `f` of the type `a::B` is the value or the tensor `a::B.f`.

use super::catalog::Checkpoint;
use super::errors::CheckpointSerializationError;
use super::session::{CheckpointSession, Inner};
use crate::checkpoint;
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::state::{Element, HostTensor, StateDict, encode_value};
use crate::sync::{Mutex, lock};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::ops::Deref;
use std::sync::{Arc, Weak};

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

    /// Reads every field from `saved`; changes nothing unless all of them are there.
    ///
    /// # Errors
    /// Those of [`Saved`].
    fn load(&mut self, saved: &Saved<'_>) -> Result<()>;
}

/// Implements [`CheckpointState`] for a struct. It lists the fields that are values, which serde writes, with
/// their types, and those that are [`Tensor`]s, with their element types.
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
    /// `Invalid` from a [`CheckpointSerializationError`]: its length is not that of its shape.
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
    /// they are not what was saved.
    pub fn tensor<T: Element>(&self, name: &str) -> Result<Tensor<T>> {
        let name = key(self.id, name);
        Ok(Tensor::new(self.checkpoint.read_as(&name)?, self.checkpoint.tensor(&name)?.shape))
    }
}

/// The name of a field in a checkpoint.
fn key(id: &str, field: &str) -> String {
    format!("{id}.{field}")
}

/// A state that is bound to a session. Clones refer to the same state. It outlives the session: the next
/// session of its catalog that is entered on the thread takes it over.
#[derive(Debug)]
pub struct Bound<T>(Arc<Shared<T>>);

#[derive(Debug)]
pub(super) struct Shared<T> {
    state: Mutex<T>,
    link: Mutex<Link>,
}

/// The catalog and session that a state belongs to.
#[derive(Clone, Debug, Default)]
pub(super) struct Link {
    pub catalog: Option<Checkpoint>,
    pub session: Weak<Inner>,
    pub loaded: bool,
}

impl<T> Clone for Bound<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T: CheckpointState> From<T> for Bound<T> {
    fn from(state: T) -> Self {
        Self(Arc::new(Shared { state: Mutex::new(state), link: Mutex::default() }))
    }
}

impl<T: CheckpointState> Bound<T> {
    /// Reads or changes the state. A session that commits meanwhile, on this thread too, gets `Busy`.
    pub fn update<R>(&self, change: impl FnOnce(&mut T) -> R) -> R {
        change(&mut lock(&self.0.state))
    }

    /// Whether the state was restored from the selected row: `checkpoint_state_loaded`.
    pub fn is_loaded(&self) -> bool {
        lock(&self.0.link).loaded
    }

    /// The catalog that the state belongs to; None without a catalog, or with a
    /// [`NullCheckpoint`](super::NullCheckpoint).
    pub fn checkpoint(&self) -> Option<Checkpoint> {
        lock(&self.0.link).catalog.clone()
    }

    /// The session that the state is bound to; None after the session was left, until the next is entered.
    pub fn session(&self) -> Option<CheckpointSession> {
        lock(&self.0.link).session.upgrade().map(CheckpointSession)
    }

    /// How much components keep, from 0 to 2; 0 without a catalog.
    pub fn checkpoint_level(&self) -> u8 {
        self.checkpoint().map_or(0, |catalog| catalog.level())
    }

    /// Whether the next write of its session is expected to flush.
    pub fn checkpoint_is_flush_due(&self) -> bool {
        self.session().is_some_and(|session| session.is_flush_due())
    }

    pub(super) fn erased(&self) -> Arc<dyn Erased> {
        self.0.clone()
    }
}

/// A state of any type.
pub(super) trait Erased: Send + Sync {
    fn id(&self) -> &'static str;
    fn fields(&self) -> &'static [Field];
    fn link(&self, link: Link);
    fn save(&self, to: &mut StateDict<'static>) -> Result<()>;
    fn restore(&self, from: &Saved<'_>) -> Result<()>;
}

impl<T: CheckpointState> Erased for Shared<T> {
    fn id(&self) -> &'static str {
        T::ID
    }

    fn fields(&self) -> &'static [Field] {
        T::FIELDS
    }

    fn link(&self, link: Link) {
        *lock(&self.link) = link;
    }

    fn save(&self, to: &mut StateDict<'static>) -> Result<()> {
        let busy = |_| Error::new(ErrorKind::Busy, format!("a state is being changed state={}", T::ID));
        let state = match self.state.try_lock() {
            // A change that panicked may have left the state partly changed; it is saved as it is.
            Err(std::sync::TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            guard => guard.map_err(busy)?,
        };
        state.save(&mut Fields { id: T::ID, state: to })
    }

    fn restore(&self, from: &Saved<'_>) -> Result<()> {
        lock(&self.state).load(from)
    }
}
