//! Composite checkpoints: several items in one step.

use crate::checkpoint::{Checkpoint, TensorInfo};
use crate::error::{Error, ErrorKind, Result};
use crate::state::{Element, StateDict};
use serde::de::DeserializeOwned;

/// The items of one step, by name: Orbax's `args.Composite`.
///
/// ```
/// use ashore::{StateDict, compat::orbax::CompositeArgs};
/// let (mut model, mut loader) = (StateDict::new(), StateDict::new());
/// model.tensor("weights", vec![0.5_f32; 4])?;
/// loader.value("position", &17)?;
/// let args = CompositeArgs::new().item("model", model)?.item("dataloader", loader)?;
/// assert_eq!(args.item_names(), ["model", "dataloader"]);
/// # Ok::<(), ashore::Error>(())
/// ```
#[derive(Debug, Default)]
pub struct CompositeArgs {
    state: StateDict<'static>,
    names: Vec<String>,
}

impl CompositeArgs {
    /// No items.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an item. Its tensors and values are saved as `name.tensor`.
    ///
    /// # Errors
    /// `Invalid`: a name that is empty, taken, or contains a dot; an empty item, which no reader could find
    /// again.
    pub fn item(mut self, name: impl Into<String>, state: StateDict<'static>) -> Result<Self> {
        let name = name.into();
        let refuse = |why: &str| Err(Error::invalid(format!("{why} item={name:?}")));
        if name.is_empty() || name.contains('.') || self.names.contains(&name) {
            return refuse("the name of an item must be new, not empty, and without a dot");
        }
        if state.is_empty() && state.value_names().len() == 0 {
            return refuse("an item has no tensors and no values");
        }
        self.state.absorb(&format!("{name}."), state)?;
        self.names.push(name);
        Ok(self)
    }

    /// The names of the items, in order.
    pub fn item_names(&self) -> &[String] {
        &self.names
    }

    /// Returns the items as the one state dict that is saved.
    pub fn into_state(self) -> StateDict<'static> {
        self.state
    }
}

/// One item of a step.
#[derive(Clone, Debug)]
pub struct Item<'a> {
    checkpoint: &'a Checkpoint,
    prefix: String,
}

impl<'a> Item<'a> {
    /// The item `name` of a checkpoint.
    ///
    /// # Errors
    /// `NotFound` when there is none.
    pub fn of(checkpoint: &'a Checkpoint, name: &str) -> Result<Self> {
        let prefix = format!("{name}.");
        let values = checkpoint.value_names().any(|value| value.starts_with(&prefix));
        if values || checkpoint.with_prefix(&prefix)?.len() > 0 {
            return Ok(Self { checkpoint, prefix });
        }
        let missing = Error::new(ErrorKind::NotFound, format!("no such item in the checkpoint item={name:?}"));
        Err(checkpoint.located(missing))
    }

    /// The tensors of the item, by their full names.
    ///
    /// # Errors
    /// As [`Checkpoint::tensors`].
    pub fn tensors(&self) -> Result<impl Iterator<Item = TensorInfo<'a>> + use<'a>> {
        self.checkpoint.with_prefix(&self.prefix)
    }

    /// The bytes of a tensor, by its name in the item.
    ///
    /// # Errors
    /// As [`Checkpoint::read`].
    pub fn read(&self, name: &str) -> Result<Vec<u8>> {
        self.checkpoint.read(&format!("{}{name}", self.prefix))
    }

    /// The elements of a tensor, by its name in the item.
    ///
    /// # Errors
    /// As [`Checkpoint::read_as`].
    pub fn read_as<T: Element>(&self, name: &str) -> Result<Vec<T>> {
        self.checkpoint.read_as(&format!("{}{name}", self.prefix))
    }

    /// A value, by its name in the item.
    ///
    /// # Errors
    /// As [`Checkpoint::value`].
    pub fn value<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        self.checkpoint.value(&format!("{}{name}", self.prefix))
    }
}
