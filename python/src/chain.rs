//! Published versions: `ashore._ashore.Publisher`, `Follow`, `Update`, `Change` and `Weights`.

use crate::collect::Memory;
use crate::errors::{self, IntoPy, closed, entry, invalid};
use crate::handle::Handle;
use crate::lent::{self, Held, Lent, Targets};
use crate::reading::Reading;
use crate::sources::{self, Devices, Item};
use crate::tree::{Leaves, Tensor};
use crate::waiting::{SLICE, interruptible, seconds};
use crate::{dtypes, values};
use ashore::chain::{Changed, Follow as Engine, Reader, Switch, Update as Next, Weights as Version};
use ashore::{Error, ErrorKind, Form, StateDict, Value};
use pyo3::prelude::*;
use pyo3::sync::MutexExt;
use pyo3::types::PyDict;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A publisher of the engine, until it is closed.
#[pyclass(module = "ashore._ashore", frozen)]
pub struct Publisher {
    inner: Mutex<Option<Arc<ashore::chain::Publisher>>>,
    process: u32,
    /// The memory of the tensors of the last published version.
    seen: Mutex<Vec<Memory>>,
}

impl Publisher {
    /// Returns the publisher of the engine.
    pub fn open(&self, py: Python<'_>) -> PyResult<Arc<ashore::chain::Publisher>> {
        if std::process::id() != self.process {
            return Err(closed(py, "a publisher cannot be used in a forked child: it belongs to the parent"));
        }
        let inner = self.inner.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner).clone();
        inner.ok_or_else(|| closed(py, "the publisher was closed"))
    }

    /// Collects the tensors and values of a state, and the devices of its tensors.
    pub fn collect(
        &self,
        py: Python<'_>,
        state: &Bound<'_, PyAny>,
        beside: &Bound<'_, PyDict>,
    ) -> PyResult<(StateDict<'static>, Devices, Reading)> {
        let leaves = Leaves::of(state)?;
        let mut dict = StateDict::with_capacity(leaves.tensors.len());
        for (name, value) in &leaves.values {
            dict.value(name.as_str(), value).or_raise(py)?;
        }
        for (name, value) in beside {
            let name: String = name.extract()?;
            dict.value(name.as_str(), &values::encode(&value, &name)?).or_raise(py)?;
        }
        let item = |held| {
            let Tensor { name, object, way, place } = held;
            Item { name, object, way: Some(way), place, capture: None }
        };
        let items = leaves.tensors.into_iter().map(item).collect();
        // The memory is taken out of the lock, because collecting runs Python code.
        let mut seen = std::mem::take(&mut *self.seen.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner));
        let (devices, reading) = sources::add(py, &mut dict, items, &mut seen, None, None, false)?;
        *self.seen.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner) = seen;
        Ok((dict, devices, reading))
    }
}

#[pymethods]
impl Publisher {
    #[new]
    fn new(
        py: Python<'_>,
        root: PathBuf,
        form: &str,
        grace: u64,
        full_every: u64,
        begin_with_full: bool,
        arena: u64,
    ) -> PyResult<Self> {
        entry(py, || {
            let form = match form {
                "packed" => Form::Packed,
                "indices" => Form::Indices,
                "zstd" => Form::Zstd,
                _ => return Err(invalid(py, &format!("a form is packed, indices or zstd form={form:?}"), None)),
            };
            let build = move || {
                let builder = ashore::chain::Publisher::open(&root)?.form(form).grace(grace);
                let builder = builder.full_every(full_every).arena(arena);
                if begin_with_full { builder.begin_with_full() } else { builder }.build()
            };
            let inner = Mutex::new(Some(Arc::new(interruptible(py, build)?.or_raise(py)?)));
            Ok(Self { inner, process: std::process::id(), seen: Mutex::default() })
        })
    }

    /// Returns the newest durable version.
    fn newest(&self, py: Python<'_>) -> PyResult<Option<u64>> {
        entry(py, || {
            let publisher = self.open(py)?;
            Ok(py.detach(move || publisher.newest()))
        })
    }

