//! Jobs that save the same steps into one root: runs each rank, and checks the outcomes that it is told.

use super::medium::{Medium, Root};
use super::messages::{At, Travel, Wire};
use super::place::{Asked, Desk, Manners, Place, slack};
use super::scheduler::{Body, Clock, Killed, Rng, Scheduler};
use crate::commit::several::end::Part;
use crate::commit::several::message::Receipt;
use crate::commit::several::{Agreed, Describe, Group, Structures, Vote, identity};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::ranks::board::OnBoard;
use crate::ranks::{Coordinator, Hello, Member};
use crate::storage::shared::SharedWriting;
use std::collections::BTreeMap;
use std::panic::resume_unwind;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// How messages travel between ranks.
#[derive(Clone, Copy, Debug)]
pub(super) enum By {
    /// A coordinator that loses, delays and repeats messages.
    Wire(Travel),
    /// The production coordinator, over a board.
    Board(Manners),
}

/// The parameters of the simulation of a seed. Times are in microseconds.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub world: u32,
    pub jobs: u32,
    pub saves: u64,
    pub by: By,
    /// How much clocks are ahead, and how much they gain or lose in a second, at most.
    pub clocks: (u64, u64),
    /// True if two jobs have the same run token: the second job is the first job started again.
    pub one_token: bool,
    /// A rank dies at one in this many steps; 0: never.
    pub deadly: u64,
    /// Rank 0 of the first job dies at this step of its own; 0: never.
    pub first_dies: u64,
    /// A rank saves another step, or fails, in one of this many saves; 0: never.
    pub wrong: u64,
    /// The time limit of a save is between this and twice as much.
    pub patience: u64,
    pub overwrite: bool,
}

impl Plan {
    /// From 1 to 64 ranks, log-uniform, with faults of every kind.
    pub fn any(seed: u64) -> Self {
        let exponent = Rng::new(seed ^ 0x5eed).below(1 << 16) as f64 / f64::from(1 << 16);
        Self::of(seed, 64_f64.powf(exponent).round() as u32)
    }

    /// `world` ranks, with faults of every kind.
    pub fn of(seed: u64, world: u32) -> Self {
        let mut rng = Rng::new(seed ^ 0xfa17);
        let each = u64::from(world) * 40;
        let patience = [5_000, 100_000][rng.below(2) as usize];
        let late = [10, 2_000, 30_000][rng.below(3) as usize];
        let lost = [0, each, each / 4][rng.below(3) as usize];
        let by = if rng.one_in(2) {
            By::Wire(Travel { lost, late })
        } else {
            let from = rng.below(patience * 4);
            By::Board(Manners {
                server: rng.one_in(2),
                per_host: [1, 2, 8][rng.below(3) as usize],
                late,
                lost,
                takes: [0, 20, 500, 5_000][rng.below(4) as usize],
                slander: [0, 1_000][rng.below(2) as usize],
                outage: if rng.one_in(4) { (from, from + rng.below(patience * 4)) } else { (0, 0) },
            })
        };
        Self {
            world,
            jobs: 1 + rng.below(2) as u32,
            saves: 1 + rng.below(3),
            by,
            clocks: [(0, 0), (1_000_000_000, 200), (1_000_000, 100_000)][rng.below(3) as usize],
            one_token: rng.one_in(2),
            deadly: [0, each * 4, each][rng.below(3) as usize],
            first_dies: if rng.one_in(4) { 1 + rng.below(30 + 8 * u64::from(world)) } else { 0 },
            wrong: [0, u64::from(world) * 4][rng.below(2) as usize],
            patience,
            overwrite: rng.one_in(2),
        }
    }

    /// As `any`, without faults. With `board`, uses the production coordinator.
    pub fn calm(seed: u64, board: bool) -> Self {
        let manners = Manners { server: seed % 2 == 1, late: 100, takes: 20, ..Manners::PERFECT };
        let by = if board { By::Board(manners) } else { By::Wire(Travel { lost: 0, late: 100 }) };
        Self { jobs: 1, by, deadly: 0, first_dies: 0, wrong: 0, patience: 60_000_000, ..Self::any(seed) }
    }

    fn clock(&self, rng: &mut Rng) -> Clock {
        let (ahead, gain) = self.clocks;
        Clock { ahead: rng.below(ahead + 1), gain: rng.below(2 * gain + 1) as i64 - gain as i64 }
    }
}

/// The result of a seed.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// The outcomes of saves, each with the number of ranks that were told this outcome.
    pub outcomes: BTreeMap<String, u64>,
    /// The order in which ranks ran, equal for two runs of a seed.
    pub trace: u64,
    /// The operations that rank 0 and rank 1 of the first job requested of the board: when they met, and in
    /// each save.
    pub asked: [Vec<Asked>; 2],
}

