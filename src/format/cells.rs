//! Items that are made when they are first asked for, and then stay where they are.

use crate::error::Result;
use std::sync::OnceLock;

/// Items of a group: memory for a group is taken when one of its items is made.
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

    /// Returns an item that was made before.
    pub fn made(&self, index: usize) -> Option<&T> {
        self.groups.get(index / GROUP)?.get()?.get(index % GROUP)?.get().map(AsRef::as_ref)
    }

    /// Keeps `item`, unless there is one already, and returns what is there; None beyond the last item.
    pub fn keep(&self, index: usize, item: T) -> Option<&T> {
        let group = self.groups.get(index / GROUP).filter(|_| index < self.len)?;
        let group = group.get_or_init(|| std::iter::repeat_with(OnceLock::new).take(GROUP).collect());
        Some(group.get(index % GROUP)?.get_or_init(|| Box::new(item)))
    }

    /// Returns an item, which `make` makes the first time; None beyond the last item.
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