    /// Publishes a tree of tensors and values.
    fn publish(&self, py: Python<'_>, state: &Bound<'_, PyAny>, beside: &Bound<'_, PyDict>) -> PyResult<Handle> {
        entry(py, || {
            let publisher = self.open(py)?;
            let (dict, ..) = self.collect(py, state, beside)?;
            py.detach(move || publisher.publish(dict)).or_raise(py).map(Handle::of_publish)
        })
    }

    /// Removes versions that no follower needs.
    fn prune(&self, py: Python<'_>) -> PyResult<Vec<String>> {
        entry(py, || {
            let publisher = self.open(py)?;
            interruptible(py, move || publisher.prune())?.or_raise(py)
        })
    }

    fn is_open(&self, py: Python<'_>) -> bool {
        self.open(py).is_ok()
    }

    /// Waits for publishes in flight, and releases memory and threads.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        entry(py, || {
            if std::process::id() != self.process {
                return Err(closed(py, "a publisher cannot be closed in a forked child"));
            }
            let inner = self.inner.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner).take();
            self.seen.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner).clear();
            interruptible(py, move || {
                // Calls of other threads, and saves of an executor that have not ended, hold it, too.
                let mut inner = inner;
                while let Some(Err(shared)) = inner.take().map(Arc::try_unwrap) {
                    inner = Some(shared);
                    std::thread::sleep(Duration::from_millis(1));
                }
            })
        })
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        let inner = self.inner.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        // The drop waits for publishes in flight, so it must not hold the GIL. After the end of the
        // interpreter there is no GIL.
        let mut inner = Some(inner);
        if Python::try_attach(|py| py.detach(|| drop(inner.take()))).is_none() {
            drop(inner);
        }
    }
}

/// A follower while no call uses it.
#[derive(Default)]
struct Place {
    held: Mutex<Option<Box<Held>>>,
    /// Set when an exception of a signal ended the wait of a call. The call continues alone until it sees
    /// this.
    stopped: AtomicBool,
    /// The version of the weights; 0 means none.
    version: AtomicU64,
}

/// A follower while a call uses it. Its drop returns the follower.
struct Lease {
    place: Arc<Place>,
    held: Option<Box<Held>>,
}

impl Lease {
    fn engine(&mut self) -> Option<&mut Engine<'static>> {
        self.held.as_mut().map(|held| held.engine())
    }

    /// Runs a call of the engine, and stores the version after it.
    fn with<T>(&mut self, f: impl FnOnce(&mut Engine<'static>) -> ashore::Result<T>) -> ashore::Result<T> {
        let gone = || Error::new(ErrorKind::Busy, "a follower is in use");
        let done = f(self.engine().ok_or_else(gone)?);
        let version = self.engine().and_then(|engine| engine.version());
        self.place.version.store(version.unwrap_or(0), Ordering::Release);
        done
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        *self.place.held.lock().unwrap_or_else(PoisonError::into_inner) = self.held.take();
    }
}

/// A follower of a chain.
#[pyclass(module = "ashore._ashore", frozen)]
pub struct Follow {
    place: Arc<Place>,
    reader: Option<Reader>,
    /// How long an interrupted wait may continue.
    piece: Duration,
    process: u32,
}

impl Follow {
    fn ours(&self, py: Python<'_>) -> PyResult<()> {
        if std::process::id() == self.process {
            return Ok(());
        }
        Err(closed(py, "a follower cannot be used in a forked child: it belongs to the parent"))
    }

    /// Takes the follower for one call.
    fn lease(&self, py: Python<'_>) -> PyResult<Lease> {
        self.lease_until(py, None)?
            .ok_or_else(|| errors::busy(py, "a call that was interrupted still uses the follower"))
    }

