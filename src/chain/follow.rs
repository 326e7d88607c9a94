//! The follower: it brings the memory of another process to each new version.

use super::copying::{commit, copy};
use super::double::{Double, Reader};
use super::inventory::{Holding, Inventory};
use super::listing::{Cache, Item, Listing, Node, Way};
use super::reading::Delta;
use super::watch::Watch;
use super::weights::Weights;
use crate::checkpoint::Checkpoint;
use crate::completion::deadline_after;
use crate::delta::{self, How, Numbers};
use crate::error::{Error, ErrorKind, Result};
use crate::id::Attempt;
use crate::state::{Dtype, decode_value};
use crate::storage::local::Local;
use crate::storage::{self, Storage, Sweep};
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often a follower lists the versions again when a version goes away while it is read.
const TRIES: usize = 8;

/// How weights change from one version to the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Switch {
    /// One copy, which the call that applies the update writes in place: no thread may read the copy during
    /// that call. Everything is checked before the first write.
    #[default]
    InPlace,
    /// Two copies: the copy that no reader uses is brought to the new version, and then shown to [`Reader`]s.
    Double,
}

/// Builds a [`Follow`].
#[derive(Debug)]
pub struct Follower {
    storage: Arc<dyn Storage>,
    root: Option<PathBuf>,
    own: Option<Arc<dyn Storage>>,
    switch: Switch,
    poll: Duration,
    confirm: bool,
}

impl Follower {
    /// Keeps a chain of its own in the directory `path`. Each version is copied to that directory and made
    /// durable there before the weights become that version. A restart begins with the newest version in it.
    ///
    /// # Errors
    /// When the directory cannot be made or opened.
    pub fn copy_to(self, path: impl AsRef<Path>) -> Result<Self> {
        Ok(self.copy_to_storage(Arc::new(Local::open(path)?)))
    }

    /// [`Follower::copy_to`], to a storage.
    pub fn copy_to_storage(mut self, storage: Arc<dyn Storage>) -> Self {
        self.own = Some(storage);
        self
    }

    /// Sets how weights get from one version to the next. Default: [`Switch::InPlace`].
    pub fn switch(mut self, switch: Switch) -> Self {
        self.switch = switch;
        self
    }

    /// Sets how often the directory is listed. Events of the file system make it sooner. Default: 200 ms.
    pub fn poll_every(mut self, interval: Duration) -> Self {
        self.poll = interval;
        self
    }

    /// Sets whether a version is made durable where it was published, before the weights become that version.
    /// Default: true. With false, after a power cut at the publisher, weights can be a version that is gone;
    /// the next update then loads a full. Use false for mounts on which files cannot be fsynced.
    pub fn confirm(mut self, confirm: bool) -> Self {
        self.confirm = confirm;
        self
    }

    /// Begins with `weights`, which become the newest version of the follower's own copy, if there is such a
    /// copy.
    ///
    /// # Errors
    /// `Invalid` when memory is lent and the switch is [`Switch::Double`]. Errors of the own copy, which can
    /// be deleted.
    pub fn start(self, weights: Weights<'_>) -> Result<Follow<'_>> {
        let held = match self.switch {
            Switch::InPlace => Held::InPlace(weights),
            Switch::Double if weights.is_fresh() => Held::Double(Double::new(Weights::new())),
            Switch::Double => return Err(Error::invalid("a follower with two copies allocates both: lend none")),
        };
        let watch = Watch::new(self.root.as_deref());
        let (mut cache, settings) = (Cache::default(), self);
        let own = match &settings.own {
            Some(own) => {
                own.take_over()?;
                own.sweep(Sweep::default())?;
                Listing::read(own, &mut cache)?.ahead(None).map(|(_, way)| (own.clone(), way))
            }
            None => None,
        };
        let mut follow = Follow { settings, held, cache: Cache::default(), watch, refused: Vec::new() };
        if let Some((own, way)) = own {
            for item in way.full.iter().chain(&way.deltas) {
                let update = follow.read(&own, item)?;
                follow.put(update)?;
            }
        }
        Ok(follow)
    }
}

/// Follows a chain: holds a copy of the weights and brings it to each new version.
///
/// ```
/// # use ashore::chain::{Follow, Publisher, Switch, Weights};
/// # use ashore::StateDict;
/// # use std::time::Duration;
/// # let dir = tempfile::tempdir().unwrap();
/// # let root = dir.path();
/// # let publisher = Publisher::open(root)?.arena(4 << 20).build()?;
/// # let mut state = StateDict::new();
/// # state.tensor("w", vec![1.0_f32; 4])?;
/// # publisher.publish(state)?.wait(Duration::from_secs(60))?;
/// let mut follow = Follow::open(root)?.switch(Switch::Double).start(Weights::new())?;
/// let reader = follow.reader().expect("two copies"); // for the threads that serve
/// while let Some(version) = follow.advance(Duration::from_millis(10))? {
///     assert_eq!(reader.get().version(), Some(version));
/// }
/// assert_eq!(reader.get().elements::<f32>("w")?, [1.0; 4]);
/// # Ok::<(), ashore::Error>(())
/// ```
#[derive(Debug)]
pub struct Follow<'a> {
    settings: Follower,
    held: Held<'a>,
    cache: Cache,
    watch: Watch,
    /// Fulls that were found damaged. Other ways are tried first.
    refused: Vec<Node>,
}

