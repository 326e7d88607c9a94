//! The state dict: the tensors, values and metadata of one save.

use super::boxes::{Key, Place};
use super::dtype::{Dtype, Layout};
use super::source::{Address, DeviceStream, MemoryLocation, SharedSource, Source};
use super::strided::Strided;
use super::value::encode_named;
use crate::error::{Error, Result};
use foldhash::fast::FixedState;
use indexmap::IndexMap;
use indexmap::map::Entry;
use serde::Serialize;
use std::any::Any;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::hash::BuildHasher;
use std::sync::Arc;

/// The names of aliases, and of the tensor that holds the bytes of each.
pub(crate) type Aliases = BTreeMap<String, String>;

/// When a save captures a tensor's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Capture {
    /// Before `save` returns. For tensors that change before the fence: statistics, scales, step counters.
    AtSave,
    /// At the fence at the latest.
    AtFence,
}

/// The group of tensors for which the program declared no group.
pub(crate) const OPEN: u32 = 0;
/// The group of tensors that the program declared frozen, or that count as frozen because they do not change.
pub(crate) const STILL: u32 = 1;

/// One tensor of a state dict.
pub(crate) struct Tensor<'a> {
    /// Dtype and shape of the source's bytes.
    pub layout: Layout,
    /// None: the source is the whole tensor.
    pub place: Option<Place>,
    pub location: MemoryLocation,
    /// None: the default for its memory location and size.
    pub capture: Option<Capture>,
    pub source: Box<dyn Source + 'a>,
    /// The address that the source returned when it was added. With many small tensors, the stager reads it
    /// here and does not touch each source in its own memory.
    address: Option<Address>,
    packed: bool,
    /// The address of the packed capture on the device, which the save reads instead of the source. The
    /// device may still have to read the source.
    pub captured_at: Option<u64>,
    /// The number of the group. Tensors of different groups are in different files.
    pub group: u32,
}

impl Tensor<'_> {
    /// Calls `copy` with a pointer to the bytes, as [`Source::read`] does.
    pub fn read(&self, copy: &mut dyn FnMut(*const u8)) {
        match (self.captured_at, self.address) {
            (Some(address), _) => copy(std::ptr::without_provenance(address as usize)),
            (None, Some(Address(address))) => copy(address),
            (None, None) => self.source.read(copy),
        }
    }

    /// True if the bytes are ready to be read without a call of the source.
    pub fn is_ready(&self) -> bool {
        self.address.is_some()
    }

    /// The elements of a tensor in host memory that is not packed.
    pub fn strided_on_host(&self) -> Option<Strided> {
        let strides = self.strides().filter(|_| self.location.stream().is_none())?;
        Some(Strided::new(self.layout.item()?, &self.layout.shape, strides))
    }

    /// The strides of a tensor that is not packed.
    pub fn strides(&self) -> Option<&[i64]> {
        if self.packed || self.captured_at.is_some() { None } else { self.source.strides() }
    }
}

/// Named tensors, values and metadata of one save.
///
/// Tensors are *sources*: adding one copies nothing. Values may have any serde type. Values and metadata are
/// kept exactly (see [`encode_value`](super::encode_value)). The order of insertion does not change the file.
///
/// ```
/// use std::sync::Arc;
/// let weights = Arc::new(vec![0.5_f32; 6]);
/// let mut state = ashore::StateDict::new();
/// state
///     .tensor("weights", ashore::HostTensor::new(weights.clone(), [2, 3]))?
///     .tensor("bias", Arc::new(vec![1.0_f32; 2]))?
///     .value("epoch", &3)?
///     .metadata("run", "baseline")?;
/// assert_eq!(state.len(), 2);
/// assert_eq!(state.bytes(), 32);
/// # Ok::<(), ashore::Error>(())
/// ```
#[derive(Default)]
pub struct StateDict<'a> {
    pub(crate) tensors: IndexMap<Key, Tensor<'a>, FixedState>,
    pub(crate) values: BTreeMap<String, serde_json::Value>,
    /// Values of this rank alone.
    pub(crate) rank_values: BTreeMap<String, serde_json::Value>,
    pub(crate) metadata: BTreeMap<String, serde_json::Value>,
    pub(crate) aliases: Aliases,
    /// Indices of tensors in host memory that the program can write while the save holds them.
    pub(crate) writable: Vec<usize>,
    /// The streams that wrote device tensors, each once.
    pub(crate) streams: Vec<DeviceStream<'static>>,
    /// Owners that keep those streams alive beyond their tensors.
    pub(crate) stream_owners: Vec<Arc<dyn Any + Send + Sync>>,
    /// The number of boxes of each tensor that was added in boxes.
    pub(super) boxes: HashMap<String, u32, FixedState>,
    /// The keys of groups, in the order of their numbers.
    pub(super) groups: Vec<String>,
    pub(super) bytes: u64,
    pub(super) fingerprint: u64,
}

