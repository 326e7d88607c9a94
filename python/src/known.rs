//! Facts about Python objects that rarely change: types, dtypes.

use pyo3::prelude::*;
use pyo3::sync::MutexExt;
use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, PoisonError};

/// The maximum number of known objects. A program has few types and dtypes, but NumPy gives each array that
/// it unpickles a dtype object of its own, and a program can create any number of classes.
const MANY: usize = 256;

/// The fact about each object, by its address. The objects are kept, so that no other object gets the
/// address, until there are [`MANY`]. Then all of them are forgotten.
pub struct Known<V>(LazyLock<Mutex<HashMap<usize, Entry<V>>>>);

type Entry<V> = (V, Py<PyAny>);

impl<V: Copy> Known<V> {
    pub const fn new() -> Self {
        Self(LazyLock::new(Mutex::default))
    }

    /// Returns the fact about `object`. `find` determines it the first time.
    pub fn get<'py>(
        &self,
        object: Bound<'py, PyAny>,
        find: impl FnOnce(&Bound<'py, PyAny>) -> PyResult<V>,
    ) -> PyResult<V> {
        let key = object.as_ptr() as usize;
        let lock = || self.0.lock_py_attached(object.py()).unwrap_or_else(PoisonError::into_inner);
        if let Some((found, _)) = lock().get(&key) {
            return Ok(*found);
        }
        // The lock is not held here, because this runs Python code.
        let found = find(&object)?;
        let mut known = lock();
        let forgotten = (known.len() >= MANY).then(|| std::mem::take(&mut *known));
        known.insert(key, (found, object.unbind()));
        drop(known);
        // The lock is not held here, either: the end of a class can run Python code.
        drop(forgotten);
        Ok(found)
    }
}