    /// Takes the follower for one call. None if an interrupted call still uses it at `until`.
    fn lease_until(&self, py: Python<'_>, until: Option<Instant>) -> PyResult<Option<Lease>> {
        self.ours(py)?;
        loop {
            let held = self.place.held.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner).take();
            if held.is_some() {
                self.place.stopped.store(false, Ordering::Relaxed);
                return Ok(Some(Lease { place: self.place.clone(), held }));
            }
            if !self.place.stopped.load(Ordering::Relaxed) {
                return Err(errors::busy(py, "another call uses the follower: one thread at a time does"));
            }
            if until.is_some_and(|until| until <= Instant::now()) {
                return Ok(None);
            }
            py.detach(|| std::thread::sleep(SLICE));
            py.check_signals()?;
        }
    }
}

/// The name, the dtype (in safetensors and in NumPy) and the shape of a tensor, and the name of the tensor
/// that holds its bytes.
type Info = (String, String, Option<&'static str>, Vec<usize>, String);

fn infos(weights: &Version<'_>) -> Vec<Info> {
    let info = |(name, dtype, shape): (&str, ashore::Dtype, &[usize])| {
        let holder = weights.holder(name).unwrap_or(name).to_owned();
        (name.to_owned(), dtype.to_string(), dtypes::numpy_name(dtype), shape.to_vec(), holder)
    };
    weights.tensors().map(info).collect()
}

/// Copies tensors of a version to memory that must have their dtypes and shapes.
fn copy(weights: &Version<'_>, lent: &mut [Lent], tied: &[(String, String)]) -> ashore::Result<()> {
    let refuse = |why: &str, name: &str| Err(Error::new(ErrorKind::Invalid, format!("{why} tensor={name:?}")));
    for (name, other) in tied {
        if !std::ptr::eq(weights.bytes(name)?, weights.bytes(other)?) {
            return refuse("two targets share memory, but their tensors are separate in the version", name);
        }
    }
    let is: HashMap<_, _> = weights.tensors().map(|(name, dtype, shape)| (name, (dtype, shape))).collect();
    let mut own = Vec::new();
    for (name, ..) in weights.tensors() {
        let range = weights.bytes(name)?.as_ptr_range();
        own.push((range.start.addr(), range.end.addr()));
    }
    own.sort_unstable();
    for lent in lent {
        let (name, memory) = (&lent.name, &lent.memory);
        let (begin, end) = memory.extent();
        // Tensors of a version do not overlap. So the last one that begins before the end also reaches
        // farthest.
        let before = own.partition_point(|(start, _)| *start < end).checked_sub(1).and_then(|last| own.get(last));
        if begin < end && before.is_some_and(|(_, reached)| *reached > begin) {
            return refuse("a target overlaps the memory of the follower itself: read the tensor there", name);
        }
        let from = weights.bytes(name)?;
        if is.get(name.as_str()) != Some(&(memory.dtype, &memory.shape[..])) {
            return refuse("a target has another dtype or shape than the version", name);
        }
        lent.fill(|bytes| bytes.copy_from_slice(from));
    }
    Ok(())
}

#[pymethods]
impl Follow {
    #[new]
    #[expect(clippy::too_many_arguments, reason = "called by ashore/chain.py alone")]
    fn new(
        py: Python<'_>,
        root: PathBuf,
        double: bool,
        targets: Option<Vec<(String, Bound<'_, PyAny>)>>,
        strict: bool,
        copy_to: Option<PathBuf>,
        poll: f64,
        confirm: bool,
    ) -> PyResult<Self> {
        entry(py, || {
            let targets = targets.map(|targets| Targets::new(targets, strict)).transpose()?;
            let writes_targets = targets.is_some();
            let poll = seconds(py, poll)?;
            let start = move || {
                let mut follower = Engine::open(&root)?.poll_every(poll).confirm(confirm);
                follower = follower.switch(if double { Switch::Double } else { Switch::InPlace });
                if let Some(copy_to) = copy_to {
                    follower = follower.copy_to(copy_to)?;
                }
                Held::start(follower, targets)
            };
            // A start that a signal interrupts would go on, and write the memory of the program.
            let held = if writes_targets { py.detach(start) } else { interruptible(py, start)? };
            let mut held = held.or_raise(py)?;
            let reader = held.engine().reader();
            let version = AtomicU64::new(held.engine().version().unwrap_or(0));
            let place = Place { held: Mutex::new(Some(Box::new(held))), version, ..Place::default() };
            // A wait spans several polls, so that the work at the begin and the end of each wait stays small.
            let piece = (poll * 4).clamp(SLICE, Duration::from_secs(2));
            Ok(Self { place: Arc::new(place), reader, piece, process: std::process::id() })
        })
    }

    /// The version that was applied last.
    #[getter]
    fn version(&self) -> Option<u64> {
        Some(self.place.version.load(Ordering::Acquire)).filter(|version| *version > 0)
    }

    /// Waits for the next update. None after `deadline` seconds.
    #[pyo3(name = "next")]
    fn next_update(&self, py: Python<'_>, deadline: Option<f64>) -> PyResult<Option<Update>> {
        entry(py, || {
            let wait = deadline.map(|deadline| seconds(py, deadline)).transpose()?;
            let until = wait.and_then(|wait| Instant::now().checked_add(wait));
            let Some(mut lease) = self.lease_until(py, until)? else { return Ok(None) };
            let piece = self.piece;
            let wait = move || loop {
                let left = until.map_or(piece, |until| until.saturating_duration_since(Instant::now()));
                let found = lease.with(|engine| engine.next(left.min(piece)));
                let stopped = lease.place.stopped.load(Ordering::Relaxed);
                if stopped || !matches!(found, Ok(None)) || until.is_some_and(|until| until <= Instant::now()) {
                    return found;
                }
            };
            let found = interruptible(py, wait).inspect_err(|_| self.place.stopped.store(true, Ordering::Relaxed))?;
            let found = found.or_raise(py)?;
            Ok(found.map(|update| Update {
                version: update.version(),
                is_full: update.is_full(),
                bytes: update.bytes(),
                update: Mutex::new(Some(update)),
            }))
        })
    }

    /// Applies an update. A signal does not interrupt it: the memory is whole when it returns.
    fn apply(&self, py: Python<'_>, update: &Update) -> PyResult<u64> {
        entry(py, || {
            let mut lease = self.lease(py)?;
            let update = update.taken(py)?;
            py.detach(move || lease.with(|engine| engine.apply(update))).or_raise(py)
        })
    }

    /// Returns the changes of an update in the weights.
    fn changes(&self, py: Python<'_>, update: &Update) -> PyResult<Vec<Change>> {
        entry(py, || {
            let mut lease = self.lease(py)?;
            let next = update.taken(py)?;
            let (next, changes) = py.detach(move || {
                let changes = lease.with(|engine| next.changes(engine.weights()));
                (next, changes)
            });
            *update.update.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner) = Some(next);
            Ok(changes.or_raise(py)?.into_iter().map(|changed| Change { changed }).collect())
        })
    }

    /// Lists the tensors of the version.
    fn tensors(&self, py: Python<'_>) -> PyResult<Vec<Info>> {
        entry(py, || self.lease(py)?.with(|engine| Ok(infos(engine.weights()))).or_raise(py))
    }

    /// Copies tensors of the version.
    fn read_into(&self, py: Python<'_>, targets: Vec<(String, Bound<'_, PyAny>)>) -> PyResult<()> {
        entry(py, || {
            let mut lease = self.lease(py)?;
            let (mut lent, tied) = lent::several(targets)?;
            py.detach(move || lease.with(|engine| copy(engine.weights(), &mut lent, &tied))).or_raise(py)
        })
    }

    /// Compares all bytes with the digests of the version.
    fn verify(&self, py: Python<'_>) -> PyResult<()> {
        entry(py, || {
            let mut lease = self.lease(py)?;
            interruptible(py, move || lease.with(|engine| engine.weights().verify()))
                .inspect_err(|_| self.place.stopped.store(true, Ordering::Relaxed))?
                .or_raise(py)
        })
    }

    /// Returns the version that readers see. None where there is one copy.
    fn shown(&self, py: Python<'_>) -> PyResult<Option<Weights>> {
        self.ours(py)?;
        Ok(self.reader.as_ref().map(|reader| Weights { version: reader.get() }))
    }
}

