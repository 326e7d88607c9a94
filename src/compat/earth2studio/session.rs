//! A session: the row that it restores, if there is one, the states bound to it, and the writes since that
//! row.

use super::bound::{Bound, CheckpointSession, Counters, Erased, InFlightSave, Inner, Link, Work};
use super::catalog::{Checkpoint, CheckpointEntry, RECORD, Schema, current, durable};
use super::errors::{CheckpointStateCollision, CheckpointStateSchemaError};
use super::flush::Flush;
use super::metadata::Metadata;
use super::pending::{self, Pending};
use super::state::{CheckpointState, Saved, schema_hash, spelled};
use crate::checkpoint;
use crate::device::DeviceChoice;
use crate::error::{Error, ErrorKind, Result};
use crate::id::step_name;
use crate::mutant::{self, Mutant};
use crate::save::{Save, SaveOptions};
use crate::state::{StateDict, encode_value};
use crate::sync::{Mutex, lock};
use serde::de::DeserializeOwned;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::ops::Deref;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

thread_local! {
    static ACTIVE: RefCell<Vec<CheckpointSession>> = const { RefCell::new(Vec::new()) };
}

/// The most recently entered session of this thread that was not left.
pub fn active() -> Option<CheckpointSession> {
    ACTIVE.with_borrow(|sessions| sessions.last().cloned())
}

/// Binds a state to the session that is active on this thread. Without an active session the state waits for
/// the next session of the catalog that was built last on this thread. If there is no such catalog, the state
/// is bound to nothing.
///
/// # Errors
/// As [`CheckpointSession::bind`].
pub fn bind_checkpoint_state<T: CheckpointState>(state: impl Into<Bound<T>>) -> Result<Bound<T>> {
    let state = state.into();
    if let Some(session) = active() {
        return session.bind(state);
    }
    if let Some(catalog) = current() {
        let erased = state.erased();
        erased.link(Link { catalog: Some(catalog.clone()), ..Link::default() });
        pending::put(&catalog, &erased, false);
    }
    Ok(state)
}

/// Keeps a session active on this thread until it is dropped. Leaving does not flush.
pub struct Scope {
    session: CheckpointSession,
    /// Makes the scope `!Send`: it belongs to its thread.
    here: PhantomData<*const ()>,
}

impl Deref for Scope {
    type Target = CheckpointSession;

    fn deref(&self) -> &CheckpointSession {
        &self.session
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        let left = ACTIVE.with_borrow_mut(|sessions| {
            // Finds the last entry of this session: scopes may be dropped in any order.
            if let Some(at) = sessions.iter().rposition(|session| Arc::ptr_eq(&session.0, &self.session.0)) {
                sessions.remove(at);
            }
            !sessions.iter().any(|session| Arc::ptr_eq(&session.0, &self.session.0))
        });
        if left {
            // The next session of the catalog takes these states over.
            let (catalog, work) = (&self.session.0.catalog, lock(&self.session.0.work));
            for state in &work.bound {
                state.link(Link { catalog: Some(catalog.clone()), ..Link::default() });
                pending::put(catalog, state, true);
            }
        }
    }
}

impl fmt::Debug for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Scope({:?})", self.session)
    }
}

impl Checkpoint {
    /// Returns a session that restores row `row` of the catalog; -1 is the latest. Waits for a flush under
    /// way.
    ///
    /// # Errors
    /// `NotFound` when there is no such row; as [`Checkpoint::session`].
    pub fn select(&self, row: isize) -> Result<CheckpointSession> {
        self.0.land()?;
        let mut rows = self.catalog()?;
        let index = if row < 0 { rows.len().checked_sub(row.unsigned_abs()) } else { Some(row.unsigned_abs()) };
        match index.filter(|index| *index < rows.len()) {
            Some(index) => CheckpointSession::of(self, Some(rows.swap_remove(index))),
            None => {
                let missing = format!("no checkpoint entries match this selection row={row} rows={}", rows.len());
                Err(Error::new(ErrorKind::NotFound, missing).with_path(self.rank_path()))
            }
        }
    }

    /// Returns a session that restores the latest row, or starts the first. Waits for a flush under way.
    ///
    /// # Errors
    /// The failure of that flush, once; as [`Checkpoint::catalog`].
    pub fn session(&self) -> Result<CheckpointSession> {
        self.0.land()?;
        CheckpointSession::of(self, self.catalog()?.pop())
    }

