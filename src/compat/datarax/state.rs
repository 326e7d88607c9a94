//! The state of an object: named arrays, PRNG keys, and values of any serde type, strings among them.
//!
//! In a checkpoint an array is a tensor and a value is a value. A PRNG key is a tensor and a value under one
//! name: the tensor has its data, the value has the name of its implementation. Only a key has both, so
//! `read` can tell a key from an array.

use crate::checkpoint::Checkpoint;
use crate::error::{Error, ErrorKind, Result};
use crate::restore::Targets;
use crate::state::{Dtype, Element, HostTensor, StateDict, decode_value, encode_named};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

/// An object that can return its state and restore it. A [`State`] is such an object.
pub trait Checkpointable {
    /// The state to save.
    ///
    /// # Errors
    /// Its own errors; nothing is saved then.
    fn get_state(&self) -> Result<State>;

    /// Restores a saved state.
    ///
    /// # Errors
    /// Its own errors: something is missing in the saved state, or has another kind than in this object.
    fn set_state(&mut self, state: State) -> Result<()>;
}

impl Checkpointable for State {
    fn get_state(&self) -> Result<State> {
        Ok(self.clone())
    }

    fn set_state(&mut self, state: State) -> Result<()> {
        *self = state;
        Ok(())
    }
}

/// Named arrays, keys and values. Clones share the arrays.
///
/// ```
/// use ashore::compat::datarax::{PrngKey, State};
/// let (mut model, mut state) = (State::new(), State::new());
/// model.array("weights", vec![0.5_f32; 6], [2, 3])?;
/// state.nested("model", model)?.key("rng", PrngKey::threefry2x32(42))?.value("epoch", &3)?;
/// assert_eq!(state.get_array("model.weights")?.shape(), [2, 3]);
/// assert_eq!(state.get_value::<u32>("epoch")?, 3);
/// # Ok::<(), ashore::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct State(BTreeMap<String, Leaf>);

#[derive(Clone, Debug, PartialEq)]
enum Leaf {
    Array(Array),
    Key(PrngKey),
    /// The encoded value.
    Value(Value),
}

/// An array in host memory. Clones share it.
#[derive(Clone)]
pub struct Array {
    dtype: Dtype,
    shape: Vec<usize>,
    held: Arc<dyn Held>,
}

/// A PRNG key: words, and the name of the implementation that uses them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrngKey {
    /// The name, such as `threefry2x32`, `rbg` or `unsafe_rbg`.
    pub implementation: String,
    /// The shape of the data; a batch of keys has more than one dimension.
    pub shape: Vec<usize>,
    /// The data, row-major.
    pub data: Vec<u32>,
}

impl PrngKey {
    /// The key that `jax.random.key(seed)` makes, for `threefry2x32`.
    pub fn threefry2x32(seed: u64) -> Self {
        let data = vec![(seed >> 32) as u32, seed as u32];
        Self { implementation: "threefry2x32".into(), shape: vec![2], data }
    }
}

/// The elements of an array, without their type.
trait Held: Send + Sync {
    fn bytes(&self) -> &[u8];
    fn tensor(self: Arc<Self>, dtype: Dtype, shape: &[usize], name: &str, to: &mut StateDict<'static>) -> Result<()>;
}

impl<T: Element> Held for Vec<T> {
    fn bytes(&self) -> &[u8] {
        bytemuck::cast_slice(self)
    }

    fn tensor(self: Arc<Self>, dtype: Dtype, shape: &[usize], name: &str, to: &mut StateDict<'static>) -> Result<()> {
        to.tensor(name, HostTensor::with_dtype(self, dtype, shape)).map(drop)
    }
}

impl Array {
    /// An array of `shape`. A save checks its length.
    pub fn new<T: Element>(elements: impl Into<Arc<Vec<T>>>, shape: impl Into<Vec<usize>>) -> Self {
        Self { dtype: T::DTYPE, shape: shape.into(), held: elements.into() }
    }

    /// The type of its elements.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Its dimensions, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Its bytes, row-major.
    pub fn bytes(&self) -> &[u8] {
        self.held.bytes()
    }
}

impl PartialEq for Array {
    fn eq(&self, other: &Self) -> bool {
        (self.dtype, &self.shape, self.bytes()) == (other.dtype, &other.shape, other.bytes())
    }
}

impl fmt::Debug for Array {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Array({} {:?})", self.dtype, self.shape)
    }
}

