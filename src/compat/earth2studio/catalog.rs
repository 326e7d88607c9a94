//! The catalog of a run: its settings, its rows, and the executor that commits them.

use super::metadata::Metadata;
use crate::catalog::Catalog;
use crate::checkpoint;
use crate::device::{Device, DeviceChoice};
use crate::error::{Error, ErrorKind, Result, found};
use crate::executor::CheckpointExecutor;
use crate::outcome::Outcome;
use crate::save::Save;
use crate::settings::Settings;
use crate::sync::{Mutex, lock};
use serde::{Deserialize, Serialize};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

/// What a commit does with earlier rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Replaces earlier rows: one row is kept.
    Overwrite,
    /// Adds a row to the earlier rows: the last `history_size` rows are kept.
    Append,
}

impl FromStr for Mode {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "overwrite" => Ok(Self::Overwrite),
            "append" => Ok(Self::Append),
            _ => Err(Error::invalid(format!("a mode must be overwrite or append mode={text:?}"))),
        }
    }
}

/// Collects the settings of a catalog.
///
/// ```
/// use ashore::compat::earth2studio::{Checkpoint, Mode};
/// # let directory = tempfile::tempdir().unwrap();
/// let catalog = Checkpoint::builder("forecast")
///     .path(directory.path())
///     .mode(Mode::Append)
///     .history_size(4)
///     .flush_interval(10)
///     .build()?;
/// assert_eq!(catalog.name(), "forecast");
/// assert!(catalog.catalog()?.is_empty()); // no row yet
/// # Ok::<(), ashore::Error>(())
/// ```
#[derive(Clone, Debug)]
#[must_use = "nothing happens until `build`"]
pub struct Builder {
    name: String,
    path: Option<PathBuf>,
    mode: Mode,
    flush_interval: Option<u64>,
    history_size: Option<usize>,
    level: u8,
    rank: Option<(u32, u32)>,
    device: DeviceChoice,
    /// Used instead of the device that `device` selects.
    made: Option<Arc<dyn Device>>,
    settings: Settings,
}

impl Builder {
    /// Sets the directory of the catalog. The default is `$EARTH2STUDIO_CACHE/checkpoints/<name>`; if the
    /// variable is not set, `~/.cache/earth2studio` replaces it.
    pub fn path(mut self, path: impl Into<PathBuf>) -> Self {
        self.path = Some(path.into());
        self
    }

    /// Sets what a commit does with earlier rows. The default is `Overwrite`.
    pub fn mode(mut self, mode: Mode) -> Self {
        self.mode = mode;
        self
    }

    /// Sets how many writes make a flush. The default is 1; None means that only `flush` flushes.
    pub fn flush_interval(mut self, writes: impl Into<Option<u64>>) -> Self {
        self.flush_interval = writes.into();
        self
    }

    /// Sets how many rows `Append` keeps. The default is all.
    pub fn history_size(mut self, rows: impl Into<Option<usize>>) -> Self {
        self.history_size = rows.into();
        self
    }

    /// Sets how much components keep, from 0 to 2. The default is 2. At 0 states are neither saved nor
    /// restored: a row has only the progress and the metadata. Components define what the other levels mean.
    pub fn level(mut self, level: u8) -> Self {
        self.level = level;
        self
    }

    /// Sets the rank of this process and the number of ranks. With more than one rank, each has its own
    /// directory. The default is what the launcher sets in the environment (`RANK` and `WORLD_SIZE`, or the
    /// variables of Slurm or Open MPI), or rank 0 of 1 without a launcher.
    pub fn rank(mut self, rank: u32, world_size: u32) -> Self {
        self.rank = Some((rank, world_size));
        self
    }

    /// Copies tensors with `device` instead of the host's CPU.
    pub fn device(mut self, device: DeviceChoice) -> Self {
        (self.device, self.made) = (device, None);
        self
    }

    /// Copies tensors with an existing device.
    #[doc(hidden)]
    pub fn made_device(mut self, device: Arc<dyn Device>) -> Self {
        self.made = Some(device);
        self
    }

    /// Sets the settings of the executor that commits, which is built at the first flush. The default has an
    /// arena of 64 MiB. `mode` and `history_size` replace the retention in these settings.
    pub fn settings(mut self, settings: Settings) -> Self {
        self.settings = settings;
        self
    }

