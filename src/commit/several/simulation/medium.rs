//! A simulated root. All ranks see the same names, and the root detects every broken promise.

use super::memory::outside;
use super::scheduler::Scheduler;
use crate::error::{Error, ErrorKind, Result};
use crate::id::Attempt;
use crate::storage::shared::{SessionRecord, Shared, SharedAttempt, SharedWriting, Vetoed};
use crate::storage::{FileWriting, Writing};
use indexmap::IndexMap;
use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Name {
    Temp,
    Claimed,
    Step,
    /// Replaced by another attempt.
    Displaced,
    Gone,
}

#[derive(Debug)]
struct Tried {
    step: String,
    generation: u64,
    name: Name,
    /// The ranks whose files are in the attempt.
    files: BTreeSet<u32>,
    world: u32,
}

#[derive(Default)]
struct Names {
    sessions: Vec<SessionRecord>,
    /// Generations whose take-over is complete.
    taken: u64,
    notes: HashMap<(u64, String), Vec<u8>>,
    /// The attempts in the order in which they began, which does not depend on their random identities.
    attempts: IndexMap<String, Tried>,
}

/// The root.
pub(super) struct Root {
    pub scheduler: Arc<Scheduler>,
    pub seed: u64,
    names: Mutex<Names>,
}

/// The root as one thread sees it.
#[derive(Clone)]
pub(super) struct Medium {
    pub root: Arc<Root>,
    pub thread: usize,
    pub rank: u32,
    pub world: u32,
}

impl fmt::Debug for Medium {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Medium({})", self.rank)
    }
}

impl Root {
    pub fn new(seed: u64, scheduler: Arc<Scheduler>) -> Self {
        Self { scheduler, seed, names: Mutex::default() }
    }

    fn names(&self) -> MutexGuard<'_, Names> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Checks the outcome that a rank was told for an attempt. If it is durable, the attempt must be the
    /// step, or must have been replaced.
    pub fn judge(&self, attempt: Attempt, durable: bool) {
        let names = self.names();
        let tried = names.attempts.get(&attempt.to_string());
        let published = tried.is_some_and(|tried| matches!(tried.name, Name::Step | Name::Displaced));
        let seed = self.seed;
        assert!(published || !durable, "seed={seed}: acknowledged and lost: {attempt} {tried:?}");
        assert!(!published || durable, "seed={seed}: reported as failed and published: {attempt} {tried:?}");
    }
}

impl Medium {
    /// Begins one operation. Other threads may run before it, and the thread may die before or after it.
    fn names(&self) -> MutexGuard<'_, Names> {
        self.root.scheduler.step(self.thread);
        self.root.names()
    }
}

impl Shared for Medium {
    fn open_session(&self, record: &SessionRecord) -> Result<u64> {
        let mut names = self.names();
        outside(|| names.sessions.push(record.clone()));
        Ok(names.sessions.len() as u64)
    }

    fn newest(&self) -> Result<Option<(u64, Option<SessionRecord>)>> {
        let names = self.names();
        Ok(names.sessions.last().map(|record| (names.sessions.len() as u64, Some(record.clone()))))
    }

    fn take_over(&self, generation: u64) -> Result<()> {
        let listed: Vec<String> = self.names().attempts.keys().cloned().collect();
        for attempt in listed {
            let mut names = self.names();
            let Some(tried) = names.attempts.get_mut(&attempt) else { continue };
            if tried.generation < generation && matches!(tried.name, Name::Temp | Name::Claimed) {
                tried.name = Name::Gone;
            }
        }
        let mut names = self.names();
        names.taken = names.taken.max(generation);
        Ok(())
    }

    fn begin(&self, attempt: SharedAttempt<'_>, overwrite: bool) -> Result<Arc<dyn SharedWriting>> {
        let mut names = self.names();
        let there = names.attempts.values().any(|tried| tried.step == attempt.name && tried.name == Name::Step);
        if there && !overwrite {
            return Err(Error::new(ErrorKind::Conflict, "the step exists"));
        }
        let (step, generation, world) = (attempt.name.to_owned(), attempt.generation, self.world);
        let tried = Tried { step, generation, name: Name::Temp, files: BTreeSet::new(), world };
        names.attempts.insert(attempt.attempt.to_string(), tried);
        drop(names);
        Ok(Arc::new(Open { medium: self.clone(), attempt: attempt.attempt.to_string() }))
    }

