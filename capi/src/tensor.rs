//! Uses tensors of the program as sources of a state dict and as targets of a restore.
//!
//! # Safety argument
//! The safety argument of the crate applies: a tensor's description is true, its memory stays until it is
//! released, and nothing writes it between a save and the fence. Targets do not overlap: the library checks
//! this.
#![expect(unsafe_code, reason = "reads descriptions, and takes memory as they say; argument above")]

use crate::callbacks::{Context, Released};
use crate::failure::{Failed, Result};
use crate::given;
use crate::status::ashore_capture::*;
use crate::status::dtype;
use ashore_core::{
    Capture, Checkpoint, DeviceStream, DeviceTarget, HostTarget, Layout, RawDevice, RawHost, Source, StateDict, Targets,
};
use std::any::Any;
use std::ffi::{c_char, c_void};
use std::ops::Range;

/// A stream of a GPU.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct ashore_stream {
    /// A CUstream or cudaStream_t of the device's primary context; null is the legacy default stream.
    pub handle: *mut c_void,
    /// The device, by its ordinal in this process.
    pub device: u32,
}

/// A tensor to save, or memory to restore into. Zero is the default of every member but `name` and `dtype`.
#[repr(C)]
pub struct ashore_tensor {
    /// The name of the tensor: not empty, utf-8.
    pub name: *const c_char,
    /// The address of the element with all indices 0: in host memory, or on the device if `on_device` is set.
    pub data: *mut c_void,
    /// The shape: `dims` numbers, like all arrays here. Null for a scalar.
    pub shape: *const i64,
    /// The distance between neighbours in each dimension, in ELEMENTS, as in DLPack and torch. Null: packed,
    /// row-major. A tensor with strides is saved packed.
    pub strides: *const i64,
    /// The shape of the whole tensor, if this is a box of it. Null: this is the whole tensor. The ranks of a
    /// job together save each element once; if several ranks have the same box, one of them writes it. A
    /// restore compares this shape with the saved shape.
    pub global_shape: *const i64,
    /// The position in the whole tensor at which the box begins. In a save, null if `global_shape` is null. A
    /// restore may set it without `global_shape`.
    pub offset: *const i64,
    /// The number of dimensions.
    pub dims: u32,
    /// An `ashore_dtype`.
    pub dtype: i32,
    /// 0 for host memory, otherwise device memory.
    pub on_device: u32,
    /// An `ashore_capture`. Not allowed for a box or in a restore.
    pub capture: u32,
    /// The stream that wrote `data`; a restore writes in this stream. Only for device memory.
    pub stream: ashore_stream,
    /// Called once for each tensor of a save when nothing will read the tensor any more, whatever the outcome
    /// of the save. Any thread may call it, also within the call of the save. Null: nothing is to be
    /// released. A restore does not call it.
    pub release: Option<unsafe extern "C-unwind" fn(context: *mut c_void)>,
    /// Passed to `release`.
    pub context: *mut c_void,
}

impl ashore_tensor {
    /// Returns the callback, which is called once, when the returned object is dropped.
    pub fn released(&self) -> Option<Released> {
        self.release.map(|release| Released(release, Context(self.context)))
    }
}

/// The description of a tensor, for saves and restores.
struct Described<'a> {
    name: &'a str,
    layout: Layout,
    bytes: u64,
    /// Strides in bytes. None: packed.
    strides: Option<Vec<i64>>,
    global: Option<Vec<usize>>,
    offset: Option<Vec<usize>>,
}

impl<'a> Described<'a> {
    /// # Safety
    /// The safety argument of the crate applies.
    unsafe fn new(index: usize, tensor: &'a ashore_tensor) -> Result<Self> {
        // SAFETY: the caller guarantees this.
        let name = unsafe { given::text("name", tensor.name) };
        let name = name.map_err(|e| e.with_text(|text| format!("{text} tensor_index={index}")))?;
        // SAFETY: the caller guarantees this.
        unsafe { Self::named(name, tensor) }.map_err(|e| e.of_tensor(name))
    }

