//! A simulated board below the production coordinator: a directory on several hosts, or a server.
//!
//! In a directory, other ranks see a message later, each rank at another time. Messages of one name are seen
//! in the order in which they were put; messages of several names are seen in any order. A server shows
//! everything at once. It answers late, or not at all for a while, and a message that was sent twice then
//! arrives a second time, later.

use super::memory::outside;
use super::scheduler::{Scheduler, mixed};
use crate::error::{Error, ErrorKind, Result};
use crate::ranks::board::{Board, Life};
use indexmap::IndexMap;
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a server keeps the greeting of a rank that has ended.
const LEASE: u64 = 10_000_000;

/// How a board behaves. Times are in microseconds. For "one in so many", 0 means never.
#[derive(Clone, Copy, Debug)]
pub(super) struct Manners {
    /// True for a server, false for a directory.
    pub server: bool,
    /// The number of ranks of one host, which see each other's messages at once.
    pub per_host: usize,
    /// The maximum delay until other hosts see a name.
    pub late: u64,
    /// A rank never sees one in so many messages.
    pub lost: u64,
    /// The maximum time of an operation.
    pub takes: u64,
    /// One in so many looks takes a living rank for dead.
    pub slander: u64,
    /// The time during which no operation is answered: from, until.
    pub outage: (u64, u64),
}

impl Manners {
    /// Ranks on hosts of 8, and no faults.
    pub const PERFECT: Self =
        Self { server: false, per_host: 8, late: 0, lost: 0, takes: 0, slander: 0, outage: (0, 0) };
}

/// Counts of the operations that ranks requested of a board.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Asked {
    pub puts: u64,
    pub reads: u64,
    pub lists: u64,
    pub lives: u64,
    pub removes: u64,
    /// Bytes put, and bytes read: of messages, and of names in listings.
    pub written: u64,
    pub read: u64,
}

impl Asked {
    pub fn since(self, before: Self) -> Self {
        Self {
            puts: self.puts - before.puts,
            reads: self.reads - before.reads,
            lists: self.lists - before.lists,
            lives: self.lives - before.lives,
            removes: self.removes - before.removes,
            written: self.written - before.written,
            read: self.read - before.read,
        }
    }
}

/// One state of a name.
struct Version {
    number: u64,
    at: u64,
    by: usize,
    /// None: removed.
    bytes: Option<Arc<[u8]>>,
}

type Names = IndexMap<String, Vec<Version>>;

#[derive(Default)]
struct State {
    folders: IndexMap<String, Names>,
    number: u64,
    /// The rank that announced a name, and when it ceased to hold the name.
    holders: HashMap<String, (usize, Option<u64>)>,
    /// Ranks that wait for names with a prefix.
    watching: Vec<(usize, String)>,
    /// For each rank, the number of the last version before its first operation since a wait. The rank may
    /// not have seen later versions when it begins to wait.
    since: HashMap<usize, u64>,
    asked: HashMap<usize, Asked>,
}

/// A board with all its messages.
pub(super) struct Place {
    scheduler: Arc<Scheduler>,
    seed: u64,
    manners: Manners,
    state: Mutex<State>,
}

/// A board as one rank sees it.
#[derive(Clone)]
pub(super) struct Desk {
    pub place: Arc<Place>,
    pub thread: usize,
}

impl fmt::Debug for Desk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Desk({})", self.thread)
    }
}

/// Holds an announcement until it is dropped.
#[derive(Debug)]
pub(super) struct Held {
    desk: Desk,
    key: String,
}

impl Drop for Held {
    fn drop(&mut self) {
        let now = self.desk.place.scheduler.now();
        if let Some((_, ended)) = self.desk.place.state().holders.get_mut(&self.key) {
            *ended = Some(now);
        }
    }
}

impl Place {
    pub fn new(scheduler: Arc<Scheduler>, seed: u64, manners: Manners) -> Self {
        Self { scheduler, seed, manners, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The operations that a rank has requested so far.
    pub fn asked(&self, thread: usize) -> Asked {
        self.state().asked.get(&thread).copied().unwrap_or_default()
    }

    /// The state of a name that a rank sees.
    fn seen<'a>(&self, versions: &'a [Version], by: usize) -> Option<&'a Arc<[u8]>> {
        let now = self.scheduler.now();
        let newest = versions.iter().filter(|version| self.arrives(version, by) <= now);
        newest.max_by_key(|version| (version.at, version.number))?.bytes.as_ref()
    }

