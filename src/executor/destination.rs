//! Begins attempts in storage and guards the names of steps: a step has one name, and a damaged step does not
//! block a new one of its number.

use crate::catalog::Catalog;
use crate::error::{Error, ErrorKind, Result};
use crate::id::parse_step_name;
use crate::plan::Request;
use crate::settings::OnDamaged;
use crate::storage::{Adopted, FileReading, FileWriting, Storage, Writing};
use crate::writer::Begin;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

/// The storages of saves that are not steps of the root: another directory of the executor's storage, or the
/// storage that the save has brought.
#[derive(Debug)]
pub(super) struct Elsewhere(Arc<dyn Storage>);

impl Elsewhere {
    pub fn new(storage: Arc<dyn Storage>) -> Self {
        Self(storage)
    }

    /// Returns the storage of `request` in the directory `parent`, which is created if `create` is true.
    pub fn at(&self, request: &Request, parent: &Path, create: bool) -> Result<Arc<dyn Storage>> {
        let brought = request.brought.as_ref().and_then(|brought| brought.downcast_ref::<Arc<dyn Storage>>());
        brought.cloned().map_or_else(|| self.0.elsewhere(parent, create), Ok)
    }
}

/// Begins attempts.
#[derive(Debug)]
pub(super) struct Destination {
    pub storage: Arc<dyn Storage>,
    pub elsewhere: Arc<Elsewhere>,
    pub catalog: Arc<Catalog>,
    pub damaged: OnDamaged,
}

impl Begin for Destination {
    fn begin(&self, request: &Request) -> Result<Arc<dyn Writing>> {
        let Request { ticket, name, overwrite, .. } = request;
        if let Some(parent) = &request.parent {
            self.refuse_root(parent, name)?;
            return self.elsewhere.at(request, parent, true)?.begin(name, ticket.attempt(), *overwrite);
        }
        if parse_step_name(name).is_some() {
            self.catalog.refuse_second_name(ticket.step, name)?;
        }
        let begun = self.storage.begin(name, ticket.attempt(), *overwrite);
        match begun {
            Err(error) if error.kind() == ErrorKind::Conflict && self.damaged == OnDamaged::Replace => {
                let Some(damage) = self.catalog.damage(name) else { return Err(error) };
                tracing::warn!(step = ticket.step, error = %damage, "the step that is there is damaged, and is replaced");
                let attempt = self.storage.begin(name, ticket.attempt(), true)?;
                let (storage, catalog) = (self.storage.clone(), self.catalog.clone());
                Ok(Arc::new(Replacing { attempt, storage, catalog, name: name.clone() }))
            }
            begun => begun,
        }
    }
}

impl Destination {
    /// Refuses a directory that would be a step of the root: the catalog would not know of that step.
    fn refuse_root(&self, parent: &Path, name: &str) -> Result<()> {
        let root = self.storage.describe(name);
        // A URL is no path that could be made canonical.
        let same = |root: &Path| {
            parent == root || matches!((parent.canonicalize(), root.canonicalize()), (Ok(a), Ok(b)) if a == b)
        };
        if parse_step_name(name).is_some() && root.parent().is_some_and(same) {
            let why = "the directory is a step of the executor's root: save the step without a directory";
            return Err(Error::invalid(why).with_path(root));
        }
        Ok(())
    }

    /// Checks that several ranks may write the step `name`. A damaged step of that name is removed first.
    pub fn allow(&self, step: u64, name: &str) -> Result<()> {
        if parse_step_name(name).is_some() {
            self.catalog.refuse_second_name(step, name)?;
        }
        if self.damaged == OnDamaged::Replace
            && let Some(damage) = self.catalog.damage(name)
        {
            tracing::warn!(step, error = %damage, "the step that is there is damaged, and is removed");
            self.catalog.remove_damaged(name, false)?;
        }
        Ok(())
    }
}

/// An attempt that replaces a damaged step. `publish` removes the damaged step first, and then publishes
/// without replacing. So it works where directories cannot be exchanged, and an intact step that was
/// published meanwhile wins.
#[derive(Debug)]
struct Replacing {
    attempt: Arc<dyn Writing>,
    storage: Arc<dyn Storage>,
    catalog: Arc<Catalog>,
    name: String,
}

impl Writing for Replacing {
    fn expires(&self, at: Instant) {
        self.attempt.expires(at);
    }

    fn create(&self, file: &str, len: u64) -> Result<Arc<dyn FileWriting>> {
        self.attempt.create(file, len)
    }

    fn put(&self, file: &str, bytes: &[u8]) -> Result<()> {
        self.attempt.put(file, bytes)
    }

    fn adopt(&self, file: &str, source: &dyn FileReading, head: &[u8]) -> Result<Adopted> {
        self.attempt.adopt(file, source, head)
    }

    fn publish(&self, _: bool) -> Result<()> {
        if let Err(error) = self.catalog.remove_damaged(&self.name, false)
            && error.kind() != ErrorKind::NotFound
        {
            // Some bytes of the damaged step may be left in the trash. The step is removed if its name is
            // gone.
            if self.storage.open(&self.name).is_ok() {
                return Err(error);
            }
            tracing::warn!(name = self.name, error = format_args!("{error:#}"), "a damaged step is left to a sweep");
        }
        self.attempt.publish(false)
    }

    fn settle(&self) -> Result<()> {
        self.attempt.settle()
    }

    fn abandon(&self) -> Result<()> {
        self.attempt.abandon()
    }
}
