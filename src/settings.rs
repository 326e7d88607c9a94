//! Settings: plain data, filled by the builder, a file or the environment.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::str::FromStr;
use std::time::Duration;

/// How bytes reach the medium, as it really is, not as it was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum IoMode {
    /// Past the page cache.
    Direct,
    /// Through the page cache: direct I/O was refused, or accepted and not honoured (btrfs with checksums, tmpfs).
    Buffered,
}

/// How files are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Engine {
    /// As measured to be best in general: `Pwrite`.
    Auto,
    /// One blocking pwrite(2) per chunk and writer thread.
    Pwrite,
    /// Several pieces of a chunk in flight per writer thread, through io_uring and from registered memory; pwrite(2) where the
    /// kernel has no rings to give. Needs the feature `uring`.
    Uring,
}

impl FromStr for Engine {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "auto" => Ok(Self::Auto),
            "pwrite" => Ok(Self::Pwrite),
            "uring" => Ok(Self::Uring),
            _ => Err(Error::invalid(format!("an engine is auto, pwrite or uring engine={text:?}"))),
        }
    }
}

/// How much the threads behind the stager (writers, committer, tidying) give way to others, on processors and disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Priority {
    /// As any thread.
    Normal,
    /// Behind others: nice 10, batch scheduling, the lowest best-effort I/O priority. Still gets its share when nobody else
    /// wants it.
    Low,
}

impl FromStr for Priority {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "normal" => Ok(Self::Normal),
            "low" => Ok(Self::Low),
            _ => Err(Error::invalid(format!("a priority is normal or low priority={text:?}"))),
        }
    }
}

/// How the owner record of an attempt is locked, by which sweeps tell a live owner from a dead one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Locks {
    /// By flock(2). Where a file system says that it has no locks, as by `None`; where locking fails, saves fail.
    Flock,
    /// Not at all, for file systems whose locks do not work: attempts are judged by their age.
    None,
}

impl FromStr for Locks {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "flock" => Ok(Self::Flock),
            "none" => Ok(Self::None),
            _ => Err(Error::invalid(format!("locks are flock or none locks={text:?}"))),
        }
    }
}

/// Which device copies tensors into the arena. Written `auto`, `host` or `cuda:N`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
#[non_exhaustive]
pub enum DeviceChoice {
    /// A GPU where there is one, the host otherwise; the executor says which and why. It is the GPU whose context is current in the thread
    /// that builds the executor; without one, that of the first tensor in the memory of a GPU that is saved, or restored into. Until
    /// then no GPU is touched, and the arena is not pinned. Where tensors of several come first, it is that which the number of this
    /// process on its machine stands for (`LOCAL_RANK` and what other launchers set), or else the first of them.
    #[default]
    Auto,
    /// The processor. Tensors of devices are refused.
    Host,
    /// The GPU with this ordinal; without it there is no executor.
    Cuda(u32),
}

impl FromStr for DeviceChoice {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let cuda = || text.strip_prefix("cuda:").and_then(|ordinal| ordinal.parse().ok()).map(Self::Cuda);
        match text {
            "auto" => Ok(Self::Auto),
            "host" => Ok(Self::Host),
            _ => cuda().ok_or_else(|| Error::invalid(format!("a device is auto, host or cuda:N device={text:?}"))),
        }
    }
}

impl TryFrom<String> for DeviceChoice {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<DeviceChoice> for String {
    fn from(choice: DeviceChoice) -> Self {
        choice.to_string()
    }
}

impl std::fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Host => f.write_str("host"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// What `save` does while earlier saves are unfinished.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Overlap {
    /// Up to `n` unfinished saves may precede a new one; `save` waits for room until the save deadline, then is `Busy`.
    Queue(usize),
    /// `save` waits until the one before is finished: `Queue(0)`.
    Block,
    /// A save that finds another unfinished is skipped; its handle resolves to `Outcome::Skipped`.
    Skip,
    /// The newest save takes the place of one that waits and has not begun to stage; that one resolves to
    /// `Outcome::Superseded`. At most two saves are under way beside the one that waits. For loops that never fence, because
    /// each step makes new tensors: a fence waits for the waiting save, too, unless all of it can be set aside on the GPU.
    Latest,
}

/// For which saves writable sources are digested at `save`, to detect a forgotten fence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Detect {
    /// For none.
    Never,
    /// For the first two of an executor that become durable, those not counted whose GPU did not tell its digests.
    First,
    /// For all.
    All,
}