    /// When a rank first sees a state of a name.
    fn arrives(&self, version: &Version, to: usize) -> u64 {
        let Manners { per_host, late, lost, server, .. } = self.manners;
        if version.by / per_host == to / per_host {
            return version.at;
        }
        let luck = mixed(self.seed ^ mixed(version.number ^ ((to as u64) << 32)));
        // A removal is seen at last.
        if lost > 0 && luck.is_multiple_of(lost) && version.bytes.is_some() {
            return u64::MAX;
        }
        version.at + if server { 0 } else { (luck >> 20) % (late + 1) }
    }
}

fn split(key: &str) -> (&str, &str) {
    key.split_once('/').unwrap_or((key, ""))
}

impl Desk {
    /// Begins one operation. It takes time, the rank may die before or after it, and a server may not answer.
    fn ask(&self, until: Instant) -> Result<MutexGuard<'_, State>> {
        let (scheduler, Manners { takes, outage, .. }) = (&self.place.scheduler, self.place.manners);
        if scheduler.is_dead(self.thread) {
            return Err(Error::new(ErrorKind::Cancelled, "this rank is dead"));
        }
        scheduler.step(self.thread);
        if takes > 0 {
            let took = scheduler.with_rng(|rng| rng.below(takes + 1));
            scheduler.sleep(self.thread, scheduler.now() + took);
        }
        let now = scheduler.now();
        if (outage.0..outage.1).contains(&now) {
            // A server is asked once more even when there is no time left.
            let until = scheduler.time(self.thread, until).max(now + 50_000);
            scheduler.sleep(self.thread, outage.1.min(until));
            if scheduler.now() < outage.1 {
                return Err(Error::new(ErrorKind::Unavailable, "the board does not answer"));
            }
        }
        let mut state = self.place.state();
        let number = state.number;
        outside(|| state.since.entry(self.thread).or_insert(number));
        Ok(state)
    }

    fn count(&self, state: &mut State, count: impl FnOnce(&mut Asked)) {
        count(outside(|| state.asked.entry(self.thread).or_default()));
    }

    fn change(&self, state: &mut State, key: &str, bytes: Option<Arc<[u8]>>, at: u64) {
        state.number += 1;
        let version = Version { number: state.number, at, by: self.thread, bytes };
        let (folder, name) = split(key);
        outside(|| {
            let names = state.folders.entry(folder.to_owned()).or_default();
            names.entry(name.to_owned()).or_default().push(version);
        });
        state.watching.retain(|(who, prefix)| {
            let theirs = key.starts_with(prefix);
            if theirs {
                self.place.scheduler.wake(*who);
            }
            !theirs
        });
    }
}

impl Board for Desk {
    type Held = Held;

    fn check_token(&self, _: &str) -> Result<()> {
        Ok(())
    }

    fn put(&self, key: &str, bytes: &[u8], until: Instant) -> Result<()> {
        let mut state = self.ask(until)?;
        self.count(&mut state, |asked| {
            asked.puts += 1;
            asked.written += (key.len() + bytes.len()) as u64;
        });
        let (scheduler, bytes) = (&self.place.scheduler, outside(|| Arc::<[u8]>::from(bytes)));
        let now = scheduler.now();
        self.change(&mut state, key, Some(bytes.clone()), now);
        // The first try of a message that was sent twice finally arrives.
        if self.place.manners.server && scheduler.with_rng(|rng| rng.one_in(50)) {
            let later = now + scheduler.with_rng(|rng| rng.below(50_000));
            self.change(&mut state, key, Some(bytes), later);
        }
        Ok(())
    }

    fn announce(&self, key: &str, bytes: &[u8], until: Instant) -> Result<Held> {
        outside(|| self.place.state().holders.insert(key.to_owned(), (self.thread, None)));
        let held = Held { desk: self.clone(), key: key.to_owned() };
        self.put(key, bytes, until)?;
        Ok(held)
    }

    fn read(&self, key: &str, longest: usize, until: Instant) -> Result<Option<Vec<u8>>> {
        let mut state = self.ask(until)?;
        let (folder, name) = split(key);
        let versions = state.folders.get(folder).and_then(|names| names.get(name));
        let found = versions.and_then(|versions| self.place.seen(versions, self.thread));
        let found = found.map(|bytes| bytes[..bytes.len().min(longest + 1)].to_vec());
        let bytes = found.as_ref().map_or(0, Vec::len);
        self.count(&mut state, |asked| {
            asked.reads += 1;
            asked.read += bytes as u64;
        });
        Ok(found)
    }

