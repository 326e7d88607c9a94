//! The versions of a chain, and the way to the newest one.

use super::inventory::{Holding, Inventory};
use super::reading::{manifest_bytes, manifest_head};
use crate::checkpoint::Checkpoint;
use crate::delta::{Base, Manifest, is_delta};
use crate::error::{Error, ErrorKind, Result, found};
use crate::format::seal::is_ours;
use crate::id::{Attempt, parse_version_name};
use crate::storage::{self, Reading, Storage};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

/// A directory of a chain: a version, or a full beside a version that is a delta.
#[derive(Clone, Debug)]
pub(super) struct Item {
    pub number: u64,
    pub name: String,
    pub attempt: Attempt,
    pub bytes: u64,
    /// The base of a delta. None: a full.
    pub base: Option<Base>,
}

impl Item {
    pub fn node(&self) -> Node {
        (self.number, self.attempt)
    }
}

/// A version of a chain, with its attempt.
pub(super) type Node = (u64, Attempt);

/// The versions in a directory.
///
/// ```
/// # use ashore::chain::{Chain, Publisher};
/// # use ashore::StateDict;
/// # let dir = tempfile::tempdir().unwrap();
/// # let root = dir.path();
/// # let publisher = Publisher::open(root)?.arena(4 << 20).build()?;
/// # let mut state = StateDict::new();
/// # state.tensor("w", vec![1.0_f32; 4])?;
/// # publisher.publish(state)?.wait(std::time::Duration::from_secs(60))?;
/// let chain = Chain::open(root)?;
/// let version = &chain.versions()?[0];
/// assert_eq!((version.number, version.base, version.buildable), (1, None, true));
/// assert!(chain.holes()?.is_empty());
/// # Ok::<(), ashore::Error>(())
/// ```
#[derive(Debug)]
pub struct Chain {
    storage: Arc<dyn Storage>,
}

/// A directory of a chain.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct Version {
    /// The number of the version.
    pub number: u64,
    /// The name of its directory.
    pub name: String,
    /// The base of a delta. None: a full.
    pub base: Option<u64>,
    /// The attempt that was published.
    pub attempt: Attempt,
    /// The length of its files.
    pub bytes: u64,
    /// Whether a new reader can build the version from the files in the directory.
    pub buildable: bool,
}

/// A version that cannot be built, although no later full replaces it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct Hole {
    /// The version that cannot be built.
    pub number: u64,
    /// The base that is missing, or that is another one than the delta was made for.
    pub missing: u64,
}

impl Chain {
    /// The chain in `root`, a directory or a URL.
    ///
    /// # Errors
    /// Errors of [`storage::at`](crate::storage::at): `NotFound` when there is no such directory.
    pub fn open(root: impl AsRef<Path>) -> Result<Self> {
        Ok(Self::over(storage::at(root)?))
    }

    /// The chain in `storage`.
    pub fn over(storage: Arc<dyn Storage>) -> Self {
        Self { storage }
    }

    /// Returns every version, oldest first. A full beside a delta comes after the delta.
    ///
    /// # Errors
    /// When the directory cannot be read. A damaged directory, or one that is no version, is left out.
    pub fn versions(&self) -> Result<Vec<Version>> {
        let listing = Listing::read(&self.storage, &mut Cache::default())?;
        let version = |item: &Item| Version {
            number: item.number,
            name: item.name.clone(),
            base: item.base.as_ref().map(|base| base.version),
            attempt: item.attempt,
            bytes: item.bytes,
            buildable: listing.way(None, item.node()).is_some(),
        };
        Ok(listing.items.iter().map(version).collect())
    }

    /// Returns the versions after the newest buildable full that cannot be built themselves, oldest first.
    ///
    /// # Errors
    /// As [`Chain::versions`].
    pub fn holes(&self) -> Result<Vec<Hole>> {
        Ok(Listing::read(&self.storage, &mut Cache::default())?.holes())
    }
}

/// The most directories that a cache holds open. A process often may have 1,024 files open. Further versions
/// are read again in each listing.
const OPEN_MAX: usize = 256;

/// A directory, and the version that was read from it. It stays open, because another directory could get the
/// identity of one that is closed.
type Known = (Arc<dyn Reading>, Option<Item>);

/// The versions that were read from directories. A directory never changes under its name while its identity
/// stays.
#[derive(Debug, Default)]
pub(super) struct Cache(HashMap<String, Known>);

/// The versions of a chain at one moment.
#[derive(Clone, Debug, Default)]
pub(super) struct Listing {
    /// Ordered by number. A full beside a delta comes after the delta.
    pub items: Vec<Item>,
    /// The highest number in the name of any version, readable or not.
    pub highest: Option<u64>,
}

/// The files to read to get to a version: from a full or from the held version, over deltas.
#[derive(Clone, Debug)]
pub(super) struct Way {
    pub full: Option<Item>,
    /// The deltas in the order in which they are applied.
    pub deltas: Vec<Item>,
    pub bytes: u64,
}

impl Listing {
    /// Reads the manifests of all versions that `cache` does not know.
    ///
    /// # Errors
    /// When the names cannot be listed, or a version cannot be read at present. A damaged version is left
    /// out.
    pub fn read(storage: &Arc<dyn Storage>, cache: &mut Cache) -> Result<Self> {
        let mut names: Vec<_> = storage.list()?;
        names.retain(|name| parse_version_name(name).is_some());
        let highest = names.iter().filter_map(|name| parse_version_name(name)).map(|(number, _)| number).max();
        cache.0.retain(|name, _| names.contains(name));
        let mut items = Vec::with_capacity(names.len());
        for name in names {
            items.extend(look(storage, &name, cache)?);
        }
        items.sort_by(|a, b| (a.number, &a.name).cmp(&(b.number, &b.name)));
        Ok(Self { items, highest })
    }

