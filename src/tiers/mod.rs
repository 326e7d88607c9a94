//! Tiers: roots behind the executor's own, to which durable steps are copied.
//!
//! **Protocol.** The future of a save says when the save is durable in the first tier.
//! [`Save::durable_in`](crate::Save::durable_in) returns another future for a tier behind it. For each tier,
//! a promotion thread copies durable steps, newest first, as the same attempts.
//! **Completion.** A promotion is reported after the tier's own publish is durable.
//! **Crash.** The set of promoted steps is not recorded: the next session compares the steps of the root with
//! those of the tier.
//! **Cancellation.** A shutdown waits for promotions until its deadline, and names the steps that a tier does
//! not have.

mod behind;
mod claim;
mod copies;
mod copy;
mod follow;
mod line;
mod lineage;
mod promote;

pub(crate) use behind::{Behind, Part};
pub use copy::{Copied, copy};
pub(crate) use lineage::Note;

use crate::catalog::Retention;
use crate::error::{Error, Result};
use crate::settings::{Settings, Unpromoted};
use crate::storage::{self, Storage};
use serde::Deserialize;
use std::path::PathBuf;
use std::sync::Arc;

/// A tier behind the root of an executor: see [`Builder::tier`](crate::Builder::tier).
///
/// ```
/// use ashore::{CheckpointExecutor, StateDict, tiers::Tier};
/// use std::{sync::Arc, time::Duration};
/// # let dir = tempfile::tempdir().unwrap();
/// # let (fast, shared) = (dir.path().join("fast"), dir.path().join("shared"));
/// let tier = Tier::at(shared.to_string_lossy()).named("shared").keep_last(10);
/// let builder = CheckpointExecutor::builder(&fast).arena(4 << 20).chunk(1 << 20);
/// let executor = builder.keep_last(2).tier(tier).build()?;
/// let mut state = StateDict::new();
/// state.tensor("weights", Arc::new(vec![1.0_f32; 4]))?;
/// let save = executor.save(1, state)?;
/// let committed = save.wait(Duration::from_secs(60))?.committed().unwrap();
/// assert!(committed.path.starts_with(&fast));
/// let promoted = save.durable_in("shared").wait(Duration::from_secs(60))?;
/// assert!(promoted.path.starts_with(&shared) && promoted.attempt == committed.attempt);
/// executor.shutdown(Duration::from_secs(60))?;
/// # Ok::<(), ashore::Error>(())
/// ```
///
/// As JSON, for interfaces of other languages: an object with `root`, and optionally `name`, `keep_last`,
/// `keep_every` and `unpromoted`.
#[derive(Clone, Debug, Deserialize)]
#[serde(from = "Given")]
#[must_use = "a tier is given to `Builder::tier`"]
pub struct Tier {
    name: Option<String>,
    root: Root,
    retention: Retention,
    unpromoted: Unpromoted,
}

/// A tier as JSON.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Given {
    root: String,
    name: Option<String>,
    keep_last: Option<usize>,
    keep_every: Option<u64>,
    #[serde(default)]
    unpromoted: Unpromoted,
}

impl From<Given> for Tier {
    fn from(Given { root, name, keep_last, keep_every, unpromoted }: Given) -> Self {
        Self { name, root: Root::At(root), retention: Retention { keep_last, keep_every }, unpromoted }
    }
}

#[derive(Clone, Debug)]
enum Root {
    At(String),
    Over(Arc<dyn Storage>),
}

impl Root {
    /// The location of the tier, for messages.
    fn place(&self) -> PathBuf {
        match self {
            Self::At(root) => root.into(),
            Self::Over(storage) => storage.describe(""),
        }
    }
}

impl Tier {
    /// Makes a tier at `root`: a directory, such as one of another host or in `/dev/shm`, or the URL of an
    /// object store. Its name is `root`.
    pub fn at(root: impl Into<String>) -> Self {
        Self { name: None, root: Root::At(root.into()), retention: Retention::default(), unpromoted: Unpromoted::Warn }
    }

    /// Makes a tier in `storage`.
    pub fn over(name: impl Into<String>, storage: Arc<dyn Storage>) -> Self {
        let (name, root) = (Some(name.into()), Root::Over(storage));
        Self { name, root, retention: Retention::default(), unpromoted: Unpromoted::Warn }
    }

    /// Sets the name of the tier, which futures, reports and errors use. The lineage of sessions is noted
    /// under this name: a tier that gets another name is a new tier.
    pub fn named(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Sets how many newest steps the tier keeps. Older steps are deleted after a promotion. The default
    /// keeps all.
    pub fn keep_last(mut self, count: usize) -> Self {
        self.retention.keep_last = Some(count);
        self
    }

    /// Keeps every step that is a multiple of `every`, beyond `keep_last`. It is refused without `keep_last`.
    pub fn keep_every(mut self, every: u64) -> Self {
        self.retention.keep_every = Some(every);
        self
    }

    /// Sets what retention of the first tier does with a step that this tier wants and does not have. By
    /// default, retention deletes the step and warns.
    pub fn unpromoted(mut self, unpromoted: Unpromoted) -> Self {
        self.unpromoted = unpromoted;
        self
    }

    /// Returns the tier that the settings name, if they name one.
    pub(crate) fn of(settings: &Settings) -> Option<Self> {
        let retention = Retention { keep_last: settings.tier_keep_last, keep_every: None };
        let root = Root::At(settings.tier.clone()?);
        Some(Self { name: None, root, retention, unpromoted: settings.unpromoted })
    }

    /// Returns the names of tiers, in their order, for comparison.
    pub(crate) fn names(tiers: &[Self]) -> String {
        format!("{:?}", tiers.iter().map(Self::name).collect::<Vec<_>>())
    }

    fn name(&self) -> String {
        match (&self.name, &self.root) {
            (Some(name), _) | (None, Root::At(name)) => name.clone(),
            (None, Root::Over(storage)) => storage.describe("").display().to_string(),
        }
    }
}

impl Root {
    /// Makes a relative path absolute.
    fn make_absolute(&mut self) -> Result<()> {
        if let Self::At(root) = self
            && !storage::is_url(root.as_ref())
        {
            let path = std::path::absolute(&*root).map_err(|error| Error::io("cannot tell where a tier is", error))?;
            *root = path.to_str().map_or_else(|| root.clone(), Into::into);
        }
        Ok(())
    }
}

/// Opens the storage of a tier, and creates a missing directory.
fn open(root: &Root) -> Result<Arc<dyn Storage>> {
    match root {
        Root::Over(storage) => Ok(storage.clone()),
        Root::At(root) => storage::open(root),
    }
}

/// Whether a session may write to a tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum TierState {
    /// The session has not reached the tier yet, or the tier does not answer at present. Steps are promoted
    /// when the tier answers.
    Away,
    /// The session has taken the tier over.
    Ours,
    /// Another session has taken the tier over, or had written to it before this session reached it. Nothing
    /// more is promoted. Saves continue in the first tier.
    Lost,
}

/// What a tier has and lacks.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct TierReport {
    /// The name of the tier.
    pub tier: String,
    /// Its root.
    pub root: PathBuf,
    /// Whether this session may write to it.
    pub state: TierState,
    /// The newest step of this root that is durable in the tier.
    pub newest: Option<u64>,
    /// Steps of the first tier that this tier wants and does not have, oldest first.
    pub lacks: Vec<u64>,
    /// Steps of which the tier has another attempt, by a session that is not in this session's lineage,
    /// oldest first. The tier's attempts count.
    pub forks: Vec<u64>,
    /// Why the last promotion failed. None after a later promotion.
    pub error: Option<Error>,
}
