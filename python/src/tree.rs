//! Converts a state of nested containers to named leaves, and back.
//!
//! The name of a leaf is the path to it, joined by dots. The *shape* of the tree (its containers and keys) is
//! text that is saved beside the leaves, because names alone do not distinguish a dot in a key from a level,
//! or a list from a dict. The shape is JSON: `0` is a tensor, `1` a value, and an array is a container. The
//! array begins with its kind (`"d"` a dict, `"o"` an `OrderedDict`, `"l"` a list, `"t"` a tuple). Its items
//! follow, each item of a dict after its key.

use crate::errors::invalid;
use crate::leaf::{self, Leaf, Way, type_name};
use crate::sources::Place;
use crate::values;
use ashore::Value;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyInt, PyList, PyString, PyTuple};
use serde_json::Value as Json;
use std::collections::HashSet;
use std::fmt::Write;

/// The key of the metadata that contains the shape of the tree.
pub const SHAPE: &str = "ashore.tree";

/// How deep containers may nest.
const MAX_DEPTH: usize = 100;

/// A tensor of a state, or the box of it that this rank has.
pub struct Tensor<'py> {
    pub name: String,
    pub object: Bound<'py, PyAny>,
    pub way: Way,
    pub place: Option<Place>,
}

/// The leaves of a state.
#[derive(Default)]
pub struct Leaves<'py> {
    /// In the order of the tree.
    pub tensors: Vec<Tensor<'py>>,
    /// The values by name.
    pub values: Vec<(String, Value)>,
    /// The shape of the tree.
    pub shape: String,
}

impl<'py> Leaves<'py> {
    /// Collects the leaves of `state`.
    ///
    /// # Errors
    /// `InvalidError`, naming the place, for an object that cannot be saved, for keys above tensors that are
    /// neither text nor integers, and for two leaves of the same name.
    pub fn of(state: &Bound<'py, PyAny>) -> PyResult<Self> {
        let py = state.py();
        match leaf::of(state)? {
            Leaf::Dict | Leaf::Ordered | Leaf::List | Leaf::Tuple => {}
            _ => {
                let why = format!("a state is a dict, list or tuple of tensors and values type={}", type_name(state)?);
                return Err(invalid(py, &why, None));
            }
        }
        let mut walk = Walk { leaves: Self::default(), path: String::new() };
        walk.container(state, 0)?;
        let leaves = walk.leaves;
        let mut names: HashSet<&str> = HashSet::with_capacity(leaves.values.len());
        for (name, _) in &leaves.values {
            if !names.insert(name) {
                return Err(same_name(py, name));
            }
        }
        if let Some(held) = leaves.tensors.iter().find(|held| !names.is_empty() && names.contains(&*held.name)) {
            return Err(same_name(py, &held.name));
        }
        Ok(leaves)
    }
}

fn same_name(py: Python<'_>, name: &str) -> PyErr {
    invalid(py, "two leaves of the state have the same name once their keys are joined by dots", Some(name))
}

struct Walk<'py> {
    leaves: Leaves<'py>,
    /// The name of the present position of the walk.
    path: String,
}

impl<'py> Walk<'py> {
    fn visit(&mut self, object: &Bound<'py, PyAny>, depth: usize) -> PyResult<()> {
        match leaf::of(object)? {
            Leaf::Tensor(way) => {
                self.tensor(object.clone(), way, None);
                Ok(())
            }
            Leaf::DTensor => self.dtensor(object),
            Leaf::Dict | Leaf::Ordered if has_names(object)? => self.container(object, depth),
            Leaf::Dict | Leaf::Ordered | Leaf::List | Leaf::Tuple if self.has_tensors(object, depth)? => {
                self.container(object, depth)
            }
            _ => {
                self.leaves.values.push((self.path.clone(), values::encode(object, &self.path)?));
                self.leaves.shape.push('1');
                Ok(())
            }
        }
    }

