//! Memory of Python objects that the engine reads or writes as bytes.
//!
//! # Safety argument
//! A slice covers packed memory of the host that an object describes. [`Lent`] holds the owner of the memory.
//! [`Held`] holds it, too, and drops the follower first: so the memory stays allocated. Only torch and NumPy
//! can free the memory while it is referenced, by `resize_` of a storage and `resize` of an array: the
//! documentation forbids that. [`Lent::fill`] uses its slice for one call. Only [`Held::start`] makes the
//! slices of a follower. They do not overlap, because [`several`] has checked that, and none is a target of a
//! copy from the follower. They are written within the calls that apply a version. Callers promise that the
//! program reads or writes the memory meanwhile in no other thread, and never writes that of a follower.
//! Where a caller breaks this promise, values are wrong, as in any library that fills tensors without the
//! GIL.
#![expect(unsafe_code, reason = "slices of memory that Python objects own; argument above")]

use crate::collect::{self, Found, Memory};
use crate::errors::invalid;
use ashore::chain::{Follow, Follower, Weights};
use pyo3::prelude::*;

/// Memory for a tensor. Rust accesses it only while it is filled.
pub struct Lent {
    pub name: String,
    pub memory: Memory,
    /// The owner of the memory.
    keep: Py<PyAny>,
}

impl Lent {
    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.memory.bytes() as usize
    }

    /// Calls `fill` with the memory.
    pub fn fill(&mut self, fill: impl FnOnce(&mut [u8])) {
        // SAFETY: `keep` owns the memory during the call; see the safety argument.
        fill(unsafe { self.slice() });
    }

    /// # Safety
    /// The slice is the only one of its memory, and `keep` is not dropped before it.
    unsafe fn slice(&self) -> &'static mut [u8] {
        if self.len() == 0 {
            return &mut [];
        }
        let address = std::ptr::with_exposed_provenance_mut(self.memory.address);
        // SAFETY: packed, writable memory of the host of this length, as `one` has checked; the rest is the
        // caller's promise.
        unsafe { std::slice::from_raw_parts_mut(address, self.len()) }
    }
}

/// A follower, with the owners of the memory that it writes.
pub struct Held {
    // This field is dropped first.
    engine: Follow<'static>,
    _keep: Vec<Py<PyAny>>,
}

impl Held {
    /// Begins to follow, into memory of its own, or into `targets` and no other memory.
    ///
    /// # Errors
    /// As [`Weights::lend`] and [`Follower::start`].
    pub fn start(follower: Follower, targets: Option<Targets>) -> ashore::Result<Self> {
        let mut keep = Vec::new();
        let mut weights = Weights::new();
        if let Some(Targets { lent, tied, strict }) = targets {
            for lent in lent {
                let (dtype, shape) = (lent.memory.dtype, &lent.memory.shape);
                // SAFETY: no other slice overlaps, as `several` has checked; `keep` is dropped after
                // `weights`, or moves into the result with the follower.
                let bytes = unsafe { lent.slice() };
                keep.push(lent.keep);
                weights.lend(lent.name, dtype, shape, bytes)?;
            }
            for (name, holder) in tied {
                weights.lend_alias(name, holder);
            }
            if strict {
                weights.strict();
            }
        }
        follower.start(weights).map(|engine| Self { engine, _keep: keep })
    }

    pub fn engine(&mut self) -> &mut Follow<'static> {
        &mut self.engine
    }
}

/// Memory that a follower writes.
pub struct Targets {
    lent: Vec<Lent>,
    tied: Aliases,
    strict: bool,
}

impl Targets {
    /// As [`several`]. With `strict`, a version must have these tensors and no others.
    pub fn new(objects: Vec<(String, Bound<'_, PyAny>)>, strict: bool) -> PyResult<Self> {
        let (lent, tied) = several(objects)?;
        Ok(Self { lent, tied, strict })
    }
}

/// Returns the memory of `object`, which the engine writes.
///
/// # Errors
/// `InvalidError`, naming the tensor, for an object that is no tensor in packed, writable memory of the host.
pub fn one(object: &Bound<'_, PyAny>, name: &str) -> PyResult<Lent> {
    let Found { memory, keep, read_only } = collect::find(object, name, None)?;
    let refuse = |why: &str| Err(invalid(object.py(), why, Some(name)));
    if !memory.on_host() {
        return refuse("a follower writes memory of the host: give its changes to tensors on a device yourself");
    }
    if memory.strides.is_some() {
        return refuse("a target of a follower is packed, in row-major order: make it contiguous");
    }
    if read_only {
        return refuse("a target is read-only");
    }
    Ok(Lent { name: name.to_owned(), memory, keep })
}

/// Further names of tensors, each with the name under which the memory was lent.
pub type Aliases = Vec<(String, String)>;

/// Returns the memory of several objects, and further names of it. Each further name comes with the name
/// under which the memory is lent: the first in the order of names, as in a version.
///
/// # Errors
/// As [`one`], and for objects that share only a part of their memory.
pub fn several(mut objects: Vec<(String, Bound<'_, PyAny>)>) -> PyResult<(Vec<Lent>, Aliases)> {
    objects.sort_by(|a, b| a.0.cmp(&b.0));
    let (mut found, mut tied): (Vec<Lent>, Vec<(String, String)>) = (Vec::with_capacity(objects.len()), Vec::new());
    let mut begins = std::collections::BTreeMap::new();
    for (name, object) in objects {
        let lent = one(&object, &name)?;
        let (begin, end) = lent.memory.extent();
        // Earlier objects do not overlap. So the last one that begins before the end also reaches farthest.
        let before = begins.range(..end).next_back().map(|(_, number): (_, &usize)| &found[*number]);
        match before.filter(|before| begin < end && before.memory.extent().1 > begin) {
            Some(before) if before.memory == lent.memory => tied.push((name, before.name.clone())),
            Some(before) => {
                let why = format!("two targets of a follower share memory other={:?}", before.name);
                return Err(invalid(object.py(), &why, Some(&name)));
            }
            None => {
                if begin < end {
                    begins.insert(begin, found.len());
                }
                found.push(lent);
            }
        }
    }
    Ok((found, tied))
}