/// What becomes of the error of a save that failed in the background, when no handle and no call has returned it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum OnUnseenError {
    /// The next `save` returns its error, and does not save; or `shutdown` does.
    NextCall,
    /// It is logged, at the level of errors, by the next `save`, which goes on; `shutdown` returns what is left. For programs
    /// that would rather miss a checkpoint than stop.
    Warn,
}

/// What a save does about a damaged step of the same number.
///
/// A step is damaged when this library made it and its bytes are not what was written. Found when it cannot be opened, or when
/// [`Catalog::latest_valid`](crate::Catalog::latest_valid) or a prune of this executor's catalog has read it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum OnDamaged {
    /// The new step takes its place, so that a run that resumed before it gets past it. The damaged one is
    /// removed right before the new one is published.
    #[default]
    Replace,
    /// The save fails with `Conflict`, as over a sound step.
    Refuse,
}

/// The settings of an executor. Sizes in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Settings {
    /// Size of the pinned arena, taken at start and never grown: 256 MiB. Half or a quarter where not all of it can be pinned.
    pub arena: u64,
    /// Size of a chunk, the unit of copying and writing: 8 MiB, at most 1 GiB, a multiple of 4096. At least two must fit the arena.
    pub chunk: u64,
    /// Number of writer threads: 4.
    pub writers: usize,
    /// Number of shard files per save: 1.
    pub files: usize,
    /// Which device copies: `Auto`, that of the tensors.
    pub device: DeviceChoice,
    /// Ask for direct I/O: true.
    pub direct: bool,
    /// How files are written: `Auto`.
    pub engine: Engine,
    /// How owner records are locked: `Flock`.
    pub locks: Locks,
    /// Attempts of which no lock tells whether their owner is alive (of another host, or without locks) are deleted when they have
    /// not changed for so long: a day, at least an hour. Live owners touch theirs every five minutes.
    pub abandoned_after: Duration,
    /// How much writers give way to other threads: `Normal`.
    pub priority: Priority,
    /// What `save` does while earlier saves are unfinished: `Queue(1)`.
    pub overlap: Overlap,
    /// What becomes of errors of saves that no handle and no call has returned: `NextCall`.
    pub on_unseen_error: OnUnseenError,
    /// When to look for forgotten fences: `First`. Of tensors of GPUs, among those of the executor's own.
    pub detect: Detect,
    /// Memory of the GPU, taken at start, in which small tensors are captured at `save`: 16 MiB, and as much as a chunk beside it.
    /// With 0 nothing is gathered: small tensors cross the bus one by one and are taken at the fence, and strided ones are refused.
    pub gather: u64,
    /// Memory of the GPU, taken at start, in which fences, and the ends of scopes, set aside what has not left it: none, and a
    /// fence on streams waits until copies are queued. At least a chunk. A list of what a save holds comes on top, 40 bytes for every
    /// 64 KiB. Of states that span devices nothing is set aside: for those a fence always waits. Experimental.
    pub scratch: u64,
    /// At a fence on streams, have them wait for a number in pinned memory instead of an event: false. The stream of copies writes
    /// it behind them, and the host as soon as every save that the fence is for has failed: so the deadline of a save also bounds
    /// how long the GPU waits, where copies crawl or hang. Not for what a fence sets aside, nor at the end of a scope. CUDA's
    /// own tools do not see this order. Streams wait for events where the driver refuses, or `CUDA_DEVICE_MAX_CONNECTIONS` is
    /// below 8: [`DeviceReport::memory_waits`](crate::device::DeviceReport::memory_waits) says so.
    pub memory_waits: bool,
    /// Queue the copies of a chunk from a GPU in one call (`cuMemcpyBatchAsync`), where the driver has that and the arena is
    /// pinned: false, because which way is faster has not been measured yet.
    pub batch: bool,
    /// How much a save may copy on the calling thread for `Capture::AtSave`: 1 MiB.
    pub capture_budget: u64,
    /// Keep this many newest steps; None keeps all.
    pub keep_last: Option<usize>,
    /// Keep every step that is a multiple of this, beyond `keep_last`.
    pub keep_every: Option<u64>,
    /// Read a step that an earlier process wrote whole before it counts for `keep_last`, once and off the
    /// path of saves: false. A damaged one then replaces no older one.
    pub verify_kept: bool,
    /// What a save does about a damaged step of the same number: `Replace`.
    pub damaged: OnDamaged,
    /// A save that is not durable after so long fails: 30 minutes. Counted from the call, waiting for room included.
    pub save_timeout: Duration,
    /// A save that is still read when a fence has waited this long fails: 10 minutes.
    pub fence_timeout: Duration,
    /// How long dropping the executor waits for saves in flight: 5 minutes.
    pub shutdown_timeout: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            arena: 256 << 20,
            chunk: 8 << 20,
            writers: 4,
            files: 1,
            device: DeviceChoice::Auto,
            direct: true,
            engine: Engine::Auto,
            locks: Locks::Flock,
            abandoned_after: Duration::from_secs(24 * 3600),
            priority: Priority::Normal,
            overlap: Overlap::Queue(1),
            on_unseen_error: OnUnseenError::NextCall,
            detect: Detect::First,
            gather: 16 << 20,
            scratch: 0,
            memory_waits: false,
            batch: false,
            capture_budget: 1 << 20,
            keep_last: None,
            keep_every: None,
            verify_kept: false,
            damaged: OnDamaged::Replace,
            save_timeout: Duration::from_secs(30 * 60),
            fence_timeout: Duration::from_secs(10 * 60),
            shutdown_timeout: Duration::from_secs(5 * 60),
        }
    }
}