    fn tensor(&mut self, object: Bound<'py, PyAny>, way: Way, place: Option<Place>) {
        self.leaves.tensors.push(Tensor { name: self.path.clone(), object, way, place });
        self.leaves.shape.push('0');
    }

    /// Adds the box of a DTensor that this rank has.
    fn dtensor(&mut self, object: &Bound<'py, PyAny>) -> PyResult<()> {
        let boxes = object.py().import("ashore.torch._boxes")?;
        let mine: Option<(Bound<'py, PyAny>, Place)> =
            boxes.call_method1("mine", (object, self.path.as_str()))?.extract()?;
        let Some((local, place)) = mine else {
            self.leaves.shape.push('0');
            return Ok(());
        };
        match leaf::of(&local)? {
            Leaf::Tensor(way) => self.tensor(local, way, Some(place)),
            _ => return Err(invalid(object.py(), &values::refusal(&local)?, Some(&self.path))),
        }
        Ok(())
    }

    /// Walks through a container.
    fn container(&mut self, object: &Bound<'py, PyAny>, depth: usize) -> PyResult<()> {
        if depth > MAX_DEPTH {
            return Err(self.too_deep(object.py()));
        }
        let of = leaf::of(object)?;
        let kind = match of {
            Leaf::Ordered => "[\"o\"",
            Leaf::List => "[\"l\"",
            Leaf::Tuple => "[\"t\"",
            _ => "[\"d\"",
        };
        self.leaves.shape.push_str(kind);
        let parent = self.path.len();
        if matches!(of, Leaf::List | Leaf::Tuple) {
            for (index, item) in object.try_iter()?.enumerate() {
                self.enter(|path| write!(path, "{index}"));
                self.leaves.shape.push(',');
                self.visit(&item?, depth + 1)?;
                self.path.truncate(parent);
            }
        } else {
            for (key, item) in object.cast::<PyDict>()? {
                self.key(&key)?;
                self.leaves.shape.push(',');
                self.visit(&item, depth + 1)?;
                self.path.truncate(parent);
            }
        }
        self.leaves.shape.push(']');
        Ok(())
    }

    /// Descends to a key.
    fn key(&mut self, key: &Bound<'py, PyAny>) -> PyResult<()> {
        self.leaves.shape.push(',');
        if let Ok(text) = key.cast_exact::<PyString>() {
            let text = text.to_str()?;
            self.enter(|path| path.write_str(text));
            let plain = |byte: u8| (b' '..0x7f).contains(&byte) && byte != b'"' && byte != b'\\';
            let shape = &mut self.leaves.shape;
            if text.bytes().all(plain) {
                shape.push('"');
                shape.push_str(text);
                shape.push('"');
            } else {
                shape.push_str(&Json::from(text).to_string());
            }
            return Ok(());
        }
        if let Some(number) = number(key) {
            self.enter(|path| write!(path, "{number}"));
            self.leaves.shape.push_str(&number.to_string());
            return Ok(());
        }
        let why = format!(
            "the keys above a tensor are text, or integers of 64 bits: they become its name key={} type={}",
            key.repr()?,
            type_name(key)?
        );
        Err(invalid(key.py(), &why, Some(&self.path)))
    }

    fn enter(&mut self, write: impl FnOnce(&mut String) -> std::fmt::Result) {
        if !self.path.is_empty() {
            self.path.push('.');
        }
        // Writing to a string never fails.
        let _ = write(&mut self.path);
    }

    /// Whether there is a tensor within a container.
    fn has_tensors(&self, object: &Bound<'py, PyAny>, depth: usize) -> PyResult<bool> {
        if depth > MAX_DEPTH {
            return Err(self.too_deep(object.py()));
        }
        match leaf::of(object)? {
            Leaf::Tensor(_) | Leaf::DTensor => Ok(true),
            Leaf::List | Leaf::Tuple => {
                for item in object.try_iter()? {
                    if self.has_tensors(&item?, depth + 1)? {
                        return Ok(true);
                    }
                }
                Ok(false)
            }
            Leaf::Dict | Leaf::Ordered => {
                for (_, item) in object.cast::<PyDict>()? {
                    if self.has_tensors(&item, depth + 1)? {
                        return Ok(true);
                    }
                }
                Ok(false)
            }
            _ => Ok(false),
        }
    }

    fn too_deep(&self, py: Python<'_>) -> PyErr {
        invalid(py, "a state nests too deeply, or contains itself", Some(&self.path))
    }
}

/// Whether a dict has keys that can all be parts of names.
fn has_names(object: &Bound<'_, PyAny>) -> PyResult<bool> {
    let dict = object.cast::<PyDict>()?;
    let name = |key: &Bound<'_, PyAny>| key.is_exact_instance_of::<PyString>() || number(key).is_some();
    Ok(!dict.is_empty() && dict.iter().all(|(key, _)| name(&key)))
}

/// Returns the number of a key that is an integer of 64 bits.
fn number(key: &Bound<'_, PyAny>) -> Option<i64> {
    key.cast_exact::<PyInt>().ok()?.extract().ok()
}

/// The parts from which a tree is rebuilt.
pub trait Parts<'py> {
    fn tensor(&self, name: &str) -> PyResult<Bound<'py, PyAny>>;
    fn value(&self, name: &str) -> PyResult<Bound<'py, PyAny>>;
}

