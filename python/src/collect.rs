//! Finds the memory of Python objects: the address, dtype, shape and strides of a tensor's elements.
//!
//! Nothing is copied and nothing waits, except that an array's own `__dlpack__` may wait until the array is
//! computed. Descriptions of a library that are wrong are detected here and refused by name.

use crate::dlpack::{self, Description, Device, read_capsule};
use crate::errors::{invalid, invalid_from, is_ours};
use crate::known::Known;
use crate::leaf::{self, Leaf, Way};
use crate::{dtypes, values};
use ashore::Dtype;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyDict, PyTuple};
use smallvec::SmallVec;

/// The sizes of dimensions, or the distances of neighbours in them.
pub type Dims<T> = SmallVec<[T; 4]>;

/// The memory of a tensor.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Memory {
    /// The address of the element with all indices 0; the address is 0 where there is no such element.
    pub address: usize,
    pub device: Device,
    pub dtype: Dtype,
    pub shape: Dims<usize>,
    /// The distances of neighbours in bytes. None: packed in row-major order.
    pub strides: Option<Dims<i64>>,
}

/// A tensor as found in a Python object.
pub struct Found {
    pub memory: Memory,
    /// The object that keeps the memory allocated.
    pub keep: Py<PyAny>,
    pub read_only: bool,
}

impl Memory {
    /// Returns the length of the packed tensor in bytes.
    pub fn bytes(&self) -> u64 {
        self.elements() * self.dtype.bitsize() as u64 / 8
    }

    /// Returns the number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|dim| *dim as u64).product()
    }

    /// Whether the memory belongs to the host.
    pub fn on_host(&self) -> bool {
        matches!(self.device.kind, dlpack::CPU | dlpack::CUDA_HOST)
    }

    /// Returns the range of addresses that contains the elements.
    pub fn extent(&self) -> (usize, usize) {
        if self.elements() == 0 {
            return (self.address, self.address);
        }
        let Some(strides) = &self.strides else {
            return (self.address, self.address.saturating_add(self.bytes() as usize));
        };
        let (mut low, mut high) = (self.address as i128, self.address as i128 + self.dtype.bitsize() as i128 / 8);
        for (&dim, &stride) in self.shape.iter().zip(strides) {
            let reach = (dim as i128 - 1) * i128::from(stride);
            *if reach < 0 { &mut low } else { &mut high } += reach;
        }
        (low.max(0) as usize, high as usize)
    }
}

/// Finds the memory of `object`. `known` is the result of this function for the same place of an earlier
/// save: a torch tensor with the same memory is not checked again in all respects.
///
/// # Errors
/// `InvalidError`, naming `name`, for an object that is no tensor, or that has no readable memory.
pub fn find(object: &Bound<'_, PyAny>, name: &str, known: Option<&Memory>) -> PyResult<Found> {
    find_by(way(object, name)?, object, name, known)
}

/// As [`find`], for an object whose type is known to be a tensor.
pub fn find_by(way: Way, object: &Bound<'_, PyAny>, name: &str, known: Option<&Memory>) -> PyResult<Found> {
    let wrong = |e: PyErr| {
        // Errors of this package name the tensor already.
        if is_ours(object.py(), &e) {
            return e;
        }
        invalid_from(object.py(), "a tensor does not say where its memory is", Some(name), e)
    };
    let found = match way {
        Way::Torch(exchange) => {
            exchange.describe(object, |description| torch(object, name, Some(&description), known)).map_err(wrong)?
        }
        Way::TorchAttributes => torch(object, name, None, known).map_err(wrong)?,
        Way::Numpy => numpy(object, name).map_err(wrong)?,
        Way::Capsule => capsule(object, name).map_err(wrong)?,
    };
    let memory = &found.memory;
    if memory.address == 0 && memory.elements() > 0 {
        let why = "a tensor has elements and no memory: its storage was resized to 0, or it is a wrapper, fake, \
                   meta or zero tensor";
        return Err(invalid(object.py(), why, Some(name)));
    }
    if !memory.on_host() && !matches!(memory.device.kind, dlpack::CUDA | dlpack::CUDA_MANAGED) {
        let Device { kind, id } = memory.device;
        let why = format!("only memory of the host and of CUDA devices can be saved dlpack_device={kind}:{id}");
        return Err(invalid(object.py(), &why, Some(name)));
    }
    Ok(found)
}