impl Settings {
    /// The defaults, changed by `ASHORE_ARENA`, `ASHORE_CHUNK` (bytes), `ASHORE_WRITERS`, `ASHORE_FILES`, `ASHORE_DIRECT`
    /// (`true` or `false`), `ASHORE_DEVICE`, `ASHORE_ENGINE`, `ASHORE_LOCKS`, `ASHORE_PRIORITY`, `ASHORE_KEEP_LAST`, `ASHORE_KEEP_EVERY`.
    ///
    /// # Errors
    /// `Invalid`, naming the variable that does not parse.
    pub fn from_env() -> Result<Self> {
        Self::from_vars(|name| std::env::var(name).ok())
    }

    fn from_vars(var: impl Fn(&str) -> Option<String>) -> Result<Self> {
        fn set<T: std::str::FromStr>(name: &str, text: Option<String>, field: &mut T) -> Result<()> {
            if let Some(text) = text {
                *field = text
                    .parse()
                    .map_err(|_| Error::invalid(format!("an environment variable does not parse {name}={text:?}")))?;
            }
            Ok(())
        }
        let mut settings = Self::default();
        for (name, field) in [("ASHORE_ARENA", &mut settings.arena), ("ASHORE_CHUNK", &mut settings.chunk)] {
            set(name, var(name), field)?;
        }
        for (name, field) in [("ASHORE_WRITERS", &mut settings.writers), ("ASHORE_FILES", &mut settings.files)] {
            set(name, var(name), field)?;
        }
        set("ASHORE_ENGINE", var("ASHORE_ENGINE"), &mut settings.engine)?;
        set("ASHORE_LOCKS", var("ASHORE_LOCKS"), &mut settings.locks)?;
        set("ASHORE_DEVICE", var("ASHORE_DEVICE"), &mut settings.device)?;
        set("ASHORE_PRIORITY", var("ASHORE_PRIORITY"), &mut settings.priority)?;
        set("ASHORE_DIRECT", var("ASHORE_DIRECT"), &mut settings.direct)?;
        if let Some(text) = var("ASHORE_KEEP_LAST") {
            set("ASHORE_KEEP_LAST", Some(text), settings.keep_last.insert(0))?;
        }
        if let Some(text) = var("ASHORE_KEEP_EVERY") {
            set("ASHORE_KEEP_EVERY", Some(text), settings.keep_every.insert(0))?;
        }
        Ok(settings)
    }