    /// # Safety
    /// The safety argument of the crate applies.
    unsafe fn named(name: &'a str, tensor: &ashore_tensor) -> Result<Self> {
        let refuse = |why: String| Failed::invalid(format!("{why} tensor={name:?}"));
        let number = tensor.dtype;
        let dtype = dtype(number).ok_or_else(|| refuse(format!("there is no such dtype dtype={number}")))?;
        let sizes = |what: &str, at: *const i64| {
            // SAFETY: the caller guarantees this: `dims` numbers.
            let all = unsafe { given::array(what, at, tensor.dims as usize) };
            let all = all.map_err(|e| e.with_text(|text| format!("{text} tensor={name:?}")))?;
            let sizes = all.iter().map(|&size| usize::try_from(size).ok()).collect::<Option<Vec<_>>>();
            sizes.ok_or_else(|| refuse(format!("a size is negative {what}={all:?}")))
        };
        let shape = sizes("shape", tensor.shape)?;
        let maybe = |what, at: *const i64| if at.is_null() { Ok(None) } else { sizes(what, at).map(Some) };
        let (global, offset) = (maybe("global_shape", tensor.global_shape)?, maybe("offset", tensor.offset)?);
        let layout = Layout::new(dtype, &shape);
        let bytes = layout.bytes().map_err(|e| refuse(e.message().into()))?;
        let bits = dtype.bitsize();
        let strides = if tensor.strides.is_null() {
            None
        } else if !bits.is_multiple_of(8) {
            return Err(refuse(format!("elements that are no whole bytes have no strides dtype={dtype}")));
        } else {
            // SAFETY: the caller guarantees this: `dims` numbers.
            let strides = unsafe { given::array("strides", tensor.strides, tensor.dims as usize)? };
            let in_bytes = strides.iter().map(|stride| stride.checked_mul(bits as i64 / 8)).collect::<Option<Vec<_>>>();
            let in_bytes = in_bytes.ok_or_else(|| refuse(format!("a stride overflows strides={strides:?}")))?;
            // Bindings of other languages always give strides, but packed memory is read and filled faster.
            Some(in_bytes).filter(|strides| !is_packed(&shape, strides, bits / 8))
        };
        if tensor.data.is_null() && bytes > 0 {
            return Err(refuse(format!("the memory of a tensor is null bytes={bytes}")));
        }
        Ok(Self { name, layout, bytes, strides, global, offset })
    }
}

/// True if elements of `item` bytes with these strides, in bytes, are packed in row-major order.
fn is_packed(shape: &[usize], strides: &[i64], item: usize) -> bool {
    let mut expected = item as i64;
    let mut dims = shape.iter().zip(strides).rev();
    let packed = dims.all(|(&size, &stride)| {
        let fits = size == 1 || stride == expected;
        expected = expected.saturating_mul(size as i64);
        fits
    });
    packed || shape.contains(&0)
}

fn stream(of: ashore_stream) -> DeviceStream<'static> {
    // SAFETY: the program promises that this is a stream of that device for as long as its tensors are used.
    unsafe { DeviceStream::new(of.device, of.handle.addr()) }
}

/// Reads the streams of a fence.
pub fn streams(given: &[ashore_stream]) -> Vec<DeviceStream<'static>> {
    given.iter().map(|of| stream(*of)).collect()
}

/// Makes the state dict of tensors, each with its callback.
///
/// # Safety
/// The safety argument of the crate applies.
pub unsafe fn state(tensors: &[ashore_tensor], keeps: Vec<Option<Released>>) -> Result<StateDict<'static>> {
    let mut state = StateDict::with_capacity(tensors.len());
    for ((index, tensor), keep) in tensors.iter().enumerate().zip(keeps) {
        // SAFETY: the caller guarantees this.
        let described = unsafe { Described::new(index, tensor)? };
        let name = described.name;
        let put = match keep {
            // SAFETY: the caller guarantees this.
            Some(keep) => unsafe { put(&mut state, tensor, described, keep) },
            // SAFETY: the caller guarantees this.
            None => unsafe { put(&mut state, tensor, described, ()) },
        };
        put.map_err(|e| e.of_tensor(name))?;
    }
    Ok(state)
}

/// # Safety
/// The safety argument of the crate applies.
unsafe fn put(
    state: &mut StateDict<'static>,
    tensor: &ashore_tensor,
    described: Described<'_>,
    keep: impl Any + Send + Sync,
) -> Result<()> {
    let Described { ref layout, bytes, ref strides, .. } = described;
    let (dtype, shape) = (layout.dtype, &layout.shape);
    if tensor.on_device != 0 {
        let (address, stream) = (tensor.data.addr() as u64, stream(tensor.stream));
        // SAFETY: the program promises what both constructors need.
        let source = unsafe {
            match strides {
                None => RawDevice::new(address, bytes, dtype, shape, stream, keep),
                Some(strides) => RawDevice::strided(address, dtype, shape, strides, stream, keep),
            }
        };
        return insert(state, tensor, &described, source);
    }
    let at = tensor.data.cast_const().cast();
    // SAFETY: the program promises what both constructors need.
    let source = unsafe {
        match strides {
            None => RawHost::new(at, bytes, dtype, shape, keep),
            Some(strides) => RawHost::strided(at, dtype, shape, strides, keep),
        }
    };
    insert(state, tensor, &described, source)
}

fn insert(
    state: &mut StateDict<'static>,
    tensor: &ashore_tensor,
    described: &Described<'_>,
    source: impl Source + 'static,
) -> Result<()> {
    let name = described.name;
    let capture = match tensor.capture {
        number if number == ASHORE_CAPTURE_DEFAULT as u32 => None,
        number if number == ASHORE_CAPTURE_AT_SAVE as u32 => Some(Capture::AtSave),
        number if number == ASHORE_CAPTURE_AT_FENCE as u32 => Some(Capture::AtFence),
        other => return Err(Failed::invalid(format!("there is no such capture capture={other} tensor={name:?}"))),
    };
    match (&described.global, &described.offset, capture) {
        (None, None, None) => state.tensor(name, source)?,
        (None, None, Some(capture)) => state.tensor_captured(name, source, capture)?,
        (Some(global), Some(offset), None) => state.tensor_box(name, global, offset, source)?,
        (Some(_), Some(_), Some(_)) => {
            let why = "a box is captured by its size and place: leave `capture` 0, or set `at_save` for the save";
            return Err(Failed::invalid(format!("{why} tensor={name:?}")));
        }
        _ => {
            let why = "a box has both `global_shape` and `offset`, the whole tensor neither";
            return Err(Failed::invalid(format!("{why} tensor={name:?}")));
        }
    };
    Ok(())
}

