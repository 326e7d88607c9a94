//! The publisher's state, and the commit of a version.

use super::copying::{commit, copy};
use super::encoding::{Encoded, Held, encode};
use super::settings::{Kind, Published, Settings};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, ErrorKind, Result};
use crate::guard;
use crate::id::{Attempt, version_name};
use crate::mutant::{self, Mutant};
use crate::storage::{Memory, Storage, Writing};
use crate::sync::{Mutex, lock};
use std::collections::HashMap;
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

/// What the threads of a publisher share.
pub(super) struct Shared {
    pub storage: Arc<dyn Storage>,
    /// Where saves are staged. The commit then writes each version to the chain.
    pub memory: Memory,
    pub settings: Settings,
    pub state: Mutex<State>,
    /// Held during a commit: versions are committed one at a time.
    turn: Mutex<()>,
    /// Receivers of the results of saves under way.
    pub slots: Mutex<HashMap<Attempt, Weak<OnceLock<Published>>>>,
}

/// The durable versions, and the version in memory.
#[derive(Default)]
pub(super) struct State {
    /// The newest durable version, bit for bit. None: the next version is a full.
    pub held: Option<Arc<Held>>,
    /// The number of the newest version, durable or not.
    pub newest: u64,
    /// The newest full that is known to be durable.
    pub full: Option<u64>,
    /// The length of that full.
    pub full_bytes: u64,
    /// Numbers and lengths of the deltas after it, oldest first.
    pub deltas: Vec<(u64, u64)>,
    /// Set when another publisher has taken the chain over.
    pub ended: Option<Error>,
}

impl Shared {
    pub fn new(storage: Arc<dyn Storage>, settings: Settings, state: State) -> Self {
        let (memory, state) = (Memory::new(), Mutex::new(state));
        Self { storage, memory, settings, state, turn: Mutex::new(()), slots: Mutex::default() }
    }

    /// Publishes the version that was staged under `name`.
    ///
    /// # Errors
    /// `Conflict` for this and every later version when another publisher has published the number;
    /// `Indeterminate` when it is unknown whether the version is published: the next version is a full then.
    pub fn commit(&self, name: &str, number: u64) -> Result<(Arc<dyn Writing>, Published)> {
        let _turn = lock(&self.turn);
        let (staged, step) = Held::staged(&self.memory, name).map_err(|e| e.with_step(number))?;
        let base = {
            let mut state = lock(&self.state);
            if let Some(error) = &state.ended {
                return Err(error.clone());
            }
            if number <= state.newest {
                let what = format!("a later version was committed first version={number} newest={}", state.newest);
                return Err(Error::new(ErrorKind::Cancelled, what).with_step(number));
            }
            state.newest = number;
            state.held.clone()
        };
        let staged = Arc::new(staged);
        let (delta, encoding) = self.delta(base.as_deref(), &staged, &step)?;
        if mutant::on(Mutant::ChainOrder) {
            lock(&self.state).held = Some(staged.clone());
        }
        let attempt = staged.holding.attempt;
        let written = match &delta {
            Some(delta) => commit(self.storage.as_ref(), name, attempt, |to| delta.write(to)),
            None => self.write_full(name, attempt, &staged),
        };
        let mut state = lock(&self.state);
        let writing = match written {
            Ok(writing) => writing,
            Err(error) => {
                let error = error.with_step(number);
                match error.kind() {
                    // The version in memory may be built on a version that a crash removes.
                    ErrorKind::Indeterminate if mutant::on(Mutant::ChainUnclear) => state.held = Some(staged),
                    ErrorKind::Indeterminate => state.held = None,
                    ErrorKind::Conflict => state.ended = Some(taken_over(&error)),
                    _ => {}
                }
                return Err(error);
            }
        };
        let (kind, bytes) = match (&delta, &base) {
            (Some(delta), Some(base)) => {
                state.deltas.push((number, delta.bytes()));
                (Kind::Delta { base: base.holding.version, changed: delta.changed() }, delta.bytes())
            }
            _ => {
                state.full_is_durable(number, staged.bytes);
                (Kind::Full, staged.bytes)
            }
        };
        let published = Published {
            version: number,
            attempt,
            kind,
            bytes,
            full_bytes: staged.bytes,
            state: staged.holding.state.to_bits(),
            path: self.storage.describe(name),
            encoding,
        };
        state.held = Some(staged);
        Ok((writing, published))
    }

    /// Returns the delta from the held version. None if a full is shorter, or if the structure is another.
    fn delta(&self, base: Option<&Held>, new: &Held, step: &Checkpoint) -> Result<(Option<Encoded>, Duration)> {
        let began = Instant::now();
        let Some(base) = base.filter(|base| base.inventory.is_like(&new.inventory)) else {
            return Ok((None, Duration::ZERO));
        };
        let delta = encode(base, new, step, self.settings.form)?;
        let worthwhile = delta.bytes() <= new.bytes / 2;
        Ok(if worthwhile { (Some(delta), began.elapsed()) } else { (None, Duration::ZERO) })
    }

    fn write_full(&self, name: &str, attempt: Attempt, held: &Held) -> Result<Arc<dyn Writing>> {
        let files = held.files.clone().ok_or_else(|| Error::internal("a full is written from staged files"))?;
        let from = Memory::over(name, files);
        let reading = from.open(name)?;
        commit(self.storage.as_ref(), name, attempt, |to| copy(reading.as_ref(), to).map(drop))
    }

    /// Tidies up after an acknowledged version: writes a full beside the newest delta if the deltas have
    /// become long, and removes versions that no reader needs.
    pub fn tidy(&self) {
        let due = {
            let state = lock(&self.state);
            let bytes: u64 = state.deltas.iter().map(|(_, bytes)| bytes).sum();
            let long = bytes > state.full_bytes / 2 || state.deltas.len() as u64 >= self.settings.full_every;
            state.held.clone().filter(|held| long && held.files.is_some())
        };
        if let Some(held) = due {
            let name = version_name(held.holding.version, true);
            guard::attempt("write a full beside a delta", || {
                // An earlier try may have failed, so this one is another attempt.
                let written = self.write_full(&name, Attempt::new(), &held)?;
                lock(&self.state).full_is_durable(held.holding.version, held.bytes);
                written.settle()
            });
        }
        guard::attempt("remove old versions", || self.prune().map(drop));
    }

    /// Removes versions that are older than the newest durable full, and returns their names.
    ///
    /// # Errors
    /// Errors of the storage.
    pub fn prune(&self) -> Result<Vec<String>> {
        let full = lock(&self.state).full;
        super::retention::prune(&self.storage, full, self.settings.grace)
    }
}

impl State {
    /// Notes a durable full. Newer deltas may have been committed while it was written.
    fn full_is_durable(&mut self, number: u64, bytes: u64) {
        if self.full.is_none_or(|full| full < number) {
            (self.full, self.full_bytes) = (Some(number), bytes);
            self.deltas.retain(|(delta, _)| *delta > number);
        }
    }
}

fn taken_over(error: &Error) -> Error {
    let what = "another publisher has published to this chain; this one has ended";
    let ended = Error::new(ErrorKind::Conflict, what).with_source_of(error);
    error.path().map(|path| ended.clone().with_path(path)).unwrap_or(ended)
}