/// Runs one seed. `turn` is called before and after each turn of a rank.
///
/// # Panics
/// When a promise is broken. The message has the seed.
pub(super) fn run(seed: u64, plan: &Plan, turn: &mut dyn FnMut(usize, bool)) -> Seen {
    let mut rng = Rng::new(seed ^ 0xc10c);
    let clocks = (0..plan.jobs * plan.world).map(|_| plan.clock(&mut rng)).collect();
    let scheduler = Arc::new(Scheduler::new(seed, clocks, plan.deadly, plan.first_dies));
    let root = Arc::new(Root::new(seed, scheduler.clone()));
    let seen = Arc::new(Mutex::new(Seen::default()));
    let place = match plan.by {
        By::Board(manners) => Some(Arc::new(Place::new(scheduler.clone(), seed, manners))),
        By::Wire(_) => None,
    };
    let mut bodies = Vec::<Body>::new();
    for job in 0..plan.jobs {
        let first = (job * plan.world) as usize;
        let travel = if let By::Wire(travel) = plan.by { travel } else { Travel { lost: 0, late: 0 } };
        let wire = Arc::new(Wire::new(scheduler.clone(), first, travel));
        // The second job begins while the first one saves.
        let start = u64::from(job) * scheduler.with_rng(|rng| rng.below(plan.patience * plan.saves));
        for rank in 0..plan.world {
            let thread = first + rank as usize;
            let medium = Medium { root: root.clone(), thread, rank, world: plan.world };
            let member = Member { rank, world: plan.world, local_rank: 0 };
            let (plan, seen, wire) = (plan.clone(), seen.clone(), wire.clone());
            let desk = place.clone().map(|place| Desk { place, thread });
            bodies.push(Box::new(move || {
                medium.root.scheduler.sleep(thread, start);
                Rank { plan: &plan, medium, member, wire, desk, job, seen: &seen }.live();
            }));
        }
    }
    let mut broken = None;
    for payload in scheduler.run(bodies, turn).into_iter().filter_map(Result::err) {
        if payload.is::<Killed>() {
            note(&seen, "died");
        } else {
            broken = Some(payload);
        }
    }
    if let Some(payload) = broken {
        eprintln!("seed={seed} {plan:?}");
        resume_unwind(payload);
    }
    let mut seen = std::mem::take(&mut *lock(&seen));
    seen.trace = scheduler.trace();
    seen
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

fn note(seen: &Mutex<Seen>, outcome: &str) {
    *lock(seen).outcomes.entry(outcome.to_owned()).or_default() += 1;
}

/// One rank of a job.
struct Rank<'a> {
    plan: &'a Plan,
    medium: Medium,
    member: Member,
    wire: Arc<Wire>,
    desk: Option<Desk>,
    job: u32,
    seen: &'a Mutex<Seen>,
}

impl Rank<'_> {
    fn live(&self) {
        let (scheduler, me) = (&self.medium.root.scheduler, self.medium.thread);
        let mut asked = self.asked();
        let deadline = scheduler.instant(me, scheduler.now()) + Duration::from_micros(10 * self.plan.patience);
        let coordinator: Arc<dyn Coordinator> = match self.desk.clone() {
            Some(desk) => Arc::new(OnBoard::new(desk, self.member).expect("a rank of its world")),
            None => Arc::new(At { wire: self.wire.clone(), member: self.member }),
        };
        let per_host = if let By::Board(manners) = self.plan.by { manners.per_host } else { 8 };
        let hello = Hello {
            member: self.member,
            nonce: Uuid::new_v4(),
            token: if self.plan.one_token { "run".to_owned() } else { format!("run-{}", self.job) },
            host: format!("host-{}", me / per_host),
            pid: me as u32,
        };
        let met = Group::meet_as(&hello, coordinator, Arc::new(self.medium.clone()), &|_| (), deadline);
        self.check_deadline(deadline, false);
        self.count(&mut asked);
        let Ok(group) = met else { return note(self.seen, "unmet") };
        let mut known = Structures::none();
        for save in 0..self.plan.saves {
            let patience = self.plan.patience + scheduler.with_rng(|rng| rng.below(self.plan.patience));
            let deadline = scheduler.instant(me, scheduler.now()) + Duration::from_micros(patience);
            let told = self.save(&group, save, &mut known, deadline);
            self.check_deadline(deadline, told.is_err());
            self.count(&mut asked);
            let outcome = told.map_or_else(|error| format!("{:?}", error.kind()).to_lowercase(), |()| "durable".into());
            note(self.seen, &outcome);
        }
    }

    /// Checks that no call exceeds its deadline by more than the rules allow.
    fn check_deadline(&self, deadline: Instant, failed: bool) {
        let scheduler = &self.medium.root.scheduler;
        let now = scheduler.instant(self.medium.thread, scheduler.now());
        let (slack, outage) = match &self.plan.by {
            By::Board(manners) => (slack(manners), manners.outage.1 > 0),
            By::Wire(_) => (Duration::ZERO, false),
        };
        // A few operations follow.
        let slack = Duration::from_millis(30) + slack * 20;
        // After the deadline a rank listens, and rank 0 looks, for another second. A rank tells others of its
        // failure for five seconds.
        let grace = Duration::from_secs(1 + 5 * u64::from(failed && (self.member.rank > 0 || outage)));
        let seed = self.medium.root.seed;
        let late = now.saturating_duration_since(deadline + grace + slack);
        assert!(late.is_zero(), "seed={seed}: waited past the deadline: {late:?} rank={}", self.member.rank);
    }

    fn asked(&self) -> Asked {
        self.desk.as_ref().map(|desk| desk.place.asked(desk.thread)).unwrap_or_default()
    }

    /// Counts what this rank has requested of the board since `before`.
    fn count(&self, before: &mut Asked) {
        let now = self.asked();
        if let (0, Some(asked)) = (self.job, lock(self.seen).asked.get_mut(self.member.rank as usize)) {
            asked.push(now.since(*before));
        }
        *before = now;
    }

    /// Carries out one save like the committer.
    fn save(&self, group: &Group, save: u64, known: &mut Structures, deadline: Instant) -> Result<()> {
        let (medium, scheduler) = (&self.medium, &self.medium.root.scheduler);
        let first = group.member.rank == 0;
        let (other, fails) = scheduler.with_rng(|rng| (rng.one_in(self.plan.wrong), rng.one_in(self.plan.wrong)));
        let step = save + 100 * u64::from(other);
        let (name, overwrite) = (format!("step-{step}"), self.plan.overwrite);
        let description = format!("rank {} 12345678", group.member.rank).into_bytes();
        let vote =
            Vote { fresh: false, step, name: name.clone(), overwrite, structure: identity(&description), error: None };
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