fn torch(
    tensor: &Bound<'_, PyAny>,
    name: &str,
    description: Option<&Description<'_>>,
    known: Option<&Memory>,
) -> PyResult<Found> {
    let py = tensor.py();
    let refuse = |why: &str| Err(invalid(py, why, Some(name)));
    if tensor.call_method0(intern!(py, "is_neg"))?.is_truthy()? {
        return refuse("a lazily negated view has the bytes of what it negates: call resolve_neg() first");
    }
    let keep = tensor.call_method0(intern!(py, "untyped_storage"));
    let storage = |keep: PyResult<Bound<'_, PyAny>>| keep.map(Bound::unbind);
    // Address, shape, strides and dtype equal those of a tensor that was checked. DLPack does not describe
    // two differences: a conjugated view of a complex tensor, and a dtype of less than a byte per element.
    if let (Some(known), Some(description)) = (known, description)
        && !matches!(known.dtype, Dtype::C64 | Dtype::F4 | Dtype::I8 | Dtype::U8)
        && is_same(known, description)
    {
        return Ok(Found { memory: known.clone(), keep: storage(keep)?, read_only: false });
    }
    if tensor.call_method0(intern!(py, "is_conj"))?.is_truthy()? {
        return refuse("a lazily conjugated view has the bytes of what it conjugates: call resolve_conj() first");
    }
    if tensor.getattr(intern!(py, "is_quantized"))?.is_truthy()? {
        return refuse(
            "a quantized tensor has a scale beside its bytes: save int_repr(), q_scale() and q_zero_point()",
        );
    }
    let layout = tensor.getattr(intern!(py, "layout"))?.str()?.to_string();
    if layout != "torch.strided" {
        return refuse(&format!(
            "a tensor of this layout consists of several tensors: save its indices and values layout={layout}"
        ));
    }
    if tensor.getattr(intern!(py, "is_nested"))?.is_truthy()? {
        return refuse("a nested tensor consists of several tensors: save those of unbind()");
    }
    let dtype = torch_dtype(tensor, name)?;
    let mut memory = match description {
        Some(description) => memory_of(description, dtype),
        None => torch_attributes(tensor, dtype, name)?,
    };
    if dtype == Dtype::F4 {
        // torch counts pairs of elements. safetensors counts elements.
        match memory.shape.last_mut() {
            Some(last) if memory.strides.is_none() => *last *= 2,
            _ => return refuse("a tensor of float4 pairs must be contiguous, with at least one dimension"),
        }
    }
    if memory.elements() > 0 && memory.address != 0 {
        let storage = keep.as_ref().map_err(|e| e.clone_ref(py))?;
        let begin: usize = storage.call_method0(intern!(py, "data_ptr"))?.extract()?;
        let bytes: usize = storage.call_method0(intern!(py, "nbytes"))?.extract()?;
        let (low, high) = memory.extent();
        if low < begin || high > begin.saturating_add(bytes) {
            let why = format!(
                "the storage of a tensor was resized and no longer holds its elements storage_bytes={bytes} needed_bytes={}",
                high.saturating_sub(begin)
            );
            return refuse(&why);
        }
    }
    Ok(Found { memory, keep: storage(keep)?, read_only: false })
}

