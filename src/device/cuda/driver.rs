//! The CUDA driver, found at run time. No file outside this folder calls the driver. From the bottom up:
//! `handles` has the types of its objects, `rows` the arguments of a copy of rows, `functions` the table of
//! its functions, `codes` their result codes, `batch` a function that a driver may lack. `library` finds the
//! driver, `context` has the calls on a device, and `owned` has the objects that the driver creates and
//! destroys.
//!
//! A missing library, a missing symbol, or a driver without a device causes an error that names it, never a
//! panic. A result code is a plain number, because a newer driver may return codes that are unknown here.
//!
//! **Failure.** Some result codes mean that the context is lost. Such a code is sticky: from then on every
//! call on that context fails with the same error, and the driver is not called any more, not even to release
//! objects. A context also counts as lost when the driver keeps refusing to report the progress of work.
//! **Exit, fork.** If the driver is already shut down at process exit, a release ignores the error. A forked
//! child never calls the driver.
//!
//! # Safety argument
//! The signatures are those of `cuda.h` for the named symbols, which the driver keeps stable. The library is
//! never unloaded. Handles are created here and destroyed once, by the owner that wraps them. Pointers to
//! results point to locals of the call. The caller of an `unsafe fn` vouches for the memory that a call reads
//! or writes later, in stream order.

mod batch;
mod codes;
mod context;
mod functions;
mod handles;
mod library;
mod owned;
#[cfg(all(test, not(any(loom, miri))))]
mod proof;
mod rows;

pub(super) use batch::Copies;
pub(super) use context::Context;
pub(super) use handles::{Address, FunctionHandle, StreamHandle};
pub(super) use library::Driver;
pub(super) use owned::{Event, Memory, Module, Registered, Stream};
