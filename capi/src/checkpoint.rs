//! Opens and reads checkpoints.
//!
//! # Safety argument
//! The safety argument of the crate applies. A text that is freed was made here by `CString::into_raw`.
#![expect(unsafe_code, reason = "exported names, and the program's pointers; argument above")]

use crate::failure::{Result, run, text};
use crate::handles::{self, Opened, ashore_checkpoint};
use crate::status::ashore_status::ASHORE_OK;
use crate::tensor::{self, ashore_tensor};
use crate::{given, log};
use ashore_core::internal::state::encode_value;
use ashore_core::{Checkpoint, DeviceChoice};
use serde_json::{Map, Value, json};
use std::ffi::{CString, c_char};
use std::ptr;

/// Opens the step in the directory `path`. No executor is needed.
// SAFETY: the name starts with the prefix of this library.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ashore_checkpoint_open(path: *const c_char, checkpoint: *mut *mut ashore_checkpoint) -> i32 {
    run(|| {
        // SAFETY: see the safety argument of the crate.
        let checkpoint = unsafe { given::result("checkpoint", checkpoint)? };
        *checkpoint = ptr::null_mut();
        log::listen();
        // SAFETY: see the safety argument of the crate.
        let opened = Checkpoint::open(unsafe { given::text("path", path)? })?;
        *checkpoint = handles::give(Opened { checkpoint: opened, lent: false }, 0);
        Ok(ASHORE_OK)
    })
}

/// Returns the step of a checkpoint, or -1 for an invalid handle.
// SAFETY: the name starts with the prefix of this library.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ashore_checkpoint_step(checkpoint: *mut ashore_checkpoint) -> i64 {
    let mut step = -1;
    run(|| {
        step = i64::try_from(handles::find(checkpoint)?.step()).unwrap_or(i64::MAX);
        Ok(ASHORE_OK)
    });
    step
}

/// Fills the memory of `count` targets in parallel, and compares every byte with its digest. A target with
/// `offset` gets the box of `shape` at that offset; other targets get the whole tensor. Dtype and shape must
/// match the saved ones: nothing is converted. Nothing is written unless every target fits. Packed targets
/// that overlap are refused. The result is undefined for targets that overlap because of their strides.
/// After a failure to read, the content of the targets is undefined. After ASHORE_DEADLINE copies to device
/// memory may still be under way: keep that memory until the device has ended its work.
// SAFETY: the name starts with the prefix of this library.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ashore_restore(
    checkpoint: *mut ashore_checkpoint,
    targets: *const ashore_tensor,
    count: usize,
) -> i32 {
    run(|| {
        let checkpoint = handles::find(checkpoint)?;
        // SAFETY: see the safety argument of the crate.
        let targets = unsafe { given::array("targets", targets, count)? };
        // SAFETY: see the safety argument of the crate.
        unsafe {
            match targets.iter().find(|target| target.on_device != 0) {
                Some(first) if !checkpoint.lent => {
                    let on_device = (**checkpoint).clone().with_device(DeviceChoice::Cuda(first.stream.device))?;
                    tensor::restore(&on_device, targets)?;
                }
                _ => tensor::restore(&checkpoint, targets)?,
            }
        }
        Ok(ASHORE_OK)
    })
}

/// Makes the JSON text of the value `name`, or, if `name` is null, of the checkpoint: {"step": 7, "attempt":
/// "...", "path": "...", "ranks": 1, "tensors": [{"name": "w", "dtype": "F32", "shape": [2, 3], "bytes": 24},
/// ...], "values": {...}, "metadata": {...}}. Values that another language has saved and that JSON cannot
/// express, such as NaN or a tuple, have the tags of docs/format.md: {"$f64": "7ff8000000000000"}. Free the
/// text with ashore_text_free. `json` is null after a failure.
// SAFETY: the name starts with the prefix of this library.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ashore_checkpoint_json(
    checkpoint: *mut ashore_checkpoint,
    name: *const c_char,
    json: *mut *mut c_char,
) -> i32 {
    run(|| {
        // SAFETY: see the safety argument of the crate.
        let json = unsafe { given::result("json", json)? };
        *json = ptr::null_mut();
        let checkpoint = handles::find(checkpoint)?;
        let found = if name.is_null() {
            listed(&checkpoint)?
        } else {
            // SAFETY: see the safety argument of the crate.
            let name = unsafe { given::text("name", name)? };
            exact(&checkpoint.value(name)?, checkpoint.value(name))?
        };
        *json = text(&found.to_string()).into_raw();
        Ok(ASHORE_OK)
    })
}

/// Makes the JSON text of the value `name` that the rank `rank` saved for itself. Free the text with
/// ashore_text_free.
// SAFETY: the name starts with the prefix of this library.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ashore_checkpoint_rank_json(
    checkpoint: *mut ashore_checkpoint,
    rank: u32,
    name: *const c_char,
    json: *mut *mut c_char,
) -> i32 {
    run(|| {
        // SAFETY: see the safety argument of the crate.
        let json = unsafe { given::result("json", json)? };
        *json = ptr::null_mut();
        // SAFETY: see the safety argument of the crate.
        let name = unsafe { given::text("name", name)? };
        let checkpoint = handles::find(checkpoint)?;
        let found = exact(&checkpoint.rank_value(rank, name)?, checkpoint.rank_value(rank, name))?;
        *json = text(&found.to_string()).into_raw();
        Ok(ASHORE_OK)
    })
}

/// Returns a value as plain JSON. A value of a kind that JSON lacks has the form in which the step stores it.
fn exact(kinds: &ashore_core::Value, plain: ashore_core::Result<Value>) -> Result<Value> {
    let stored = encode_value(kinds)?;
    Ok(plain.ok().filter(|plain| encode_value(plain).is_ok_and(|again| again == stored)).unwrap_or(stored))
}

fn listed(checkpoint: &Checkpoint) -> Result<Value> {
    let (mut values, mut metadata) = (Map::new(), Map::new());
    for name in checkpoint.value_names() {
        values.insert(name.to_owned(), exact(&checkpoint.value(name)?, checkpoint.value(name))?);
    }
    for name in checkpoint.metadata_keys() {
        metadata.insert(name.to_owned(), exact(&checkpoint.metadata(name)?, checkpoint.metadata(name))?);
    }
    let tensors: Vec<Value> = checkpoint
        .tensors()?
        .map(|t| json!({ "name": t.name, "dtype": t.dtype, "shape": t.shape, "bytes": t.bytes }))
        .collect();
    Ok(json!({
        "step": checkpoint.step(),
        "attempt": checkpoint.attempt().to_string(),
        "path": checkpoint.path().to_string_lossy(),
        "ranks": checkpoint.world(),
        "tensors": tensors,
        "values": values,
        "metadata": metadata,
    }))
}

/// Frees a text that a function has made. Does nothing for null.
// SAFETY: the name starts with the prefix of this library.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ashore_text_free(text: *mut c_char) {
    if !text.is_null() {
        // SAFETY: made by `CString::into_raw` here, and freed once.
        drop(unsafe { CString::from_raw(text) });
    }
}

/// Frees the handle of a checkpoint. Does nothing for null or an invalid handle.
// SAFETY: the name starts with the prefix of this library.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ashore_checkpoint_free(checkpoint: *mut ashore_checkpoint) {
    handles::free(checkpoint);
}
