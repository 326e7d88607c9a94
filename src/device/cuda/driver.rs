//! The CUDA driver, found at run time. No file outside this folder calls it. From below: `handles` are the types of
//! its objects, `functions` is the table of its functions,
//! `codes` what they return, `batch` a function that a driver may lack, `library` how the driver is found, `context` what a device
//! is asked, `owned` what a driver hands out and takes back.
//!
//! A library that is absent, a symbol that it lacks, a driver without a device: each is an error that names it, never a panic.
//! A result code is a plain number, because a newer driver may return ones that are not known here.
//!
//! **Failure.** A code after which a context is lost is sticky: from then on every call on that context fails
//! with the same error and the driver is not called any more, not even to give things back. A context also
//! counts as lost when the driver refuses to say how far work is, and does not stop refusing. **Exit, fork.**
//! A driver that the end of the process has taken down already is no error for whoever gives something back;
//! a forked child never calls it.
//!
//! # Safety argument
//! The signatures are those of `cuda.h` for the symbols named, which the driver keeps stable, and the library is never unloaded.
//! Handles are made here and destroyed once, by the owner that wraps them. Pointers to results are to locals of the call. What
//! a call reads or writes later, in stream order, is what the caller of an `unsafe fn` vouches for.

mod batch;
mod codes;
mod context;
mod functions;
mod handles;
mod library;
mod owned;
#[cfg(all(test, not(any(loom, miri))))]
mod proof;

pub(super) use batch::Copies;
pub(super) use context::Context;
pub(super) use handles::{Address, FunctionHandle, StreamHandle};
pub(super) use library::Driver;
pub(super) use owned::{Event, Memory, Module, Registered, Stream};