/// Fills targets from a checkpoint.
///
/// # Safety
/// The safety argument of the crate applies.
pub unsafe fn restore(checkpoint: &Checkpoint, tensors: &[ashore_tensor]) -> Result<()> {
    let mut targets = Targets::new();
    let mut memory: Vec<(Range<usize>, &str)> = Vec::new();
    for (index, tensor) in tensors.iter().enumerate() {
        // SAFETY: the caller guarantees this.
        let described = unsafe { Described::new(index, tensor)? };
        let name = described.name;
        let slice = fits(checkpoint, &described).map_err(|e| e.of_tensor(name))?;
        let Described { layout, bytes, strides, .. } = described;
        let (dtype, shape) = (layout.dtype, &layout.shape);
        if tensor.on_device != 0 {
            let (address, stream) = (tensor.data.addr() as u64, stream(tensor.stream));
            // SAFETY: the program promises what both constructors need.
            let target = unsafe {
                match &strides {
                    None => DeviceTarget::new(address, bytes, stream).with_dtype(dtype),
                    Some(strides) => DeviceTarget::strided(address, dtype, shape, strides, stream),
                }
            };
            targets = match &slice {
                None => targets.device(name, target),
                Some(slice) => targets.device_slice(name, slice, target),
            };
            continue;
        }
        let at: *mut u8 = tensor.data.cast();
        if let Some(strides) = &strides {
            // SAFETY: the program promises memory at every element. The library checks that elements do not
            // overlap.
            let target = unsafe { HostTarget::strided(at, dtype, shape, strides) };
            targets = match &slice {
                None => targets.host(name, target),
                Some(slice) => targets.host_slice(name, slice, target),
            };
            continue;
        }
        let to: &mut [u8] = if bytes == 0 {
            &mut []
        } else {
            memory.push((at.addr()..at.addr().saturating_add(bytes as usize), name));
            // SAFETY: the program lets the library write this many bytes. A check below makes sure that no
            // two packed targets overlap, before one is written.
            unsafe { std::slice::from_raw_parts_mut(at, bytes as usize) }
        };
        targets = match &slice {
            None => targets.bytes(name, to),
            Some(slice) => targets.slice(name, slice, to),
        };
    }
    memory.sort_by_key(|(range, _)| range.start);
    if let Some([(_, one), (_, other)]) = memory.windows(2).find(|pair| pair[0].0.end > pair[1].0.start) {
        let why = "two targets are in the same memory";
        return Err(Failed::invalid(format!("{why} tensor={one:?} other={other:?}")).of_tensor(one));
    }
    Ok(checkpoint.read_into(targets)?)
}

/// Returns the slice of a saved tensor that a target asks for; None for the whole tensor. It compares dtype
/// and shape here, because the library compares only lengths.
fn fits(checkpoint: &Checkpoint, described: &Described<'_>) -> Result<Option<Vec<Range<usize>>>> {
    let Described { name, layout, global, offset, .. } = described;
    let info = checkpoint.tensor(name)?;
    let refuse = |why: &str, stored: String, asked: String| {
        let text = format!("{why} stored={stored} asked={asked} tensor={name:?}");
        let error = ashore_core::Error::new(ashore_core::ErrorKind::Invalid, text);
        Failed::from(error.with_step(checkpoint.step()).with_path(checkpoint.path()))
    };
    if info.dtype != layout.dtype {
        return Err(refuse("the target has another dtype", info.dtype.to_string(), layout.dtype.to_string()));
    }
    let shaped = |shape: &[usize]| format!("{shape:?}");
    let whole = match (global, offset) {
        (Some(global), _) => &global[..],
        (None, Some(_)) => info.shape,
        (None, None) => &layout.shape[..],
    };
    if whole != info.shape {
        return Err(refuse("the target has another shape", shaped(info.shape), shaped(whole)));
    }
    let Some(offset) = offset else {
        return if layout.shape[..] == *info.shape {
            Ok(None)
        } else {
            Err(refuse("the target has another shape", shaped(info.shape), shaped(&layout.shape)))
        };
    };
    let ends = offset.iter().zip(&layout.shape[..]).map(|(&at, &size)| Some(at..at.checked_add(size)?));
    let slice = ends.collect::<Option<Vec<_>>>().filter(|slice| slice.len() == info.shape.len());
    let slice = slice.filter(|slice| slice.iter().zip(info.shape).all(|(range, size)| range.end <= *size));
    let asked = || format!("{:?} at {offset:?}", &layout.shape[..]);
    slice.map(Some).ok_or_else(|| refuse("the box reaches beyond the tensor", shaped(info.shape), asked()))
}
