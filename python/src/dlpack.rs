//! The structures of DLPack 1.3 that describe tensors.
//!
//! # Safety argument
//! The structures are those of `dlpack.h`, field by field, and are only read. [`Exchange`] holds a pointer to
//! a table that its type publishes for the life of the process (the text of the specification), whose major
//! version was checked; [`Exchange::describe`] passes it objects of exactly that type. A capsule is read
//! while the caller holds it, and is never marked as consumed: its destructor releases the tensor.
#![expect(unsafe_code, reason = "tables and structures of C; argument above")]

use pyo3::exceptions::PyBufferError;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyType};
use std::ffi::{CStr, c_int, c_void};
use std::ptr::NonNull;

/// Memory of the host.
pub const CPU: i32 = 1;
/// Memory of an NVIDIA GPU.
pub const CUDA: i32 = 2;
/// Pinned memory of the host.
pub const CUDA_HOST: i32 = 3;
/// Memory that an NVIDIA GPU and the host share.
pub const CUDA_MANAGED: i32 = 13;

const READ_ONLY: u64 = 1;

#[repr(C)]
#[derive(Clone, Copy)]
struct Version {
    major: u32,
    minor: u32,
}

/// A device: its type and number.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Device {
    /// [`CPU`], [`CUDA`], and others.
    pub kind: i32,
    /// The number among devices of this type.
    pub id: i32,
}

/// The type of elements.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DataType {
    /// Integer, float and so on.
    pub code: u8,
    /// Bits of a lane.
    pub bits: u8,
    /// Lanes of an element.
    pub lanes: u16,
}

#[repr(C)]
struct Raw {
    data: *mut c_void,
    device: Device,
    ndim: i32,
    dtype: DataType,
    shape: *const i64,
    strides: *const i64,
    byte_offset: u64,
}

#[repr(C)]
struct Managed {
    tensor: Raw,
    context: *mut c_void,
    deleter: *const c_void,
}

#[repr(C)]
struct ManagedVersioned {
    version: Version,
    context: *mut c_void,
    deleter: *const c_void,
    flags: u64,
    tensor: Raw,
}

#[repr(C)]
struct Table {
    version: Version,
    older: *const Table,
    allocate: *const c_void,
    managed_from_object: *const c_void,
    managed_to_object: *const c_void,
    tensor_from_object: Option<unsafe extern "C" fn(*mut c_void, *mut Raw) -> c_int>,
    current_stream: Option<unsafe extern "C" fn(i32, i32, *mut *mut c_void) -> c_int>,
}

/// The DLPack description of a tensor. The slices live as long as the tensor's own description.
pub struct Description<'t> {
    /// The address of the element with all indices 0.
    pub address: usize,
    /// The device of the memory.
    pub device: Device,
    /// The type of the elements.
    pub dtype: DataType,
    /// The sizes of the dimensions.
    pub shape: &'t [i64],
    /// The distances of neighbours, in elements. None: packed.
    pub strides: Option<&'t [i64]>,
    /// Whether the memory must not be written.
    pub read_only: bool,
}

impl<'t> Description<'t> {
    /// # Safety
    /// `raw` is a description by DLPack, and its shape and strides live for `'t`.
    unsafe fn of(raw: &Raw, read_only: bool) -> Self {
        let dims = |at: *const i64| match usize::try_from(raw.ndim) {
            // SAFETY: the caller promises that there are as many elements as dimensions.
            Ok(ndim) if ndim > 0 && !at.is_null() => Some(unsafe { std::slice::from_raw_parts(at, ndim) }),
            _ => None,
        };
        let address = (raw.data as usize).wrapping_add(raw.byte_offset as usize);
        let (shape, strides) = (dims(raw.shape).unwrap_or(&[]), dims(raw.strides));
        Self { address, device: raw.device, dtype: raw.dtype, shape, strides, read_only }
    }
}

/// The table of functions with which a type describes its tensors.
#[derive(Clone, Copy)]
pub struct Exchange(NonNull<Table>);