    /// Builds the catalog. Touches no files.
    ///
    /// # Errors
    /// `Invalid`, naming the setting: a `flush_interval`, `history_size`, `level`, rank or setting that is
    /// out of range, a name that cannot be the name of a directory, or a missing path where no default is
    /// available.
    pub fn build(mut self) -> Result<Checkpoint> {
        let refuse = |why: &str, setting: String| Err(Error::invalid(format!("{why} {setting}")));
        if self.flush_interval == Some(0) {
            return refuse("an interval must be at least 1", "flush_interval=0".into());
        }
        if self.history_size == Some(0) {
            return refuse("a history must have at least 1 row", "history_size=0".into());
        }
        if self.level > 2 {
            return refuse("a level must be 0, 1 or 2", format!("level={}", self.level));
        }
        let (rank, world_size) = match self.rank {
            Some(given) => given,
            None => launched(|name| std::env::var(name).ok())?,
        };
        if rank >= world_size {
            return refuse("a rank must be below the number of ranks", format!("rank={rank} of={world_size}"));
        }
        if matches!(&*self.name, "" | "." | "..") || self.name.contains(['/', '\0']) {
            return refuse("the name of a catalog must be valid for a directory", format!("name={:?}", self.name));
        }
        self.settings.keep_last = if self.mode == Mode::Overwrite { Some(1) } else { self.history_size };
        self.settings.keep_every = None;
        self.settings.check()?;
        let path = match self.path.take() {
            Some(path) => path,
            None => cache()?.join("checkpoints").join(&self.name),
        };
        let checkpoint =
            Checkpoint(Arc::new(CatalogState { path, rank, world_size, given: self, line: Mutex::default() }));
        CURRENT.set(Arc::downgrade(&checkpoint.0));
        Ok(checkpoint)
    }
}

thread_local! {
    /// The catalog that was built last on this thread.
    static CURRENT: RefCell<Weak<CatalogState>> = const { RefCell::new(Weak::new()) };
}

/// The catalog that was built last on this thread, if it still exists.
pub(super) fn current() -> Option<Checkpoint> {
    CURRENT.with_borrow(Weak::upgrade).map(Checkpoint)
}

/// The rank and the number of ranks that a launcher set in the environment; 0 of 1 without a launcher.
fn launched(variable: impl Fn(&str) -> Option<String>) -> Result<(u32, u32)> {
    let launchers = [
        ("RANK", "WORLD_SIZE"),
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ];
    let number = |name: &str| {
        let wrong = |text: &str| Error::invalid(format!("a launcher's variable is not a number {name}={text:?}"));
        variable(name).map(|text| text.trim().parse::<u32>().map_err(|_| wrong(&text))).transpose()
    };
    for (rank, world_size) in launchers {
        match (number(rank)?, number(world_size)?) {
            (Some(rank), Some(world_size)) => return Ok((rank, world_size)),
            // Ranks that each believe they are the only one would write to the same directory.
            (None, Some(2..)) => {
                let what = "the launcher sets the number of ranks but not this rank: set `rank`";
                return Err(Error::invalid(format!("{what} {world_size} without={rank}")));
            }
            (Some(1..), None) => {
                let what = "the launcher sets this rank but not the number of ranks: set `rank`";
                return Err(Error::invalid(format!("{what} {rank} without={world_size}")));
            }
            _ => {}
        }
    }
    Ok((0, 1))
}

fn cache() -> Result<PathBuf> {
    let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache/earth2studio"));
    let found = std::env::var_os("EARTH2STUDIO_CACHE").map(PathBuf::from).or_else(home);
    found.ok_or_else(|| Error::invalid("a catalog needs a path: set `path`, EARTH2STUDIO_CACHE or HOME"))
}

/// The catalog of a named run; see the [module](super). Clones refer to the same catalog.
#[derive(Clone, Debug)]
pub struct Checkpoint(pub(super) Arc<CatalogState>);

#[derive(Debug)]
pub(super) struct CatalogState {
    path: PathBuf,
    rank: u32,
    world_size: u32,
    given: Builder,
    line: Mutex<Line>,
}

