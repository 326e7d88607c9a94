//! Converts plain Python values to the engine's [`Value`], and back.

use crate::errors;
use crate::leaf::{self, Leaf};
use ashore::Value;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBool, PyBytes, PyComplex, PyDict, PyFloat, PyFrozenSet, PyInt, PyList, PySet, PyString, PyTuple};

/// How deep values may nest. The engine refuses deeper values, and this limit keeps the recursion from
/// overflowing the stack.
const MAX_DEPTH: usize = 120;

/// Returns the value of a Python object.
///
/// # Errors
/// `InvalidError`, naming `name`, for an object of a type that cannot be restored as it was.
pub fn encode(object: &Bound<'_, PyAny>, name: &str) -> PyResult<Value> {
    Encoder { name }.value(object, 0)
}

struct Encoder<'n> {
    name: &'n str,
}

impl Encoder<'_> {
    fn value(&self, object: &Bound<'_, PyAny>, depth: usize) -> PyResult<Value> {
        let py = object.py();
        if depth > MAX_DEPTH {
            return Err(errors::invalid(py, "a value nests too deeply, or contains itself", Some(self.name)));
        }
        Ok(match leaf::of(object)? {
            Leaf::None => Value::None,
            Leaf::Bool => Value::Bool(object.is_truthy()?),
            Leaf::Int => int(object)?,
            Leaf::Float => Value::Float(object.extract()?),
            Leaf::Text => Value::Text(self.text(object)?),
            Leaf::Bytes => Value::Bytes(object.cast::<PyBytes>()?.as_bytes().to_vec()),
            Leaf::Complex => {
                let complex = object.cast::<PyComplex>()?;
                Value::Complex(complex.getattr("real")?.extract()?, complex.getattr("imag")?.extract()?)
            }
            Leaf::List => Value::List(self.items(object, depth)?),
            Leaf::Tuple => Value::Tuple(self.items(object, depth)?),
            Leaf::Set => Value::Set(self.items(object, depth)?),
            Leaf::FrozenSet => Value::FrozenSet(self.items(object, depth)?),
            Leaf::Dict => Value::Dict(self.pairs(object, depth)?),
            Leaf::Ordered => Value::Ordered(self.pairs(object, depth)?),
            Leaf::Counter => Value::Counter(self.pairs(object, depth)?),
            Leaf::NumpyScalar => self.numpy(object, depth)?,
            Leaf::Tensor(_) | Leaf::DTensor | Leaf::Refused(_) => return Err(self.refused(object)?),
        })
    }

    fn text(&self, object: &Bound<'_, PyAny>) -> PyResult<String> {
        let text = object.cast::<PyString>()?;
        let why = "text with a lone surrogate has no UTF-8";
        text.to_str().map(str::to_owned).map_err(|e| errors::invalid_from(object.py(), why, Some(self.name), e))
    }

    fn items(&self, object: &Bound<'_, PyAny>, depth: usize) -> PyResult<Vec<Value>> {
        object.try_iter()?.map(|item| self.value(&item?, depth + 1)).collect()
    }

    fn pairs(&self, object: &Bound<'_, PyAny>, depth: usize) -> PyResult<Vec<(Value, Value)>> {
        let mut pairs = Vec::new();
        for (key, item) in object.cast::<PyDict>()? {
            pairs.push((self.value(&key, depth + 1)?, self.value(&item, depth + 1)?));
        }
        Ok(pairs)
    }

    fn numpy(&self, scalar: &Bound<'_, PyAny>, depth: usize) -> PyResult<Value> {
        let dtype = scalar.getattr("dtype")?;
        let kind: String = dtype.getattr("kind")?.extract()?;
        let plain = match kind.as_str() {
            "M" | "m" => scalar.call_method1("astype", ("int64",))?.call_method0("item")?,
            "V" if !dtype.getattr("names")?.is_none() => return Err(self.refused(scalar)?),
            // This is a bfloat16 or an 8-bit float of `ml_dtypes`.
            "V" => match scalar.call_method0("__float__") {
                Ok(float) => float,
                Err(_) => return Err(self.refused(scalar)?),
            },
            "b" | "i" | "u" | "f" | "c" | "U" | "S" => scalar.call_method0("item")?,
            _ => return Err(self.refused(scalar)?),
        };
        let same = plain.get_type().is(scalar.get_type());
        if same {
            // `longdouble.item()` returns itself, so it has no plain value.
            return Err(self.refused(scalar)?);
        }
        let name: String = dtype.str()?.extract()?;
        Ok(Value::Numpy(name, Box::new(self.value(&plain, depth + 1)?)))
    }

    fn refused(&self, object: &Bound<'_, PyAny>) -> PyResult<PyErr> {
        Ok(errors::invalid(object.py(), &refusal(object)?, Some(self.name)))
    }
}

