//! Several processes and threads use one root in every way at once, for a time.
//!
//! ```text
//! abuse ROOT SECONDS [SEED]   starts two processes of four threads each
//! ```
//!
//! Each thread saves, overwrites, saves borrowed tensors in a scope, cancels, prunes, reads, verifies and
//! sweeps, in a random order. A step holds bytes that follow from its number and a number drawn for its save,
//! so every step that is read can be judged. A step that was reported durable is listed until eight newer
//! ones are.

use ashore::storage::Sweep;
use ashore::{
    CheckpointExecutor, Error, ErrorKind, Fence, Outcome, Overlap, PruneOptions, Result, Retention, Save, SaveOptions,
    StateDict,
};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const THREADS: u64 = 4;
const PROCESSES: u64 = 2;
const KEPT: usize = 8;
const WAIT: Duration = Duration::from_secs(60);
/// A save that is waited for while the others hold the disk.
const LENGTHS: [usize; 4] = [0, 1000, 70_000, 300_000];

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let number = |text: &str| text.parse::<u64>().map_err(|_| wrong("seconds and seeds are numbers"));
    match arguments[..] {
        [root, seconds] => start(root, seconds, u64::from(std::process::id())),
        [root, seconds, seed] => start(root, seconds, number(seed)?),
        [root, seconds, seed, process] => work(Path::new(root), number(seconds)?, number(seed)?, number(process)?),
        _ => Err(wrong("give a root, seconds and perhaps a seed")),
    }
}

fn wrong(what: &str) -> Error {
    Error::new(ErrorKind::Invalid, what)
}

/// Starts the processes, and judges what they leave.
fn start(root: &str, seconds: &str, seed: u64) -> Result<()> {
    println!("seed {seed}");
    let program = std::env::current_exe().map_err(|e| Error::io("cannot find this program", e))?;
    let spawn =
        |process: u64| Command::new(&program).args([root, seconds, &seed.to_string(), &process.to_string()]).spawn();
    let children: Vec<_> = (0..PROCESSES).map(spawn).collect();
    for child in children {
        let ended = child.and_then(|mut child| child.wait()).map_err(|e| Error::io("cannot run a process", e))?;
        if !ended.success() {
            return Err(wrong(&format!("a process ended with {ended}")));
        }
    }
    // The next executor deletes what is left of attempts.
    let executor = CheckpointExecutor::builder(root).arena(64 << 10).chunk(16 << 10).build()?;
    let (entries, problems) = executor.catalog().survey()?;
    if !problems.is_empty() {
        return Err(wrong(&format!("there are damaged steps {problems:?}")));
    }
    for entry in &entries {
        judge(&executor, entry.step)?;
    }
    executor.shutdown(WAIT)?;
    let left: Vec<_> = std::fs::read_dir(root)
        .and_then(|entries| entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect())
        .map_err(|e| Error::io("cannot list the root", e))?;
    let left: Vec<_> = left.iter().filter(|name| name.starts_with(".step-") || name.starts_with(".trash-")).collect();
    println!("{} steps are left, and of attempts {left:?}", entries.len());
    if left.is_empty() { Ok(()) } else { Err(wrong("something of an attempt was left behind")) }
}

/// What the threads of a process share.
struct Shared {
    executor: CheckpointExecutor,
    next: AtomicU64,
    process: u64,
    until: Instant,
}

/// A generator of numbers: splitmix64.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

fn content(step: u64, drawn: u64) -> Vec<u64> {
    let mut numbers = Numbers(step ^ drawn.rotate_left(32));
    let length = LENGTHS[(drawn % LENGTHS.len() as u64) as usize] / 8;
    (0..length).map(|_| numbers.next()).collect()
}

fn work(root: &Path, seconds: u64, seed: u64, process: u64) -> Result<()> {
    let builder = CheckpointExecutor::builder(root).arena(256 << 10).chunk(32 << 10).overlap(Overlap::Queue(4));
    let until = Instant::now() + Duration::from_secs(seconds);
    let shared = Shared { executor: builder.build()?, next: AtomicU64::new(1), process, until };
    let counts = std::thread::scope(|scope| {
        let shared = &shared;
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| scope.spawn(move || abuse(shared, Numbers(seed ^ (process << 8 | thread) << 40))))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().map_err(|_| wrong("a thread panicked"))?)
            .collect::<Result<Vec<_>>>()
    })?;
    shared.executor.shutdown(WAIT)?;
    let mut all = BTreeMap::<&str, u64>::new();
    counts.into_iter().flatten().for_each(|(what, count)| *all.entry(what).or_default() += count);
    println!("process {process}: {all:?}");
    if all.get("durable").is_none_or(|&count| count < seconds) {
        return Err(wrong("hardly any save became durable, so the run shows nothing"));
    }
    Ok(())
}

