//! Errors of the engine as exceptions of the package `ashore`.

use ashore::{Error, ErrorKind};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// The kind of errors for an object that was closed, or that belongs to the parent of a forked child.
const CLOSED: &str = "closed";

/// Returns the name of a kind in Python.
fn kind_name(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::Invalid => "invalid",
        ErrorKind::NotFound => "not_found",
        ErrorKind::Conflict => "conflict",
        ErrorKind::Busy => "busy",
        ErrorKind::NoSpace => "no_space",
        ErrorKind::Unavailable => "unavailable",
        ErrorKind::Corrupt => "corrupt",
        ErrorKind::Device => "device",
        ErrorKind::Cancelled => "cancelled",
        ErrorKind::Deadline => "deadline",
        ErrorKind::Indeterminate => "indeterminate",
        _ => "internal",
    }
}

/// Makes the exception of `kind`; `ashore._errors` chooses its class.
fn make(
    py: Python<'_>,
    kind: &str,
    text: &str,
    tensor: Option<&str>,
    path: Option<String>,
    step: Option<u64>,
) -> PyErr {
    static MAKE: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let make = MAKE.import(py, "ashore._errors", "make");
    match make.and_then(|make| make.call1((kind, text, tensor, path, step))) {
        Ok(exception) => PyErr::from_value(exception),
        Err(error) => error,
    }
}

/// Returns the exception for an error of the engine.
pub fn raise(py: Python<'_>, error: &Error) -> PyErr {
    let path = error.path().map(|path| path.to_string_lossy().into_owned());
    let tensor = quoted(error.message(), "tensor=");
    make(py, kind_name(error.kind()), &format!("{error:#}"), tensor.as_deref(), path, error.step())
}

/// Returns the exception for an invalid call. `tensor` names the tensor or value concerned.
pub fn invalid(py: Python<'_>, why: &str, tensor: Option<&str>) -> PyErr {
    match tensor {
        Some(name) => make(py, "invalid", &format!("{why} tensor={name:?}"), Some(name), None, None),
        None => make(py, "invalid", why, None, None, None),
    }
}

/// As [`invalid`], with another exception as its cause.
pub fn invalid_from(py: Python<'_>, why: &str, tensor: Option<&str>, cause: PyErr) -> PyErr {
    let error = invalid(py, &format!("{why}: {cause}"), tensor);
    error.set_cause(py, Some(cause));
    error
}

/// Whether an exception is one of this package, which names its tensor already.
pub fn is_ours(py: Python<'_>, error: &PyErr) -> bool {
    static BASE: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    BASE.import(py, "ashore._errors", "Error").is_ok_and(|base| error.matches(py, base).unwrap_or(false))
}

/// Returns the exception for an object that is closed.
pub fn closed(py: Python<'_>, why: &str) -> PyErr {
    make(py, CLOSED, why, None, None, None)
}

/// Returns the exception for an object that another call uses.
pub fn busy(py: Python<'_>, why: &str) -> PyErr {
    make(py, kind_name(ErrorKind::Busy), why, None, None, None)
}

/// Runs an entry point of this module: a panic in it becomes `InternalError`.
pub fn entry<T>(py: Python<'_>, body: impl FnOnce() -> PyResult<T>) -> PyResult<T> {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        let text = format!("a bug in ashore: {}", panic_text(&*panic));
        Err(make(py, "internal", &text, None, None, None))
    })
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("a panic")
}

/// Converts results of the engine to results of Python.
pub trait IntoPy<T> {
    /// Converts the error to an exception.
    fn or_raise(self, py: Python<'_>) -> PyResult<T>;
}

impl<T> IntoPy<T> for ashore::Result<T> {
    fn or_raise(self, py: Python<'_>) -> PyResult<T> {
        self.map_err(|error| raise(py, &error))
    }
}

/// Returns the text that follows `key` in quotes, as `{:?}` wrote it.
fn quoted(message: &str, key: &str) -> Option<String> {
    let at = message.find(&format!("{key}\""))?;
    let mut rest = message.get(at + key.len() + 1..)?.chars();
    let mut text = String::new();
    loop {
        match rest.next()? {
            '"' => return Some(text),
            '\\' => match rest.next()? {
                'n' => text.push('\n'),
                't' => text.push('\t'),
                'r' => text.push('\r'),
                '0' => text.push('\0'),
                'u' => {
                    let digits: String = rest.by_ref().skip(1).take_while(|c| *c != '}').collect();
                    text.push(u32::from_str_radix(&digits, 16).ok().and_then(char::from_u32)?);
                }
                other => text.push(other),
            },
            other => text.push(other),
        }
    }
}
