//! Jobs that save the same steps into one root: what each rank does, and what it is told.

use super::medium::{Medium, Root};
use super::messages::{At, Travel, Wire};
use super::scheduler::{Killed, Rng, Scheduler};
use crate::commit::several::end::Part;
use crate::commit::several::message::Receipt;
use crate::commit::several::{Agreed, Describe, Group, Structures, Vote, identity};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::ranks::Member;
use crate::storage::shared::SharedWriting;
use std::collections::BTreeMap;
use std::panic::resume_unwind;
use std::sync::{Arc, Mutex, PoisonError};

/// What a seed simulates. Times are in microseconds.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub world: u32,
    pub jobs: u32,
    pub saves: u64,
    pub travel: Travel,
    /// A thread dies at one in so many steps; 0: never.
    pub deadly: u64,
    /// A rank saves another step, or fails, at one in so many saves; 0: never.
    pub wrong: u64,
    /// How long a save may take: between this and twice as much.
    pub patience: u64,
    pub overwrite: bool,
}

impl Plan {
    /// From 1 to 64 ranks, log-uniform, with faults of every kind.
    pub fn any(seed: u64) -> Self {
        let mut rng = Rng::new(seed ^ 0x5eed);
        let exponent = rng.below(1 << 16) as f64 / f64::from(1 << 16);
        let world = 64_f64.powf(exponent).round() as u32;
        let each = u64::from(world) * 40;
        Self {
            world,
            jobs: 1 + rng.below(2) as u32,
            saves: 1 + rng.below(3),
            travel: Travel {
                lost: [0, each, each / 4][rng.below(3) as usize],
                late: [10, 2_000, 30_000][rng.below(3) as usize],
            },
            deadly: [0, each * 4, each][rng.below(3) as usize],
            wrong: [0, u64::from(world) * 4][rng.below(2) as usize],
            patience: [5_000, 100_000][rng.below(2) as usize],
            overwrite: rng.one_in(2),
        }
    }

    /// The same without faults.
    pub fn calm(seed: u64) -> Self {
        let travel = Travel { lost: 0, late: 100 };
        Self { jobs: 1, travel, deadly: 0, wrong: 0, patience: 60_000_000, ..Self::any(seed) }
    }
}

/// Runs one seed; returns how saves ended, with the number of ranks that were told so.
///
/// # Panics
/// When a promise is broken, with the seed.
pub(super) fn run(seed: u64, plan: &Plan) -> BTreeMap<String, u64> {
    let threads = (plan.jobs * plan.world) as usize;
    let scheduler = Arc::new(Scheduler::new(seed, threads, plan.deadly));
    let root = Arc::new(Root::new(seed, scheduler.clone()));
    let outcomes = Arc::new(Mutex::new(BTreeMap::new()));
    let mut handles = Vec::with_capacity(threads);
    for job in 0..plan.jobs {
        let first = (job * plan.world) as usize;
        let wire = Arc::new(Wire::new(scheduler.clone(), first, plan.travel));
        // The second job begins while the first one saves.
        let start = u64::from(job) * scheduler.with_rng(|rng| rng.below(plan.patience * plan.saves));
        for rank in 0..plan.world {
            let thread = first + rank as usize;
            let medium = Medium { root: root.clone(), thread, rank, world: plan.world };
            let member = Member { rank, world: plan.world, local_rank: 0 };
            let at = Arc::new(At { wire: wire.clone(), member });
            let (plan, outcomes, scheduler) = (plan.clone(), outcomes.clone(), scheduler.clone());
            let body = move || {
                scheduler.enter(thread);
                let _left = Leaving { scheduler: &scheduler, thread };
                scheduler.sleep(thread, start);
                Rank { plan: &plan, medium, at, outcomes: &outcomes }.live();
            };
            let built = std::thread::Builder::new().stack_size(256 << 10).spawn(body);
            handles.push(built.expect("a thread for each rank"));
        }
    }
    let mut broken = None;
    for payload in handles.into_iter().filter_map(|handle| handle.join().err()) {
        if payload.is::<Killed>() {
            note(&outcomes, "died");
        } else {
            broken = Some(payload);
        }
    }
    if let Some(payload) = broken {
        resume_unwind(payload);
    }
    std::mem::take(&mut *outcomes.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Tells the scheduler when a thread has ended, or died.
struct Leaving<'a> {
    scheduler: &'a Scheduler,
    thread: usize,
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.scheduler.leave(self.thread);
    }
}

fn note(outcomes: &Mutex<BTreeMap<String, u64>>, outcome: &str) {
    *outcomes.lock().unwrap_or_else(PoisonError::into_inner).entry(outcome.to_owned()).or_default() += 1;
}