    fn list(&self, folder: &str, until: Instant) -> Result<Vec<String>> {
        let mut state = self.ask(until)?;
        let mut names: Vec<String> = Vec::new();
        for (name, versions) in state.folders.get(folder).into_iter().flatten() {
            if self.place.seen(versions, self.thread).is_some() {
                names.push(name.clone());
            }
        }
        let bytes: usize = names.iter().map(String::len).sum();
        self.count(&mut state, |asked| {
            asked.lists += 1;
            asked.read += bytes as u64;
        });
        drop(state);
        // No medium lists names in the order in which they came.
        let turned = self.place.scheduler.with_rng(|rng| rng.below(names.len() as u64)) as usize;
        names.rotate_left(turned);
        Ok(names)
    }

    fn remove(&self, key: &str, until: Instant) {
        if let Ok(mut state) = self.ask(until) {
            let now = self.place.scheduler.now();
            let (folder, name) = split(key);
            self.count(&mut state, |asked| asked.removes += 1);
            if state.folders.get(folder).is_some_and(|names| names.contains_key(name)) {
                self.change(&mut state, key, None, now);
            }
        }
    }

    fn remove_others(&self, session: &str, until: Instant) {
        let Ok(mut state) = self.ask(until) else { return };
        let now = self.place.scheduler.now();
        let mut keys = Vec::new();
        for (folder, names) in &state.folders {
            if folder.starts_with("messages-") && folder != session {
                keys.extend(names.keys().map(|name| format!("{folder}/{name}")));
            }
        }
        for key in keys {
            self.change(&mut state, &key, None, now);
        }
    }

    fn life(&self, key: &str, _: bool, until: Instant) -> Life {
        let Ok(mut state) = self.ask(until) else { return Life::Unknown };
        self.count(&mut state, |asked| asked.lives += 1);
        let Manners { server, slander, per_host, .. } = self.place.manners;
        let scheduler = &self.place.scheduler;
        let (folder, name) = split(key);
        let versions = state.folders.get(folder).and_then(|names| names.get(name));
        let there = versions.is_some_and(|versions| self.place.seen(versions, self.thread).is_some());
        let Some((who, ended)) = state.holders.get(key).copied() else { return Life::Dead };
        if !there || scheduler.with_rng(|rng| rng.one_in(slander)) {
            return Life::Dead;
        }
        match ended {
            Some(ended) if server => {
                if scheduler.now() > ended + LEASE {
                    Life::Dead
                } else {
                    Life::Alive
                }
            }
            None if server => Life::Alive,
            _ if who / per_host != self.thread / per_host => Life::Unknown,
            Some(_) => Life::Dead,
            None => Life::Alive,
        }
    }

    fn hint(&self) -> &'static str {
        "this is a simulation"
    }

    fn now(&self) -> Instant {
        self.place.scheduler.instant(self.thread, self.place.scheduler.now())
    }

    fn wait(&self, prefix: &str, turn: u32, until: Instant) {
        let scheduler = &self.place.scheduler;
        if scheduler.is_dead(self.thread) {
            return;
        }
        let (now, until) = (scheduler.now(), scheduler.time(self.thread, until));
        let pause = if self.place.manners.server {
            let mut state = self.place.state();
            let since = state.since.remove(&self.thread).unwrap_or_default();
            let (folder, name) = split(prefix);
            // Names are in the order in which they came.
            let news = state.folders.get(folder).is_some_and(|names| {
                let newest = |versions: &[Version]| versions.last().map_or(0, |version| version.number);
                let news = names.iter().rev().take_while(|(_, versions)| newest(versions) > since);
                news.into_iter().any(|(found, _)| found.starts_with(name))
            });
            if news {
                return;
            }
            state.watching.retain(|(who, _)| *who != self.thread);
            outside(|| state.watching.push((self.thread, prefix.to_owned())));
            2_000_000
        } else {
            1_000 * (1_u64 << turn.min(6)).min(50)
        };
        scheduler.sleep(self.thread, until.min(now + pause).max(now + 1));
    }
}

/// How late the longest operation of a board ends, when it begins at its deadline.
pub(super) fn slack(manners: &Manners) -> Duration {
    Duration::from_micros(manners.takes + if manners.outage.1 > 0 { 50_000 } else { 0 })
}