/// A version that was read and checked.
#[pyclass(module = "ashore._ashore", frozen)]
pub struct Update {
    #[pyo3(get)]
    version: u64,
    #[pyo3(get)]
    is_full: bool,
    #[pyo3(get)]
    bytes: u64,
    /// None after the update was applied or given to a call.
    update: Mutex<Option<Next>>,
}

impl Update {
    fn taken(&self, py: Python<'_>) -> PyResult<Next> {
        let taken = self.update.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner).take();
        taken.ok_or_else(|| invalid(py, &format!("an update is applied once version={}", self.version), None))
    }
}

#[pymethods]
impl Update {
    /// Returns the values that were published with the version.
    fn values<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        entry(py, || {
            let dict = PyDict::new(py);
            let update = self.taken(py)?;
            let values: ashore::Result<Vec<(String, Value)>> =
                update.value_names().map(|name| Ok((name.to_owned(), update.value(name)?))).collect();
            *self.update.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner) = Some(update);
            for (name, value) in values.or_raise(py)? {
                dict.set_item(name, values::decode(py, &value)?)?;
            }
            Ok(dict)
        })
    }
}

/// The change of one tensor in an update.
#[pyclass(module = "ashore._ashore", frozen)]
pub struct Change {
    changed: Changed,
}