/// One rank of a job.
struct Rank<'a> {
    plan: &'a Plan,
    medium: Medium,
    at: Arc<At>,
    outcomes: &'a Mutex<BTreeMap<String, u64>>,
}

impl Rank<'_> {
    fn live(&self) {
        let scheduler = &self.medium.root.scheduler;
        let deadline = scheduler.instant(scheduler.now() + 10 * self.plan.patience);
        let Ok(group) = Group::meet(self.at.clone(), Arc::new(self.medium.clone()), "run", deadline) else {
            return note(self.outcomes, "unmet");
        };
        let mut known = Structures::none();
        for save in 0..self.plan.saves {
            let patience = self.plan.patience + scheduler.with_rng(|rng| rng.below(self.plan.patience));
            let due = scheduler.now() + patience;
            let told = self.save(&group, save, &mut known, due);
            let (now, seed) = (scheduler.now(), self.medium.root.seed);
            // Operations on the storage take a microsecond each, for every thread.
            let slack = 20_000 + 200 * u64::from(self.plan.world * self.plan.jobs);
            // A rank listens a second longer, and tells others of its failure for five.
            let grace = 1_000_000 + 5_000_000 * u64::from(told.is_err());
            assert!(now <= due + slack + grace, "seed={seed}: waited past the deadline: {now} {due}");
            note(
                self.outcomes,
                &told.map_or_else(|error| format!("{:?}", error.kind()).to_lowercase(), |()| "durable".into()),
            );
        }
    }

    /// One save, as the thread that commits carries it out.
    fn save(&self, group: &Group, save: u64, known: &mut Structures, due: u64) -> Result<()> {
        let (medium, scheduler) = (&self.medium, &self.medium.root.scheduler);
        let deadline = scheduler.instant(due);
        let first = group.member.rank == 0;
        let (other, fails) = scheduler.with_rng(|rng| (rng.one_in(self.plan.wrong), rng.one_in(self.plan.wrong)));
        let step = save + 100 * u64::from(other);
        let (name, overwrite) = (format!("step-{step}"), self.plan.overwrite);
        let description = format!("rank {} 12345678", group.member.rank).into_bytes();
        let vote = Vote { step, name: name.clone(), overwrite, structure: identity(&description), error: None };
        let mut begun = None;
        let agreed = if first {
            let mut begin = || {
                begun = Some(group.begin(save, &name, overwrite)?);
                Ok(())
            };
            let mut assign = |describe: Describe<'_>| {
                (0..self.plan.world).try_for_each(|rank| describe(rank).map(drop))?;
                Ok((vec![Vec::new(); self.plan.world as usize], None))
            };
            group.decide(save, &vote, &description, None, known, &mut assign, &mut begin, deadline)
        } else {
            group.follow(save, &vote, &description, deadline)
        };
        let plan = match agreed {
            Ok(Agreed::Go { plan, .. }) => plan,
            Ok(Agreed::Refused(error)) => return Err(error),
            Ok(Agreed::Ended(_)) => return Err(Error::internal("no policy ends a save here")),
            Err(error) => {
                if !first {
                    let _ = group.withdraw(save, &error, deadline);
                }
                return Err(error);
            }
        };
        let attempt = begun.map_or_else(|| group.join(save, &name), Ok);
        let attempt = attempt.inspect_err(|error| drop(group.withdraw(save, error, deadline)))?;
        let id = group.attempt(save);
        let mut part = Simulated { attempt: attempt.as_ref(), group, step, save, plan, overwrite };
        let failed = fails.then(|| Error::new(ErrorKind::NoSpace, "the disk is full"));
        let ended = group.end(save, attempt.as_ref(), &mut part, failed, deadline);
        match &ended {
            Ok(()) => medium.root.judge(id, true),
            Err(error) if error.kind() != ErrorKind::Indeterminate => {
                if first {
                    attempt.abandon()?;
                }
                medium.root.judge(id, false);
            }
            Err(_) => {}
        }
        ended
    }
}

struct Simulated<'a> {
    attempt: &'a dyn SharedWriting,
    group: &'a Group,
    step: u64,
    save: u64,
    plan: Digest,
    overwrite: bool,
}

impl Part for Simulated<'_> {
    fn overwrite(&self) -> bool {
        self.overwrite
    }

    fn seal(&mut self) -> Result<Receipt> {
        self.attempt.put("files", &[])?;
        self.attempt.sync_names()?;
        let (step, plan, digest) = (self.step, self.plan, Digest::EMPTY);
        Ok(Receipt { step, attempt: self.group.attempt(self.save), plan, bytes: 1, rows: 0, digest })
    }

    fn assemble(&mut self, _: &BTreeMap<u32, Receipt>) -> Result<()> {
        Ok(())
    }

    fn promise(&self) -> Result<()> {
        Ok(())
    }

    fn begin_publish(&self) -> Result<()> {
        Ok(())
    }
}
