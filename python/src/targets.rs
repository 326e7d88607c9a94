//! Reads tensors into memory that Python objects own.
//!
//! # Safety argument
//! A target is memory that an object describes, and this call holds the object. Before anything is read, each
//! target is checked to be writable, its shape is compared with that of the region that is read, and the
//! extents of no two targets overlap. So each slice is the only one of its memory in this library. The caller
//! of `read_into` promises that no other thread of the program uses the memory meanwhile. Where the caller
//! breaks this promise, values are torn, as in any library that fills tensors without the GIL.
#![expect(unsafe_code, reason = "slices of memory that Python objects own; argument above")]

use crate::collect::{self, Found};
use crate::dlpack;
use crate::errors::{IntoPy, invalid};
use crate::sources;
use ashore::{Checkpoint, DeviceChoice, DeviceTarget, HostTarget, Targets};
use pyo3::prelude::*;
use std::collections::HashMap;
use std::ops::Range;

/// The length of the largest element in bytes.
const SCALAR: usize = 8;

/// The begin and the end in each dimension.
pub type Region = Vec<(usize, usize)>;

/// The source and the target of a read.
pub struct Wanted<'py> {
    pub name: String,
    pub object: Bound<'py, PyAny>,
    /// The region that is read. None: the whole tensor.
    pub region: Option<Region>,
}

/// Fills all targets. With `needs_device`, the checkpoint has no device for targets in device memory.
///
/// # Errors
/// `InvalidError`, naming the tensor, for a target of another dtype or shape, and for a target that cannot be
/// written, has elements that overlap, or shares memory with another. `NotFoundError` for a name that the
/// checkpoint does not have.
pub fn read(
    py: Python<'_>,
    checkpoint: &Checkpoint,
    wanted: Vec<Wanted<'_>>,
    strict: bool,
    stream: Option<usize>,
    needs_device: bool,
) -> PyResult<()> {
    let mut founds = Vec::with_capacity(wanted.len());
    for want in &wanted {
        founds.push(fitting(py, checkpoint, want)?);
    }
    let again = same_memory(py, checkpoint, &wanted, &founds)?;
    // The targets of scalars whose own memory is filled under another name: no part of a scalar can be left
    // out.
    let mut spare = vec![[0_u8; SCALAR]; again.len()];
    let mut spare = spare.iter_mut();
    let mut targets = if strict { Targets::new().strict() } else { Targets::new() };
    let mut streams: HashMap<(i32, bool), usize> = HashMap::new();
    for (number, (want, Found { memory, .. })) in wanted.iter().zip(&founds).enumerate() {
        if again.contains(&number) {
            // The memory is filled under the other name. A target without bytes counts as requested.
            let name = want.name.as_str();
            let scalar = spare.next().and_then(|bytes| bytes.get_mut(..memory.bytes() as usize));
            targets = match (memory.shape.len(), scalar) {
                (0, Some(bytes)) => targets.bytes(name, bytes),
                (dims, _) => targets.slice(name, &vec![0..0; dims], &mut []),
            };
            continue;
        }
        let region: Option<Vec<Range<usize>>> =
            want.region.as_ref().map(|region| region.iter().map(|&(begin, end)| begin..end).collect());
        let name = want.name.as_str();
        if let (true, Some(strides)) = (memory.on_host(), &memory.strides) {
            let first = std::ptr::with_exposed_provenance_mut(memory.address);
            // SAFETY: writable memory of the object at each element, and no other target's.
            let target = unsafe { HostTarget::strided(first, memory.dtype, &memory.shape, strides) };
            targets = match &region {
                Some(region) => targets.host_slice(name, region, target),
                None => targets.host(name, target),
            };
            continue;
        }
        if memory.on_host() {
            let length = memory.bytes() as usize;
            let bytes: &mut [u8] = if length == 0 {
                &mut []
            } else {
                // SAFETY: writable memory of the object, of this length, and no other target's.
                unsafe { std::slice::from_raw_parts_mut(std::ptr::with_exposed_provenance_mut(memory.address), length) }
            };
            targets = match &region {
                Some(region) => targets.slice(name, region, bytes),
                None => targets.bytes(name, bytes),
            };
            continue;
        }
        let way = collect::way(&want.object, &want.name)?;
        let place = (memory.device.id, way.says_stream());
        let handle = match (stream, streams.get(&place)) {
            (Some(handle), _) | (None, Some(&handle)) => handle,
            (None, None) => collect::current_stream(py, way, memory.device)?,
        };
        streams.insert(place, handle);
        let on = sources::given(u32::try_from(memory.device.id).unwrap_or(0), handle);
        let address = memory.address as u64;
        let target = match &memory.strides {
            // SAFETY: memory of the object on that device, used in the library's current stream.
            None => unsafe { DeviceTarget::new(address, memory.bytes(), on) }.with_dtype(memory.dtype),
            // SAFETY: as above.
            Some(strides) => unsafe { DeviceTarget::strided(address, memory.dtype, &memory.shape, strides, on) },
        };
        targets = match &region {
            Some(region) => targets.device_slice(name, region, target),
            None => targets.device(name, target),
        };
    }
    let on_device = founds.iter().any(|found| !found.memory.on_host());
    // The GIL is released. `wanted` and `founds` hold the objects.
    let read = || match needs_device && on_device {
        true => checkpoint.clone().with_device(DeviceChoice::Auto)?.read_into(targets),
        false => checkpoint.read_into(targets),
    };
    py.detach(read).or_raise(py)?;
    py.check_signals()
}