    /// Enters the session of this catalog that is active on this thread, or a new one from
    /// [`Checkpoint::session`]. A new session takes over the states of the session that was left last.
    ///
    /// # Errors
    /// As [`Checkpoint::session`] and [`CheckpointSession::enter`].
    pub fn enter(&self) -> Result<Scope> {
        let session = self.active().map_or_else(|| self.session(), Ok)?;
        session.enter()
    }

    /// The session that is active on this thread, if it belongs to this catalog.
    pub fn active(&self) -> Option<CheckpointSession> {
        active().filter(|session| session.is_of(self))
    }
}

impl CheckpointSession {
    pub(super) fn of(catalog: &Checkpoint, entry: Option<CheckpointEntry>) -> Result<Self> {
        let selected = match &entry {
            // At level 0 components keep nothing and restore nothing.
            Some(_) if catalog.level() == 0 => None,
            Some(entry) => {
                let row = checkpoint::Checkpoint::open(&entry.path)?;
                let record = row.value(RECORD)?;
                Some((row, record))
            }
            None => None,
        };
        let write_count = entry.as_ref().map_or(0, |entry| entry.write_count);
        // Metadata belongs to the row that was read: the next row has only the metadata that the program
        // writes for it.
        let metadata = match &entry {
            Some(entry) if mutant::on(Mutant::ResumeMetadata) => entry.metadata.0.clone(),
            _ => BTreeMap::new(),
        };
        let counters = Counters { write_count, metadata, dirty: false };
        let (bound, replaceable) = (Vec::new(), Vec::new());
        let work = Work { entry, selected, counters, bound, replaceable, adopted: false, in_flight: None };
        Ok(Self(Arc::new(Inner { catalog: catalog.clone(), work: Mutex::new(work) })))
    }

    pub(super) fn is_of(&self, catalog: &Checkpoint) -> bool {
        Arc::ptr_eq(&self.0.catalog.0, &catalog.0)
    }

    /// Makes this the active session of the thread, and binds the states that wait for a session of its
    /// catalog: states of the session that was left last, and states of
    /// [`bind_checkpoint_state`](super::bind_checkpoint_state).
    ///
    /// # Errors
    /// As [`bind`](Self::bind); the session is then not entered, and the states continue to wait.
    pub fn enter(&self) -> Result<Scope> {
        let adopted = std::mem::replace(&mut lock(&self.0.work).adopted, true);
        let waiting = if adopted { Vec::new() } else { pending::take(&self.0.catalog) };
        if let Err(error) = waiting.iter().try_for_each(|pending| self.take_over(pending)) {
            // All these states continue to wait: another session may be entered instead of this one.
            waiting.iter().for_each(|it| pending::put(&self.0.catalog, &it.state, it.of_session));
            lock(&self.0.work).adopted = false;
            return Err(error);
        }
        ACTIVE.with_borrow_mut(|sessions| sessions.push(self.clone()));
        Ok(Scope { session: self.clone(), here: PhantomData })
    }

    fn take_over(&self, Pending { state, of_session }: &Pending) -> Result<()> {
        let id = state.id();
        if self.exists() && !of_session {
            tracing::warn!(state = id, "a state is restored late: it was bound before a session was entered");
        }
        self.adopt(state.clone())?;
        if *of_session {
            lock(&self.0.work).replaceable.push(id);
        }
        Ok(())
    }

    /// Whether the next write is expected to flush.
    pub fn is_flush_due(&self) -> bool {
        let interval = self.0.catalog.0.flush_interval();
        interval.is_some_and(|interval| (self.write_count() + 1).is_multiple_of(interval))
    }

    /// Whether this is the active session of the thread.
    pub fn is_active(&self) -> bool {
        ACTIVE.with_borrow(|sessions| sessions.last().is_some_and(|last| Arc::ptr_eq(&last.0, &self.0)))
    }

    /// Whether there is a row: the selected one, or the last that this session committed.
    pub fn exists(&self) -> bool {
        lock(&self.0.work).entry.is_some()
    }

    /// The commit of the row of this session.
    pub fn commit_id(&self) -> Option<String> {
        lock(&self.0.work).entry.as_ref().map(|entry| entry.commit_id.clone())
    }

    /// The metadata of the row of this session; empty when there is no row.
    pub fn metadata(&self) -> Metadata {
        lock(&self.0.work).entry.as_ref().map_or_else(Metadata::new, |entry| entry.metadata.clone())
    }