/// Whether a tensor has the same memory as a known one.
fn is_same(known: &Memory, description: &Description<'_>) -> bool {
    let item = (known.dtype.bitsize() / 8) as i64;
    let dims = |shape: &[i64]| {
        shape.len() == known.shape.len() && shape.iter().zip(&known.shape).all(|(a, b)| *a == *b as i64)
    };
    let strides = match (&known.strides, description.strides) {
        (Some(known), Some(now)) => known.len() == now.len() && known.iter().zip(now).all(|(a, b)| *a == b * item),
        (None, now) => now.is_none_or(|now| is_packed(description.shape, now)),
        (Some(_), None) => false,
    };
    known.address == description.address
        && known.device == description.device
        && dtypes::by_dlpack(description.dtype) == Some(known.dtype)
        && dims(description.shape)
        && strides
}

/// Whether elements with these strides, counted in elements, are packed in row-major order.
fn is_packed(shape: &[i64], strides: &[i64]) -> bool {
    let mut expected = 1_i64;
    shape.contains(&0)
        || shape.iter().zip(strides).rev().all(|(&dim, &stride)| {
            let fits = dim == 1 || stride == expected;
            expected = expected.saturating_mul(dim);
            fits
        })
}

fn memory_of(description: &Description<'_>, dtype: Dtype) -> Memory {
    let item = (dtype.bitsize() / 8) as i64;
    let shape = description.shape.iter().map(|&dim| usize::try_from(dim).unwrap_or(0)).collect();
    let packed = description.strides.is_none_or(|strides| is_packed(description.shape, strides));
    let strides = description.strides.filter(|_| !packed);
    let strides = strides.map(|strides| strides.iter().map(|stride| stride * item).collect());
    Memory { address: description.address, device: description.device, dtype, shape, strides }
}

fn torch_attributes(tensor: &Bound<'_, PyAny>, dtype: Dtype, name: &str) -> PyResult<Memory> {
    let py = tensor.py();
    let device = tensor.getattr("device")?;
    let kind = device.getattr("type")?.extract::<String>()?;
    let device = match kind.as_str() {
        "cpu" => Device { kind: dlpack::CPU, id: 0 },
        "cuda" => Device { kind: dlpack::CUDA, id: device.getattr("index")?.extract()? },
        _ => {
            let why = format!("only memory of the host and of CUDA devices can be saved device={kind}");
            return Err(invalid(py, &why, Some(name)));
        }
    };
    let shape: Vec<i64> = tensor.getattr("shape")?.extract()?;
    let strides: Vec<i64> = tensor.call_method0("stride")?.extract()?;
    let address = tensor.call_method0("data_ptr")?.extract()?;
    let dtype_of = dlpack::DataType { code: 0, bits: 0, lanes: 0 };
    let description =
        Description { address, device, dtype: dtype_of, shape: &shape, strides: Some(&strides), read_only: false };
    Ok(memory_of(&description, dtype))
}

/// The dtype for each dtype object of torch or NumPy.
static DTYPES: Known<Option<Dtype>> = Known::new();

fn torch_dtype(tensor: &Bound<'_, PyAny>, name: &str) -> PyResult<Dtype> {
    let object = tensor.getattr(intern!(tensor.py(), "dtype"))?;
    let found = DTYPES
        .get(object.clone(), |object| Ok(object.str()?.to_str()?.strip_prefix("torch.").and_then(dtypes::by_name)))?;
    match found {
        Some(dtype) => Ok(dtype),
        None => Err(no_dtype(tensor.py(), &object.str()?.to_string(), name)),
    }
}

fn no_dtype(py: Python<'_>, dtype: &str, name: &str) -> PyErr {
    let hint = if dtype.contains("complex128") {
        "save torch.view_as_real(tensor), or the real and imaginary parts"
    } else {
        "convert the tensor, or save its bytes as uint8"
    };
    invalid(py, &format!("safetensors has no such dtype: {hint} dtype={dtype}"), Some(name))
}