impl<'a> StateDict<'a> {
    /// An empty state dict.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty state dict with capacity for `tensors` tensors.
    pub fn with_capacity(tensors: usize) -> Self {
        Self { tensors: IndexMap::with_capacity_and_hasher(tensors, FixedState::default()), ..Self::default() }
    }

    /// Adds a tensor, with the default capture for its memory location and size.
    ///
    /// # Errors
    /// `Invalid`, naming the tensor, for an empty, reserved (`__metadata__`) or duplicate name, a source
    /// whose byte length does not match its dtype and shape, strides that do not fit its shape, or F4 with an
    /// odd last dimension, because torch refuses the whole file then.
    pub fn tensor(&mut self, name: impl Into<String>, source: impl Source + 'a) -> Result<&mut Self> {
        self.insert(name.into(), Box::new(source), None, None)
    }

    /// Adds a box of a tensor that several ranks save together: `source` holds the elements from index `at`
    /// on, in a tensor of `shape`. [`StateDict::tensor`] adds a tensor without a box. If several ranks add
    /// the same box, or the same whole tensor, one of these ranks writes it.
    ///
    /// A rank can add several boxes of one tensor, which then go to different files. A box may be empty, such
    /// as the boxes of the last ranks when a tensor is split unevenly; an empty box is not written. The boxes
    /// of all ranks must cover each element of the tensor exactly once. The save checks that before it writes
    /// a byte.
    ///
    /// ```
    /// use ashore::{HostTensor, StateDict};
    /// // Rows 2 and 3 of a tensor of 8 rows.
    /// let rows = HostTensor::new(vec![0.0_f32; 8], [2, 4]);
    /// let mut state = StateDict::new();
    /// state.tensor_box("weights", [8, 4], [2, 0], rows)?;
    /// # Ok::<(), ashore::Error>(())
    /// ```
    ///
    /// # Errors
    /// The errors of [`StateDict::tensor`]. Also `Invalid`, naming the tensor, for a box that reaches beyond
    /// `shape`, has another number of dimensions, or cuts a byte in two, and for a second box of another
    /// dtype or `shape`.
    pub fn tensor_box(
        &mut self,
        name: impl Into<String>,
        shape: impl AsRef<[usize]>,
        at: impl AsRef<[usize]>,
        source: impl Source + 'a,
    ) -> Result<&mut Self> {
        let place = Place { global: shape.as_ref().into(), at: at.as_ref().into() };
        self.insert(name.into(), Box::new(source), None, Some(place))
    }

    /// Adds a tensor. `capture` sets when the tensor is captured.
    ///
    /// # Errors
    /// The errors of [`StateDict::tensor`]. `save` checks whether [`Capture::AtSave`] is possible.
    pub fn tensor_captured(
        &mut self,
        name: impl Into<String>,
        source: impl Source + 'a,
        capture: Capture,
    ) -> Result<&mut Self> {
        self.insert(name.into(), Box::new(source), Some(capture), None)
    }

    pub(super) fn insert(
        &mut self,
        name: String,
        source: Box<dyn Source + 'a>,
        capture: Option<Capture>,
        place: Option<Place>,
    ) -> Result<&mut Self> {
        let refuse = |name: &str, why: String| Err(Error::invalid(format!("{why} tensor={name:?}")));
        if name.is_empty() || name == "__metadata__" {
            return refuse(&name, "a tensor cannot have this name".into());
        }
        if self.aliases.contains_key(&name) {
            return refuse(&name, "two tensors have the same name".into());
        }
        let (layout, location) = (source.layout(), source.location());
        if let Some(strides) = source.strides()
            && (strides.len() != layout.shape.len() || layout.item().is_none())
        {
            let (dtype, shape) = (layout.dtype, &layout.shape[..]);
            let wrong = "only elements of whole bytes have strides, one for each dimension";
            return refuse(&name, format!("{wrong} strides={strides:?} dtype={dtype} shape={shape:?}"));
        }
        if layout.dtype == Dtype::F4 && layout.shape.last().is_none_or(|&last| last % 2 == 1) {
            let why = "two elements of F4 share a byte, and torch refuses a file in which the last dimension is odd";
            return refuse(&name, format!("{why} dtype=F4 shape={:?}", &layout.shape[..]));
        }
        match layout.bytes() {
            Err(e) => return refuse(&name, e.message().into()),
            Ok(expected) if expected != location.bytes() => {
                let (got, dtype, shape) = (location.bytes(), layout.dtype, &layout.shape[..]);
                return refuse(
                    &name,
                    format!(
                        "a source has the wrong length expected_bytes={expected} found_bytes={got} dtype={dtype} shape={shape:?}"
                    ),
                );
            }
            Ok(bytes) => {
                let number = match &place {
                    None => 0,
                    Some(place) => match self.next_box(&name, &layout, place) {
                        Ok(number) => number,
                        Err(e) => return refuse(&name, e.message().into()),
                    },
                };
                let seed = FixedState::with_seed(self.fingerprint);
                let fingerprint = match &place {
                    None => seed.hash_one((&name, &layout)),
                    Some(place) => seed.hash_one((&name, &layout, place)),
                };
                match self.tensors.entry(Key { name, number }) {
                    Entry::Occupied(there) => return refuse(there.key(), "two tensors have the same name".into()),
                    Entry::Vacant(free) => {
                        match location.stream() {
                            // Searched from the end: streams are few, and the last one nearly always matches.
                            Some(stream) if !self.streams.iter().rev().any(|s| *s == stream) => {
                                self.streams.push(stream);
                                self.stream_owners.extend(source.stream_owner());
                            }
                            None if location.writable() => self.writable.push(free.index()),
                            _ => {}
                        }
                        if place.is_some() {
                            self.boxes.insert(free.key().name.clone(), number + 1);
                        }
                        let address = source.address().map(Address);
                        let packed = source.strides().is_none();
                        free.insert(Tensor {
                            layout,
                            place,
                            location,
                            capture,
                            source,
                            address,
                            packed,
                            captured_at: None,
                            group: OPEN,
                        });
                    }
                }
                self.bytes = self.bytes.saturating_add(bytes);
                self.fingerprint = fingerprint;
            }
        }
        Ok(self)
    }

