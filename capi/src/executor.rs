//! Opens and closes executors, calls fences, and reports on executors.
//!
//! # Safety argument
//! The safety argument of the crate applies.
#![expect(unsafe_code, reason = "exported names, and the program's pointers; argument above")]

use crate::failure::{Failed, Result, run, text};
use crate::handles::{self, Opened, ashore_checkpoint, ashore_executor};
use crate::ranks::ashore_ranks;
use crate::status::ashore_status::{self, ASHORE_OK};
use crate::tensor::{self, ashore_stream};
use crate::{given, log, tiers};
use ashore_core::catalog::Problem;
use ashore_core::internal::executor::is_own_thread;
use ashore_core::tiers::Tier;
use ashore_core::{Builder, CheckpointExecutor, Error, ErrorKind, Settings};
use serde_json::{Value, json};
use std::ffi::c_char;
use std::ptr;
use std::time::Duration;

/// Opens an executor over the directory `root`, creates the directory if it is missing, and sweeps dead
/// attempts of earlier processes. `settings` is a JSON object of the members of `Settings` in the Rust
/// library, with times in seconds, such as {"arena": 268435456, "keep_last": 3, "save_timeout": 600}; null is
/// {}. Its member `tiers` lists the roots behind this one, nearest first, to which durable steps are copied:
/// [{"root": "s3://bucket/run", "name": "store", "keep_last": 20}]. `ranks` is null for one rank, and is read
/// only within the call. `executor` is null after a failure. Fails with ASHORE_INVALID if a launcher has
/// started several ranks and `ranks` is null.
// SAFETY: the name starts with the prefix of this library.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ashore_open(
    root: *const c_char,
    settings: *const c_char,
    ranks: *const ashore_ranks,
    executor: *mut *mut ashore_executor,
) -> i32 {
    run(|| {
        log::listen();
        // SAFETY: see the safety argument of the crate.
        let ranks = unsafe { ranks.as_ref() };
        let released = ranks.and_then(ashore_ranks::released);
        // SAFETY: see the safety argument of the crate.
        let executor = unsafe { given::result("executor", executor)? };
        *executor = ptr::null_mut();
        // SAFETY: see the safety argument of the crate.
        let root = unsafe { given::text("root", root)? };
        let mut builder = CheckpointExecutor::builder(root);
        if !settings.is_null() {
            // SAFETY: see the safety argument of the crate.
            let (settings, tiers) = parsed(unsafe { given::text("settings", settings)? })?;
            builder = tiers.into_iter().fold(builder.settings(settings), Builder::tier);
        }
        if let Some(ranks) = ranks {
            // SAFETY: see the safety argument of the crate.
            builder = unsafe { ranks.of(builder, released)? };
        }
        *executor = handles::give::<ashore_executor>(builder.build()?, 0);
        Ok(ASHORE_OK)
    })
}

/// Parses settings from their JSON text, and separates the tiers from them.
fn parsed(text: &str) -> Result<(Settings, Vec<Tier>)> {
    const TIMES: [&str; 4] = ["abandoned_after", "save_timeout", "fence_timeout", "shutdown_timeout"];
    let mut settings = given::json("argument", "settings", text)?;
    if !settings.is_object() {
        return Err(Failed::invalid(format!("settings are a JSON object settings={text:?}")));
    }
    let tiers = tiers::taken(&mut settings)?;
    for name in TIMES {
        let Some(value) = settings.get_mut(name) else { continue };
        if let Some(number) = value.as_f64() {
            let time = given::seconds(number)
                .map_err(|_| Failed::invalid(format!("a time is a number of seconds from 0 {name}={number}")))?;
            *value = json!({ "secs": time.as_secs(), "nanos": time.subsec_nanos() });
        }
    }
    let settings = serde_json::from_value(settings)
        .map_err(|e| Error::new(ErrorKind::Invalid, "settings do not parse").with_source(e))?;
    Ok((settings, tiers))
}

/// Accepts no more saves, waits at most `seconds` for the saves under way, and ends the threads. Afterwards
/// the handle is free, even if the call fails; a close in the `done` of `ashore_save_then` is refused, and
/// frees nothing. Does nothing for null. Returns the first error of a save that no call has returned, or
/// ASHORE_DEADLINE if saves had not ended: these saves have failed. Handles of the executor's saves and
/// checkpoints stay valid, and checkpoints can still be read. The number of such handles is logged.
// SAFETY: the name starts with the prefix of this library.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ashore_close(executor: *mut ashore_executor, seconds: f64) -> i32 {
    run(|| {
        if executor.is_null() {
            return Ok(ASHORE_OK);
        }
        let found = handles::find(executor)?;
        if is_own_thread(&found) {
            // Refused: the handle stays, so that another thread can close it and wait for its saves.
            found.shutdown(Duration::ZERO)?;
        }
        drop(found);
        // Free the handle even if `seconds` is invalid.
        let taken = handles::take(executor)?;
        let ended = given::seconds(seconds).and_then(|time| Ok(taken.shutdown(time)?));
        let (saves, checkpoints) = handles::alive(handles::number(executor));
        if (saves, checkpoints) != (0, 0) {
            tracing::warn!(saves, checkpoints, "handles of an executor that was closed are not freed");
        }
        drop(taken);
        ended.map(|()| ASHORE_OK)
    })
}