    /// Returns the newest version that can be built and is newer than the held version, with the way to it
    /// that reads the fewest bytes. Older versions count if the held version is not in the chain.
    pub fn ahead(&self, held: Option<Node>) -> Option<(Node, Way)> {
        let known = held.is_some_and(|held| self.items.iter().any(|item| item.node() == held));
        let mut nodes: Vec<Node> = self.items.iter().map(Item::node).collect();
        nodes.dedup();
        let wanted = |node: &Node| held.is_none_or(|held| *node != held && (node.0 > held.0 || !known));
        let reached = |node: Node| self.way(held, node).map(|way| (node, way));
        nodes.into_iter().rev().filter(wanted).find_map(reached)
    }

    /// Returns the way to `target` that reads the fewest bytes, from the held version or from a full.
    pub fn way(&self, held: Option<Node>, target: Node) -> Option<Way> {
        let (mut at, mut deltas, mut bytes, mut best) = (target, Vec::<Item>::new(), 0_u64, None::<Way>);
        // The number of a base is below that of its delta, so this loop ends.
        loop {
            let mut way = |full: Option<&Item>| {
                let bytes = bytes + full.map_or(0, |full| full.bytes);
                if best.as_ref().is_none_or(|best: &Way| bytes < best.bytes) {
                    best = Some(Way { full: full.cloned(), deltas: deltas.iter().rev().cloned().collect(), bytes });
                }
            };
            if held.is_some_and(|held| held == at || super::blind() && held.0 == at.0) {
                way(None);
                break;
            }
            let here = || self.items.iter().filter(|item| item.node() == at);
            if let Some(full) = here().find(|item| item.base.is_none()) {
                way(Some(full));
            }
            let Some(delta) = here().find(|item| item.base.is_some()) else { break };
            let Some(base) = &delta.base else { break };
            at = (base.version, base.attempt);
            bytes = bytes.saturating_add(delta.bytes);
            deltas.push(delta.clone());
        }
        best
    }

    /// See [`Chain::holes`].
    pub fn holes(&self) -> Vec<Hole> {
        let newest = self.items.iter().filter(|item| item.base.is_none()).map(|item| item.number).max();
        let after = |item: &&Item| newest.is_none_or(|newest| item.number > newest);
        let hole = |item: &Item| {
            let mut missing = item;
            while let Some(base) = &missing.base {
                let Some(next) = self.items.iter().find(|item| item.node() == (base.version, base.attempt)) else {
                    return Hole { number: item.number, missing: base.version };
                };
                missing = next;
            }
            Hole { number: item.number, missing: missing.number }
        };
        self.items.iter().filter(after).filter(|item| self.way(None, item.node()).is_none()).map(hole).collect()
    }

    /// Returns the fulls by number.
    pub fn fulls(&self) -> BTreeMap<u64, &Item> {
        self.items.iter().filter(|item| item.base.is_none()).map(|item| (item.number, item)).collect()
    }
}

/// Reads a version by its name. None when the version was not written by this library, is damaged, or has
/// gone.
fn look(storage: &Arc<dyn Storage>, name: &str, cache: &mut Cache) -> Result<Option<Item>> {
    let Some(reading) = found(storage.open(name))? else { return Ok(None) };
    let identity = reading.identity();
    if let Some((known, item)) = cache.0.get(name)
        && identity.is_some()
        && known.identity() == identity
    {
        return Ok(item.clone());
    }
    let item = match item_of(storage, name, reading.as_ref()) {
        // The version is being removed.
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        // Only errors that another read would return again are kept.
        Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Invalid) => {
            tracing::warn!(name, error = format_args!("{error:#}"), "a version cannot be read, and is left out");
            None
        }
        item => item?,
    };
    let item = item.filter(|item| parse_version_name(name).is_some_and(|(number, _)| number == item.number));
    if identity.is_some() && cache.0.len() < OPEN_MAX {
        cache.0.insert(name.into(), (reading, item.clone()));
    }
    Ok(item)
}

/// Reads the manifest of an open version. None when the version was not written by this library.
fn item_of(storage: &Arc<dyn Storage>, name: &str, reading: &dyn Reading) -> Result<Option<Item>> {
    let path = storage.describe(name);
    let located = |error: Error| error.with_path(&path);
    let head = manifest_head(reading).map_err(located)?;
    if is_delta(&head) {
        let bytes = manifest_bytes(reading, &path)?;
        let Manifest { number, attempt, bytes: columns, base, .. } = Manifest::parse(&bytes).map_err(located)?;
        let bytes = columns.saturating_add(bytes.len() as u64);
        return Ok(Some(Item { number, name: name.into(), attempt, bytes, base: Some(base) }));
    }
    if !is_ours(&head) {
        return Ok(None);
    }
    let full = Checkpoint::from_storage(storage.clone(), name)?;
    let (number, attempt, bytes) = (full.step(), full.attempt(), full.bytes());
    Ok(Some(Item { number, name: name.into(), attempt, bytes, base: None }))
}

/// Returns the identity of an open full.
pub(super) fn holding(full: &Checkpoint, inventory: &Inventory) -> Holding {
    Holding { version: full.step(), attempt: full.attempt(), state: inventory.digest() }
}
