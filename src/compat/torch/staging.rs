//! States that are staged or still being staged, as `execute_save` takes them.

use crate::error::{Error, Result};
use crate::state::{Layout, Promise, Source, StateDict, promise};
use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;

/// torch's `staging_future_or_state_dict`.
#[derive(Debug)]
pub enum StagedState {
    /// The state is complete. Tensors that are not copies are read until the next fence, as in any save.
    Ready(StateDict<'static>),
    /// The state is still being staged.
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
///
/// ```
/// use ashore::compat::torch::Staging;
/// use ashore::{Dtype, Layout, StateDict};
/// let mut values = StateDict::new();
/// values.value("epoch", &3)?;
/// let (mut stage, staging) = Staging::channel(values, [("weights".into(), Layout::new(Dtype::F32, [4]))])?;
/// // ... pass `staging.into()` to `execute_save`, then deliver each tensor when it has been copied ...
/// stage.deliver("weights", vec![0.5_f32; 4])?;
/// assert_eq!(stage.missing().count(), 0);
/// # Ok::<(), ashore::Error>(())
/// ```
pub struct Staging(pub(super) Inner);

#[expect(clippy::large_enum_variant, reason = "one for each save")]
pub(super) enum Inner {
    /// The structure of the state is known. Its tensors are promised.
    Stream(StateDict<'static>),
    /// Nothing about the state is known yet.
    Whole(Coming),
}

impl Staging {
    /// Creates a state whose structure is known. `state` has the parts that exist already, mainly values;
    /// `tensors` are delivered later through the [`Stage`], in any order. Each tensor is written as it is
    /// delivered, so a state may be larger than the arena.
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

    /// Creates a state that arrives whole, as with torch's staging future. A thread of the executor waits for
    /// it.
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

/// The sending end of a [`Staging::channel`]. Dropping it before all tensors are delivered fails the save.
#[derive(Debug)]
#[must_use = "a stage that is dropped fails the save"]
pub struct Stage(BTreeMap<String, Promise>);

impl Stage {
    /// Delivers a tensor.
    ///
    /// # Errors
    /// `NotFound` for a tensor that was not promised or was delivered before. `Invalid` for a tensor of
    /// another dtype or shape, or one that can be written while the save keeps it; the save then fails with
    /// that error.
    pub fn deliver(&mut self, name: &str, source: impl Source + 'static) -> Result<()> {
        let promise = self.0.remove(name).ok_or_else(|| {
            let what = format!("no such tensor is expected tensor={name:?}");
            Error::new(crate::error::ErrorKind::NotFound, what)
        })?;
        promise.fulfil(source)
    }

    /// The names of the tensors that are not delivered yet.
    pub fn missing(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// Reports that staging failed: the save fails with `why`.
    pub fn fail(self, why: Error) {
        for promise in self.0.into_values() {
            promise.fail(why.clone());
        }
    }
}
