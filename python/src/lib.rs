//! The extension module of the Python package `ashore`: `ashore._ashore`. Its classes are thin. The package's
//! Python modules build the public API from them.
//!
//! # Safety argument
//! The only unsafe call asks the interpreter for its number, while a thread of that interpreter runs in this
//! module.
#![expect(unsafe_code, reason = "the number of the interpreter; argument above")]

mod chain;
mod checkpoint;
mod collect;
mod dlpack;
mod dtypes;
mod errors;
mod executor;
mod handle;
mod known;
mod leaf;
mod lent;
mod notify;
mod reading;
mod sources;
mod targets;
mod tree;
mod values;
mod waiting;

use pyo3::exceptions::PyImportError;
use pyo3::prelude::*;
use std::ffi::OsString;
use std::process::ExitCode;

/// Passes an exception on to `sys.unraisablehook`.
#[pyfunction]
fn unraisable(py: Python<'_>, exception: Bound<'_, PyAny>, object: Option<Bound<'_, PyAny>>) {
    PyErr::from_value(exception).write_unraisable(py, object.as_ref());
}

/// Runs the program `ashore` with these arguments, of which the first is its name. Returns its exit status.
#[pyfunction]
fn run(py: Python<'_>, arguments: Vec<OsString>) -> PyResult<u8> {
    errors::entry(py, || {
        let ended = py.detach(|| ashore_cli::run(arguments));
        // An exit code does not reveal its number, so the number is searched.
        Ok((0..=u8::MAX).find(|number| ExitCode::from(*number) == ended).unwrap_or(1))
    })
}

/// Panics, for the test that a panic becomes an `InternalError`.
#[pyfunction]
fn panic_for_test(py: Python<'_>) -> PyResult<()> {
    errors::entry(py, || panic!("as the test asked"))
}

// The module is not tested without a GIL. A free-threaded interpreter for which it is built enables its GIL
// again when it imports the module.
#[pymodule(gil_used = true)]
fn _ashore(module: &Bound<'_, PyModule>) -> PyResult<()> {
    // SAFETY: this thread has a state of the interpreter that imports the module.
    let interpreter = unsafe { pyo3::ffi::PyInterpreterState_GetID(pyo3::ffi::PyInterpreterState_Get()) };
    if interpreter != 0 {
        return Err(PyImportError::new_err("ashore cannot be imported in a subinterpreter: its threads serve one"));
    }
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<executor::Executor>()?;
    module.add_class::<handle::Handle>()?;
    module.add_class::<handle::Promotion>()?;
    module.add_class::<checkpoint::Checkpoint>()?;
    module.add_class::<checkpoint::Catalog>()?;
    module.add_class::<chain::Publisher>()?;
    module.add_class::<chain::Follow>()?;
    module.add_class::<chain::Update>()?;
    module.add_class::<chain::Change>()?;
    module.add_class::<chain::Weights>()?;
    module.add_function(wrap_pyfunction!(notify::notify_next, module)?)?;
    module.add_function(wrap_pyfunction!(notify::notify_stop, module)?)?;
    module.add_function(wrap_pyfunction!(notify::notify_forget, module)?)?;
    module.add_function(wrap_pyfunction!(unraisable, module)?)?;
    module.add_function(wrap_pyfunction!(run, module)?)?;
    module.add_function(wrap_pyfunction!(panic_for_test, module)?)?;
    Ok(())
}