/// One thread: random uses until the time is over.
fn abuse(shared: &Shared, mut numbers: Numbers) -> Result<BTreeMap<&'static str, u64>> {
    let mut counts = BTreeMap::new();
    while Instant::now() < shared.until {
        let executor = &shared.executor;
        let what = match numbers.below(12) {
            0..=3 => saved(shared, &mut numbers, SaveOptions::default(), false)?,
            4 => saved(shared, &mut numbers, SaveOptions::default().overwrite(), true)?,
            5 => borrowed(shared, &mut numbers)?,
            6 => cancelled(shared, &mut numbers)?,
            7 => {
                let pruned = executor.catalog().prune(&Retention::last(KEPT), PruneOptions::new());
                may_fail(pruned, &[ErrorKind::Conflict, ErrorKind::NotFound], "pruned")?
            }
            8 => may_fail(executor.catalog().sweep(Sweep::default()), &[], "swept")?,
            9 => {
                executor.fence()?;
                "fenced"
            }
            _ => {
                let listed = executor.catalog().list()?;
                match listed.len() as u64 {
                    0 => "empty",
                    count => judge(executor, listed[numbers.below(count) as usize].step)?,
                }
            }
        };
        *counts.entry(what).or_default() += 1;
    }
    Ok(counts)
}

fn may_fail<T>(result: Result<T>, kinds: &[ErrorKind], done: &'static str) -> Result<&'static str> {
    match result {
        Ok(_) => Ok(done),
        Err(error) if kinds.contains(&error.kind()) => Ok("refused"),
        Err(error) => Err(error),
    }
}

/// A number that no other thread and no other process has, above those before; or one that exists already.
fn number(shared: &Shared, numbers: &mut Numbers, again: bool) -> u64 {
    let next = shared.next.fetch_add(u64::from(!again), Ordering::Relaxed);
    let next = if again { next.saturating_sub(1 + numbers.below(KEPT as u64)).max(1) } else { next };
    next * PROCESSES + shared.process
}

fn state(step: u64, drawn: u64) -> Result<StateDict<'static>> {
    let mut state = StateDict::new();
    state.tensor("t", Arc::new(content(step, drawn)))?.value("drawn", &drawn)?;
    Ok(state)
}

fn saved(shared: &Shared, numbers: &mut Numbers, options: SaveOptions, again: bool) -> Result<&'static str> {
    let (step, drawn) = (number(shared, numbers, again), numbers.next());
    ended(shared, step, shared.executor.save_with(step, state(step, drawn)?, options))
}

fn borrowed(shared: &Shared, numbers: &mut Numbers) -> Result<&'static str> {
    let (step, drawn) = (number(shared, numbers, false), numbers.next());
    let mut tensor = content(step, drawn);
    let save = shared.executor.scope(Fence::host(), |scope| {
        let mut state = StateDict::new();
        state.tensor("t", &tensor[..])?.value("drawn", &drawn)?;
        scope.save(step, state)
    });
    // The scope has ended, so that the tensor may be written.
    tensor.fill(0);
    ended(shared, step, save.and_then(|save| save))
}

fn cancelled(shared: &Shared, numbers: &mut Numbers) -> Result<&'static str> {
    let (step, drawn) = (number(shared, numbers, false), numbers.next());
    let save = shared.executor.save(step, state(step, drawn)?);
    if let Ok(save) = &save {
        std::thread::sleep(Duration::from_micros(numbers.below(5000)));
        save.cancel();
    }
    ended(shared, step, save)
}

/// Waits for a save, and looks whether what it says is true.
fn ended(shared: &Shared, step: u64, save: Result<Save>) -> Result<&'static str> {
    match save.and_then(|save| save.wait(WAIT)) {
        Ok(Outcome::Durable(_)) => {
            let listed = shared.executor.catalog().list()?;
            let newer = listed.iter().filter(|entry| entry.step > step).count();
            if newer < KEPT && !listed.iter().any(|entry| entry.step == step) {
                return Err(wrong(&format!("a durable step is not listed step={step} listed={listed:?}")));
            }
            Ok("durable")
        }
        Ok(_) => Ok("gave way"),
        Err(error) => match error.kind() {
            ErrorKind::Conflict | ErrorKind::Cancelled | ErrorKind::Busy => Ok("refused"),
            _ => Err(error),
        },
    }
}

/// Reads a step, if it is still there, and compares every byte with what was saved.
fn judge(executor: &CheckpointExecutor, step: u64) -> Result<&'static str> {
    let checkpoint = match executor.checkpoint(step) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok("gone"),
        checkpoint => checkpoint?,
    };
    let drawn: u64 = checkpoint.value("drawn")?;
    if checkpoint.read_as::<u64>("t")? != content(step, drawn) || !checkpoint.verify()?.is_sound() {
        return Err(wrong(&format!("a step holds what was not saved step={step}")));
    }
    Ok("read")
}
