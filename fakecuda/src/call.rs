//! The common part of every exported function: the thread's context, counts, faults, and sticky errors.

use crate::abi::{CAPTURE_UNSUPPORTED, INVALID_CONTEXT, NOT_INITIALIZED, Status, is_sticky};
use crate::device::{self, Device};
use crate::settings::strike;
use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicBool, Ordering};

/// What a function requires before its body runs.
#[derive(Clone, Copy, PartialEq, Eq)]
#[expect(non_camel_case_types, reason = "they read as words before `fn` in `export`")]
pub enum Needs {
    /// Nothing, not even `cuInit`.
    nothing,
    /// `cuInit`.
    init,
    /// A current context without an error.
    context,
    /// A current context without an error, and no capture that forbids calls that may synchronise.
    quiet,
}

pub static INITIALIZED: AtomicBool = AtomicBool::new(false);

thread_local! {
    /// Ordinals of the contexts pushed by this thread; the last is current.
    pub static CONTEXTS: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
    /// The thread's capture mode: 0 global, 1 thread-local, 2 relaxed.
    pub static CAPTURE_MODE: Cell<i32> = const { Cell::new(0) };
    /// The error code with which the work that this call enqueues will fail.
    static LATE: Cell<Option<i32>> = const { Cell::new(None) };
}

/// The current device, if its context is alive.
pub fn current() -> Status<&'static Device> {
    let ordinal = CONTEXTS.with_borrow(|c| c.last().copied()).ok_or(INVALID_CONTEXT)?;
    let device = device::get(ordinal)?;
    if device.state().retained == 0 { Err(INVALID_CONTEXT) } else { Ok(device) }
}

/// Returns the error code with which work enqueued now is to fail, if any.
pub fn late_fault() -> Option<i32> {
    LATE.take()
}

/// Runs the body of an exported function.
pub fn call(name: &'static str, needs: Needs, body: impl FnOnce() -> Status) -> i32 {
    let run = || {
        if needs != Needs::nothing && !INITIALIZED.load(Ordering::Acquire) {
            return Err(NOT_INITIALIZED);
        }
        let ordinal = CONTEXTS.with_borrow(|c| c.last().copied());
        if let Some(device) = ordinal.and_then(|o| device::get(o).ok()) {
            count(device, name)?;
        }
        if matches!(needs, Needs::context | Needs::quiet) {
            current()?.state().healthy()?;
        }
        if needs == Needs::quiet && !current()?.state().may_synchronise() {
            return Err(CAPTURE_UNSUPPORTED);
        }
        body()
    };
    let result = run();
    // Nothing was enqueued that could fail later, so the device itself fails.
    if let (Some(code), Ok(device)) = (LATE.take(), current()) {
        device.state().sticky = Some(code);
        device.changed();
    }
    if let (Err(code), Ok(device)) = (result, current())
        && is_sticky(code)
    {
        device.stopped();
    }
    result.err().unwrap_or(0)
}

/// Counts a call on a device, and fails it if a fault applies.
pub fn count(device: &Device, name: &'static str) -> Status {
    let mut state = device.state();
    *state.calls.entry(name).or_default() += 1;
    match strike(&mut state.faults, name) {
        None => {}
        Some((code, true)) => LATE.set(Some(code)),
        Some((code, false)) => {
            if is_sticky(code) {
                state.sticky = Some(code);
                drop(state);
                device.changed();
            }
            return Err(code);
        }
    }
    Ok(())
}