enum Held<'a> {
    InPlace(Weights<'a>),
    Double(Double),
}

impl std::fmt::Debug for Held<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::InPlace(weights) => weights.fmt(f),
            Self::Double(double) => double.front().fmt(f),
        }
    }
}

/// A version that was read, checked and made durable, and not yet applied.
pub struct Update {
    what: What,
    /// The version that the update was checked against. None: no version yet.
    base: Option<Holding>,
    becomes: Holding,
    bytes: u64,
}

enum What {
    Full(Checkpoint, Inventory),
    Delta(Delta, Inventory),
}

/// What an update changes in one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Changed {
    /// The tensor.
    pub name: String,
    /// Its dtype.
    pub dtype: Dtype,
    /// Indices of the elements that change, in ascending order. None: the whole tensor.
    pub indices: Option<Vec<u64>>,
    /// Their new values, little-endian, one after the other.
    pub values: Vec<u8>,
}

impl Update {
    /// The version of the weights after the update.
    pub fn version(&self) -> u64 {
        self.becomes.version
    }

    /// Whether the version is read whole, not applied to the weights as a delta.
    pub fn is_full(&self) -> bool {
        matches!(self.what, What::Full(..))
    }

    /// The length of its files.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The names of the values that were published with the version, sorted.
    pub fn value_names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.values().keys().map(String::as_str)
    }

    /// Decodes the value `name` that was published with the version, such as the number of a training step.
    ///
    /// # Errors
    /// `NotFound` when there is no such value, `Invalid` when it is not a `T`; both name version and value.
    pub fn value<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        let none = || Error::new(ErrorKind::NotFound, format!("no such value in the version value={name:?}"));
        let value = self.values().get(name).ok_or_else(none).and_then(|value| {
            let wanted = std::any::type_name::<T>();
            let other = || Error::invalid(format!("the value has another type value={name:?} wanted={wanted}"));
            decode_value(value).map_err(|e| other().with_source_of(&e))
        });
        value.map_err(|error| error.with_step(self.version()))
    }

    fn values(&self) -> &BTreeMap<String, serde_json::Value> {
        match &self.what {
            What::Full(full, _) => &full.manifest().values,
            What::Delta(delta, _) => &delta.manifest.values,
        }
    }

    /// Returns what a delta changes in the weights that it was made for, tensor by tensor. It is for memory
    /// that this library does not write, such as `index_copy_` on a GPU. Empty for a full.
    ///
    /// # Errors
    /// `Invalid` when `weights` are not the weights that the delta was made for.
    pub fn changes(&self, weights: &Weights<'_>) -> Result<Vec<Changed>> {
        let What::Delta(delta, _) = &self.what else { return Ok(Vec::new()) };
        if weights.holding() != self.base {
            return Err(Error::invalid("the update was made for other weights than these").with_step(self.version()));
        }
        let mut changed = Vec::new();
        for (entry, patch) in delta.manifest.tensors.iter().zip(&delta.patches) {
            let (name, dtype) = (entry.name.clone(), entry.dtype);
            if patch.how == How::Whole {
                changed.push(Changed { name, dtype, indices: None, values: patch.columns.concat() });
                continue;
            }
            let (mut indices, mut values) = (Vec::new(), Vec::new());
            delta::visit(weights.bytes(&name)?, Numbers::of(entry.dtype), patch, &mut |index, value| {
                indices.push(index as u64);
                values.extend_from_slice(value);
                Ok(())
            })?;
            changed.push(Changed { name, dtype, indices: Some(indices), values });
        }
        Ok(changed)
    }
}