// SAFETY: the table is constant and lives as long as the process.
unsafe impl Send for Exchange {}
// SAFETY: as above.
unsafe impl Sync for Exchange {}

impl Exchange {
    /// Finds the table that the type `of` publishes, if the table has a known version.
    pub fn find(of: &Bound<'_, PyType>) -> Option<Self> {
        let capsule = of.getattr("__dlpack_c_exchange_api__").ok()?.cast_into::<PyCapsule>().ok()?;
        let mut table: NonNull<Table> = capsule.pointer_checked(Some(c"dlpack_exchange_api")).ok()?.cast();
        loop {
            // SAFETY: a capsule of this name holds such a table, and so does each `older`.
            let it = unsafe { table.as_ref() };
            if it.version.major == 1 && it.tensor_from_object.is_some() {
                return Some(Self(table));
            }
            table = NonNull::new(it.older.cast_mut())?;
        }
    }

    /// Describes `tensor`, whose type published this table, and passes the description to `read`.
    pub fn describe<T>(
        self,
        tensor: &Bound<'_, PyAny>,
        read: impl FnOnce(Description<'_>) -> PyResult<T>,
    ) -> PyResult<T> {
        // SAFETY: the table lives as long as the process.
        let table = unsafe { self.0.as_ref() };
        let Some(describe) = table.tensor_from_object else {
            return Err(PyBufferError::new_err("the exchange table has no function for tensors"));
        };
        let none = std::ptr::null();
        let (device, dtype) = (Device { kind: 0, id: 0 }, DataType { code: 0, bits: 0, lanes: 0 });
        let mut raw =
            Raw { data: std::ptr::null_mut(), device, ndim: 0, dtype, shape: none, strides: none, byte_offset: 0 };
        // SAFETY: the object is of the type of this table, and `raw` is of the structure that it fills.
        if unsafe { describe(tensor.as_ptr().cast(), &mut raw) } != 0 {
            return Err(PyErr::fetch(tensor.py()));
        }
        // SAFETY: the call filled it, and shape and strides live while the tensor does and control stays
        // here.
        read(unsafe { Description::of(&raw, false) })
    }

    /// Returns the stream in which the library queues work for this device at present.
    pub fn current_stream(self, py: Python<'_>, device: Device) -> PyResult<usize> {
        // SAFETY: the table lives as long as the process.
        let table = unsafe { self.0.as_ref() };
        let Some(current) = table.current_stream else { return Ok(0) };
        let mut stream = std::ptr::null_mut();
        // SAFETY: `stream` takes the handle.
        if unsafe { current(device.kind, device.id, &mut stream) } != 0 {
            return Err(PyErr::fetch(py));
        }
        Ok(stream as usize)
    }
}

/// Reads the description in a capsule that `__dlpack__` returned.
pub fn read_capsule<T>(
    capsule: &Bound<'_, PyCapsule>,
    read: impl FnOnce(Description<'_>) -> PyResult<T>,
) -> PyResult<T> {
    const VERSIONED: &CStr = c"dltensor_versioned";
    if let Ok(pointer) = capsule.pointer_checked(Some(VERSIONED)) {
        // SAFETY: a capsule of this name holds this structure until it is released, and the caller holds it.
        let managed = unsafe { pointer.cast::<ManagedVersioned>().as_ref() };
        if managed.version.major != 1 {
            return Err(PyBufferError::new_err("a tensor of another major version of DLPack"));
        }
        // SAFETY: the structure was filled by its producer.
        return read(unsafe { Description::of(&managed.tensor, managed.flags & READ_ONLY != 0) });
    }
    let pointer = capsule.pointer_checked(Some(c"dltensor"))?;
    // SAFETY: as above, for the structure without a version.
    let managed = unsafe { pointer.cast::<Managed>().as_ref() };
    // SAFETY: as above.
    read(unsafe { Description::of(&managed.tensor, false) })
}
