//! Records what this process knows about attempts, and deletes a single step or a dead attempt.

use super::{Catalog, Entry, Known};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, ErrorKind, Result};
use crate::id::Attempt;
use crate::mutant::{self, Mutant};
use crate::storage::{Sweep, Swept};
use crate::sync::wait_while_for;
use std::time::Duration;

/// How long a publish waits for a prune to release its name.
const ANNOUNCE: Duration = Duration::from_secs(60);

impl Catalog {
    /// Records that `attempt` is durable: this process published it and every fsync succeeded. Other steps
    /// are made durable before they count.
    #[doc(hidden)]
    pub fn acknowledge(&self, attempt: Attempt) {
        let mut known = self.known();
        known.pending.remove(&attempt);
        if known.durable.insert(attempt) {
            known.own.push(attempt);
            known.sound.insert(attempt);
        }
    }

    /// Records that `attempt` is about to be published as `name`. Until its outcome is known, the attempt
    /// does not count and is not deleted. The same holds for the step that it may replace.
    ///
    /// # Errors
    /// `Busy` when a prune has been deleting that step for too long.
    pub(crate) fn announce(&self, name: &str, attempt: Attempt) -> Result<()> {
        let going = |known: &mut Known| known.going.contains(name);
        let (mut known, late) = wait_while_for(&self.gone, self.known(), ANNOUNCE, going);
        if late {
            return Err(
                Error::new(ErrorKind::Busy, "the step is still being deleted").with_path(self.storage.describe(name))
            );
        }
        known.pending.insert(attempt, name.into());
        Ok(())
    }

    /// Records that `attempt` was not published.
    pub(crate) fn withdraw(&self, attempt: Attempt) {
        self.known().pending.remove(&attempt);
    }

    /// Records that the publish of `attempt` ended as `Indeterminate`. The attempt never counts in this
    /// process: a later fsync would prove nothing, because the kernel reports a lost write only once.
    #[doc(hidden)]
    pub fn doubt(&self, attempt: Attempt) {
        let mut known = self.known();
        known.pending.remove(&attempt);
        known.durable.remove(&attempt);
        known.own.retain(|own| *own != attempt);
        known.doubtful.insert(attempt);
    }

    /// Removes only attempts and trash of dead owners. Reports what it kept, and why.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn sweep(&self, how: Sweep) -> Result<Swept> {
        self.storage.sweep(how)
    }

    /// Claims `name` for a removal. Returns false while an attempt may be published under it.
    pub(super) fn claim(&self, name: &str) -> bool {
        let mut known = self.known();
        !known.pending.values().any(|pending| pending == name) && known.going.insert(name.into())
    }

    pub(super) fn unclaim(&self, name: &str) {
        self.known().going.remove(name);
        self.gone.notify_all();
    }

    /// Removes `entry`, unless its name now belongs to another attempt than when it was listed.
    pub(super) fn remove(&self, entry: &Entry) -> Result<()> {
        // Open first, then compare, so that only the compared step is removed.
        let opened = self.storage.open(&entry.name)?;
        let there = Checkpoint::from_storage(self.storage.clone(), &entry.name)?;
        if there.attempt() != entry.attempt {
            return Err(Error::new(ErrorKind::Conflict, "the step was replaced meanwhile; it was not removed"));
        }
        self.storage.remove_opened(&entry.name, opened.as_ref())
    }

    /// Removes the step under `name` if this library made it and it is damaged.
    pub(crate) fn remove_damaged(&self, name: &str, dry_run: bool) -> Result<()> {
        // Open first, then judge, so that only the judged step is removed.
        let opened = self.storage.open(name)?;
        if self.damage(name).is_none() {
            let what = "the step is no longer damaged, or no longer one of this library; it was not removed";
            return Err(Error::new(ErrorKind::Conflict, what));
        }
        if dry_run { Ok(()) } else { self.storage.remove_opened(name, opened.as_ref()) }
    }

    /// Returns the damage of the step under `name`, if this library made the step. A step is damaged if it
    /// cannot be opened, or if this process read it and found other bytes than were written.
    pub(crate) fn damage(&self, name: &str) -> Option<Error> {
        match Checkpoint::try_open(&self.storage, name) {
            Ok(checkpoint) => self.known().damaged.get(&checkpoint.attempt()).cloned(),
            Err(failure) if failure.is_damage() => Some(failure.into_error()),
            Err(_) => None,
        }
    }

    /// Forgets a removed attempt, so that the memory of a long run does not grow with its saves.
    pub(super) fn forget(&self, attempt: Attempt) {
        let mut known = self.known();
        known.durable.remove(&attempt);
        known.sound.remove(&attempt);
        known.damaged.remove(&attempt);
        known.own.retain(|own| *own != attempt);
    }

    /// Makes the step durable. Returns false, and does nothing, if the outcome of its publish is still open.
    ///
    /// # Errors
    /// When the step cannot be made durable.
    pub(crate) fn is_settled(&self, entry: &Entry) -> Result<bool> {
        if self.known().pending.contains_key(&entry.attempt) {
            return Ok(false);
        }
        match self.make_durable(entry) {
            Err(error) if error.kind() == ErrorKind::Indeterminate || error.kind() == ErrorKind::NotFound => Ok(false),
            settled => settled.map(|()| true),
        }
    }

    pub(super) fn make_durable(&self, entry: &Entry) -> Result<()> {
        let known = self.known();
        if known.doubtful.contains(&entry.attempt) {
            let what = "it is unknown whether the publish of this step is durable";
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
