//! What was found out about objects of Python that mostly stay: types, dtypes.

use pyo3::prelude::*;
use pyo3::sync::MutexExt;
use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, PoisonError};

/// How many objects are known. A program has few types and dtypes, but NumPy gives each array that it
/// unpickles a dtype object of its own, and a program can make classes without end.
const MANY: usize = 256;

/// What is known of each object, by its address. The objects are kept, so that no other one gets the address,
/// until there are [`MANY`]: then all are forgotten.
pub struct Known<V>(LazyLock<Mutex<HashMap<usize, Entry<V>>>>);

type Entry<V> = (V, Py<PyAny>);

impl<V: Copy> Known<V> {
    pub const fn new() -> Self {
        Self(LazyLock::new(Mutex::default))
    }

    /// What is known of `object`; `find` finds it out the first time.
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
        // Not under the lock: it runs code of Python.
        let found = find(&object)?;
        let mut known = lock();
        let forgotten = (known.len() >= MANY).then(|| std::mem::take(&mut *known));
        known.insert(key, (found, object.unbind()));
        drop(known);
        // Not under the lock, either: the end of a class can run code of Python.
        drop(forgotten);
        Ok(found)
    }
}