impl std::fmt::Debug for Update {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut out = f.debug_struct("Update");
        out.field("version", &self.version()).field("full", &self.is_full()).field("bytes", &self.bytes).finish()
    }
}

impl Follow<'_> {
    /// Returns a builder of a follower of the chain in `root`, a directory or a URL.
    ///
    /// # Errors
    /// Errors of [`storage::at`](crate::storage::at): `NotFound` when there is no such directory.
    pub fn open(root: impl AsRef<Path>) -> Result<Follower> {
        let follower = Self::over(storage::at(root.as_ref())?);
        // A URL taken as a path names no directory with events: then there is no watch.
        Ok(Follower { root: Some(root.as_ref().into()), ..follower })
    }

    /// Returns a builder of a follower of the chain in `storage`.
    pub fn over(storage: Arc<dyn Storage>) -> Follower {
        let poll = Duration::from_millis(200);
        Follower { storage, root: None, own: None, switch: Switch::InPlace, poll, confirm: true }
    }

    /// The weights, at the version that was last applied.
    pub fn weights(&self) -> &Weights<'_> {
        match &self.held {
            Held::InPlace(weights) => weights,
            Held::Double(double) => double.front(),
        }
    }

    /// Returns a reader that gives other threads the newest version. None with [`Switch::InPlace`].
    pub fn reader(&self) -> Option<Reader> {
        match &self.held {
            Held::InPlace(_) => None,
            Held::Double(double) => Some(double.reader()),
        }
    }

    /// The present version of the weights.
    pub fn version(&self) -> Option<u64> {
        self.weights().version()
    }

    /// Waits until there is a newer version, and applies all newer versions. Returns the version of the
    /// weights after that, or None when `timeout` passed first.
    ///
    /// # Errors
    /// As [`Follow::next`] and [`Follow::apply`]; versions before the one that failed are applied.
    pub fn advance(&mut self, timeout: Duration) -> Result<Option<u64>> {
        let Some(update) = self.next(timeout)? else { return Ok(None) };
        let mut version = self.apply(update)?;
        while let Some(update) = self.prepare()? {
            version = self.apply(update)?;
        }
        Ok(Some(version))
    }

    /// Waits until there is a newer version. Reads and checks the first update on the way to the newest
    /// version that reads the fewest bytes, and makes that update durable. Nothing is written to the weights.
    /// Returns None when `timeout` passed first.
    ///
    /// # Errors
    /// Errors of the storages. `Invalid` when a version was made for other weights, `Corrupt` when its bytes
    /// differ from what was written, `NoSpace` when the own copy has no space. Each error names version and
    /// path, and the tensor, if it concerns one. The weights stay unchanged, and a later call tries again.
    pub fn next(&mut self, timeout: Duration) -> Result<Option<Update>> {
        let deadline = deadline_after(timeout);
        loop {
            if let Some(update) = self.prepare()? {
                return Ok(Some(update));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.watch.wait(left.min(self.settings.poll));
        }
    }

    /// Applies an update. The weights must not have changed since it was read. Returns their version after
    /// that.
    ///
    /// # Errors
    /// `Invalid` when the weights are another version than the update was read for. With two copies, the
    /// weights stay unchanged after any error. In place, a failed read of a full leaves them unusable until
    /// the next full; a delta was checked before and does not fail.
    pub fn apply(&mut self, update: Update) -> Result<u64> {
        let version = self.put(update)?;
        if self.settings.own.is_some() {
            crate::guard::attempt("shorten the follower's own copy", || self.shorten());
        }
        Ok(version)
    }

    fn put(&mut self, update: Update) -> Result<u64> {
        if self.weights().holding() != update.base {
            let (here, version) = (self.version(), update.version());
            return Err(
                Error::invalid(format!("an update was read for other weights here={here:?}")).with_step(version)
            );
        }
        let node = (update.becomes.version, update.becomes.attempt);
        let is_full = update.is_full();
        let applied = match (update.what, &mut self.held) {
            (What::Delta(delta, after), Held::InPlace(weights)) => weights.apply(&delta, after),
            (What::Delta(delta, after), Held::Double(double)) => double.apply(delta, after),
            (What::Full(full, inventory), Held::InPlace(weights)) => weights.load(&full, inventory),
            (What::Full(full, inventory), Held::Double(double)) => double.load(&full, inventory),
        };
        applied.inspect_err(|error| self.refuse(is_full, node, error))?;
        Ok(node.0)
    }

    /// The next update, if there is a newer version.
    fn prepare(&mut self) -> Result<Option<Update>> {
        let (mut tries, mut failed) = (1, None);
        loop {
            let mut listing = Listing::read(&self.settings.storage, &mut self.cache)?;
            listing.items.retain(|item| item.base.is_some() || !self.refused.contains(&item.node()));
            let held = self.weights().holding().map(|holding| (holding.version, holding.attempt));
            let Some((target, way)) = listing.ahead(held) else {
                // Every way failed. The next call tries all ways again.
                let refused = std::mem::take(&mut self.refused);
                match failed {
                    Some(error) => return Err(error),
                    None if refused.is_empty() => return Ok(None),
                    None => continue,
                }
            };
            let refused = self.refused.len();
            match self.first(&listing, target, &way) {
                Ok(update) => return Ok(Some(update)),
                // The version was removed or replaced while it was read: list again.
                Err(error) if again(&error) && tries < TRIES => tries += 1,
                Err(error) if self.refused.len() > refused => {
                    tracing::warn!(error = format_args!("{error:#}"), "a full is damaged; another way is tried");
                    failed.get_or_insert(error);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Remembers a full that is damaged.
    fn refuse(&mut self, is_full: bool, node: Node, error: &Error) {
        if is_full && error.kind() == ErrorKind::Corrupt && !self.refused.contains(&node) {
            self.refused.push(node);
        }
    }

    /// Returns the first update on a way. If that update does not fit the weights, returns the full from
    /// which the version can be built without it.
    fn first(&mut self, listing: &Listing, target: Node, way: &Way) -> Result<Update> {
        let Some(item) = way.full.as_ref().or(way.deltas.first()) else {
            return Err(Error::internal("a way to a version is empty"));
        };
        let error = match self.fetch(item) {
            Err(error) if way.full.is_none() && !again(&error) => error,
            fetched => return fetched,
        };
        let around = listing.way(None, target).and_then(|way| way.full);
        match around.filter(|full| full.number >= item.number) {
            Some(full) => {
                tracing::warn!(error = format_args!("{error:#}"), "a delta does not fit; a full is loaded instead");
                self.fetch(&full)
            }
            None => Err(error),
        }
    }

    /// Makes a version durable and reads it.
    fn fetch(&mut self, item: &Item) -> Result<Update> {
        self.durable(item).inspect_err(|error| self.refuse(item.base.is_none(), item.node(), error))
    }

    fn durable(&self, item: &Item) -> Result<Update> {
        let storage = self.settings.storage.clone();
        let located = |error: Error| error.with_step(item.number).with_path(storage.describe(&item.name));
        if self.settings.confirm && !super::blind() {
            storage.confirm(&item.name).map_err(located)?;
        }
        let Some(own) = self.settings.own.clone() else { return self.read(&storage, item) };
        // The version is checked before it is copied. So the own copy contains only versions that fit the
        // weights.
        let update = self.read(&storage, item)?;
        keep(&storage, &own, item).map_err(|error| error.with_step(item.number).with_path(own.describe(&item.name)))?;
        Ok(update)
    }

    /// Reads a version and checks it against the weights.
    fn read(&self, storage: &Arc<dyn Storage>, item: &Item) -> Result<Update> {
        let (base, bytes) = (self.weights().holding(), item.bytes);
        let what = if item.base.is_some() {
            let reading = storage.open(&item.name).map_err(|e| e.with_step(item.number))?;
            let delta = Delta::read(reading.as_ref(), &storage.describe(&item.name), self.weights().inventory())?;
            let after = self.weights().check(&delta)?;
            What::Delta(delta, after)
        } else {
            let full = Checkpoint::from_storage(storage.clone(), &item.name)?;
            let (inventory, _) = Inventory::of(&full)?;
            self.weights().fits(full.step(), &inventory)?;
            // In place there is no older copy to fall back to: all bytes are checked before the first is
            // written.
            if base.is_some() && matches!(self.held, Held::InPlace(_)) {
                check_bytes(&full)?;
            }
            What::Full(full, inventory)
        };
        let becomes = match &what {
            What::Full(full, inventory) => super::listing::holding(full, inventory),
            What::Delta(delta, _) => delta.holding(),
        };
        Ok(Update { what, base, becomes, bytes })
    }

    /// Copies the newest full that leads to the weights to the own copy, when its deltas have become long.
    /// Removes versions from the own copy that do not lead to the weights: older versions, and those of a
    /// chain that was deleted and begun again.
    fn shorten(&mut self) -> Result<()> {
        let (Some(own), Some(holding)) = (&self.settings.own, self.weights().holding()) else { return Ok(()) };
        let held = (holding.version, holding.attempt);
        let mut mine = Listing::read(own, &mut Cache::default())?;
        let Some(mut way) = mine.way(None, held) else { return Ok(()) };
        let at = way.full.as_ref().map_or((0, 0), |full| (full.number, full.bytes));
        if way.bytes.saturating_sub(at.1) > at.1 / 2 {
            let listing = Listing::read(&self.settings.storage, &mut self.cache)?;
            let leads = |item: &&Item| {
                item.number > at.0
                    && (item.node() == held || way.deltas.iter().any(|delta| delta.node() == item.node()))
            };
            let mut later =
                listing.items.iter().filter(|item| item.base.is_none() && !self.refused.contains(&item.node()));
            if let Some(next) = later.rfind(leads) {
                keep(&self.settings.storage, own, next)?;
                mine = Listing::read(own, &mut Cache::default())?;
                way = mine.way(None, held).unwrap_or(way);
            }
        }
        let leads = |item: &&Item| way.full.iter().chain(&way.deltas).any(|on| on.name == item.name);
        for item in mine.items.iter().filter(|item| !leads(item)) {
            super::retention::replace(own.as_ref(), &item.name)?;
        }
        Ok(())
    }
}

/// Reads all bytes of a full.
///
/// # Errors
/// `Corrupt`, naming the file and the tensor, when a tensor's bytes differ from what was written.
fn check_bytes(full: &Checkpoint) -> Result<()> {
    let Some(damage) = full.verify()?.damage.into_iter().next() else { return Ok(()) };
    let what = format!("a full is damaged: {} tensor={:?}", damage.what, damage.tensor);
    Err(Error::corrupt(what).with_step(full.step()).with_path(full.path().join(&damage.file)))
}

/// Copies a version to the follower's own chain, unless the version is there. A damaged full is not copied.
fn keep(from: &Arc<dyn Storage>, to: &Arc<dyn Storage>, item: &Item) -> Result<()> {
    let mine = Listing::read(to, &mut Cache::default())?;
    let is_same = |mine: &Item| mine.name == item.name && mine.attempt == item.attempt && mine.bytes == item.bytes;
    if mine.items.iter().any(is_same) {
        return to.confirm(&item.name);
    }
    if item.base.is_none() {
        check_bytes(&Checkpoint::from_storage(from.clone(), &item.name)?)?;
    }
    // Under this name there may be another version of the number, which the publisher has lost, or a damaged
    // one.
    super::retention::replace(to.as_ref(), &item.name)?;
    let reading = from.open(&item.name)?;
    // The copy gets an attempt of its own: an earlier process may have died while it copied this version.
    let whole = |copied: u64| {
        let gone = || Error::new(ErrorKind::NotFound, "a version was removed while it was copied");
        if copied == item.bytes { Ok(()) } else { Err(gone()) }
    };
    let made = commit(to.as_ref(), &item.name, Attempt::new(), |to| copy(reading.as_ref(), to).and_then(whole));
    made?.settle()
}

/// Whether a version went away while it was read.
fn again(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Conflict)
}
