//! Converts collected tensors to a state dict of the engine.
//!
//! # Safety argument
//! Threads of the engine read a source until the save is staged. The objects that own the memory (the
//! storages of torch's tensors, NumPy's arrays, capsules of DLPack) are in one Python list, to which each
//! source has a reference. So the memory stays allocated as long. Only torch can free it while it is
//! referenced, by `resize_` of a storage: the documentation forbids that between `save` and the fence. The
//! caller of `CheckpointExecutor.save` promises that nothing writes the memory between a save and the fence.
//! Where the caller breaks this promise, bytes are wrong, but no memory access is invalid. Where an adapter
//! declares memory immutable, nothing writes it while its owner lives: XLA does not reuse the memory of an
//! array while a capsule of it exists, and only the adapter knows its own copies. The extents were checked
//! against the storages. A stream is the one in which the library queues its work, which torch never
//! destroys.
#![expect(unsafe_code, reason = "sources over memory that Python objects own; argument above")]

use crate::collect::{self, Found, Memory};
use crate::errors::{self, IntoPy};
use crate::leaf::Way;
use crate::reading::{Extent, Owners, Reading};
use ashore::{Capture, DeviceStream, HostTensor, RawDevice, RawHost, StateDict};
use pyo3::prelude::*;
use pyo3::types::PyList;
use std::collections::HashMap;
use std::sync::Arc;

/// The position of a box: the shape of the whole tensor, and the index of the first element.
pub type Place = (Vec<usize>, Vec<usize>);

/// Packed memory that nothing writes while its owner lives.
struct Immutable {
    address: usize,
    bytes: usize,
    _keep: Owners,
}

impl AsRef<[u8]> for Immutable {
    fn as_ref(&self) -> &[u8] {
        let pointer = std::ptr::with_exposed_provenance::<u8>(self.address);
        // SAFETY: `_keep` owns the memory, and nothing writes it meanwhile; see the safety argument.
        unsafe { std::slice::from_raw_parts(pointer, self.bytes) }
    }
}

/// A tensor to be saved.
pub struct Item<'py> {
    pub name: String,
    pub object: Bound<'py, PyAny>,
    /// How the object describes itself, if that is known.
    pub way: Option<Way>,
    /// The position of the object in a tensor. None: the object is the whole tensor.
    pub place: Option<Place>,
    pub capture: Option<Capture>,
}

/// The streams of the devices with tensors of a save, and how to ask for the current stream. Each device has
/// one entry for libraries that tell their stream, and one for all others.
pub type Devices = HashMap<(i32, bool), (DeviceStream<'static>, Way)>;

/// Finds the memory of `items` and adds them to `state`. `seen` holds the memory of the tensors of the last
/// save, in order, and is replaced by that of this save. `extra` is kept alive, too. `immutable` declares
/// that nothing writes the memory while its owner lives: then no fence is needed. Returns the memory that the
/// engine reads, too.
///
/// # Errors
/// `InvalidError`, naming the tensor.
pub fn add<'py>(
    py: Python<'py>,
    state: &mut StateDict<'static>,
    mut items: Vec<Item<'py>>,
    seen: &mut Vec<Memory>,
    extra: Option<Py<PyAny>>,
    stream: Option<usize>,
    immutable: bool,
) -> PyResult<(Devices, Reading)> {
    let mut devices = Devices::new();
    let mut owners: Vec<Py<PyAny>> = extra.into_iter().collect();
    owners.reserve(items.len());
    let mut tensors = Vec::with_capacity(items.len());
    let mut memories = Vec::with_capacity(items.len());
    let mut streams = Vec::with_capacity(items.len());
    for (number, item) in items.iter().enumerate() {
        let known = seen.get(number);
        let way = match item.way {
            Some(way) => way,
            None => collect::way(&item.object, &item.name)?,
        };
        let Found { memory, keep, .. } = collect::find_by(way, &item.object, &item.name, known)?;
        let place = Some((memory.device.id, way.says_stream())).filter(|_| !memory.on_host());
        if let Some(place) = place.filter(|place| !devices.contains_key(place)) {
            let handle = match stream {
                Some(handle) => handle,
                None => collect::current_stream(py, way, memory.device)?,
            };
            let ordinal = u32::try_from(memory.device.id).unwrap_or(0);
            // SAFETY: a stream that the library uses, of this device; see above.
            let stream = unsafe { DeviceStream::new(ordinal, handle) };
            devices.insert(place, (promised(stream), way));
        }
        streams.push(place.and_then(|place| devices.get(&place)).map(|(stream, _)| *stream));
        if way.says_stream() && memory.elements() > 0 {
            let (begin, end) = memory.extent();
            tensors.push(Extent { number, owner: owners.len(), begin, end });
        }
        owners.push(keep);
        memories.push(memory);
    }
    let keep: Owners = Arc::new(PyList::new(py, owners)?.unbind());
    let holders = holders(&mut items, &memories);
    // A tensor that is captured in the call may be resized after it. Aliases have told their holders.
    let captured = |number: usize| items.get(number).is_some_and(|item| item.capture == Some(Capture::AtSave));
    tensors.retain(|tensor: &Extent| !captured(holders.get(tensor.number).copied().flatten().unwrap_or(tensor.number)));
    for (((item, memory), stream), holder) in items.iter().zip(&memories).zip(streams).zip(holders) {
        if let Some(holder) = holder.and_then(|holder| items.get(holder)) {
            state.alias(item.name.clone(), &holder.name).or_raise(py)?;
            continue;
        }
        put(py, state, item, memory, stream, keep.clone(), immutable)?;
    }
    *seen = memories;
    let names = items.into_iter().map(|item| item.name).collect();
    Ok((devices, Reading { owners: Arc::downgrade(&keep), tensors, names }))
}