    /// Checks the settings against each other.
    ///
    /// # Errors
    /// `Invalid`, naming the setting.
    pub fn check(&self) -> Result<()> {
        let refuse = |why: String| Err(Error::invalid(why));
        let alignment = crate::ALIGNMENT as u64;
        if self.chunk == 0 || !self.chunk.is_multiple_of(alignment) || self.chunk > 1 << 30 {
            return refuse(format!("a chunk is a multiple of {alignment} bytes, at most 1 GiB chunk={}", self.chunk));
        }
        if self.arena < 2 * self.chunk {
            return refuse(format!("the arena holds at least two chunks arena={} chunk={}", self.arena, self.chunk));
        }
        if self.scratch > 0 && self.scratch < self.chunk {
            return refuse(format!("the scratch holds no chunk scratch={} chunk={}", self.scratch, self.chunk));
        }
        for (name, count, most) in [("writers", self.writers, 256), ("files", self.files, 99_999)] {
            if count == 0 || count > most {
                return refuse(format!("a number is out of range 1..={most} {name}={count}"));
            }
        }
        if self.abandoned_after < Duration::from_secs(3600) {
            let why = "live owners touch their attempts every five minutes; give them at least an hour";
            return refuse(format!("{why} abandoned_after={:?}", self.abandoned_after));
        }
        // As `Retention::check`.
        match (self.keep_last, self.keep_every) {
            (Some(0), _) => refuse("keep at least one step, or leave this unset to keep all keep_last=0".into()),
            (_, Some(0)) => refuse("no step is a multiple of this: leave it unset keep_every=0".into()),
            (None, Some(every)) => {
                refuse(format!("nothing is deleted without keep_last: set it, too, or neither keep_every={every}"))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_changes_the_defaults_and_nonsense_is_named() {
        let settings = Settings::from_vars(|name| match name {
            "ASHORE_ARENA" => Some("16777216".into()),
            "ASHORE_KEEP_LAST" => Some("3".into()),
            "ASHORE_DIRECT" => Some("false".into()),
            "ASHORE_DEVICE" => Some("cuda:2".into()),
            _ => None,
        })
        .unwrap();
        assert_eq!((settings.arena, settings.keep_last, settings.direct), (16 << 20, Some(3), false));
        assert_eq!(settings.device, DeviceChoice::Cuda(2));
        let error = Settings::from_vars(|name| (name == "ASHORE_WRITERS").then(|| "many".into())).unwrap_err();
        assert!(error.to_string().contains("ASHORE_WRITERS=\"many\""), "{error}");
    }

    #[test]
    fn settings_that_cannot_work_are_refused_by_name() {
        type Change = fn(&mut Settings);
        let cases: [(Change, &str); 10] = [
            (|s| s.abandoned_after = Duration::from_secs(3599), "abandoned_after="),
            (|s| s.scratch = s.chunk - 1, "scratch="),
            (|s| s.chunk = 5000, "chunk=5000"),
            (|s| s.chunk = 0, "chunk=0"),
            (|s| s.arena = s.chunk, "arena="),
            (|s| s.writers = 0, "writers=0"),
            (|s| s.files = 100_000, "files=100000"),
            (|s| s.keep_last = Some(0), "keep_last=0"),
            (|s| (s.keep_last, s.keep_every) = (Some(1), Some(0)), "keep_every=0"),
            (|s| s.keep_every = Some(100), "set it, too, or neither keep_every=100"),
        ];
        Settings::default().check().unwrap();
        for (change, named) in cases {
            let mut settings = Settings::default();
            change(&mut settings);
            let error = settings.check().unwrap_err();
            assert!(error.to_string().contains(named), "{error}");
        }
    }
}