fn numpy(array: &Bound<'_, PyAny>, name: &str) -> PyResult<Found> {
    let py = array.py();
    let object = array.getattr(intern!(py, "dtype"))?;
    let found = DTYPES.get(object.clone(), |object| {
        let native = object.getattr("isnative")?.is_truthy()?;
        Ok(dtypes::by_name(object.getattr("name")?.extract()?).filter(|_| native))
    })?;
    let Some(dtype) = found else {
        return Err(no_dtype(py, &object.str()?.to_string(), name));
    };
    let interface = array.getattr(intern!(py, "__array_interface__"))?;
    let interface = interface.cast::<PyDict>()?;
    let field = |key: &str| interface.get_item(key).map(|value| value.unwrap_or_else(|| py.None().into_bound(py)));
    let (address, read_only): (usize, bool) = field("data")?.extract()?;
    let shape: Vec<i64> = field("shape")?.extract()?;
    let item = (dtype.bitsize() / 8) as i64;
    let strides: Option<Vec<i64>> = field("strides")?.extract()?;
    let shape_of = || shape.iter().map(|&dim| dim as usize).collect::<Dims<usize>>();
    let strides = strides.filter(|strides| {
        let in_elements: Vec<i64> = strides.iter().map(|stride| stride / item).collect();
        strides.iter().any(|stride| stride % item != 0) || !is_packed(&shape, &in_elements)
    });
    let (shape, strides) = (shape_of(), strides.map(|strides| strides.into_iter().collect()));
    let memory = Memory { address, device: Device { kind: dlpack::CPU, id: 0 }, dtype, shape, strides };
    Ok(Found { memory, keep: array.clone().unbind(), read_only })
}

fn capsule(array: &Bound<'_, PyAny>, name: &str) -> PyResult<Found> {
    let py = array.py();
    let place: (i32, i32) = array.call_method0(intern!(py, "__dlpack_device__"))?.extract()?;
    let options = PyDict::new(py);
    options.set_item("max_version", PyTuple::new(py, [1, 3])?)?;
    // The producer makes this stream wait until the array is computed.
    if place.0 == dlpack::CUDA {
        options.set_item("stream", 1)?;
    }
    let export = || array.call_method("__dlpack__", (), Some(&options));
    let capsule = match export() {
        Err(e) if e.is_instance_of::<pyo3::exceptions::PyTypeError>(py) => {
            // This producer is older than DLPack 1.0.
            options.del_item("max_version")?;
            export()?
        }
        capsule => capsule?,
    };
    let capsule = capsule.cast_into::<PyCapsule>()?;
    let (memory, read_only) = read_capsule(&capsule, |description| {
        let Some(dtype) = dtypes::by_dlpack(description.dtype) else {
            let dlpack::DataType { code, bits, lanes } = description.dtype;
            return Err(no_dtype(py, &format!("dlpack:{code}:{bits}:{lanes}"), name));
        };
        Ok((memory_of(&description, dtype), description.read_only))
    })?;
    Ok(Found { memory, keep: capsule.into_any().unbind(), read_only })
}

/// Returns how a tensor describes itself.
///
/// # Errors
/// An error that names `name`, if the object is no tensor.
pub fn way(object: &Bound<'_, PyAny>, name: &str) -> PyResult<Way> {
    match leaf::of(object)? {
        Leaf::Tensor(way) => Ok(way),
        _ => Err(invalid(object.py(), &values::refusal(object)?, Some(name))),
    }
}

/// Returns the stream in which the library of such tensors queues work on a device at present. The stream is
/// 0 where the library does not tell it.
pub fn current_stream(py: Python<'_>, way: Way, device: Device) -> PyResult<usize> {
    match way {
        Way::Torch(exchange) => exchange.current_stream(py, device),
        Way::TorchAttributes => {
            let cuda = py.import("torch")?.getattr("cuda")?;
            cuda.call_method1("current_stream", (device.id,))?.getattr("cuda_stream")?.extract()
        }
        // This stream was made to wait for the array when the array was exported.
        Way::Numpy | Way::Capsule => Ok(0),
    }
}
