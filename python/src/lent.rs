//! Memory of Python objects that the engine reads or writes as bytes.
//!
//! # Safety argument
//! A slice is over packed memory of the host that an object describes. [`Lent`] holds what owns it, and a
//! follower holds its [`Lent`] as long as the slice: the memory stays allocated. torch and NumPy alone can
//! free it under a reference, by `resize_` of a storage and `resize` of an array: the documentation forbids
//! that. Slices of one follower do not overlap, which [`several`] checks, and none is a target of a copy from
//! it. They are written within the calls that apply a version or fill a target alone, and that the program
//! reads or writes the memory meanwhile in no other thread, and writes that of a follower never, is what
//! callers promise; where that is broken, values are wrong, as in any library that fills tensors without the
//! GIL.
#![expect(unsafe_code, reason = "slices of memory that Python objects own; argument above")]

use crate::collect::{self, Found, Memory};
use crate::errors::invalid;
use pyo3::prelude::*;

/// Memory for a tensor.
pub struct Lent {
    pub name: String,
    pub memory: Memory,
    pub bytes: &'static mut [u8],
    /// What owns the memory.
    pub keep: Py<PyAny>,
}

/// The memory of `object`, which the engine writes.
///
/// # Errors
/// `InvalidError`, naming the tensor, for what is no tensor in packed, writable memory of the host.
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
    let length = memory.bytes() as usize;
    let bytes: &'static mut [u8] = if length == 0 {
        &mut []
    } else {
        // SAFETY: writable memory of this length; see the safety argument.
        unsafe { std::slice::from_raw_parts_mut(std::ptr::with_exposed_provenance_mut(memory.address), length) }
    };
    Ok(Lent { name: name.to_owned(), memory, bytes, keep })
}

/// More names of tensors, each with the name that has the memory.
pub type Aliases = Vec<(String, String)>;

/// The memory of several objects, and further names of it, each with the name it is lent under: the first in
/// the order of names, as in a version.
///
/// # Errors
/// As [`one`], and for objects that share a part of their memory.
pub fn several(mut objects: Vec<(String, Bound<'_, PyAny>)>) -> PyResult<(Vec<Lent>, Aliases)> {
    objects.sort_by(|a, b| a.0.cmp(&b.0));
    let (mut found, mut tied): (Vec<Lent>, Vec<(String, String)>) = (Vec::with_capacity(objects.len()), Vec::new());
    let mut begins = std::collections::BTreeMap::new();
    for (name, object) in objects {
        let lent = one(&object, &name)?;
        let (begin, end) = lent.memory.extent();
        // Of those before, which do not overlap, the last that begins before the end reaches farthest.
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
