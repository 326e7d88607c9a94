//! Settings of an executor: plain data, set by the builder, a file or the environment.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::str::FromStr;
use std::time::Duration;

/// How bytes actually reach the medium, which may differ from what was requested.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum IoMode {
    /// Direct I/O: bytes bypass the page cache.
    Direct,
    /// Through the page cache: the file system refused direct I/O, or accepted it without honouring it (btrfs
    /// with checksums, tmpfs).
    Buffered,
}

/// Which system calls write files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Engine {
    /// The engine that was fastest in most measurements: `Pwrite`.
    Auto,
    /// One blocking pwrite(2) per chunk and writer thread.
    Pwrite,
    /// io_uring from registered memory, with several pieces of a chunk in flight per writer thread; pwrite(2)
    /// where io_uring is not available. Needs the feature `uring`.
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

/// CPU and I/O priority of the threads behind the stager: writers, committer and tidying.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Priority {
    /// The priority of any thread.
    Normal,
    /// Below other threads: nice 10, batch scheduling, the lowest best-effort I/O priority. Idle CPUs and
    /// disks are still used in full.
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

/// How the owner record of an attempt is locked. A sweep tells live owners from dead ones by this lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Locks {
    /// flock(2). The same as `None` on a file system that reports no lock support. Saves fail if locking
    /// fails for another reason.
    Flock,
    /// No locks, for file systems whose locks do not work. Sweeps judge attempts by their age.
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
///
/// ```
/// let choice: ashore::DeviceChoice = "cuda:1".parse()?;
/// assert_eq!(choice, ashore::DeviceChoice::Cuda(1));
/// # Ok::<(), ashore::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
#[non_exhaustive]
pub enum DeviceChoice {
    /// A GPU if the machine has one, the host otherwise.
    /// [`CheckpointExecutor::device`](crate::CheckpointExecutor::device) reports the choice and its reason.
    /// The executor takes the GPU whose context is current in the thread that builds it. Without a current
    /// context it takes the GPU of the first tensor in GPU memory that is saved or restored into; until then
    /// no GPU is touched, and the arena is not pinned. If the first such tensors are on several GPUs, the
    /// executor takes the GPU with the local rank of this process (`LOCAL_RANK`, or the variables of other
    /// launchers), or else the first of these GPUs.
    #[default]
    Auto,
    /// The host's CPU. Tensors in GPU memory are refused.
    Host,
    /// The GPU with this ordinal. Building the executor fails if there is no such GPU.
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
    /// At most `n` unfinished saves may precede a new one. If there are more, `save` waits until the save
    /// deadline, then returns `Busy`.
    Queue(usize),
    /// `save` waits until the previous save is finished: `Queue(0)`.
    Block,
    /// A new save is skipped while another is unfinished; its handle resolves to `Outcome::Skipped`.
    Skip,
    /// A new save replaces the waiting save that has not begun to stage. The replaced save resolves to
    /// `Outcome::Superseded`. At most two other saves are under way besides the waiting one. Meant for loops
    /// that never fence because each step makes new tensors. A fence also waits for the waiting save, unless
    /// scratch has room for late copies of all its tensors.
    Latest,
}

/// Which saves digest writable sources at `save`, to detect a forgotten fence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Detect {
    /// No save.
    Never,
    /// The first two durable saves of an executor. A save whose GPU returned no digests does not count.
    First,
    /// Every save.
    All,
}

/// What happens to the error of a background save if no handle and no call has returned the error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum OnUnseenError {
    /// The next `save` returns the error and does not save; `shutdown` returns it if no `save` did.
    NextCall,
    /// The next `save` logs the error at error level and proceeds. `shutdown` returns the errors that no
    /// `save` logged. For programs that prefer a missing checkpoint to a stop.
    Warn,
}

/// What a save does with a damaged step of the same number.
///
/// A step is damaged when this library made it and its bytes are not what was written. The executor knows of
/// the damage when the step cannot be opened, or after
/// [`Catalog::latest_valid`](crate::Catalog::latest_valid) or a prune of this executor's catalog has read it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum OnDamaged {
    /// The new step replaces the damaged one, so that a run that resumed from an earlier step can save this
    /// step again. The damaged step is removed right before the new one is published.
    #[default]
    Replace,
    /// The save fails with `Conflict`, as for an intact step.
    Refuse,
}

/// What retention does with a step of the first tier that is not yet promoted to a tier that wants it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Unpromoted {
    /// Retention deletes the step and logs a warning, so that the first tier needs no more space than without
    /// tiers. A step that is being copied stays until the copy has ended.
    #[default]
    Warn,
    /// Retention keeps the step until the tier has a copy. The first tier grows while the other tier is
    /// unavailable.
    Block,
}

impl FromStr for Unpromoted {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "warn" => Ok(Self::Warn),
            "block" => Ok(Self::Block),
            _ => Err(Error::invalid(format!("steps that are not promoted are warn or block unpromoted={text:?}"))),
        }
    }
}

