//! A job that saves steps of a known content, and a look at what it has left. What both print is judged.

use crate::{admits, wrong};
use ashore::ranks::{Coordinator, Member};
use ashore::{Catalog, Checkpoint, CheckpointExecutor, Error, HostTensor, Result, StateDict};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

const ROWS: usize = 60;
const COLUMNS: usize = 200;

/// What the tensors hold at a step: every number belongs to its step and place alone.
fn content(step: u64, rows: Range<usize>) -> Vec<u64> {
    (rows.start * COLUMNS..rows.end * COLUMNS).map(|at| step * 1_000_003 + at as u64).collect()
}

fn rows_of(Member { rank, world, .. }: Member) -> Range<usize> {
    ROWS * rank as usize / world as usize..ROWS * (rank as usize + 1) / world as usize
}

/// Goes on from the newest step, and saves until `steps` more are durable or a save fails: one process
/// without ranks where `ranks` is None.
pub fn saves(ranks: Option<Arc<dyn Coordinator>>, root: &str, steps: &str, timeout_ms: &str) -> Result<()> {
    let number = |text: &str| text.parse::<u64>().map_err(|_| wrong("steps and timeout are numbers"));
    let (steps, timeout) = (number(steps)?, Duration::from_millis(number(timeout_ms)?));
    let alone = Member { rank: 0, world: 1, local_rank: 0 };
    let member = ranks.as_ref().map_or(alone, |ranks| ranks.member());
    let began = Instant::now();
    let builder = CheckpointExecutor::builder(root).arena(64 << 10).chunk(16 << 10).keep_last(2).save_timeout(timeout);
    let builder = match ranks {
        Some(ranks) => builder.ranks(ranks),
        None => builder.alone(),
    };
    let builder = match admits::recorded(root)? {
        Some(storage) => builder.storage(storage),
        None => builder,
    };
    let executor = match builder.build() {
        Ok(executor) => executor,
        Err(error) => {
            told("refused", 0, &error, began);
            return Ok(());
        }
    };
    let mine = rows_of(member);
    let newest = executor.latest()?;
    if let Some(newest) = &newest {
        same(newest, "weights", mine.clone())?;
    }
    let newest = newest.map_or(0, |newest| newest.step());
    println!("met newest={newest}");
    for step in newest + 1..=newest + steps {
        let began = Instant::now();
        let rows = HostTensor::new(Arc::new(content(step, mine.clone())), [mine.len(), COLUMNS]);
        let mut state = StateDict::new();
        state.tensor_box("weights", [ROWS, COLUMNS], [mine.start, 0], rows)?;
        // Every rank holds it, and one writes it.
        state.tensor("shared", HostTensor::new(Arc::new(content(step, 0..1)), [1, COLUMNS]))?;
        state.value("step", &step)?.rank_value("rank", &member.rank)?;
        let saved = executor.save(step, state).and_then(|save| save.wait(timeout + Duration::from_secs(30)));
        match saved.map(ashore::Outcome::committed) {
            Ok(Some(committed)) => println!("durable step={step} attempt={}", committed.attempt),
            Ok(None) => return Err(wrong("a save was skipped")),
            Err(error) => {
                told("failed", step, &error, began);
                break;
            }
        }
    }
    let ended = executor.shutdown(Duration::from_secs(30));
    println!("left clean={}", ended.is_ok());
    Ok(())
}

fn told(what: &str, step: u64, error: &Error, began: Instant) {
    let (kind, ranks, after) = (error.kind(), error.ranks(), began.elapsed().as_millis());
    println!("{what} step={step} kind={kind:?} ranks={ranks:?} after_ms={after} {error:#}");
}

/// Verifies every listed step, byte by byte, and compares it with what it must hold.
pub fn look(root: &str) -> Result<()> {
    let catalog = Catalog::open(root)?;
    for entry in catalog.list()? {
        let checkpoint = catalog.checkpoint(entry.step)?;
        let report = checkpoint.verify()?;
        if !report.is_sound() {
            return Err(wrong(&format!("a listed step is damaged step={} {report:?}", entry.step)));
        }
        same(&checkpoint, "weights", 0..ROWS)?;
        same(&checkpoint, "shared", 0..1)?;
        for rank in 0..checkpoint.world() {
            if checkpoint.rank_value::<u32>(rank, "rank")? != rank {
                return Err(wrong(&format!("the value of a rank is another rank's step={} rank={rank}", entry.step)));
            }
        }
        println!("step={} attempt={} world={}", checkpoint.step(), checkpoint.attempt(), checkpoint.world());
    }
    Ok(())
}

fn same(checkpoint: &Checkpoint, name: &str, rows: Range<usize>) -> Result<()> {
    let step = checkpoint.step();
    let read = checkpoint.read_slice_as::<u64>(name, &[rows.clone(), 0..COLUMNS])?;
    let value: u64 = checkpoint.value("step")?;
    if read == content(step, rows) && value == step {
        return Ok(());
    }
    Err(wrong(&format!("a step holds what was not saved step={step} tensor={name} value={value}")))
}
