//! Notices at a fence that a storage was resized while the engine reads it.
//!
//! A reference does not keep the memory of a torch storage allocated when `resize_` is called: the engine
//! then reads freed memory. The documentation forbids that between `save` and the fence. A program that does
//! it anyway gets an error at the fence, and the save is cancelled.

use crate::errors::invalid;
use ashore::Save;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyList;
use std::sync::{Arc, Weak};

/// The memory that the engine reads for one save.
pub struct Reading {
    /// The owners of the memory, as long as the engine reads it.
    pub owners: Weak<Py<PyList>>,
    pub tensors: Vec<Extent>,
    /// The names of all tensors, in the order of the call.
    pub names: Vec<String>,
}

/// The memory of a torch tensor.
pub struct Extent {
    /// Its number in the call.
    pub number: usize,
    /// The position of its storage in the list of owners.
    pub owner: usize,
    pub begin: usize,
    pub end: usize,
}

impl Reading {
    /// Whether the engine reads nothing of it any more.
    pub fn is_over(&self) -> bool {
        self.owners.strong_count() == 0
    }

    /// Cancels the save if a storage was resized while the engine reads it, and returns the error to raise.
    pub fn check(&self, py: Python<'_>, save: &Save) -> Option<PyErr> {
        let owners = self.owners.upgrade()?;
        // A storage that does not say where its memory is has lost that memory, too.
        let lost = |extent: &&Extent| !holds(owners.bind(py), extent).unwrap_or(false);
        let extent = self.tensors.iter().find(lost)?;
        let (name, step) = (self.names.get(extent.number).map_or("", String::as_str), save.step());
        let fate = if save.cancel() { "the save was cancelled" } else { "the step may have wrong bytes" };
        let why = format!("the storage of a tensor was resized between save and fence: {fate} step={step}");
        Some(invalid(py, &why, Some(name)))
    }
}

fn holds(owners: &Bound<'_, PyList>, extent: &Extent) -> PyResult<bool> {
    let (py, storage) = (owners.py(), owners.get_item(extent.owner)?);
    let begin: usize = storage.call_method0(intern!(py, "data_ptr"))?.extract()?;
    let bytes: usize = storage.call_method0(intern!(py, "nbytes"))?.extract()?;
    Ok(begin <= extent.begin && extent.end <= begin.saturating_add(bytes))
}

/// The owners of the memory of all tensors of a save. A thread of the engine drops it without the GIL. The
/// next call into this module then releases the reference.
pub type Owners = Arc<Py<PyList>>;
