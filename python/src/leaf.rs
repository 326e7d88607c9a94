//! The kind of a leaf of a state, by its type. Each type is examined once.

use crate::dlpack::Exchange;
use crate::known::Known;
use pyo3::prelude::*;
use pyo3::types::{
    PyBool, PyBytes, PyComplex, PyDict, PyFloat, PyFrozenSet, PyInt, PyList, PySet, PyString, PyTuple, PyType,
};

/// The kind of objects of a type.
#[derive(Clone, Copy)]
pub enum Leaf {
    None,
    Bool,
    Int,
    Float,
    Complex,
    Text,
    Bytes,
    List,
    Tuple,
    Set,
    FrozenSet,
    Dict,
    Ordered,
    Counter,
    NumpyScalar,
    /// Memory to be saved.
    Tensor(Way),
    /// A DTensor: this rank has one box of it, or none.
    DTensor,
    /// The object cannot be saved. The text is the reason.
    Refused(&'static str),
}

/// How a tensor describes itself.
#[derive(Clone, Copy)]
pub enum Way {
    /// A tensor of torch, by the table of its type.
    Torch(Exchange),
    /// A tensor of a torch that has no such table, by its attributes.
    TorchAttributes,
    /// An array of NumPy, by its array interface.
    Numpy,
    /// Any other array, by `__dlpack__`.
    Capsule,
}

impl Way {
    /// Whether the library of such a tensor tells in which stream it works. Any other array was made ready in
    /// the default stream.
    pub fn says_stream(self) -> bool {
        matches!(self, Self::Torch(_) | Self::TorchAttributes)
    }
}

static TYPES: Known<Leaf> = Known::new();

/// Returns the kind of `object`.
pub fn of(object: &Bound<'_, PyAny>) -> PyResult<Leaf> {
    TYPES.get(object.get_type().into_any(), |of| classify(of.cast()?))
}

/// Returns the name of an object's type, with its module.
pub fn type_name(object: &Bound<'_, PyAny>) -> PyResult<String> {
    Ok(object.get_type().fully_qualified_name()?.to_string())
}

fn classify(of: &Bound<'_, PyType>) -> PyResult<Leaf> {
    let py = of.py();
    let plain = [
        (py.get_type::<PyDict>(), Leaf::Dict),
        (py.get_type::<PyList>(), Leaf::List),
        (py.get_type::<PyTuple>(), Leaf::Tuple),
        (py.get_type::<PyBool>(), Leaf::Bool),
        (py.get_type::<PyInt>(), Leaf::Int),
        (py.get_type::<PyFloat>(), Leaf::Float),
        (py.get_type::<PyComplex>(), Leaf::Complex),
        (py.get_type::<PyString>(), Leaf::Text),
        (py.get_type::<PyBytes>(), Leaf::Bytes),
        (py.get_type::<PySet>(), Leaf::Set),
        (py.get_type::<PyFrozenSet>(), Leaf::FrozenSet),
        (py.None().into_bound(py).get_type(), Leaf::None),
    ];
    if let Some((_, leaf)) = plain.iter().find(|(known, _)| of.is(known)) {
        return Ok(*leaf);
    }
    let collections = py.import("collections")?;
    for (name, leaf) in [("OrderedDict", Leaf::Ordered), ("Counter", Leaf::Counter)] {
        if of.is(&collections.getattr(name)?) {
            return Ok(leaf);
        }
    }
    if let Some(leaf) = of_torch(of)? {
        return Ok(leaf);
    }
    if let Some(leaf) = of_numpy(of)? {
        return Ok(leaf);
    }
    if of.hasattr("__dlpack__")? && of.hasattr("__dlpack_device__")? {
        return Ok(Leaf::Tensor(Way::Capsule));
    }
    for (known, why) in [
        (py.get_type::<PyDict>(), "a subclass of dict would come back as a dict: convert it with dict()"),
        (py.get_type::<PyTuple>(), "a subclass of tuple would come back as a tuple: convert it with tuple()"),
        (py.get_type::<PyList>(), "a subclass of list would come back as a list: convert it with list()"),
        (py.get_type::<PyInt>(), "a subclass of int would come back as an int: convert it with int()"),
        (py.get_type::<PyString>(), "a subclass of str would come back as a str: convert it with str()"),
    ] {
        if of.is_subclass(&known)? {
            return Ok(Leaf::Refused(why));
        }
    }
    Ok(Leaf::Refused("neither a tensor nor a plain value"))
}

/// Returns a module if it is imported already: no object can be of a module that is not.
fn imported<'py>(py: Python<'py>, name: &str) -> PyResult<Option<Bound<'py, PyAny>>> {
    let modules = py.import("sys")?.getattr("modules")?;
    Ok(modules.cast::<PyDict>()?.get_item(name)?.filter(|module| !module.is_none()))
}

fn of_torch(of: &Bound<'_, PyType>) -> PyResult<Option<Leaf>> {
    let Some(torch) = imported(of.py(), "torch")? else { return Ok(None) };
    // Another thread may still be importing the module.
    let Ok(tensor) = torch.getattr("Tensor") else { return Ok(None) };
    if !of.is_subclass(&tensor)? {
        return Ok(None);
    }
    let nn = torch.getattr("nn").and_then(|nn| nn.getattr("parameter"));
    let known = |name: &str| nn.as_ref().is_ok_and(|nn| nn.getattr(name).is_ok_and(|known| of.is(&known)));
    if of.is(&tensor) || known("Parameter") || known("Buffer") {
        let way = Exchange::find(of).map_or(Way::TorchAttributes, Way::Torch);
        return Ok(Some(Leaf::Tensor(way)));
    }
    let dtensor = imported(of.py(), "torch.distributed.tensor")?.and_then(|module| module.getattr("DTensor").ok());
    if dtensor.is_some_and(|dtensor| of.is(&dtensor)) {
        return Ok(Some(Leaf::DTensor));
    }
    let name = of.name()?.to_string();
    let why = match name.as_str() {
        "UninitializedParameter" | "UninitializedBuffer" => "a lazy module has not been initialized: run it once",
        "FakeTensor" => "a fake tensor has no memory",
        _ => "a subclass of torch.Tensor whose memory ashore does not know: give the plain tensors it consists of",
    };
    Ok(Some(Leaf::Refused(why)))
}

fn of_numpy(of: &Bound<'_, PyType>) -> PyResult<Option<Leaf>> {
    let Some(numpy) = imported(of.py(), "numpy")? else { return Ok(None) };
    let (Ok(array), Ok(scalar)) = (numpy.getattr("ndarray"), numpy.getattr("generic")) else { return Ok(None) };
    if of.is(&array) || numpy.getattr("memmap").is_ok_and(|memmap| of.is(&memmap)) {
        return Ok(Some(Leaf::Tensor(Way::Numpy)));
    }
    if of.is_subclass(&array)? {
        let why = "a subclass of numpy.ndarray would come back as an array: convert it with numpy.asarray()";
        return Ok(Some(Leaf::Refused(why)));
    }
    Ok(of.is_subclass(&scalar)?.then_some(Leaf::NumpyScalar))
}