impl State {
    /// An empty state.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an array without copying it.
    ///
    /// # Errors
    /// `Invalid`: the name is taken.
    pub fn array<T: Element>(
        &mut self,
        name: impl Into<String>,
        elements: impl Into<Arc<Vec<T>>>,
        shape: impl Into<Vec<usize>>,
    ) -> Result<&mut Self> {
        self.put(name.into(), Leaf::Array(Array::new(elements, shape)))
    }

    /// Adds a PRNG key.
    ///
    /// # Errors
    /// `Invalid`: the name is taken.
    pub fn key(&mut self, name: impl Into<String>, key: PrngKey) -> Result<&mut Self> {
        self.put(name.into(), Leaf::Key(key))
    }

    /// Adds a value: a number, a string, or anything else that serde can serialize.
    ///
    /// # Errors
    /// `Invalid`: the name is taken, or the value cannot be kept exactly.
    pub fn value(&mut self, name: impl Into<String>, value: &(impl Serialize + ?Sized)) -> Result<&mut Self> {
        let name = name.into();
        let encoded = encode_named("value", &name, value)?;
        self.put(name, Leaf::Value(encoded))
    }

    /// Adds `state` as a part of this one. Each of its names is prefixed with `name` and a dot.
    ///
    /// # Errors
    /// `Invalid`: a name is taken.
    pub fn nested(&mut self, name: &str, state: State) -> Result<&mut Self> {
        for (inner, leaf) in state.0 {
            self.put(format!("{name}.{inner}"), leaf)?;
        }
        Ok(self)
    }

    /// The part `name` of this state, under the names that it had before [`nested`](Self::nested).
    ///
    /// # Errors
    /// `NotFound` when there is no such part.
    pub fn get_nested(&self, name: &str) -> Result<State> {
        let inner = |full: &str| Some(full.strip_prefix(name)?.strip_prefix('.')?.to_owned());
        let found = self.0.iter().filter_map(|(full, leaf)| Some((inner(full)?, leaf.clone())));
        let nested = Self(found.collect());
        if nested.0.is_empty() {
            let missing = format!("the state has no such part name={name:?}");
            return Err(Error::new(ErrorKind::NotFound, missing));
        }
        Ok(nested)
    }

    /// Checks that this saved state and `current` belong to the same iterator: the fields that both have for
    /// the sampler, the data source and the number of shards and workers must be equal. Otherwise the run
    /// would continue with other data.
    ///
    /// # Errors
    /// `Invalid`, naming the field.
    pub(super) fn same_iterator(&self, current: &State) -> Result<()> {
        for field in ["sampler_repr", "data_source_repr", "shard_count", "worker_count"] {
            if let (Some(saved), Some(current)) = (self.0.get(field), current.0.get(field))
                && saved != current
            {
                let what = "the checkpoint belongs to an iterator over other data; restore the iterator's settings, or start a new run";
                return Err(Error::invalid(format!("{what} field={field} saved={saved:?} current={current:?}")));
            }
        }
        Ok(())
    }

    /// Checks that this state has the structure of `current`: the same names, each of the same kind, dtype
    /// and shape.
    ///
    /// # Errors
    /// `Invalid`, naming the first difference.
    pub(super) fn same_structure(&self, current: &State) -> Result<()> {
        let refuse = |why: &str, name: &str| Err(Error::invalid(format!("{why} name={name:?}")));
        for (name, leaf) in &self.0 {
            let same = match (leaf, current.0.get(name)) {
                (_, None) => return refuse("the target lacks a part of the checkpoint", name),
                (Leaf::Array(saved), Some(Leaf::Array(there))) => {
                    (saved.dtype, &saved.shape) == (there.dtype, &there.shape)
                }
                (Leaf::Key(saved), Some(Leaf::Key(there))) => {
                    (&saved.implementation, &saved.shape) == (&there.implementation, &there.shape)
                }
                (Leaf::Value(_), Some(Leaf::Value(_))) => true,
                _ => false,
            };
            if !same {
                return refuse("the kind, dtype or shape of a part differs between checkpoint and target", name);
            }
        }
        match current.0.keys().find(|name| !self.0.contains_key(*name)) {
            Some(name) => refuse("the checkpoint lacks a part of the target", name),
            None => Ok(()),
        }
    }

    fn put(&mut self, name: String, leaf: Leaf) -> Result<&mut Self> {
        if self.0.contains_key(&name) {
            return Err(Error::invalid(format!("the name is taken name={name:?}")));
        }
        self.0.insert(name, leaf);
        Ok(self)
    }

