//! Items that are created when they are first requested, and then stay at their addresses.

use crate::error::Result;
use std::sync::OnceLock;

/// The number of items in a group. Memory for a group is allocated when one of its items is created.
const GROUP: usize = 64;

/// Room for a known number of items.
#[derive(Debug)]
pub(super) struct Cells<T> {
    groups: Vec<OnceLock<Group<T>>>,
    len: usize,
}

type Group<T> = Box<[OnceLock<Box<T>>]>;

impl<T> Cells<T> {
    pub fn new(len: usize) -> Self {
        Self { groups: std::iter::repeat_with(OnceLock::new).take(len.div_ceil(GROUP)).collect(), len }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns an item that was created before.
    pub fn made(&self, index: usize) -> Option<&T> {
        self.groups.get(index / GROUP)?.get()?.get(index % GROUP)?.get().map(AsRef::as_ref)
    }

    /// Keeps `item`, unless the cell already has one, and returns the item in the cell. Returns None beyond
    /// the last item.
    pub fn keep(&self, index: usize, item: T) -> Option<&T> {
        let group = self.groups.get(index / GROUP).filter(|_| index < self.len)?;
        let group = group.get_or_init(|| std::iter::repeat_with(OnceLock::new).take(GROUP).collect());
        Some(group.get(index % GROUP)?.get_or_init(|| Box::new(item)))
    }

    /// Returns an item, which `make` creates the first time. Returns None beyond the last item.
    pub fn get(&self, index: usize, make: impl FnOnce() -> Result<T>) -> Result<Option<&T>> {
        match self.made(index) {
            None if index < self.len => Ok(self.keep(index, make()?)),
            made => Ok(made),
        }
    }
}

impl<T> From<Vec<T>> for Cells<T> {
    fn from(items: Vec<T>) -> Self {
        let cells = Self::new(items.len());
        items.into_iter().enumerate().for_each(|(index, item)| _ = cells.keep(index, item));
        cells
    }
}
