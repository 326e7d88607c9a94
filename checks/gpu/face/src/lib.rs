//! A C interface to the library for the Python programs in `checks/gpu`, which call it with pointers of torch
//! and of the driver. It is for tests only: it promises nothing, and is not the library's C interface.
//!
//! A function that makes something returns null when it fails. Any other function returns a code: 0 is
//! success, 1 a save that was not begun, -1 a failure, whose kind and text `face_error` gives to the calling
//! thread. No panic crosses the interface: it becomes such an error.
//!
//! # Safety argument
//! Pointers come from the program: strings end with a zero byte, arrays hold the stated number of elements,
//! handles come from this library and are given back once, not while another call uses them. The program
//! promises for the memory of tensors what `RawHost::new` and `RawDevice::new` require. Nothing else is
//! dereferenced, and a null handle or text is refused.

mod steps;
mod tensors;

use ashore::DeviceChoice;
use ashore::internal::device::Cuda;
use ashore::{CheckpointExecutor, DeviceStream, Error, ErrorKind, Outcome, Result, Save, Settings};
use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tensors::Tensor;

/// The result of a save, in bytes and in seconds since its call.
#[repr(C)]
#[derive(Default)]
pub struct Committed {
    bytes: u64,
    blocked: f64,
    staged: f64,
    durable: f64,
    tail: f64,
    over_budget: u64,
    late_chunks: u64,
}

/// A stream of a device.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Stream {
    handle: u64,
    ordinal: u32,
}

thread_local! {
    /// The last text for this thread: an error, a report.
    static TEXT: RefCell<CString> = RefCell::default();
}

fn tell(text: &str) -> *const c_char {
    TEXT.with_borrow_mut(|last| {
        *last = CString::new(text.replace('\0', " ")).unwrap_or_default();
        last.as_ptr()
    })
}

/// Runs the body of a function; `failed` is its result after an error.
fn guarded<T>(failed: T, run: impl FnOnce() -> Result<T>) -> T {
    let ended = catch_unwind(AssertUnwindSafe(run));
    let error = match ended {
        Ok(Ok(value)) => return value,
        Ok(Err(error)) => error,
        Err(_) => Error::new(ErrorKind::Internal, "a panic"),
    };
    tell(&format!("{error:?}"));
    failed
}

fn invalid(what: &str) -> Error {
    Error::new(ErrorKind::Invalid, what)
}

/// Reads a text of the program.
///
/// # Safety
/// Null, or ends with a zero byte and stays for `'a`.
unsafe fn text<'a>(at: *const c_char) -> Result<&'a str> {
    if at.is_null() {
        return Err(invalid("a text is null"));
    }
    // SAFETY: passed on.
    unsafe { CStr::from_ptr(at) }.to_str().map_err(|_| invalid("a text is not utf-8"))
}

/// The object behind a handle.
///
/// # Safety
/// Null, or from this library and not given back while `'a` lasts.
unsafe fn held<'a, T>(handle: *const T) -> Result<&'a T> {
    // SAFETY: passed on.
    unsafe { handle.as_ref() }.ok_or_else(|| invalid("a handle is null"))
}

/// Reads an array of the program.
///
/// # Safety
/// Holds `count` elements for `'a`, if there are any.
unsafe fn array<'a, T>(at: *const T, count: u64) -> Result<&'a [T]> {
    match (count, at.is_null()) {
        (0, _) => Ok(&[]),
        (_, true) => Err(invalid("an array is null")),
        // SAFETY: passed on.
        _ => Ok(unsafe { std::slice::from_raw_parts(at, count as usize) }),
    }
}

/// Takes back the object that a handle owned.
///
/// # Safety
/// As [`held`], and not used any more.
unsafe fn given_back<T>(handle: *mut T) -> Result<Box<T>> {
    if handle.is_null() {
        return Err(invalid("a handle is null"));
    }
    // SAFETY: made by `Box::into_raw` here, and passed on.
    Ok(unsafe { Box::from_raw(handle) })
}

fn timeout(seconds: f64) -> Result<Duration> {
    Duration::try_from_secs_f64(seconds).map_err(|_| invalid("seconds are a number from 0"))
}