#[pymethods]
impl Change {
    #[getter]
    fn name(&self) -> &str {
        &self.changed.name
    }

    /// The names of the dtype in safetensors and in NumPy.
    #[getter]
    fn dtype(&self) -> (String, Option<&'static str>) {
        (self.changed.dtype.to_string(), dtypes::numpy_name(self.changed.dtype))
    }

    /// How many elements change. None: all of them.
    #[getter]
    fn count(&self) -> Option<usize> {
        self.changed.indices.as_ref().map(Vec::len)
    }

    /// The length of the values in bytes.
    #[getter]
    fn bytes(&self) -> usize {
        self.changed.values.len()
    }

    /// Copies indices (as 64-bit integers) and values to memory of these lengths.
    fn fill(&self, py: Python<'_>, indices: Option<Bound<'_, PyAny>>, values: Bound<'_, PyAny>) -> PyResult<()> {
        entry(py, || {
            let name = self.changed.name.as_str();
            let indices = indices.map(|indices| lent::one(&indices, name)).transpose()?;
            let mut values = lent::one(&values, name)?;
            let wanted = self.changed.indices.as_ref().map_or(0, |indices| indices.len() * 8);
            if indices.as_ref().map_or(0, Lent::len) != wanted || values.len() != self.changed.values.len() {
                return Err(invalid(py, "the memory for a change has another length than the change", Some(name)));
            }
            py.detach(move || {
                values.fill(|bytes| bytes.copy_from_slice(&self.changed.values));
                if let (Some(mut to), Some(from)) = (indices, &self.changed.indices) {
                    to.fill(|bytes| {
                        for (to, from) in bytes.as_chunks_mut().0.iter_mut().zip(from) {
                            *to = from.to_ne_bytes();
                        }
                    });
                }
            });
            Ok(())
        })
    }
}

/// A version that does not change.
#[pyclass(module = "ashore._ashore", frozen)]
pub struct Weights {
    version: Arc<Version<'static>>,
}

#[pymethods]
impl Weights {
    #[getter]
    fn version(&self) -> Option<u64> {
        self.version.version()
    }

    fn tensors(&self) -> Vec<Info> {
        infos(&self.version)
    }

    /// Returns the address and the length of the bytes of a tensor. They stay valid while this object lives.
    fn memory(&self, py: Python<'_>, name: &str) -> PyResult<(usize, usize)> {
        entry(py, || {
            let bytes = self.version.bytes(name).or_raise(py)?;
            Ok((bytes.as_ptr().expose_provenance(), bytes.len()))
        })
    }
}