/// Returns when nothing will read the tensors of all saves so far any more: then the program may write them.
/// With `count` streams, the call makes these streams wait on the GPU instead, and returns as soon as that
/// wait is queued: then the program may write GPU tensors in these streams, and host tensors at once. Takes
/// some nanoseconds if no save is reading.
// SAFETY: the name starts with the prefix of this library.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ashore_fence(
    executor: *mut ashore_executor,
    streams: *const ashore_stream,
    count: usize,
) -> i32 {
    run(|| {
        let executor = handles::find(executor)?;
        // SAFETY: see the safety argument of the crate.
        let on = unsafe { given::array("streams", streams, count)? };
        if on.is_empty() {
            executor.fence()?
        } else {
            executor.fence_on(&tensor::streams(on))?
        }
        Ok(ASHORE_OK)
    })
}

/// Opens the newest durable step under the root. If there is none, `checkpoint` is null and the status
/// ASHORE_OK.
// SAFETY: the name starts with the prefix of this library.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ashore_latest(executor: *mut ashore_executor, checkpoint: *mut *mut ashore_checkpoint) -> i32 {
    run(|| {
        // SAFETY: see the safety argument of the crate.
        let checkpoint = unsafe { given::result("checkpoint", checkpoint)? };
        *checkpoint = ptr::null_mut();
        if let Some(newest) = handles::find(executor)?.latest()? {
            *checkpoint = handles::give(Opened { checkpoint: newest, lent: true }, handles::number(executor));
        }
        Ok(ASHORE_OK)
    })
}

/// Opens the newest step whose bytes are all as written. Skips damaged steps and steps marked bad. Reads each
/// examined step completely. `skipped` may be null; otherwise it receives the JSON text of the newer steps,
/// newest first: [{"step": 8, "path": "...", "kind": 7, "text": "..."}, ...], where `kind` is an
/// `ashore_status`. Free the text with ashore_text_free. Both results are null after a failure. If there is
/// no step, `checkpoint` is null and the status ASHORE_OK. If there are steps and none is sound, the call
/// fails with the damage of the newest.
// SAFETY: the name starts with the prefix of this library.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ashore_latest_valid(
    executor: *mut ashore_executor,
    checkpoint: *mut *mut ashore_checkpoint,
    skipped: *mut *mut c_char,
) -> i32 {
    run(|| {
        // SAFETY: see the safety argument of the crate.
        let (checkpoint, mut skipped) = unsafe { (given::result("checkpoint", checkpoint)?, skipped.as_mut()) };
        *checkpoint = ptr::null_mut();
        if let Some(skipped) = &mut skipped {
            **skipped = ptr::null_mut();
        }
        let found = handles::find(executor)?.latest_valid()?;
        if let Some(skipped) = skipped {
            let problems = found.iter().flat_map(|found| &found.skipped).map(problem).collect();
            *skipped = text(&Value::Array(problems).to_string()).into_raw();
        }
        if let Some(found) = found {
            *checkpoint = handles::give(Opened { checkpoint: found.checkpoint, lent: true }, handles::number(executor));
        }
        Ok(ASHORE_OK)
    })
}

fn problem(problem: &Problem) -> Value {
    json!({
        "step": problem.step,
        "path": problem.path.to_string_lossy(),
        "kind": ashore_status::from(problem.error.kind()) as i32,
        "text": format!("{:#}", problem.error),
    })
}

/// Opens a step under the root. Fails with ASHORE_NOT_FOUND if the step does not exist.
// SAFETY: the name starts with the prefix of this library.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ashore_step(
    executor: *mut ashore_executor,
    step: u64,
    checkpoint: *mut *mut ashore_checkpoint,
) -> i32 {
    run(|| {
        // SAFETY: see the safety argument of the crate.
        let checkpoint = unsafe { given::result("checkpoint", checkpoint)? };
        *checkpoint = ptr::null_mut();
        let opened = Opened { checkpoint: handles::find(executor)?.checkpoint(step)?, lent: true };
        *checkpoint = handles::give(opened, handles::number(executor));
        Ok(ASHORE_OK)
    })
}

/// Makes a JSON object that describes an executor on this machine: its device and why it was chosen, its
/// arena, how it writes. Free the text with ashore_text_free.
// SAFETY: the name starts with the prefix of this library.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ashore_report(executor: *mut ashore_executor, json: *mut *mut c_char) -> i32 {
    run(|| {
        // SAFETY: see the safety argument of the crate.
        let json = unsafe { given::result("json", json)? };
        *json = ptr::null_mut();
        let executor = handles::find(executor)?;
        *json = text(&report(&executor).to_string()).into_raw();
        Ok(ASHORE_OK)
    })
}

/// Returns what was found, or the reason why it was not found.
fn or_why(found: std::result::Result<impl Into<Value>, String>) -> Value {
    found.map_or_else(Value::from, Into::into)
}

fn report(executor: &CheckpointExecutor) -> Value {
    let (device, arena) = (executor.device(), executor.arena().report());
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "device": device.name,
        "device_why": device.why,
        "gather": or_why(device.gather.clone()),
        "scratch": or_why(device.scratch.clone()),
        "memory_waits": or_why(device.memory_waits.clone()),
        "batch": or_why(device.batch.clone().map(|()| true)),
        "kernels": device.kernels,
        "engine": executor.engine(),
        "arena": arena.bytes,
        "slabs": arena.slabs,
        "huge_pages": arena.huge_pages,
        "pinned": or_why(arena.pinned.clone().map(|()| true)),
        "locked": or_why(arena.locked.clone().map(|()| true)),
    })
}
