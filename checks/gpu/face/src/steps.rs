//! Reads steps back.
//!
//! # Safety argument
//! That of the crate.

use crate::{face, given_back, held, invalid, text};
use ashore::{Catalog, Checkpoint, Targets};
use std::ffi::c_char;

face! {
    /// Opens `step` under the directory `root`.
    fn face_step(root: *const c_char, step: u64) -> *mut Checkpoint = std::ptr::null_mut(); {
        // SAFETY: the argument of the crate.
        let root = unsafe { text(root)? };
        Ok(Box::into_raw(Box::new(Catalog::open(root)?.checkpoint(step)?)))
    }

    /// Reads a tensor of `bytes` bytes to the host, and checks it against its digests.
    fn face_read(step: *const Checkpoint, name: *const c_char, to: *mut u8, bytes: u64) -> i32 = -1; {
        // SAFETY: the argument of the crate.
        let (step, name) = unsafe { (held(step)?, text(name)?) };
        if step.tensor(name)?.bytes != bytes || (to.is_null() && bytes > 0) {
            return Err(invalid("a tensor has another length, or there is no memory for it"));
        }
        if bytes == 0 {
            return Ok(0);
        }
        // SAFETY: the program's to be written, `bytes` long.
        let to = unsafe { std::slice::from_raw_parts_mut(to, bytes as usize) };
        step.read_into(Targets::new().bytes(name, to)).map(|()| 0)
    }

    /// Gives back a step.
    fn face_drop_step(step: *mut Checkpoint) -> i32 = -1; {
        // SAFETY: the argument of the crate.
        drop(unsafe { given_back(step)? });
        Ok(0)
    }
}
