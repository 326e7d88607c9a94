//! A save that the queue's thread runs, because its state comes later or a storage writer of the program
//! carries it out.

use super::drive::{self, Ranks, complete};
use super::engine::EngineWriter;
use super::future::{Told, Written};
use super::options::Who;
use super::plan::Metadata;
use super::planner::{DefaultSavePlanner, SavePlanner};
use super::staging::{Coming, Inner};
use super::turn::{Turn, planned};
use super::writer::StorageWriter;
use crate::compat::ending::end_by;
use crate::error::{Error, ErrorKind, Result};
use crate::executor::{CheckpointExecutor, DeferredSave};
use crate::guard::guarded;
use crate::outcome::Outcome;
use crate::state::StateDict;
use crate::sync::{Mutex, lock};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

/// How long after its deadline a save by several ranks may take to end. It ends by itself, after a veto.
const LATE: Duration = Duration::from_secs(15);

#[expect(clippy::large_enum_variant, reason = "one is made for each save")]
pub(super) enum Writer {
    Engine(EngineWriter),
    Users(Box<dyn StorageWriter>),
}

pub(super) enum Planner {
    Kept(Arc<Mutex<DefaultSavePlanner>>),
    Users(Box<dyn SavePlanner>),
}

impl Planner {
    /// Calls `work` with the planner.
    fn with<T>(&mut self, work: impl FnOnce(&mut dyn SavePlanner) -> T) -> T {
        match self {
            Self::Kept(kept) => work(&mut *lock(kept)),
            Self::Users(users) => work(users.as_mut()),
        }
    }
}

/// See the module.
pub(super) struct Job {
    pub executor: Arc<CheckpointExecutor>,
    pub state: Inner,
    pub planner: Planner,
    pub writer: Writer,
    pub who: Who,
    pub step: u64,
    pub deadline: Instant,
    pub id: Option<PathBuf>,
    pub told: Told,
}

impl Job {
    pub fn run(self, deferred: DeferredSave) {
        let claimed = deferred.claim();
        match self.who {
            // The other ranks have to learn of a save that this rank gave up.
            Who::Gather | Who::PerRank => self.together(deferred, claimed),
            Who::Alone if claimed => self.alone(deferred),
            Who::Alone => {}
        }
    }

    fn alone(self, deferred: DeferredSave) {
        let Self { executor, state, mut planner, writer, deadline, id, told, .. } = self;
        let (state, id) = (staged(state, &deferred, deadline), id.as_deref());
        match writer {
            Writer::Engine(mut writer) => {
                let planned = |planner: &mut dyn SavePlanner| planned(state?, planner, &mut writer, id, &told);
                match planner.with(planned) {
                    Ok(state) => writer.begin(deferred, state),
                    Err(error) => deferred.end(Err(error)),
                }
            }
            Writer::Users(mut writer) => {
                drop(executor);
                let save = |planner: &mut dyn SavePlanner| {
                    drive::save(state, planner, writer.as_mut(), id, &Ranks::Alone, deadline)
                };
                let saved = planner.with(save);
                elsewhere(deferred, saved, place(id), &told);
            }
        }
    }

    fn together(self, deferred: DeferredSave, claimed: bool) {
        let Self { executor, state, mut planner, writer, who, step, deadline, id, told } = self;
        let (turn, id) = (Turn { executor: &executor, who, step, deadline }, id.as_deref());
        let state = if claimed { staged(state, &deferred, deadline) } else { Err(ended()) };
        // From here on all ranks decide together how the save ends.
        let state = state.and_then(|state| if deferred.commit() { Ok(state) } else { Err(ended()) });
        match writer {
            Writer::Engine(mut writer) => {
                let users = match &mut planner {
                    Planner::Kept(_) => None,
                    Planner::Users(users) => Some(users.as_mut()),
                };
                let planned = turn.planned(state, users, &mut writer, id, &told);
                let begun = planned.and_then(|state| writer.submit(state));
                let late = deadline + LATE;
                deferred.end(begun.and_then(|save| end_by(&save, late, late + LATE, "the deadline of its ranks")));
            }
            Writer::Users(mut writer) => {
                let saved = planner.with(|planner| turn.written(state, planner, writer.as_mut(), id));
                elsewhere(deferred, saved, place(id), &told);
            }
        }
    }
}

fn place(id: Option<&Path>) -> PathBuf {
    id.map(Into::into).unwrap_or_default()
}

/// Ends a save that a storage writer of the program has carried out.
fn elsewhere(deferred: DeferredSave, saved: Result<Metadata>, path: PathBuf, told: &Told) {
    let committed = deferred.elsewhere(path);
    deferred.end(saved.map(|metadata| {
        let _ = told.set(Written::Users(metadata));
        Outcome::Durable(committed)
    }));
}

fn ended() -> Error {
    Error::new(ErrorKind::Cancelled, "the save ended before its state was staged")
}

/// Waits for the state. Fails when the save ends first.
fn staged(state: Inner, deferred: &DeferredSave, deadline: Instant) -> Result<StateDict<'static>> {
    match state {
        Inner::Stream(state) => Ok(state),
        Inner::Whole(coming) => guarded("a staging future panicked", || wait_for(coming, deferred, deadline)),
    }
}

fn wait_for(mut coming: Coming, deferred: &DeferredSave, deadline: Instant) -> Result<StateDict<'static>> {
    let mut save = deferred.save();
    let first = std::future::poll_fn(move |cx| {
        if save.poll_ended(cx).is_ready() {
            return Poll::Ready(Err(ended()));
        }
        coming.as_mut().poll(cx)
    });
    complete(first, deadline)
}