/// For each item, returns the earlier item with the same memory, which holds its bytes. If an item is
/// captured in the call, its holder is captured, too: the bytes are read once.
fn holders(items: &mut [Item<'_>], memories: &[Memory]) -> Vec<Option<usize>> {
    let mut first: HashMap<&Memory, usize, foldhash::fast::FixedState> = HashMap::default();
    first.reserve(memories.len());
    let mut holders = Vec::with_capacity(memories.len());
    for (number, memory) in memories.iter().enumerate() {
        let item = items.get(number).filter(|item| item.place.is_none() && memory.elements() > 0);
        let captured = item.is_some_and(|item| item.capture == Some(Capture::AtSave));
        let holder = item.map(|_| *first.entry(memory).or_insert(number)).filter(|&holder| holder != number);
        if let Some(holder) = holder.filter(|_| captured).and_then(|holder| items.get_mut(holder)) {
            holder.capture = Some(Capture::AtSave);
        }
        holders.push(holder);
    }
    holders
}

/// Extends the lifetime of a stream: torch's streams live as long as the process, and so does the legacy
/// stream.
fn promised(stream: DeviceStream<'_>) -> DeviceStream<'static> {
    // SAFETY: see the safety argument.
    unsafe { DeviceStream::new(stream.ordinal(), stream.handle()) }
}

fn put(
    py: Python<'_>,
    state: &mut StateDict<'static>,
    item: &Item<'_>,
    memory: &Memory,
    stream: Option<DeviceStream<'static>>,
    keep: Owners,
    immutable: bool,
) -> PyResult<()> {
    let (dtype, shape) = (memory.dtype, &memory.shape[..]);
    // A tensor without elements has no address, so it gets an aligned one.
    let address = memory.address.max(std::mem::align_of::<u64>());
    match (stream, &memory.strides) {
        (None, None) if immutable => {
            let owner = Immutable { address, bytes: memory.bytes() as usize, _keep: keep };
            insert(py, state, item, HostTensor::from_owner(owner, dtype, shape))
        }
        (None, None) => {
            let pointer = std::ptr::with_exposed_provenance::<u8>(address);
            // SAFETY: `keep` owns the memory; see the safety argument.
            insert(py, state, item, unsafe { RawHost::new(pointer, memory.bytes(), dtype, shape, keep) })
        }
        (None, Some(strides)) => {
            let pointer = std::ptr::with_exposed_provenance::<u8>(address);
            // SAFETY: as above, and the extent of the elements was checked.
            insert(py, state, item, unsafe { RawHost::strided(pointer, dtype, shape, strides, keep) })
        }
        (Some(stream), None) => {
            // SAFETY: as above, in memory of the stream's device.
            insert(py, state, item, unsafe {
                RawDevice::new(address as u64, memory.bytes(), dtype, shape, stream, keep)
            })
        }
        (Some(stream), Some(strides)) => {
            // SAFETY: as above.
            insert(py, state, item, unsafe { RawDevice::strided(address as u64, dtype, shape, strides, stream, keep) })
        }
    }
}

fn insert(
    py: Python<'_>,
    state: &mut StateDict<'static>,
    item: &Item<'_>,
    source: impl ashore::Source + 'static,
) -> PyResult<()> {
    let name = item.name.clone();
    let added = match (&item.place, item.capture) {
        (None, None) => state.tensor(name, source),
        (None, Some(capture)) => state.tensor_captured(name, source, capture),
        (Some((shape, at)), None) => state.tensor_box(name, shape, at, source),
        (Some(_), Some(_)) => {
            return Err(errors::invalid(py, "a box is captured as the engine chooses: give no capture", Some(&name)));
        }
    };
    added.or_raise(py).map(drop)
}

/// Returns the current streams of the devices of a save, each once.
pub fn current(devices: &[(i32, Way)], py: Python<'_>) -> PyResult<Vec<DeviceStream<'static>>> {
    let mut streams = Vec::with_capacity(devices.len());
    for &(id, way) in devices {
        let device = crate::dlpack::Device { kind: crate::dlpack::CUDA, id };
        let stream = given(u32::try_from(id).unwrap_or(0), collect::current_stream(py, way, device)?);
        if !streams.contains(&stream) {
            streams.push(stream);
        }
    }
    Ok(streams)
}

/// Makes a stream from the handle that the program gives.
pub fn given(ordinal: u32, handle: usize) -> DeviceStream<'static> {
    // SAFETY: the documentation of `fence` requires a stream of that device that is alive.
    unsafe { DeviceStream::new(ordinal, handle) }
}
