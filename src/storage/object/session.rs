//! The session of this process on a root: the take-over that made it, and its live attempts.

use super::client::Client;
use super::probe;
use super::root::{Edit, Root};
use super::state::{Entry, Owner, State};
use crate::error::{Error, ErrorKind, Result};
use crate::id::Attempt;
use crate::storage::Writers;
use crate::sync::{Mutex, lock};
use object_store::path::Path as Key;
use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use uuid::Uuid;

/// The state that a storage shares with its attempts and readers.
#[derive(Debug)]
pub(super) struct Inner {
    pub client: Client,
    pub root: Root,
    pub live: Live,
    /// The session of this process. None as long as the process only reads. The lock is held only to read or
    /// set the session, because edits of the root take it while the root is locked.
    session: Mutex<Option<Session>>,
    /// Held during a take-over, so that two take-overs do not overlap.
    taking: Mutex<()>,
    /// The state for other prefixes of the same store, kept while a save there is in progress, so that two
    /// such saves belong to one session.
    others: Mutex<BTreeMap<Key, Weak<Inner>>>,
    /// How the executor writes, if there is one.
    writers: Mutex<Option<Writers>>,
}

impl Inner {
    pub fn new(client: Client) -> Self {
        let root = Root::new(client.clone());
        let (live, session, writers) = (Live::default(), Mutex::new(None), Mutex::new(None));
        Self { client, root, live, session, taking: Mutex::new(()), others: Mutex::default(), writers }
    }

    /// Returns the state for the root at another prefix of the same store, which may be this root itself.
    pub fn at(self: &Arc<Self>, prefix: Key, name: &str) -> Arc<Self> {
        if prefix == self.client.key("") {
            return self.clone();
        }
        let mut others = lock(&self.others);
        others.retain(|_, other| other.strong_count() > 0);
        if let Some(other) = others.get(&prefix).and_then(Weak::upgrade) {
            return other;
        }
        let other = Arc::new(Self::new(self.client.at(prefix.clone(), name)));
        other.equip(self.writers());
        others.insert(prefix, Arc::downgrade(&other));
        other
    }

    /// Keeps how the executor writes, for files that are created later.
    pub fn equip(&self, writers: Option<Writers>) {
        *lock(&self.writers) = writers;
    }

    /// How the executor writes, if there is one.
    pub fn writers(&self) -> Option<Writers> {
        *lock(&self.writers)
    }

    /// The generation of this process. None as long as the process only reads.
    pub fn generation(&self) -> Option<u64> {
        lock(&self.session).as_ref().map(|session| session.generation)
    }

    /// The generation of this process. Takes the root over if there is none yet.
    pub fn session(&self) -> Result<u64> {
        if let Some(generation) = self.generation() {
            return Ok(generation);
        }
        let _taking = lock(&self.taking);
        self.generation().map_or_else(|| self.open(myself()), Ok)
    }

    /// Takes the root over, unless this process owns it already.
    pub fn own(&self) -> Result<()> {
        let _taking = lock(&self.taking);
        let ours = *lock(&self.session);
        if let Some(ours) = ours
            && self.root.read()?.is_some_and(|state| ours.owns(&state))
        {
            return Ok(());
        }
        self.open(myself()).map(drop)
    }

    /// Takes the root over for `owner`, and returns the new generation. From then on no attempt of an older
    /// generation can be published.
    pub fn take_over(&self, owner: Owner) -> Result<u64> {
        let _taking = lock(&self.taking);
        self.open(owner)
    }

    fn open(&self, owner: Owner) -> Result<u64> {
        probe::conditions(&self.client)?;
        let mut generation = 0;
        let done = self.root.change(&|state| state.session.id == owner.id, &mut |state| {
            let mut state = state.cloned().unwrap_or_else(State::empty);
            state.generation += 1;
            state.session = owner.clone();
            state.vetoed.clear();
            generation = state.generation;
            Ok(Edit::To(state))
        });
        // A take-over that lands late owns the root until the next take-over, and no process acts for it.
        done.map_err(|error| match error.kind() {
            ErrorKind::Indeterminate => error.with_kind(ErrorKind::Unavailable),
            _ => error,
        })?;
        *lock(&self.session) = Some(Session { generation, id: owner.id });
        Ok(generation)
    }

    /// Refuses to act for a session that is not the newest.
    pub fn check_owned(&self, state: &State, generation: u64) -> Result<()> {
        let ours = *lock(&self.session);
        if state.generation == generation && ours.is_none_or(|ours| ours.generation != generation || ours.owns(state)) {
            return Ok(());
        }
        let Owner { run, host, pid, .. } = &state.session;
        let (theirs, ours) = (state.generation, generation);
        let who = format!("generation={theirs} ours={ours} run={run:?} host={host} pid={pid}");
        let why = "a newer session has taken this root over: is the job running twice? Give each job a root of its own";
        Err(Error::new(ErrorKind::Conflict, format!("{why} {who}")).with_path(self.client.name()))
    }

    /// The error for a root object that this process has changed before and that is missing.
    pub fn vanished(&self) -> Error {
        self.root.vanished()
    }

    /// The path of `name`, for messages.
    pub fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.client.name())
    }
}

/// A take-over of this process.
#[derive(Clone, Copy, Debug)]
struct Session {
    generation: u64,
    id: Uuid,
}

impl Session {
    /// True if this is the newest take-over. A root that was deleted and created again counts its generations
    /// from 1 again.
    fn owns(self, state: &State) -> bool {
        state.generation == self.generation && state.session.id == self.id
    }
}

/// A session of this process alone.
fn myself() -> Owner {
    owner(Uuid::new_v4(), String::new())
}

/// This process as an owner of the root.
pub(super) fn owner(id: Uuid, run: String) -> Owner {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    Owner { id, run, host, pid: std::process::id() }
}

/// The attempts that this process has begun and that have not ended.
#[derive(Debug, Default)]
pub(super) struct Live(Mutex<Vec<Begun>>);

/// An attempt that has begun.
#[derive(Clone, Debug)]
pub(super) struct Begun {
    pub name: String,
    pub generation: u64,
    pub attempt: Attempt,
    alive: Weak<()>,
}

impl Begun {
    pub fn is_alive(&self) -> bool {
        self.alive.strong_count() > 0
    }
}

impl Live {
    /// Records an attempt. The attempt is alive as long as the caller keeps the returned value.
    ///
    /// # Errors
    /// `Conflict` when the attempt was begun before and has not ended.
    pub fn add(&self, name: &str, generation: u64, attempt: Attempt) -> Result<Arc<()>> {
        let mut begun = lock(&self.0);
        if begun.iter().any(|known| known.attempt == attempt) {
            return Err(Error::new(ErrorKind::Conflict, format!("the attempt was begun before attempt={attempt}")));
        }
        let alive = Arc::new(());
        begun.push(Begun { name: name.into(), generation, attempt, alive: Arc::downgrade(&alive) });
        Ok(alive)
    }

    /// Records a step that was removed, so that the next sweep deletes its objects.
    pub fn bury(&self, entry: &Entry) {
        let Entry { name, generation, attempt, .. } = entry.clone();
        lock(&self.0).push(Begun { name, generation, attempt, alive: Weak::new() });
    }

    pub fn forget(&self, attempt: Attempt) {
        lock(&self.0).retain(|known| known.attempt != attempt);
    }

    pub fn all(&self) -> Vec<Begun> {
        lock(&self.0).clone()
    }
}