    /// Every name, sorted.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// The array `name`.
    ///
    /// # Errors
    /// `NotFound` when the name is missing, `Invalid` when it is not an array.
    pub fn get_array(&self, name: &str) -> Result<&Array> {
        match self.leaf(name)? {
            Leaf::Array(array) => Ok(array),
            _ => Err(wrong(name, "an array")),
        }
    }

    /// The elements of the array `name`.
    ///
    /// # Errors
    /// As [`State::get_array`]; `Invalid` also when its elements are not of type `T`.
    pub fn get_elements<T: Element>(&self, name: &str) -> Result<Vec<T>> {
        let array = self.get_array(name)?;
        if array.dtype != T::DTYPE {
            let (expected, found) = (T::DTYPE, array.dtype);
            return Err(Error::invalid(format!(
                "the elements have another type expected={expected} found={found} name={name:?}"
            )));
        }
        Ok(bytemuck::pod_collect_to_vec(array.bytes()))
    }

    /// The PRNG key `name`.
    ///
    /// # Errors
    /// As [`State::get_array`].
    pub fn get_key(&self, name: &str) -> Result<&PrngKey> {
        match self.leaf(name)? {
            Leaf::Key(key) => Ok(key),
            _ => Err(wrong(name, "a key")),
        }
    }

    /// The value `name`.
    ///
    /// # Errors
    /// As [`State::get_array`]; `Invalid` also when it is not a `T`.
    pub fn get_value<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        match self.leaf(name)? {
            Leaf::Value(value) => decode_value(value),
            _ => Err(wrong(name, "a value")),
        }
    }

    fn leaf(&self, name: &str) -> Result<&Leaf> {
        let missing = || Error::new(ErrorKind::NotFound, format!("the state has no entry of this name name={name:?}"));
        self.0.get(name).ok_or_else(missing)
    }

    /// Converts to the state dict that the engine saves.
    pub(super) fn into_dict(self) -> Result<StateDict<'static>> {
        let mut state = StateDict::with_capacity(self.0.len());
        for (name, leaf) in self.0 {
            match leaf {
                Leaf::Array(array) => array.held.tensor(array.dtype, &array.shape, &name, &mut state)?,
                Leaf::Key(key) => {
                    state.value(&*name, &key.implementation)?;
                    state.tensor(name, HostTensor::new(key.data, key.shape))?;
                }
                Leaf::Value(_) if name.is_empty() => return Err(Error::invalid("a value needs a name")),
                Leaf::Value(value) => drop(state.values.insert(name, value)),
            }
        }
        Ok(state)
    }

    /// Reads the state from a checkpoint.
    pub(super) fn read(checkpoint: &Checkpoint) -> Result<Self> {
        let values = &checkpoint.manifest().values;
        let mut tensors = Vec::new();
        for tensor in checkpoint.tensors()? {
            let bytes = usize::try_from(tensor.bytes).ok().and_then(zeroed);
            let no_memory =
                || Error::new(ErrorKind::Busy, format!("not enough memory to read a tensor tensor={:?}", tensor.name));
            tensors.push((tensor, bytes.ok_or_else(no_memory)?));
        }
        let targets = tensors.iter_mut().fold(Targets::new(), |all, (tensor, to)| all.bytes(tensor.name, to));
        checkpoint.read_into(targets)?;
        let mut state = BTreeMap::new();
        for (tensor, bytes) in tensors {
            let shape = tensor.shape.to_vec();
            let leaf = match values.get(tensor.name) {
                Some(implementation) if tensor.dtype == Dtype::U32 => {
                    let (implementation, data) = (decode_value(implementation)?, bytemuck::pod_collect_to_vec(&bytes));
                    Leaf::Key(PrngKey { implementation, shape, data })
                }
                _ => Leaf::Array(Array { dtype: tensor.dtype, shape, held: Arc::new(bytes) }),
            };
            state.insert(tensor.name.to_owned(), leaf);
        }
        for (name, value) in values {
            state.entry(name.clone()).or_insert_with(|| Leaf::Value(value.clone()));
        }
        Ok(Self(state))
    }
}

fn wrong(name: &str, what: &str) -> Error {
    Error::invalid(format!("the state has something else than {what} under this name name={name:?}"))
}

fn zeroed(len: usize) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(len).ok()?;
    bytes.resize(len, 0);
    Some(bytes)
}
