//! Keeps the last failure of each thread, and runs the body of every function.
//!
//! # Safety argument
//! The safety argument of the crate applies. `ashore_last_error` returns memory of the calling thread, which
//! stays valid until that thread fails again or ends.
#![expect(unsafe_code, reason = "an exported name; argument above")]

use crate::status::ashore_status;
use ashore_core::{Error, ErrorKind};
use std::any::Any;
use std::cell::RefCell;
use std::ffi::{CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

/// A failure of a call. `text` is never null. The other members are null, or -1, if the failure has none.
#[repr(C)]
pub struct ashore_error {
    /// An `ashore_status`.
    pub kind: i32,
    /// The rank on which the failure happened.
    pub rank: i32,
    /// The step that was being saved or restored.
    pub step: i64,
    /// What was attempted and what was wrong, with its cause.
    pub text: *const c_char,
    /// The name of the tensor.
    pub tensor: *const c_char,
    /// The file or directory.
    pub path: *const c_char,
}

/// Returns the last failure in this thread, never null. It is valid until the next failure in this thread;
/// success and the *_free functions do not change it. Call this function in a statement of its own: C may
/// evaluate the arguments of a call from the right, and would read the failure before the call that fails.
// SAFETY: the name starts with the prefix of this library.
#[unsafe(no_mangle)]
pub extern "C" fn ashore_last_error() -> *const ashore_error {
    LAST.try_with(|last| &raw const last.borrow().told).unwrap_or(&raw const ENDED.0)
}

struct Last {
    told: ashore_error,
    /// What `told` points into.
    _texts: [Option<CString>; 3],
}

/// Returned when the thread's own failure is destroyed already, because the thread is ending.
struct Ended(ashore_error);

// SAFETY: the texts are constants, and nothing changes the struct.
unsafe impl Sync for Ended {}

static ENDED: Ended = Ended(NOTHING);

const NOTHING: ashore_error = ashore_error {
    kind: ashore_status::ASHORE_OK as i32,
    rank: -1,
    step: -1,
    text: c"".as_ptr(),
    tensor: ptr::null(),
    path: ptr::null(),
};

thread_local! {
    static LAST: RefCell<Last> = const { RefCell::new(Last { told: NOTHING, _texts: [None, None, None] }) };
}

/// An error of the library, and the tensor that the error concerns.
#[derive(Debug)]
pub struct Failed {
    error: Error,
    tensor: Option<String>,
}

pub type Result<T> = std::result::Result<T, Failed>;

impl Failed {
    /// Makes the error of a wrong request.
    pub fn invalid(text: impl Into<String>) -> Self {
        Error::new(ErrorKind::Invalid, text).into()
    }

    /// Changes the text.
    pub fn with_text(self, change: impl FnOnce(&str) -> String) -> Self {
        let error = Error::new(self.error.kind(), change(self.error.message()));
        Self { error, ..self }
    }

    /// Adds the tensor, unless a tensor is known already.
    pub fn of_tensor(mut self, name: &str) -> Self {
        self.tensor.get_or_insert_with(|| name.to_owned());
        self
    }
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        let tensor = named(error.message());
        Self { error, tensor }
    }
}

/// Finds the tensor name in a message, as the library's messages write it: `tensor="weights"`.
fn named(message: &str) -> Option<String> {
    let (_, rest) = message.split_once("tensor=\"")?;
    let (mut name, mut letters) = (String::new(), rest.chars());
    loop {
        match letters.next()? {
            '"' => return Some(name),
            // Names with other escaped letters appear only in the text.
            '\\' => name.push(letters.next().filter(|letter| matches!(letter, '"' | '\\' | '\''))?),
            letter => name.push(letter),
        }
    }
}

/// Makes a text for C. Zero bytes are replaced, because the text cannot contain them.
pub fn text(text: &str) -> CString {
    CString::new(text.replace('\0', "\u{fffd}")).unwrap_or_default()
}

/// Runs the body of a function. Returns its status, or the status of its error, which becomes the thread's
/// last error. A panic does not leave this function.
pub fn run(body: impl FnOnce() -> Result<ashore_status>) -> i32 {
    let failed = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(status)) => return status as i32,
        Ok(Err(failed)) => failed,
        Err(panic) => Error::new(ErrorKind::Internal, format!("a panic in the library: {}", said(&*panic))).into(),
    };
    let Failed { error, tensor } = failed;
    let kind = ashore_status::from(error.kind()) as i32;
    let rank = error.rank().map_or(-1, |rank| i32::try_from(rank).unwrap_or(-1));
    let step = error.step().map_or(-1, |step| i64::try_from(step).unwrap_or(-1));
    let texts = [
        Some(text(&format!("{error:#}"))),
        tensor.map(|tensor| text(&tensor)),
        error.path().map(|path| text(&path.to_string_lossy())),
    ];
    let at = texts.each_ref().map(|text| text.as_ref().map_or(ptr::null(), |text| text.as_ptr()));
    let told = ashore_error { kind, rank, step, text: at[0], tensor: at[1], path: at[2] };
    // A thread that is ending can no longer store a last error. It still gets the status.
    let _ = LAST.try_with(|last| *last.borrow_mut() = Last { told, _texts: texts });
    kind
}

fn said(panic: &(dyn Any + Send)) -> &str {
    let owned = || panic.downcast_ref::<String>().map(String::as_str);
    panic.downcast_ref::<&str>().copied().or_else(owned).unwrap_or("without a text")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_an_internal_error_with_its_text() {
        assert_eq!(run(|| panic!("at the disco")), ashore_status::ASHORE_INTERNAL as i32);
        // SAFETY: the pointer is never null, and belongs to this thread.
        let text = unsafe { std::ffi::CStr::from_ptr((*ashore_last_error()).text) };
        assert_eq!(text.to_str().unwrap(), "a panic in the library: at the disco");
    }

    #[test]
    fn tensors_are_named_as_messages_name_them() {
        assert_eq!(named(r#"wrong tensor="a.\"b\"\\" shape=[2]"#).unwrap(), r#"a."b"\"#);
        assert_eq!(named(r#"wrong tensor="a\n""#), None);
        assert_eq!(named("wrong"), None);
    }
}
