//! State on its way: what `execute_save` takes.

use crate::error::{Error, Result};
use crate::state::{Layout, Promise, Source, StateDict, promise};
use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;

/// torch's `staging_future_or_state_dict`.
#[derive(Debug)]
pub enum StagedState {
    /// It is there. Tensors that are not copies are read until the next fence, as with any save.
    Ready(StateDict<'static>),
    /// It is coming.
    Pending(Staging),
}

impl From<StateDict<'static>> for StagedState {
    fn from(state: StateDict<'static>) -> Self {
        Self::Ready(state)
    }
}

impl From<Staging> for StagedState {
    fn from(staging: Staging) -> Self {
        Self::Pending(staging)
    }
}

pub(super) type Coming = Pin<Box<dyn Future<Output = Result<StateDict<'static>>> + Send>>;

/// A state that is still being staged.
pub struct Staging(pub(super) Inner);

pub(super) enum Inner {
    /// Its structure is known, its tensors are promised.
    Stream(StateDict<'static>),
    /// Nothing is known of it yet.
    Whole(Coming),
}

impl Staging {
    /// A state whose structure is known: `state` holds what is there already, values above all, and `tensors` are yet to come,
    /// in any order, through the [`Stage`]. Each is written as it comes, so that a state larger than the arena flows through.
    ///
    /// # Errors
    /// `Invalid`, as [`StateDict::tensor`].
    pub fn channel(
        mut state: StateDict<'static>,
        tensors: impl IntoIterator<Item = (String, Layout)>,
    ) -> Result<(Stage, Self)> {
        let mut promises = BTreeMap::new();
        for (name, layout) in tensors {
            let (deliver, promised) = promise(layout);
            state.tensor(name.clone(), promised)?;
            promises.insert(name, deliver);
        }
        Ok((Stage(promises), Self(Inner::Stream(state))))
    }

    /// A state that comes whole, as torch's staging future does. A thread of the executor waits for it.
    pub fn future(state: impl Future<Output = Result<StateDict<'static>>> + Send + 'static) -> Self {
        Self(Inner::Whole(Box::pin(state)))
    }
}

impl fmt::Debug for Staging {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Inner::Stream(state) => write!(f, "Staging({state:?})"),
            Inner::Whole(_) => f.write_str("Staging(a future)"),
        }
    }
}

/// The end of a [`Staging::channel`] where tensors are handed in. Dropping it before all are fails the save.
#[derive(Debug)]
#[must_use = "a stage that is dropped fails the save"]
pub struct Stage(BTreeMap<String, Promise>);

impl Stage {
    /// Hands in a tensor.
    ///
    /// # Errors
    /// `NotFound` for a tensor that was not promised, or that was handed in before; `Invalid`, and the save fails with it, for one
    /// of another dtype or shape, or that can be written while it is held.
    pub fn deliver(&mut self, name: &str, source: impl Source + 'static) -> Result<()> {
        let promise = self.0.remove(name).ok_or_else(|| {
            let what = format!("no such tensor is waited for tensor={name:?}");
            Error::new(crate::error::ErrorKind::NotFound, what)
        })?;
        promise.fulfil(source)
    }

    /// The tensors that are yet to come, by name.
    pub fn missing(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// Says that staging failed: the save fails with `why`.
    pub fn fail(self, why: Error) {
        for promise in self.0.into_values() {
            promise.fail(why.clone());
        }
    }
}