/// The settings of an executor. Sizes are in bytes; each field names its default.
///
/// ```
/// let mut settings = ashore::Settings::default();
/// settings.arena = 1 << 30;
/// settings.keep_last = Some(3);
/// settings.check()?;
/// # Ok::<(), ashore::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Settings {
    /// Size of the pinned arena, allocated at start and never grown: 256 MiB. It shrinks to a half or a
    /// quarter if not all of it can be pinned.
    pub arena: u64,
    /// Size of a chunk, the unit of copying and writing: 8 MiB. A multiple of 4096, at most 1 GiB; the arena
    /// must fit at least two.
    pub chunk: u64,
    /// Number of writer threads: 4.
    pub writers: usize,
    /// Maximum number of shard files per save: 1.
    pub files: usize,
    /// Which device copies: `Auto`, the device of the tensors.
    pub device: DeviceChoice,
    /// Request direct I/O: true.
    pub direct: bool,
    /// Which system calls write files: `Auto`.
    pub engine: Engine,
    /// How owner records are locked: `Flock`.
    pub locks: Locks,
    /// Age at which a sweep deletes an attempt whose lock cannot be judged, because the lock is of another
    /// host or there are no locks: a day without a change. At least an hour, because live owners touch their
    /// attempts every five minutes.
    pub abandoned_after: Duration,
    /// Priority of the threads behind the stager: `Normal`.
    pub priority: Priority,
    /// What `save` does while earlier saves are unfinished: `Queue(1)`.
    pub overlap: Overlap,
    /// What happens to errors of saves that no handle and no call has returned: `NextCall`.
    pub on_unseen_error: OnUnseenError,
    /// Which saves detect forgotten fences: `First`. For tensors in GPU memory, only those of the executor's
    /// own GPU.
    pub detect: Detect,
    /// Size of the capture pool, GPU memory allocated at start for small tensors that are captured at `save`:
    /// 16 MiB, plus one chunk. With 0 the GPU gathers nothing: small tensors cross the bus one by one and are
    /// live until the fence, and strided tensors are refused.
    pub gather: u64,
    /// Size of the scratch, GPU memory for late copies at fences and ends of scopes: 0. With 0 a fence on
    /// streams waits until copies are queued. At least a chunk if not 0. A list of the save's pieces adds 40
    /// bytes per 64 KiB. The executor allocates scratch on its own GPU at start, and on any other GPU in the
    /// call of `save` that first has tensors of that GPU. Experimental.
    pub scratch: u64,
    /// Streams at a fence wait for a number in pinned memory instead of an event: false. The copy stream
    /// writes the number after the copies, and the host writes it as soon as every save of the fence has
    /// failed. So the deadline of a save also bounds how long the GPU waits for slow or hung copies. Late
    /// copies and ends of scopes do not use this number. CUDA's own tools do not see this order. Streams wait
    /// for events if the driver refuses, or if `CUDA_DEVICE_MAX_CONNECTIONS` is below 8;
    /// [`DeviceReport::memory_waits`](crate::device::DeviceReport::memory_waits) reports which.
    pub memory_waits: bool,
    /// Queue the copies of a chunk from a GPU in one call (`cuMemcpyBatchAsync`), if the driver has this call
    /// and the arena is pinned: false, because no measurement shows yet which way is faster.
    pub batch: bool,
    /// Bytes that one save may copy on the calling thread for `Capture::AtSave`: 1 MiB.
    pub capture_budget: u64,
    /// Number of newest steps to keep: None, which keeps all.
    pub keep_last: Option<usize>,
    /// Also keep every step that is a multiple of this number, besides the steps of `keep_last`: None.
    pub keep_every: Option<u64>,
    /// Verify a step of an earlier process before it counts for `keep_last`: false. Each step is verified
    /// once, outside of saves. With this setting, a damaged step never makes retention delete an older intact
    /// one.
    pub verify_kept: bool,
    /// What a save does with a damaged step of the same number: `Replace`.
    pub damaged: OnDamaged,
    /// The root of a tier behind the executor's own root, as a path or a URL: None.
    /// [`Builder::tier`](crate::Builder::tier) adds several tiers.
    pub tier: Option<String>,
    /// Number of newest steps that this tier keeps: None, which keeps all.
    pub tier_keep_last: Option<usize>,
    /// What retention does with steps that are not yet in this tier: `Warn`.
    pub unpromoted: Unpromoted,
    /// Write a line for each save into a log of the root, which `ashore report` reads: true.
    /// `docs/observability.md` describes the log.
    pub run_log: bool,
    /// Share unchanged files with older steps, if the file system can clone or link them: true. See
    /// [`StateDict::frozen`](crate::StateDict::frozen). With several ranks, all files are always written.
    pub links: bool,
    /// Number of saves after which a shared file is written again, if `link_age` has passed, too: 16. Until
    /// then all steps that share the file depend on the same blocks of the medium.
    pub link_saves: u32,
    /// The time after which a shared file is written again: a day.
    pub link_age: Duration,
    /// The file of a trace of saves, in Chrome's JSON: None, no trace. If this file exists already, or with
    /// several ranks, the trace gets another name beside it. If this is None, `ASHORE_TRACE` names the file.
    /// `docs/observability.md` describes the trace.
    pub trace: Option<String>,
    /// A save that is not durable after this time fails: 30 minutes. The time counts from the call of `save`
    /// and includes time in the queue.
    pub save_timeout: Duration,
    /// How long a fence waits: 10 minutes. After this time, a save whose tensors are still being read fails.
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
            tier: None,
            tier_keep_last: None,
            unpromoted: Unpromoted::Warn,
            run_log: true,
            links: true,
            link_saves: 16,
            link_age: Duration::from_secs(24 * 3600),
            trace: None,
            save_timeout: Duration::from_secs(30 * 60),
            fence_timeout: Duration::from_secs(10 * 60),
            shutdown_timeout: Duration::from_secs(5 * 60),
        }
    }
}