/// Rebuilds a tree from its shape and its leaves.
pub fn rebuild<'py>(py: Python<'py>, shape: &str, parts: &impl Parts<'py>) -> PyResult<Bound<'py, PyAny>> {
    let shape: Json = serde_json::from_str(shape).map_err(|e| unknown(py, &e.to_string()))?;
    build(py, &shape, &mut String::new(), parts)
}

fn unknown(py: Python<'_>, what: &str) -> PyErr {
    invalid(py, &format!("the shape of the tree is not one that this version knows: {what}"), None)
}

fn build<'py>(
    py: Python<'py>,
    shape: &Json,
    path: &mut String,
    parts: &impl Parts<'py>,
) -> PyResult<Bound<'py, PyAny>> {
    let items = match shape {
        Json::Number(number) if number.as_u64() == Some(0) => return parts.tensor(path),
        Json::Number(number) if number.as_u64() == Some(1) => return parts.value(path),
        Json::Array(items) => items,
        other => return Err(unknown(py, &other.to_string())),
    };
    let (kind, items) = match items.split_first() {
        Some((Json::String(kind), items)) => (kind.as_str(), items),
        _ => return Err(unknown(py, "a container without a kind")),
    };
    let parent = path.len();
    let mut child = |key: &dyn std::fmt::Display, item: &Json| {
        let dot = if path.is_empty() { "" } else { "." };
        let _ = write!(path, "{dot}{key}");
        let built = build(py, item, path, parts);
        path.truncate(parent);
        built
    };
    if kind == "l" || kind == "t" {
        let items = items.iter().enumerate().map(|(index, item)| child(&index, item)).collect::<PyResult<Vec<_>>>()?;
        return Ok(if kind == "l" { PyList::new(py, items)?.into_any() } else { PyTuple::new(py, items)?.into_any() });
    }
    let dict = PyDict::new(py);
    for pair in items.chunks(2) {
        match pair {
            [Json::String(key), item] => dict.set_item(key, child(key, item)?)?,
            [Json::Number(key), item] if key.is_i64() => dict.set_item(key.as_i64(), child(key, item)?)?,
            _ => return Err(unknown(py, "a key that is neither text nor an integer")),
        }
    }
    match kind {
        "d" => Ok(dict.into_any()),
        "o" => py.import("collections")?.getattr("OrderedDict")?.call1((dict,)),
        other => Err(unknown(py, other)),
    }
}