/// Finds the memory of a target, and checks that it fits the tensor or region that is read.
fn fitting(py: Python<'_>, checkpoint: &Checkpoint, want: &Wanted<'_>) -> PyResult<Found> {
    let stored = checkpoint.tensor(&want.name).or_raise(py)?;
    let found = collect::find(&want.object, &want.name, None)?;
    let memory = &found.memory;
    let refuse = |why: String| Err(invalid(py, &why, Some(&want.name)));
    let shape: Vec<usize> = match &want.region {
        None => stored.shape.to_vec(),
        Some(region) => region.iter().map(|(begin, end)| end.saturating_sub(*begin)).collect(),
    };
    if memory.dtype != stored.dtype || memory.shape[..] != shape[..] {
        let (dtype, has) = (memory.dtype, &memory.shape[..]);
        return refuse(format!(
            "a target has another dtype or shape than what is read into it dtype={dtype} shape={has:?} stored_dtype={} stored_shape={shape:?}",
            stored.dtype
        ));
    }
    if found.read_only {
        return refuse("a target is read-only".into());
    }
    Ok(found)
}

/// Finds targets in the same memory as another target: targets of tied tensors are read once.
///
/// # Errors
/// `InvalidError` for targets that overlap in another way, or whose tensors are stored apart.
fn same_memory(
    py: Python<'_>,
    checkpoint: &Checkpoint,
    wanted: &[Wanted<'_>],
    founds: &[Found],
) -> PyResult<std::collections::HashSet<usize>> {
    let mut order: Vec<usize> = (0..founds.len()).filter(|&number| founds[number].memory.elements() > 0).collect();
    let extent = |number: usize| {
        let memory = &founds[number].memory;
        let device = if memory.on_host() { (dlpack::CPU, 0) } else { (memory.device.kind, memory.device.id) };
        (device, memory.extent())
    };
    order.sort_by_key(|&number| extent(number));
    let mut again = std::collections::HashSet::new();
    let mut last: Option<usize> = None;
    for number in order {
        if let Some(before) = last {
            let ((device, (begin, end)), (other_device, (_, other_end))) = (extent(number), extent(before));
            if device == other_device && begin < other_end {
                let (one, two) = (&wanted[before], &wanted[number]);
                // With other strides or another shape, other elements would be at the same address.
                let layout =
                    |number: usize| founds.get(number).map(|found| (&found.memory.shape, &found.memory.strides));
                let same =
                    (begin, end) == extent(before).1 && layout(number) == layout(before) && one.region == two.region;
                if !same || !tied(checkpoint, &one.name, &two.name) {
                    let why =
                        format!("two targets share memory, and their tensors are stored apart other={:?}", one.name);
                    return Err(invalid(py, &why, Some(&two.name)));
                }
                again.insert(number);
                continue;
            }
        }
        last = Some(number);
    }
    Ok(again)
}

/// Whether two tensors have the same bytes, by their digests.
fn tied(checkpoint: &Checkpoint, one: &str, other: &str) -> bool {
    let Ok(contents) = checkpoint.contents() else { return false };
    let digests = |name: &str| {
        let tensor = contents.tensors.iter().find(|tensor| tensor.name == name)?;
        Some(tensor.slices.iter().map(|slice| (slice.at.clone(), slice.length, slice.digest)).collect::<Vec<_>>())
    };
    one == other || digests(one).is_some() && digests(one) == digests(other)
}