impl Settings {
    /// Returns the defaults, changed by `ASHORE_ARENA`, `ASHORE_CHUNK` (bytes), `ASHORE_WRITERS`,
    /// `ASHORE_FILES`, `ASHORE_DIRECT` (`true` or `false`), `ASHORE_DEVICE`, `ASHORE_ENGINE`, `ASHORE_LOCKS`,
    /// `ASHORE_PRIORITY`, `ASHORE_KEEP_LAST`, `ASHORE_KEEP_EVERY`, `ASHORE_RUN_LOG` (`true` or `false`),
    /// `ASHORE_LINKS` (`true` or `false`), `ASHORE_TRACE`, `ASHORE_TIER`, `ASHORE_TIER_KEEP_LAST`,
    /// `ASHORE_UNPROMOTED`.
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
        set("ASHORE_RUN_LOG", var("ASHORE_RUN_LOG"), &mut settings.run_log)?;
        set("ASHORE_LINKS", var("ASHORE_LINKS"), &mut settings.links)?;
        if let Some(text) = var("ASHORE_KEEP_LAST") {
            set("ASHORE_KEEP_LAST", Some(text), settings.keep_last.insert(0))?;
        }
        if let Some(text) = var("ASHORE_KEEP_EVERY") {
            set("ASHORE_KEEP_EVERY", Some(text), settings.keep_every.insert(0))?;
        }
        settings.trace_from(&var);
        settings.tier_from(&var)?;
        Ok(settings)
    }

    /// Sets the trace from the environment if the program has set none. The reason is the same as for
    /// `tier_from`.
    pub(crate) fn trace_from(&mut self, var: impl Fn(&str) -> Option<String>) {
        self.trace = self.trace.take().or_else(|| var("ASHORE_TRACE")).filter(|path| !path.is_empty());
    }

    /// Sets the tier from the environment if the program has set none. So a job in any language gets a tier
    /// without a change of its code.
    pub(crate) fn tier_from(&mut self, var: impl Fn(&str) -> Option<String>) -> Result<()> {
        if self.tier.is_some() {
            return Ok(());
        }
        let wrong =
            |name: &str, text: &str| Error::invalid(format!("an environment variable does not parse {name}={text:?}"));
        self.tier = var("ASHORE_TIER").filter(|root| !root.is_empty());
        if let Some(text) = var("ASHORE_TIER_KEEP_LAST") {
            self.tier_keep_last = Some(text.parse().map_err(|_| wrong("ASHORE_TIER_KEEP_LAST", &text))?);
        }
        if let Some(text) = var("ASHORE_UNPROMOTED") {
            self.unpromoted = text.parse().map_err(|_| wrong("ASHORE_UNPROMOTED", &text))?;
        }
        Ok(())
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
            return refuse(format!("the arena is smaller than two chunks arena={} chunk={}", self.arena, self.chunk));
        }
        if self.scratch > 0 && self.scratch < self.chunk {
            return refuse(format!("scratch is smaller than a chunk scratch={} chunk={}", self.scratch, self.chunk));
        }
        for (name, count, most) in [("writers", self.writers, 256), ("files", self.files, 99_999)] {
            if count == 0 || count > most {
                return refuse(format!("a setting is out of range 1..={most} {name}={count}"));
            }
        }
        if self.abandoned_after < Duration::from_secs(3600) {
            let why = "live owners touch their attempts every five minutes; give them at least an hour";
            return refuse(format!("{why} abandoned_after={:?}", self.abandoned_after));
        }
        if self.tier_keep_last == Some(0) {
            return refuse("keep at least one step in the tier, or leave this unset tier_keep_last=0".into());
        }
        // The same rules as `Retention::check`.
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