    fn join(&self, attempt: SharedAttempt<'_>) -> Result<Arc<dyn SharedWriting>> {
        let names = self.names();
        let name = attempt.attempt.to_string();
        match names.attempts.get(&name) {
            Some(tried) if tried.name == Name::Temp => {
                drop(names);
                Ok(Arc::new(Open { medium: self.clone(), attempt: name }))
            }
            _ => Err(Error::new(ErrorKind::NotFound, "no such attempt")),
        }
    }

    fn put_note(&self, generation: u64, name: &str, bytes: &[u8]) -> Result<()> {
        let mut names = self.names();
        outside(|| names.notes.insert((generation, name.to_owned()), bytes.to_vec()));
        Ok(())
    }

    fn note(&self, generation: u64, name: &str, _: u64) -> Result<Option<Vec<u8>>> {
        Ok(self.names().notes.get(&(generation, name.to_owned())).cloned())
    }

    fn delete_note(&self, generation: u64, name: &str) -> Result<()> {
        self.names().notes.remove(&(generation, name.to_owned()));
        Ok(())
    }
}

/// An attempt as one thread has it open.
struct Open {
    medium: Medium,
    attempt: String,
}

impl fmt::Debug for Open {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.attempt)
    }
}

impl Open {
    fn with<T>(&self, what: impl FnOnce(&mut Tried) -> T) -> T {
        let mut names = self.medium.names();
        what(names.attempts.get_mut(&self.attempt).expect("an attempt that was begun"))
    }
}

impl Writing for Open {
    fn create(&self, _: &str, _: u64) -> Result<Arc<dyn FileWriting>> {
        Err(Error::internal("the simulation has no bytes"))
    }

    /// Writes the files of this rank.
    fn put(&self, _: &str, _: &[u8]) -> Result<()> {
        let rank = self.medium.rank;
        self.with(|tried| outside(|| tried.files.insert(rank)));
        Ok(())
    }

    fn publish(&self, overwrite: bool) -> Result<()> {
        let seed = self.medium.root.seed;
        let mut names = self.medium.names();
        let taken = names.taken;
        let step = names.attempts[&self.attempt].step.clone();
        let there = names.attempts.iter().find(|(_, tried)| tried.step == step && tried.name == Name::Step);
        let there = there.map(|(name, _)| name.clone());
        let tried = names.attempts.get_mut(&self.attempt).expect("an attempt that was begun");
        if tried.name != Name::Claimed {
            return Err(Error::new(ErrorKind::Indeterminate, "the attempt is gone"));
        }
        if there.is_some() && !overwrite {
            return Err(Error::new(ErrorKind::Conflict, "another attempt won"));
        }
        assert!(tried.files.iter().copied().eq(0..tried.world), "seed={seed}: torn: {tried:?}");
        assert!(tried.generation >= taken, "seed={seed}: a zombie publishes: {tried:?} taken={taken}");
        tried.name = Name::Step;
        if let Some(replaced) = there.and_then(|name| names.attempts.get_mut(&name)) {
            replaced.name = Name::Displaced;
        }
        Ok(())
    }

    fn settle(&self) -> Result<()> {
        Ok(())
    }

    fn abandon(&self) -> Result<()> {
        self.with(|tried| {
            if matches!(tried.name, Name::Temp | Name::Claimed) {
                tried.name = Name::Gone;
            }
        });
        Ok(())
    }
}

impl SharedWriting for Open {
    fn sync_names(&self) -> Result<()> {
        self.with(|_| ());
        Ok(())
    }

    fn claim(&self) -> Result<()> {
        self.with(|tried| match tried.name {
            Name::Temp => {
                tried.name = Name::Claimed;
                Ok(())
            }
            _ => Err(Error::new(ErrorKind::Cancelled, "the attempt is gone")),
        })
    }

    fn veto(&self) -> Result<Vetoed> {
        Ok(self.with(|tried| match tried.name {
            Name::Temp => {
                tried.name = Name::Gone;
                Vetoed::Done
            }
            _ => Vetoed::TooLate,
        }))
    }
}
