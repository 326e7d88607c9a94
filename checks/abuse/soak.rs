//! Saves very many times in one process while calls fail at random, and looks whether anything grows.
//!
//! ```text
//! soak ROOT SAVES [SEED]
//! ```
//!
//! One save in twenty meets a system call that fails once. Fsyncs do nothing, because no power is lost here.
//! Memory, descriptors, threads and entries of the root are counted when a fifth of the saves has been made
//! and at the end. A publish whose outcome is unknown keeps its owner record, locked, as long as the executor
//! lives; the next executor deletes it. Every 250 saves the newest step is read and compared with what was
//! saved.

use ashore::storage::local::{Linux, Local};
use ashore::testing::{Call, Effect, Fault, Faulty};
use ashore::{CheckpointExecutor, Error, ErrorKind, Outcome, Result, StateDict};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

const WAIT: Duration = Duration::from_secs(60);
const KEPT: usize = 3;
/// The hint and the run log.
const BESIDE: usize = 2;
/// Entries of failed attempts that only the hourly sweep finds, because the sweeps after them failed, too.
const WAITING: usize = 8;
/// What the allocator may keep beyond what is in use.
const SLACK_KIB: u64 = 4096;
const CALLS: [Call; 8] =
    [Call::Open, Call::Mkdir, Call::Pwrite, Call::Fsync, Call::Ftruncate, Call::Rename, Call::Unlink, Call::List];
const ERRORS: [i32; 3] = [5, 28, 116]; // EIO, ENOSPC, ESTALE

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize| arguments.get(at).map(|text| text.parse::<u64>().map_err(|_| wrong("give numbers")));
    let root = arguments.first().ok_or_else(|| wrong("give a root and a number of saves"))?;
    let saves = number(1).ok_or_else(|| wrong("give a number of saves"))??;
    let seed = number(2).unwrap_or(Ok(u64::from(std::process::id())))?;
    println!("seed {seed}");
    soak(Path::new(root), saves, seed)
}

fn wrong(what: &str) -> Error {
    Error::new(ErrorKind::Invalid, what)
}

fn content(step: u64) -> Vec<u64> {
    (0..500 + step % 700).map(|at| step << 20 ^ at).collect()
}

fn soak(root: &Path, saves: u64, mut numbers: u64) -> Result<()> {
    let sys = Faulty::unsynced(Arc::new(Linux));
    let storage = Local::with_sys(sys.clone(), root)?;
    let builder = CheckpointExecutor::builder(root).storage(Arc::new(storage));
    let executor = builder.arena(64 << 10).chunk(16 << 10).keep_last(KEPT).build()?;
    let mut below = |bound: u64| {
        // An xorshift generator is enough to choose faults.
        numbers ^= numbers << 13 | 1;
        numbers ^= numbers >> 7;
        numbers ^= numbers << 17;
        numbers % bound
    };
    let (mut durable, mut failed, mut unknown, mut newest, mut usages) = (0_u64, 0_u64, 0_usize, 0, Vec::new());
    let (began, mut open) = (Instant::now(), Vec::new());
    for step in 1..=saves {
        // Before it is counted what the process holds, one save meets no fault, and what failed is tidied up.
        let counted = step == saves / 5 || step == saves;
        if counted {
            sys.heal();
        } else if below(20) == 0 {
            let call = Some(CALLS[below(CALLS.len() as u64) as usize]);
            let effect = Effect::Refused(ERRORS[below(ERRORS.len() as u64) as usize]);
            sys.fail(Fault { call, after: below(6), sticky: false, effect });
        }
        let mut state = StateDict::new();
        state.tensor("t", Arc::new(content(step)))?.value("step", &step)?;
        match executor.save(step, state).and_then(|save| save.wait(WAIT)) {
            Ok(Outcome::Durable(_)) => (durable, newest) = (durable + 1, step),
            Ok(outcome) => return Err(wrong(&format!("a save gave way {outcome:?}"))),
            Err(error) if matches!(error.kind(), ErrorKind::Deadline | ErrorKind::Internal) => return Err(error),
            Err(error) => {
                failed += 1;
                unknown += usize::from(error.kind() == ErrorKind::Indeterminate);
            }
        }
        if step % 250 == 0 {
            sys.heal();
            sys.forget_log();
            let checkpoint = executor.checkpoint(newest)?;
            if checkpoint.read_as::<u64>("t")? != content(newest) || !checkpoint.verify()?.is_sound() {
                return Err(wrong(&format!("a step holds what was not saved step={newest}")));
            }
        }
        if counted {
            usages.push(Usage::settled(root)?);
            open = sys.open_descriptors();
        }
    }
    let [early, late] = &usages[..] else { return Err(wrong("give at least ten saves")) };
    executor.shutdown(WAIT)?;
    drop(executor);
    let next = CheckpointExecutor::builder(root).arena(64 << 10).chunk(16 << 10).build()?;
    next.shutdown(WAIT)?;
    let left = Usage::now(root)?.entries;
    let took = began.elapsed().as_secs_f64();
    println!("{durable} durable, {failed} failed, {unknown} of them unknown, in {took:.0} s");
    println!("{early:?} became {late:?}, and the next executor left {left} entries");
    let grown = late.memory_kib > early.memory_kib + SLACK_KIB
        || late.descriptors > early.descriptors + unknown
        || late.threads > early.threads
        || late.entries > KEPT + BESIDE + WAITING + unknown
        || left > KEPT + BESIDE + unknown;
    if grown {
        return Err(wrong(&format!("something grows open={open:?}")));
    }
    if failed * 200 < saves {
        return Err(wrong("hardly any save failed, so the run shows little"));
    }
    Ok(())
}

/// What a process holds.
#[derive(Debug)]
struct Usage {
    memory_kib: u64,
    descriptors: usize,
    threads: usize,
    /// Entries of the root.
    entries: usize,
}

impl Usage {
    /// What the process holds when the tidying thread has caught up: when it has not changed for a while.
    fn settled(root: &Path) -> Result<Self> {
        let until = Instant::now() + Duration::from_secs(20);
        let mut last = Self::now(root)?;
        loop {
            std::thread::sleep(Duration::from_millis(300));
            let now = Self::now(root)?;
            let same = (now.descriptors, now.entries) == (last.descriptors, last.entries);
            if same || Instant::now() > until {
                return Ok(now);
            }
            last = now;
        }
    }

    fn now(root: &Path) -> Result<Self> {
        let count = |path: &Path| {
            std::fs::read_dir(path).map(Iterator::count).map_err(|e| Error::io("cannot list", e).with_path(path))
        };
        let status =
            std::fs::read_to_string("/proc/self/status").map_err(|e| Error::io("cannot read the status", e))?;
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"));
        let memory_kib = resident.and_then(|kib| kib.parse().ok()).ok_or_else(|| wrong("no VmRSS in the status"))?;
        Ok(Self {
            memory_kib,
            descriptors: count(Path::new("/proc/self/fd"))?,
            threads: count(Path::new("/proc/self/task"))?,
            entries: count(root)?,
        })
    }
}
