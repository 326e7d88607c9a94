//! One rank: a process that the first process started, and that carries out its orders.

use super::words::{Answer, Order, Saved, Written, clock, nanos, now};
use crate::bench::usage::{Cpu, Peak};
use crate::bench::workload::State;
use crate::bench::{Bench, PATIENCE};
use crate::limit::{self, Config, Memory};
use crate::out;
use ashore::ranks::{Coordinator, Hello, Member, Phase, Round, Session, SharedDirectory};
use ashore::{CheckpointExecutor, Error, ErrorKind, Result};
use std::io::BufRead;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

pub fn serve(bench: &Bench<'_>, world: u32, told: &[String]) -> Result<()> {
    let wrong = || Error::new(ErrorKind::Invalid, "a rank is started by `bench save --ranks N`");
    let [rank, token] = told else { return Err(wrong()) };
    let rank = rank.parse().map_err(|_| wrong())?;
    let member = Member { rank, world, local_rank: rank };
    let ended = Rank::start(bench, member, token).and_then(|mut rank| {
        let answer = rank.met();
        out::json(&answer)?;
        // The end of the first process ends its ranks.
        for line in std::io::stdin().lock().lines() {
            let line = line.map_err(|e| Error::io("cannot read what the first process orders", e))?;
            let order = serde_json::from_str(&line).map_err(|e| wrong().with_source(e))?;
            out::json(&rank.carry_out(order)?)?;
        }
        Ok(())
    });
    // The first process reports the error.
    ended.or_else(|error| out::json(&Answer::Failed(format!("{error:#}"))))
}

struct Rank<'a> {
    bench: &'a Bench<'a>,
    member: Member,
    state: State,
    timed: Arc<Timed>,
    executor: CheckpointExecutor,
    memory: Option<(Config, Memory)>,
    peak: Peak,
}

impl<'a> Rank<'a> {
    fn start(bench: &'a Bench<'a>, member: Member, token: &str) -> Result<Self> {
        let (rank, world) = (member.rank as usize, member.world as usize);
        let state = State::share(bench.args.workload, bench.args.scale, rank, world);
        let peak = Peak::watch();
        let ranks = Box::new(SharedDirectory::new(bench.dir, member)?);
        let timed = Arc::new(Timed { ranks, last_receipt: AtomicU64::new(0), published: AtomicU64::new(0) });
        let executor = bench.builder().save_timeout(PATIENCE).ranks(timed.clone()).run(token).build()?;
        Ok(Self { bench, member, state, timed, executor, memory: None, peak })
    }

    fn met(&self) -> Answer {
        let (arena, engine) = (self.executor.arena().report().bytes, self.executor.engine().to_owned());
        Answer::Met { bytes: self.state.bytes, arena, engine }
    }

    fn carry_out(&mut self, order: Order) -> Result<Answer> {
        match order {
            Order::Save { step } => self.save(step).map(Answer::Saved),
            Order::Write { files, config } => self.write(&files, config).map(Answer::Written),
            Order::End => {
                let peak = self.peak.bytes();
                self.executor.shutdown(PATIENCE)?;
                Ok(Answer::Left { peak })
            }
        }
    }

    fn save(&self, step: u64) -> Result<Saved> {
        let dict = self.state.dict()?;
        let (cpu, start, began) = (Cpu::now(), Instant::now(), now());
        let save = self.executor.save(step, dict)?;
        let call = nanos(start.elapsed());
        let Some(committed) = save.wait(PATIENCE * 2)?.committed() else {
            return Err(Error::new(ErrorKind::Internal, "a save was skipped"));
        };
        let used = Cpu::now().since(cpu);
        let of_rank_0 = |time: &AtomicU64| (self.member.rank == 0).then(|| time.load(Ordering::Relaxed));
        Ok(Saved {
            path: committed.path,
            began,
            call,
            staged: began + nanos(committed.staged),
            durable: began + nanos(committed.durable),
            stage_cpu: used.stage,
            rest_cpu: used.rest,
            io: committed.mode,
            last_receipt: of_rank_0(&self.timed.last_receipt),
            published: of_rank_0(&self.timed.published),
        })
    }

    fn write(&mut self, files: &[u64], config: Config) -> Result<Written> {
        if self.memory.as_ref().is_none_or(|(of, _)| *of != config) {
            self.memory = Some((config, Memory::new(config.chunk * config.depth as u64)));
        }
        let Some((_, memory)) = &mut self.memory else { return Err(Error::new(ErrorKind::Internal, "no memory")) };
        let attempt = limit::attempt(self.bench.dir);
        let began = Instant::now();
        let (_, mode) = limit::write_files(&attempt, &format!("rank-{}", self.member.rank), files, &config, memory)?;
        limit::sync_names(&attempt)?;
        Ok(Written { began: clock(began), durable: now(), io: mode })
    }
}

/// The coordinator of a rank. It notes when the last receipt of a save reached rank 0, and when rank 0 sent
/// the outcome.
#[derive(Debug)]
struct Timed {
    ranks: Box<dyn Coordinator>,
    last_receipt: AtomicU64,
    published: AtomicU64,
}

impl Coordinator for Timed {
    fn member(&self) -> Member {
        self.ranks.member()
    }

    fn meet(
        &self,
        hello: &Hello,
        open: &mut dyn FnMut(&[Hello]) -> Result<Session>,
        deadline: Instant,
    ) -> Result<Session> {
        self.ranks.meet(hello, open, deadline)
    }

    fn gather(
        &self,
        round: Round,
        message: &[u8],
        each: &mut dyn FnMut(u32, &[u8]) -> ControlFlow<()>,
        deadline: Instant,
    ) -> Result<()> {
        let mut timed = |rank: u32, message: &[u8]| {
            if round.phase == Phase::Receipt {
                self.last_receipt.store(now(), Ordering::Relaxed);
            }
            each(rank, message)
        };
        self.ranks.gather(round, message, &mut timed, deadline)
    }

    fn tell(&self, round: Round, message: Option<&[u8]>, deadline: Instant) -> Result<Vec<u8>> {
        if round.phase == Phase::Outcome {
            self.published.store(now(), Ordering::Relaxed);
        }
        self.ranks.tell(round, message, deadline)
    }

    fn missing(&self, round: Round) -> Vec<u32> {
        self.ranks.missing(round)
    }

    fn leave(&self) {
        self.ranks.leave();
    }
}