/// The executor, None before the first flush, and the number of the next row.
#[derive(Debug, Default)]
struct Line {
    executor: Option<Arc<CheckpointExecutor>>,
    /// The number of the next row; None means that `next` reads it from the directory.
    next: Option<u64>,
    /// The last flush, until its end is known. A session that starts earlier would restore the previous row.
    in_flight: Option<Save>,
}

/// A committed row.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct CheckpointEntry {
    /// The name of the commit.
    pub commit_id: String,
    /// The write count at the commit.
    pub write_count: u64,
    /// When it was committed.
    pub saved_at: SystemTime,
    /// The rank that committed it.
    pub rank: u32,
    /// The number of ranks.
    pub world_size: u32,
    /// The types of its states, sorted.
    pub state_ids: Vec<String>,
    /// Its metadata.
    pub metadata: Metadata,
    /// Its position in the order of commits.
    pub step: u64,
    /// Its directory.
    pub path: PathBuf,
}

/// What a row records about itself: the value `session` of its checkpoint.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Record {
    pub checkpoint: String,
    pub write_count: u64,
    pub saved_at: SystemTime,
    pub mode: Mode,
    pub rank: u32,
    pub world_size: u32,
    pub states: BTreeMap<String, Schema>,
}

/// What a row records about a state.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Schema {
    pub hash: String,
    pub fields: Vec<String>,
}

/// The name of the value that contains the record.
pub(super) const RECORD: &str = "session";

impl Checkpoint {
    /// Starts a builder for the catalog `name`.
    pub fn builder(name: impl Into<String>) -> Builder {
        Builder {
            name: name.into(),
            path: None,
            mode: Mode::Overwrite,
            flush_interval: Some(1),
            history_size: None,
            level: 2,
            rank: None,
            device: DeviceChoice::Host,
            made: None,
            settings: Settings { arena: 64 << 20, ..Settings::default() },
        }
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.0.given.name
    }

    /// The directory of this rank's rows: the path itself for a single rank, otherwise `rank_000000` and so
    /// on below it.
    pub fn rank_path(&self) -> PathBuf {
        self.0.rank_path()
    }

    /// How much components keep, from 0 to 2.
    pub fn level(&self) -> u8 {
        self.0.given.level
    }

    /// The device that copies tensors.
    pub fn device(&self) -> DeviceChoice {
        self.0.given.device
    }

    /// Every row of this rank that is on disk now, oldest first. Damaged rows and other checkpoints are
    /// omitted.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn catalog(&self) -> Result<Vec<CheckpointEntry>> {
        let Some(catalog) = found(Catalog::open(self.rank_path()))? else { return Ok(Vec::new()) };
        let mut rows = Vec::new();
        for entry in catalog.list()? {
            match checkpoint::Checkpoint::open(&entry.path).and_then(|row| CheckpointEntry::of(&row)) {
                Ok(row) => rows.push(row),
                Err(error) => {
                    tracing::warn!(path = ?entry.path, error = format_args!("{error:#}"), "not a row of a catalog")
                }
            }
        }
        // Older rows are about to be deleted.
        let kept = self.0.given.settings.keep_last.map_or(0, |kept| rows.len().saturating_sub(kept));
        Ok(rows.split_off(kept))
    }
}

impl CatalogState {
    pub fn rank_path(&self) -> PathBuf {
        match self.world_size {
            1 => self.path.clone(),
            _ => self.path.join(format!("rank_{:06}", self.rank)),
        }
    }

    pub fn level(&self) -> u8 {
        self.given.level
    }

    pub fn flush_interval(&self) -> Option<u64> {
        self.given.flush_interval
    }

    pub fn record(&self, write_count: u64, saved_at: SystemTime, states: BTreeMap<String, Schema>) -> Record {
        let Self { rank, world_size, given: Builder { ref name, mode, .. }, .. } = *self;
        Record { checkpoint: name.clone(), write_count, saved_at, mode, rank, world_size, states }
    }

