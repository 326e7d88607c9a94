//! Runs in a directory: each run is a root of the engine, each state and each active set a checkpoint.
//!
//! ```text
//! <root>/<run id>/step-00000007/           a state: one value, `state`
//! <root>/<run id>/active/step-00000008/    an active set: one value, `active`
//! ```

use super::records::{Kind, Records, checkpointer};
use super::worker::Worker;
use crate::catalog::{Catalog, PruneOptions, Retention};
use crate::checkpoint::Checkpoint;
use crate::compat::open::Open;
use crate::error::{Error, Result, found};
use crate::executor::CheckpointExecutor;
use crate::save::SaveOptions;
use crate::settings::Settings;
use crate::state::StateDict;
use crate::storage::Storage;
use crate::storage::local::Local;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;
use uuid::Uuid;

/// How many executors stay open. Each has its own threads; a run uses one for states and one for active sets.
const OPEN: usize = 8;

/// Keeps runs in a directory. Every record is a checkpoint of the engine, with all of its guarantees; `ashore
/// ls`, `inspect` and `verify` show them. A save costs a few fsyncs. One thread performs the calls, in order.
///
/// A step whose files are damaged is not listed and never loaded as the newest. Loading it by its number
/// returns `Corrupt`.
#[derive(Debug)]
pub struct Directory(Worker);

impl Directory {
    /// Opens the runs below `root`, which is created when it is missing.
    ///
    /// # Errors
    /// Errors of the storage, when the directory cannot be created.
    pub fn open(root: impl AsRef<Path>) -> Result<Self> {
        // States are values, which do not go through the arena.
        let settings = Settings { arena: 64 << 10, chunk: 32 << 10, writers: 1, ..Settings::default() };
        Self::open_with(root, settings)
    }

    /// Opens the runs below `root`, and saves them with these settings. Retention in the settings would apply
    /// to states and active sets separately.
    ///
    /// # Errors
    /// As [`Directory::open`]; `Invalid`, naming the setting that does not work.
    pub fn open_with(root: impl AsRef<Path>, settings: Settings) -> Result<Self> {
        settings.check()?;
        Local::open(&root)?;
        let runs = Runs { root: root.as_ref().into(), open: Open::new(OPEN, settings) };
        Ok(Self(Worker::start(runs)?))
    }
}

checkpointer!(Directory);

struct Runs {
    root: PathBuf,
    open: Open<(Uuid, Kind)>,
}

impl Runs {
    fn path(&self, run: Uuid, kind: Kind) -> PathBuf {
        let run = self.root.join(run.to_string());
        if kind == Kind::State { run } else { run.join("active") }
    }

    fn executor(&mut self, run: Uuid, kind: Kind) -> Result<&CheckpointExecutor> {
        let path = self.path(run, kind);
        self.open.executor((run, kind), path)
    }

    /// None when nothing was ever saved there. Reading creates nothing.
    fn catalog(&self, run: Uuid, kind: Kind) -> Result<Option<Catalog>> {
        found(Catalog::open(self.path(run, kind)))
    }

    /// Removes the steps below `oldest`; None removes all steps.
    fn remove(&self, run: Uuid, kind: Kind, oldest: Option<u64>) -> Result<()> {
        let Some(catalog) = self.catalog(run, kind)? else { return Ok(()) };
        let storage = Local::at(self.path(run, kind))?;
        for entry in catalog.list()? {
            if oldest.is_none_or(|oldest| entry.step < oldest) {
                storage.remove(&entry.name)?;
            }
        }
        Ok(())
    }
}

fn name(kind: Kind) -> &'static str {
    match kind {
        Kind::State => "state",
        Kind::Active => "active",
    }
}

impl Records for Runs {
    fn put(&mut self, run: Uuid, kind: Kind, step: u64, value: Value) -> Result<()> {
        let mut state = StateDict::new();
        state.values.insert(name(kind).into(), value);
        let save = self.executor(run, kind)?.save_with(step, state, SaveOptions::default().overwrite())?;
        // The save has its own deadline.
        save.wait(Duration::MAX).map(drop)
    }

    fn get(&mut self, run: Uuid, kind: Kind, step: Option<u64>) -> Result<Option<Value>> {
        let Some(catalog) = self.catalog(run, kind)? else { return Ok(None) };
        let checkpoint = match step {
            Some(step) => found(catalog.checkpoint(step))?,
            None => catalog.latest()?,
        };
        checkpoint.map(|checkpoint| encoded(&checkpoint, name(kind))).transpose()
    }

    fn list(&mut self, run: Uuid) -> Result<Vec<u64>> {
        let Some(catalog) = self.catalog(run, Kind::State)? else { return Ok(Vec::new()) };
        let mut steps: Vec<_> = catalog.list()?.into_iter().map(|entry| entry.step).collect();
        steps.dedup();
        Ok(steps)
    }

    fn prune(&mut self, run: Uuid, keep_last: usize) -> Result<()> {
        // Close the executors of the run: an open executor would not know which steps were removed here. The
        // next save reopens them.
        self.open.retain(|(open, _)| *open != run);
        if keep_last == 0 {
            // Remove the active sets first: after a crash between the two, the run starts at its start node.
            self.remove(run, Kind::Active, None)?;
            self.remove(run, Kind::State, None)?;
            for kind in [Kind::Active, Kind::State] {
                let path = self.path(run, kind);
                // Removes the `latest` hint and the directory, which is empty unless another program wrote
                // there.
                let _ = (fs::remove_file(path.join("latest")), fs::remove_dir(path));
            }
            return Ok(());
        }
        let Some(catalog) = self.catalog(run, Kind::State)? else { return Ok(()) };
        let pruned = catalog.prune(&Retention::last(keep_last), PruneOptions::new())?.complete()?;
        match pruned.kept.first() {
            Some(oldest) if pruned.kept.len() >= keep_last => self.remove(run, Kind::Active, Some(oldest.step)),
            _ => Ok(()),
        }
    }
}

/// The encoded value of a checkpoint.
fn encoded(checkpoint: &Checkpoint, name: &str) -> Result<Value> {
    let value = checkpoint.manifest().values.get(name).cloned();
    value.ok_or_else(|| {
        let foreign = Error::invalid(format!("the checkpoint was not written by this store value={name:?}"));
        foreign.with_step(checkpoint.step()).with_path(checkpoint.path())
    })
}