/// Returns the reason why an object is not a value.
pub fn refusal(object: &Bound<'_, PyAny>) -> PyResult<String> {
    let of = leaf::type_name(object)?;
    Ok(match leaf::of(object)? {
        Leaf::Refused(why) => format!("{why} type={of}"),
        Leaf::Tensor(_) | Leaf::DTensor => {
            format!("a tensor cannot be within a value: put it into the state type={of}")
        }
        _ => format!("a value of this type would not come back as it was; convert it to a plain one type={of}"),
    })
}

fn int(object: &Bound<'_, PyAny>) -> PyResult<Value> {
    if let Ok(value) = object.extract::<i64>() {
        return Ok(Value::Int(value));
    }
    if let Ok(value) = object.extract::<u64>() {
        return Ok(Value::Uint(value));
    }
    Ok(Value::Big(object.call_method1("__format__", ("x",))?.extract()?))
}

/// Returns the Python object of a value.
pub fn decode<'py>(py: Python<'py>, value: &Value) -> PyResult<Bound<'py, PyAny>> {
    let items = |items: &[Value]| items.iter().map(|item| decode(py, item)).collect::<PyResult<Vec<_>>>();
    let pairs = |pairs: &[(Value, Value)]| {
        let dict = PyDict::new(py);
        for (key, item) in pairs {
            dict.set_item(decode(py, key)?, decode(py, item)?)?;
        }
        Ok::<_, PyErr>(dict)
    };
    Ok(match value {
        Value::None => py.None().into_bound(py),
        Value::Bool(value) => PyBool::new(py, *value).to_owned().into_any(),
        Value::Int(value) => value.into_pyobject(py)?.into_any(),
        Value::Uint(value) => value.into_pyobject(py)?.into_any(),
        Value::Big(digits) => py.get_type::<PyInt>().call1((digits, 16))?,
        Value::Float(value) => PyFloat::new(py, *value).into_any(),
        Value::Single(value) => PyFloat::new(py, f64::from(*value)).into_any(),
        Value::Complex(re, im) => PyComplex::from_doubles(py, *re, *im).into_any(),
        Value::Text(text) => PyString::new(py, text).into_any(),
        Value::Bytes(bytes) => PyBytes::new(py, bytes).into_any(),
        Value::List(list) => PyList::new(py, items(list)?)?.into_any(),
        Value::Tuple(tuple) => PyTuple::new(py, items(tuple)?)?.into_any(),
        Value::Set(set) => PySet::new(py, items(set)?)?.into_any(),
        Value::FrozenSet(set) => PyFrozenSet::new(py, items(set)?)?.into_any(),
        Value::Dict(dict) => pairs(dict)?.into_any(),
        Value::Ordered(dict) => {
            static ORDERED: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
            ORDERED.import(py, "collections", "OrderedDict")?.call1((pairs(dict)?,))?
        }
        Value::Counter(dict) => {
            static COUNTER: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
            COUNTER.import(py, "collections", "Counter")?.call1((pairs(dict)?,))?
        }
        Value::Numpy(dtype, value) => {
            static SCALAR: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
            SCALAR.import(py, "ashore._numpy", "scalar")?.call1((dtype, decode(py, value)?))?
        }
        _ => return Err(errors::invalid(py, "a value of a kind that this version does not know", None)),
    })
}
