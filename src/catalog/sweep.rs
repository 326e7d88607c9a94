//! What this process knows of attempts, and how one step or a dead attempt is deleted.

use super::{Catalog, Entry};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, ErrorKind, Result};
use crate::id::Attempt;
use crate::mutant::{self, Mutant};
use crate::storage::{Sweep, Swept};
use std::sync::PoisonError;
use std::time::Duration;

/// How long a publish waits for a prune to let go of its name.
const ANNOUNCE: Duration = Duration::from_secs(60);

impl Catalog {
    /// Says that `attempt` is durable because this process published it and saw every fsync succeed. Other steps are made
    /// durable before they are counted.
    #[doc(hidden)]
    pub fn acknowledge(&self, attempt: Attempt) {
        let mut known = self.known();
        known.pending.remove(&attempt);
        if known.durable.insert(attempt) {
            known.own.push(attempt);
            known.sound.insert(attempt);
        }
    }

    /// Says that `attempt` is about to be published as `name`: until its outcome is known it neither counts nor goes, and
    /// neither does what it may replace.
    ///
    /// # Errors
    /// `Busy` when a prune has been deleting that step for too long.
    pub(crate) fn announce(&self, name: &str, attempt: Attempt) -> Result<()> {
        let known = self.known();
        let (mut known, waited) = self
            .gone
            .wait_timeout_while(known, ANNOUNCE, |known| known.going.contains(name))
            .unwrap_or_else(PoisonError::into_inner);
        if waited.timed_out() {
            return Err(
                Error::new(ErrorKind::Busy, "the step is still being deleted").with_path(self.storage.describe(name))
            );
        }
        known.pending.insert(attempt, name.into());
        Ok(())
    }

    /// Says that `attempt` was not published.
    pub(crate) fn withdraw(&self, attempt: Attempt) {
        self.known().pending.remove(&attempt);
    }

    /// Says that the publish of `attempt` ended as `Indeterminate`: it never counts in this process. A later fsync would
    /// prove nothing, for the kernel reports a lost write once.
    #[doc(hidden)]
    pub fn doubt(&self, attempt: Attempt) {
        let mut known = self.known();
        known.pending.remove(&attempt);
        known.durable.remove(&attempt);
        known.own.retain(|own| *own != attempt);
        known.doubtful.insert(attempt);
    }

    /// Removes attempts and trash whose owner is dead, and only those; says what it left alone, and why.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn sweep(&self, how: Sweep) -> Result<Swept> {
        self.storage.sweep(how)
    }

    /// Claims `name` for a removal; false while an attempt may be published under it.
    pub(super) fn claim(&self, name: &str) -> bool {
        let mut known = self.known();
        !known.pending.values().any(|pending| pending == name) && known.going.insert(name.into())
    }

    pub(super) fn unclaim(&self, name: &str) {
        self.known().going.remove(name);
        self.gone.notify_all();
    }

    /// Removes `entry`, unless the name has come to stand for another attempt since it was listed.
    pub(super) fn remove(&self, entry: &Entry) -> Result<()> {
        // Opened before it is compared: what is removed is what was compared, or nothing.
        let opened = self.storage.open(&entry.name)?;
        let there = Checkpoint::from_storage(self.storage.clone(), &entry.name)?;
        if there.attempt() != entry.attempt {
            return Err(Error::new(ErrorKind::Conflict, "the step was replaced meanwhile; it was not removed"));
        }
        self.storage.remove_opened(&entry.name, opened.as_ref())
    }

    /// Removes what is under `name`, if it is a damaged step of ours.
    pub(crate) fn remove_damaged(&self, name: &str, dry_run: bool) -> Result<()> {
        // Opened before it is judged: what is removed is what was judged, or nothing.
        let opened = self.storage.open(name)?;
        if self.damage(name).is_none() {
            let what = "the step is not damaged, or not of this library, any more; it was not removed";
            return Err(Error::new(ErrorKind::Conflict, what));
        }
        if dry_run { Ok(()) } else { self.storage.remove_opened(name, opened.as_ref()) }
    }

    /// What is wrong with the step under `name`, if it is ours and damaged: it cannot be opened, or this
    /// process has read it and found other bytes than were written.
    pub(crate) fn damage(&self, name: &str) -> Option<Error> {
        match Checkpoint::try_open(&self.storage, name) {
            Ok(checkpoint) => self.known().damaged.get(&checkpoint.attempt()).cloned(),
            Err(failure) if failure.is_damage() => Some(failure.into_error()),
            Err(_) => None,
        }
    }

    /// Forgets an attempt that was removed, so that a long run does not remember all of its saves.
    pub(super) fn forget(&self, attempt: Attempt) {
        let mut known = self.known();
        known.durable.remove(&attempt);
        known.sound.remove(&attempt);
        known.damaged.remove(&attempt);
        known.own.retain(|own| *own != attempt);
    }

    pub(super) fn make_durable(&self, entry: &Entry) -> Result<()> {
        let known = self.known();
        if known.doubtful.contains(&entry.attempt) {
            let what = "the publish of this step had no certain end";
            let error = crate::Error::new(crate::ErrorKind::Indeterminate, what);
            return Err(error.with_step(entry.step).with_path(&entry.path));
        }
        if known.durable.contains(&entry.attempt) {
            return Ok(());
        }
        drop(known);
        if !mutant::on(Mutant::ConfirmFsync) {
            self.storage.confirm(&entry.name)?;
        }
        self.known().durable.insert(entry.attempt);
        Ok(())
    }
}