macro_rules! face {
    ($($(#[$doc:meta])* fn $name:ident($($argument:ident: $type:ty),* $(,)?) -> $result:ty = $failed:expr; $body:block)*) => { $(
        $(#[$doc])*
        ///
        /// # Safety
        /// As the safety argument says of its pointers.
        // SAFETY: the name begins with that of this library.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($argument: $type),*) -> $result {
            $crate::guarded($failed, move || $body)
        }
    )* };
}
pub(crate) use face;

face! {
    /// Opens an executor over the directory `root`. `settings` is a JSON object of `ashore::Settings`, device
    /// included; `driver` is the library to take for the driver, null for the machine's own.
    fn face_open(root: *const c_char, settings: *const c_char, driver: *const c_char) -> *mut CheckpointExecutor =
        std::ptr::null_mut(); {
        // SAFETY: the argument at the top.
        let (root, settings) = unsafe { (text(root)?, text(settings)?) };
        let settings: Settings =
            serde_json::from_str(settings).map_err(|e| invalid("settings do not parse").with_source(e))?;
        let builder = CheckpointExecutor::builder(root).settings(settings.clone());
        let builder = match settings.device {
            DeviceChoice::Cuda(ordinal) if !driver.is_null() => {
                // SAFETY: the program promises that it is a driver.
                let device = unsafe { Cuda::with_driver(Path::new(text(driver)?), ordinal)? };
                builder.made_device(Arc::new(device))
            }
            _ => builder,
        };
        Ok(Box::into_raw(Box::new(builder.build()?)))
    }

    /// Reports the executor's device, scratch slots and engine.
    fn face_report(executor: *const CheckpointExecutor) -> *const c_char = std::ptr::null(); {
        // SAFETY: the argument at the top.
        let executor = unsafe { held(executor)? };
        let device = executor.device();
        let scratch = device.scratch.as_ref().map_or_else(Clone::clone, |slots| format!("{slots} slots"));
        Ok(tell(&format!("{device}, scratch: {scratch}, {}, {:?}", executor.engine(), executor.arena())))
    }

    /// Begins to save `count` tensors as `step`. Each tensor is released once, whether or not the save
    /// succeeds.
    fn face_save(executor: *const CheckpointExecutor, step: u64, all: *const Tensor, count: u64) -> *mut Save =
        std::ptr::null_mut(); {
        // SAFETY: the argument at the top.
        let state = unsafe { tensors::state(array(all, count)?) };
        // SAFETY: the argument at the top.
        let save = unsafe { held(executor)? }.save(step, state?)?;
        Ok(Box::into_raw(Box::new(save)))
    }

    /// Waits on the host until the tensors may be written.
    fn face_fence(executor: *const CheckpointExecutor) -> i32 = -1; {
        // SAFETY: the argument at the top.
        unsafe { held(executor)? }.fence().map(|()| 0)
    }

    /// Makes the streams wait until they may write the tensors.
    fn face_fence_on(executor: *const CheckpointExecutor, streams: *const Stream, count: u64) -> i32 = -1; {
        // SAFETY: the argument at the top.
        let (executor, streams) = unsafe { (held(executor)?, array(streams, count)?) };
        // SAFETY: as above.
        let named = |stream: &Stream| unsafe { DeviceStream::new(stream.ordinal, stream.handle as usize) };
        let streams: Vec<_> = streams.iter().map(named).collect();
        executor.fence_on(&streams).map(|()| 0)
    }

    /// Waits until no tensor of the save is read any more.
    fn face_staged(save: *const Save, seconds: f64) -> i32 = -1; {
        // SAFETY: the argument at the top.
        unsafe { held(save)? }.staged().wait(timeout(seconds)?).map(|()| 0)
    }

    /// Waits until the save has ended; `committed` may be null.
    fn face_wait(save: *const Save, seconds: f64, committed: *mut Committed) -> i32 = -1; {
        // SAFETY: the argument at the top.
        let outcome = unsafe { held(save)? }.wait(timeout(seconds)?)?;
        let Outcome::Durable(done) = outcome else { return Ok(1) };
        // SAFETY: null, or the program's to be written.
        if let Some(committed) = unsafe { committed.as_mut() } {
            *committed = Committed {
                bytes: done.bytes,
                blocked: done.blocked.as_secs_f64(),
                staged: done.staged.as_secs_f64(),
                durable: done.durable.as_secs_f64(),
                tail: done.tail.as_secs_f64(),
                over_budget: done.over_budget as u64,
                late_chunks: done.late_chunks as u64,
            };
        }
        Ok(0)
    }

    /// Gives back the handle of a save; the save continues.
    fn face_drop_save(save: *mut Save) -> i32 = -1; {
        // SAFETY: the argument at the top.
        drop(unsafe { given_back(save)? });
        Ok(0)
    }

    /// Accepts no more saves, waits for those under way, and gives back the executor, even if it fails.
    fn face_shutdown(executor: *mut CheckpointExecutor, seconds: f64) -> i32 = -1; {
        // SAFETY: the argument at the top.
        let executor = unsafe { given_back(executor)? };
        executor.shutdown(timeout(seconds)?).map(|()| 0)
    }
}

/// The text of the last failure in this thread.
// SAFETY: the name begins with that of this library.
#[unsafe(no_mangle)]
pub extern "C" fn face_error() -> *const c_char {
    TEXT.with_borrow(|last| last.as_ptr())
}