    /// Returns the number of the next box of a tensor.
    fn next_box(&self, name: &str, layout: &Layout, place: &Place) -> Result<u32> {
        place.check(layout)?;
        let Some(first) = self.tensor_named(name) else { return Ok(0) };
        let Some(known) = &first.place else {
            return Err(Error::invalid("a tensor is given both whole and in boxes"));
        };
        if (first.layout.dtype, &known.global) != (layout.dtype, &place.global) {
            let (dtype, shape, other) = (first.layout.dtype, &known.global[..], &place.global[..]);
            return Err(Error::invalid(format!(
                "boxes of one tensor disagree about it dtype={dtype} shape={shape:?} other_dtype={} other_shape={other:?}",
                layout.dtype
            )));
        }
        Ok(self.boxes.get(name).copied().unwrap_or(0))
    }

    /// The tensor of this name, or its first box.
    pub(crate) fn tensor_named(&self, name: &str) -> Option<&Tensor<'a>> {
        self.tensors.get(&(name, 0))
    }

    /// Adds a value of any serde type, kept exactly, non-finite floats included.
    ///
    /// # Errors
    /// `Invalid`, naming the value, for an empty or duplicate name, or a value that cannot be kept exactly.
    pub fn value(&mut self, name: impl Into<String>, value: &(impl Serialize + ?Sized)) -> Result<&mut Self> {
        let name = name.into();
        self.not_a_value(&name, self.rank_values.contains_key(&name))?;
        put("value", &mut self.values, name, value)?;
        Ok(self)
    }

    /// Adds a value of this rank alone, such as the state of its random number generator or its position in
    /// the data. If several ranks save together, each rank's value is kept. Values added by
    /// [`StateDict::value`] are taken from rank 0.
    ///
    /// ```
    /// let mut state = ashore::StateDict::new();
    /// state.value("epoch", &3)?.rank_value("next_sample", &4096_u64)?;
    /// # Ok::<(), ashore::Error>(())
    /// ```
    ///
    /// # Errors
    /// The errors of [`StateDict::value`]. The two kinds of values share one set of names.
    pub fn rank_value(&mut self, name: impl Into<String>, value: &(impl Serialize + ?Sized)) -> Result<&mut Self> {
        let name = name.into();
        self.not_a_value(&name, self.values.contains_key(&name))?;
        put("value", &mut self.rank_values, name, value)?;
        Ok(self)
    }

    fn not_a_value(&self, name: &str, taken: bool) -> Result<()> {
        if !taken {
            return Ok(());
        }
        Err(Error::invalid(format!("a value is given both for all ranks and for one value={name:?}")))
    }

    /// Adds user metadata, which describes the checkpoint and is not part of the state.
    ///
    /// # Errors
    /// Those of [`StateDict::value`].
    pub fn metadata(&mut self, key: impl Into<String>, value: &(impl Serialize + ?Sized)) -> Result<&mut Self> {
        put("metadata", &mut self.metadata, key.into(), value)?;
        Ok(self)
    }

    /// The tensors in order, each with name, dtype and shape. A box has its own shape.
    pub fn layouts(&self) -> impl ExactSizeIterator<Item = (&str, &Layout)> {
        self.tensors.iter().map(|(name, tensor)| (&**name, &tensor.layout))
    }

    /// The names of the values for all ranks, sorted.
    pub fn value_names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.values.keys().map(String::as_str)
    }

    /// Moves the content of `other` into this state dict, and puts `prefix` before every name.
    ///
    /// # Errors
    /// `Invalid`, with the name, when a name is taken.
    pub(crate) fn absorb(&mut self, prefix: &str, other: Self) -> Result<()> {
        for (name, Tensor { capture, source, place, group, .. }) in other.tensors {
            self.insert(format!("{prefix}{}", &*name), source, capture, place)?;
            self.inherit_group(self.len() - 1, group, &other.groups);
        }
        for (alias, holder) in other.aliases {
            self.alias(format!("{prefix}{alias}"), &format!("{prefix}{holder}"))?;
        }
        let values = |values: BTreeMap<String, serde_json::Value>| {
            values.into_iter().map(|(name, value)| (format!("{prefix}{name}"), value)).collect::<Vec<_>>()
        };
        let (shared, of_rank) = (values(other.values), values(other.rank_values));
        for (name, _) in &shared {
            self.not_a_value(name, self.rank_values.contains_key(name))?;
        }
        for (name, _) in &of_rank {
            self.not_a_value(name, self.values.contains_key(name))?;
        }
        for (what, mine, theirs) in [
            ("value", &mut self.values, shared),
            ("value", &mut self.rank_values, of_rank),
            ("metadata", &mut self.metadata, values(other.metadata)),
        ] {
            for (name, value) in theirs {
                if mine.insert(name.clone(), value).is_some() {
                    return Err(Error::invalid(format!("the name is empty or taken {what}={name:?}")));
                }
            }
        }
        Ok(())
    }

    /// Splits this into two state dicts that share the same sources, for a caller that may have to save them
    /// twice.
    ///
    /// # Errors
    /// `Invalid`, naming the tensor, if the program may write a tensor in between: the second save would save
    /// another state.
    pub(crate) fn split(self) -> Result<(Self, Self)> {
        self.settled()?;
        let mut both = (Self::with_capacity(self.len()), Self::with_capacity(self.len()));
        for (Key { name, .. }, Tensor { capture, source, place, group, .. }) in self.tensors {
            let source = SharedSource::new(source);
            both.0.insert(name.clone(), Box::new(source.clone()), capture, place.clone())?;
            both.1.insert(name, Box::new(source), capture, place)?;
            both.0.inherit_group(both.0.len() - 1, group, &self.groups);
            both.1.inherit_group(both.1.len() - 1, group, &self.groups);
        }
        for (alias, holder) in &self.aliases {
            both.0.alias(alias.as_str(), holder)?;
            both.1.alias(alias.as_str(), holder)?;
        }
        (both.0.values, both.0.metadata) = (self.values.clone(), self.metadata.clone());
        (both.1.values, both.1.metadata) = (self.values, self.metadata);
        both.0.rank_values.clone_from(&self.rank_values);
        both.1.rank_values = self.rank_values;
        Ok(both)
    }

    /// Checks that the program cannot write the tensors while the state dict holds them.
    ///
    /// # Errors
    /// `Invalid`, naming the first tensor that can be written.
    pub(crate) fn settled(&self) -> Result<()> {
        let on_device = || self.tensors.iter().find(|(_, tensor)| tensor.location.stream().is_some());
        let of_device = if self.streams.is_empty() { None } else { on_device() };
        let of_host = || self.writable.first().and_then(|&index| self.tensors.get_index(index));
        let Some((name, _)) = of_device.or_else(of_host) else { return Ok(()) };
        let what = "a tensor that the program may write cannot be kept for later; give an owned or shared copy";
        Err(Error::invalid(format!("{what} tensor={name:?}")))
    }

    /// Takes all values into one map, for a step of one rank. The two kinds of values have no name in common.
    pub(crate) fn take_values(&mut self) -> BTreeMap<String, serde_json::Value> {
        let mut values = std::mem::take(&mut self.values);
        values.append(&mut self.rank_values);
        values
    }

    /// The number of tensors, without aliases.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// True when there are no tensors.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// The sum of tensor sizes in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// A hash of names, dtypes, shapes and groups in order: equal structures have equal fingerprints.
    pub(crate) fn fingerprint(&self) -> u64 {
        self.fingerprint
    }
}

fn put(
    what: &str,
    map: &mut BTreeMap<String, serde_json::Value>,
    name: String,
    value: &(impl Serialize + ?Sized),
) -> Result<()> {
    if name.is_empty() || map.contains_key(&name) {
        return Err(Error::invalid(format!("the name is empty or taken {what}={name:?}")));
    }
    let encoded = encode_named(what, &name, value)?;
    map.insert(name, encoded);
    Ok(())
}

impl fmt::Debug for StateDict<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StateDict({} tensors, {} bytes, {} values)", self.tensors.len(), self.bytes, self.values.len())
    }
}