    /// One value of [`CheckpointSession::metadata`].
    ///
    /// # Errors
    /// `NotFound` when the name is missing, `Invalid` when the value is not a `T`.
    pub fn metadata_value<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        self.metadata().get(name)
    }

    /// Another name of [`CheckpointSession::metadata`].
    pub fn artifacts(&self) -> Metadata {
        self.metadata()
    }

    /// Another name of [`CheckpointSession::metadata_value`].
    ///
    /// # Errors
    /// As [`CheckpointSession::metadata_value`].
    pub fn artifact<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        self.metadata_value(name)
    }

    /// The metadata `lead_time` of the row of this session, if the row has it.
    ///
    /// # Errors
    /// `Invalid` when it is not a `T`.
    pub fn lead_time<T: DeserializeOwned>(&self) -> Result<Option<T>> {
        let metadata = self.metadata();
        if metadata.0.contains_key("lead_time") { metadata.get("lead_time").map(Some) } else { Ok(None) }
    }

    /// The device that copies tensors of bound states.
    pub fn device(&self) -> DeviceChoice {
        self.0.catalog.device()
    }

    /// The number of writes, including those of the selected row.
    pub fn write_count(&self) -> u64 {
        lock(&self.0.work).counters.write_count
    }

    /// Binds a state: restores it from the selected row, if that row has a state of its type, and commits it
    /// with every flush from now on. At level 0 it does neither. Binding the same state again changes
    /// nothing.
    ///
    /// # Errors
    /// `Invalid` from a [`CheckpointStateCollision`] when another state of this type is bound, and from a
    /// [`CheckpointStateSchemaError`] when its fields differ from those that were saved; the errors of
    /// [`Saved`]. The state is then unchanged and not bound.
    pub fn bind<T: CheckpointState>(&self, state: impl Into<Bound<T>>) -> Result<Bound<T>> {
        let state = state.into();
        self.adopt(state.erased())?;
        Ok(state)
    }

    fn adopt(&self, state: Arc<dyn Erased>) -> Result<()> {
        let mut work = lock(&self.0.work);
        let id = state.id();
        let there = work.bound.iter().position(|bound| bound.id() == id);
        if there.is_some_and(|at| Arc::ptr_eq(&work.bound[at], &state)) {
            return Ok(());
        }
        if there.is_some() && !work.replaceable.contains(&id) {
            return Err(CheckpointStateCollision { state_id: id.to_owned() }.error());
        }
        let mut link = Link { catalog: Some(self.0.catalog.clone()), session: Arc::downgrade(&self.0), loaded: false };
        if let Some((row, record)) = &work.selected
            && let Some(schema) = record.states.get(id)
        {
            let current = spelled(state.fields());
            if schema.hash != schema_hash(state.fields()) || schema.fields != current {
                let (state_id, saved) = (id.to_owned(), schema.fields.clone());
                return Err(CheckpointStateSchemaError { state_id, saved, current }.error());
            }
            state.restore(&Saved { id, checkpoint: row })?;
            link.loaded = true;
        }
        state.link(link);
        work.replaceable.retain(|replaceable| *replaceable != id);
        match there {
            Some(at) => work.bound[at] = state,
            None => work.bound.push(state),
        }
        Ok(())
    }

    /// Records a boundary from which a run can restart, and flushes when a flush is due.
    ///
    /// # Errors
    /// Errors of the flush, or of an earlier flush that no call has waited for.
    pub fn write(&self, metadata: Metadata) -> Result<Option<CheckpointEntry>> {
        self.write_async(metadata)?.map(|flush| flush.wait(Duration::MAX)).transpose()
    }

    /// [`write`](Self::write), but returns while a flush is under way.
    ///
    /// # Errors
    /// As [`write`](Self::write); the future returns later errors.
    pub fn write_async(&self, metadata: Metadata) -> Result<Option<Flush>> {
        let mut work = lock(&self.0.work);
        let interval = self.0.catalog.0.flush_interval();
        let due = interval.is_some_and(|interval| (work.counters.write_count + 1).is_multiple_of(interval));
        // A flush waits for the previous one; a write without a flush only checks whether the previous flush
        // has ended.
        if due || work.in_flight.as_ref().is_some_and(|in_flight| in_flight.save.try_get().is_some()) {
            self.land(&mut work)?;
        }
        let before = work.counters.clone();
        work.counters.write_count += 1;
        work.counters.metadata.extend(metadata.0);
        work.counters.dirty = true;
        if due { self.commit(&mut work, before).map(Some) } else { Ok(None) }
    }

    /// Commits the writes since the last flush, with more metadata, as a new row. Returns None when there is
    /// nothing to commit.
    ///
    /// # Errors
    /// `Busy` when a bound state is being changed; errors of its fields; errors of the storage; the error of
    /// an earlier flush that no call has waited for. The session and the catalog are then in their state
    /// before the call.
    pub fn flush(&self, metadata: Metadata) -> Result<Option<CheckpointEntry>> {
        self.flush_async(metadata)?.map(|flush| flush.wait(Duration::MAX)).transpose()
    }

    /// [`flush`](Self::flush), but returns while the flush is under way. Bound states may be changed at once.
    ///
    /// # Errors
    /// As [`flush`](Self::flush); the future returns later errors.
    pub fn flush_async(&self, metadata: Metadata) -> Result<Option<Flush>> {
        let mut work = lock(&self.0.work);
        self.land(&mut work)?;
        if !work.counters.dirty && metadata.is_empty() {
            return Ok(None);
        }
        let before = work.counters.clone();
        work.counters.metadata.extend(metadata.0);
        self.commit(&mut work, before).map(Some)
    }

    fn commit(&self, work: &mut Work, before: Counters) -> Result<Flush> {
        let begun = self.begin(work);
        let (save, row) = match begun {
            Ok(begun) => begun,
            Err(error) => {
                work.counters = before;
                self.0.catalog.0.look_again();
                return Err(error);
            }
        };
        let write_count = work.counters.write_count;
        work.counters.dirty = false;
        self.0.catalog.0.fly(&save);
        work.in_flight = Some(InFlightSave { save: save.clone(), row: row.clone(), before, write_count });
        let session = self.clone();
        Ok(Flush::new(save, row, move |row, result| session.settle(row, result)))
    }

    fn begin(&self, work: &Work) -> Result<(Save, CheckpointEntry)> {
        let given = &self.0.catalog.0;
        let mut state = StateDict::new();
        let mut states = BTreeMap::new();
        // At level 0 a row has only the progress and the metadata.
        for bound in work.bound.iter().filter(|_| given.level() > 0) {
            bound.save(&mut state)?;
            let schema = Schema { hash: schema_hash(bound.fields()), fields: spelled(bound.fields()) };
            states.insert(bound.id().to_owned(), schema);
        }
        let record = given.record(work.counters.write_count, SystemTime::now(), states);
        state.values.insert(RECORD.into(), encode_value(&record)?);
        state.metadata = work.counters.metadata.clone();
        let (executor, step) = given.next()?;
        let save = executor.save_with(step, state, SaveOptions::default())?;
        let path = self.0.catalog.rank_path().join(step_name(step));
        let metadata = Metadata(work.counters.metadata.clone());
        let row = CheckpointEntry::new(&record, metadata, step, &save.attempt().to_string(), &path);
        Ok((save, row))
    }

    /// Applies the end of a flush to the session, once: later reports of the same flush do nothing.
    fn settle(&self, row: &CheckpointEntry, result: &Result<()>) {
        let mut work = lock(&self.0.work);
        if let Some(in_flight) = work.in_flight.take_if(|in_flight| in_flight.row.commit_id == row.commit_id) {
            self.landed(&mut work, in_flight, result.is_ok());
        }
    }

    /// Waits for a flush whose end the session has not seen.
    fn land(&self, work: &mut Work) -> Result<()> {
        let Some(in_flight) = work.in_flight.take() else { return Ok(()) };
        // The save has its own deadline.
        let result = durable(in_flight.save.wait(Duration::MAX));
        self.landed(work, in_flight, result.is_ok());
        result
    }

    fn landed(&self, work: &mut Work, in_flight: InFlightSave, durable: bool) {
        self.0.catalog.0.landed(&in_flight.save);
        if durable {
            work.entry = Some(in_flight.row);
            return;
        }
        self.0.catalog.0.look_again();
        if work.counters.write_count == in_flight.write_count {
            work.counters = in_flight.before;
        } else {
            work.counters.dirty = true;
        }
    }
}

impl fmt::Debug for CheckpointSession {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CheckpointSession({:?} of {:?})", self.commit_id(), self.0.catalog.name())
    }
}