    /// Returns the executor and the number of the next row, which it reserves.
    pub fn next(&self) -> Result<(Arc<CheckpointExecutor>, u64)> {
        let mut line = lock(&self.line);
        let executor = match &line.executor {
            Some(executor) => executor.clone(),
            None => {
                let builder = CheckpointExecutor::builder(self.rank_path())
                    .settings(self.given.settings.clone())
                    .alone()
                    .no_tier_from_env();
                let builder = match &self.given.made {
                    Some(made) => builder.made_device(made.clone()),
                    None => builder.device(self.given.device),
                };
                line.executor.insert(Arc::new(builder.build()?)).clone()
            }
        };
        let step = match line.next {
            Some(next) => next,
            None => {
                let (rows, problems) = executor.catalog().survey()?;
                let steps = rows.iter().map(|row| row.step).chain(problems.iter().map(|problem| problem.step));
                let full = || Error::invalid("no step number is left for another row").with_path(self.rank_path());
                steps.max().unwrap_or(0).checked_add(1).ok_or_else(full)?
            }
        };
        line.next = step.checked_add(1);
        Ok((executor, step))
    }

    /// Records that a flush has begun.
    pub fn fly(&self, save: &Save) {
        lock(&self.line).in_flight = Some(save.clone());
    }

    /// Records that the end of a flush is known.
    pub fn landed(&self, save: &Save) {
        lock(&self.line).in_flight.take_if(|there| there.attempt() == save.attempt());
    }

    /// Waits for a flush that may not have ended.
    pub fn land(&self) -> Result<()> {
        let Some(save) = lock(&self.line).in_flight.clone() else { return Ok(()) };
        // The save has its own deadline.
        let result = durable(save.wait(Duration::MAX));
        self.landed(&save);
        result.inspect_err(|_| self.look_again())
    }

    /// Makes `next` read the next row's number from the directory again, after a failed commit.
    pub fn look_again(&self) {
        lock(&self.line).next = None;
    }
}

/// Ok if the save left a row; a skipped save leaves none.
pub(super) fn durable(outcome: Result<Outcome>) -> Result<()> {
    match outcome? {
        Outcome::Durable(_) => Ok(()),
        other => Err(Error::new(ErrorKind::Busy, format!("the overlap policy left no row outcome={other:?}"))),
    }
}

impl CheckpointEntry {
    fn of(row: &checkpoint::Checkpoint) -> Result<Self> {
        let record: Record = row.value(RECORD)?;
        let metadata = Metadata(row.manifest().metadata.clone());
        Ok(Self::new(&record, metadata, row.step(), &row.attempt().to_string(), row.path()))
    }

    pub(super) fn new(record: &Record, metadata: Metadata, step: u64, attempt: &str, path: &Path) -> Self {
        let Record { write_count, saved_at, rank, world_size, .. } = *record;
        let attempt: String = attempt.chars().filter(|c| *c != '-').take(12).collect();
        let commit_id = format!("commit_{write_count:08}_{attempt}");
        let state_ids = record.states.keys().cloned().collect();
        Self { commit_id, write_count, saved_at, rank, world_size, state_ids, metadata, step, path: path.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(variables: &[(&str, &str)]) -> Result<(u32, u32)> {
        launched(|name| variables.iter().find(|(known, _)| *known == name).map(|(_, text)| (*text).to_owned()))
    }

    #[test]
    fn the_rank_is_what_the_launcher_says_and_ranks_that_cannot_be_told_apart_are_refused() {
        assert_eq!(found(&[]).unwrap(), (0, 1));
        assert_eq!(found(&[("RANK", "3"), ("WORLD_SIZE", "8")]).unwrap(), (3, 8));
        assert_eq!(found(&[("SLURM_PROCID", "1"), ("SLURM_STEP_NUM_TASKS", "2")]).unwrap(), (1, 2));
        assert_eq!(found(&[("OMPI_COMM_WORLD_RANK", "0"), ("OMPI_COMM_WORLD_SIZE", "4")]).unwrap(), (0, 4));
        assert_eq!(found(&[("RANK", "0")]).unwrap(), (0, 1));
        assert_eq!(found(&[("WORLD_SIZE", "1")]).unwrap(), (0, 1));
        for refused in [&[("WORLD_SIZE", "8"), ("LOCAL_RANK", "3")][..], &[("RANK", "3")], &[("RANK", "three")]] {
            assert_eq!(found(refused).unwrap_err().kind(), ErrorKind::Invalid);
        }
    }
}
