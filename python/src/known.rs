//! What was found out about objects of Python that stay: types, dtypes.

use pyo3::prelude::*;
use pyo3::sync::MutexExt;
use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, PoisonError};

/// What is known of each object, by its address. The objects are kept, so that no other one gets the address.
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
        lock().insert(key, (found, object.clone().unbind()));
        Ok(found)
    }
}
