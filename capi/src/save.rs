//! Begins saves, and reports how they end.
//!
//! # Safety argument
//! The safety argument of the crate applies.
#![expect(unsafe_code, reason = "exported names, and the program's pointers; argument above")]

use crate::callbacks::{self, Context};
use crate::failure::{Failed, Result, run, text};
use crate::given;
use crate::handles::{self, ashore_executor, ashore_save};
use crate::status::ashore_phase;
use crate::status::ashore_status::{self, ASHORE_OK, ASHORE_SKIPPED};
use crate::tensor::{self, ashore_tensor};
use ashore_core::{Error, ErrorKind, Outcome, SaveOptions, Snapshot, StateDict};
use std::ffi::{c_char, c_void};
use std::ptr;

/// A named value.
#[repr(C)]
pub struct ashore_value {
    /// The name of the value: not empty, utf-8.
    pub name: *const c_char,
    /// One JSON text. 64-bit integers and doubles are kept exactly. Longer integers are refused. NaN is not
    /// JSON, and is refused, too.
    pub json: *const c_char,
}

/// Another name of a tensor of the same save, such as the name of a tied weight. The bytes are written once,
/// and a restore finds them under both names. Dtype, shape and boxes are those of the holder.
#[repr(C)]
pub struct ashore_alias {
    /// The alias: not empty, utf-8, and not the name of a tensor.
    pub name: *const c_char,
    /// The name of the tensor that holds the bytes, or of an earlier alias of that tensor.
    pub holder: *const c_char,
}

/// Puts a tensor into files of its own kind, which later steps share as long as their bytes stay the same:
/// later steps clone or link these files instead of writing them.
#[repr(C)]
pub struct ashore_group {
    /// The name of the tensor, or an alias of it.
    pub name: *const c_char,
    /// Null: the tensor is frozen, which means it is not expected to change. Otherwise the group with which
    /// the tensor changes. Each group has files of its own.
    pub key: *const c_char,
}

/// Options of one save. Zero is the default of every member but `size`.
#[repr(C)]
pub struct ashore_save_options {
    /// sizeof(ashore_save_options)
    pub size: usize,
    /// Not 0: replace the step if it exists.
    pub overwrite: u32,
    /// Not 0: capture every tensor within the call, for programs that cannot call a fence.
    pub at_save: u32,
    /// The save fails if it is not durable this many seconds after the call. 0: the setting `save_timeout`
    /// applies.
    pub deadline_seconds: f64,
    /// Values in addition to the tensors: learning rates, states of random generators, positions in data.
    pub values: *const ashore_value,
    /// Notes of the user, which a restore does not need.
    pub metadata: *const ashore_value,
    pub value_count: usize,
    pub metadata_count: usize,
    /// Values of this rank alone. If one process saves, the same as `values`.
    pub rank_values: *const ashore_value,
    pub rank_value_count: usize,
    /// More names of tensors.
    pub aliases: *const ashore_alias,
    pub alias_count: usize,
    /// Tensors that are frozen, or in groups.
    pub groups: *const ashore_group,
    pub group_count: usize,
}

impl Default for ashore_save_options {
    fn default() -> Self {
        Self {
            size: 0,
            overwrite: 0,
            at_save: 0,
            deadline_seconds: 0.0,
            values: ptr::null(),
            metadata: ptr::null(),
            value_count: 0,
            metadata_count: 0,
            rank_values: ptr::null(),
            rank_value_count: 0,
            aliases: ptr::null(),
            alias_count: 0,
            groups: ptr::null(),
            group_count: 0,
        }
    }
}

// SAFETY: the size is first, and every member may be zero.
unsafe impl given::Sized for ashore_save_options {
    const WHAT: &'static str = "ashore_save_options";
}

/// The cost of a durable save. Times are seconds since the call of the save.
#[repr(C)]
#[derive(Default)]
pub struct ashore_committed {
    /// sizeof(ashore_committed), set by the caller. Members beyond it are not written.
    pub size: usize,
    /// Bytes of tensors.
    pub bytes: u64,
    /// How long the call and fences blocked their callers.
    pub blocked: f64,
    /// When the last read of the program's memory ended.
    pub staged: f64,
    /// When the step became durable.
    pub durable: f64,
    /// Time from the last byte written until the step was durable: fsyncs, and the publish.
    pub tail: f64,
    /// How many small tensors the call did not capture, because the budget was used up.
    pub over_budget: u64,
    /// How many chunks a fence has copied on the GPU.
    pub late_chunks: u64,
    /// Bytes of tensor files that were written.
    pub written_bytes: u64,
    /// Bytes of tensor files that are clones of files of an older step.
    pub cloned_bytes: u64,
    /// Bytes of tensor files that are files of an older step, under a second name.
    pub linked_bytes: u64,
    /// How many unchanged files were written, because the file system refused to clone or link them.
    pub refused_files: u64,
}

// SAFETY: the size is first, and every member may be zero.
unsafe impl given::Sized for ashore_committed {
    const WHAT: &'static str = "ashore_committed";
}

/// The progress of a save, in bytes.
#[repr(C)]
pub struct ashore_progress {
    /// Bytes of tensors to save.
    pub bytes: u64,
    /// Bytes copied so far, including file headers.
    pub staged: u64,
    /// Bytes written so far, including file headers.
    pub written: u64,
    /// An `ashore_phase`.
    pub phase: i32,
}

/// Begins a save and returns. `tensors` and `options` are read only within the call. Afterwards only the
/// memory of the tensors is needed, each until its release. Each tensor is released once, whatever the
/// outcome of the save. `options` may be null. `save` may be null: then the save goes on alone, and the next
/// call of ashore_save_begin, or ashore_close, returns its failure. These calls also return the failure of a
/// save whose handle was freed before a call had returned it.
// SAFETY: the name starts with the prefix of this library.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ashore_save_begin(
    executor: *mut ashore_executor,
    step: u64,
    tensors: *const ashore_tensor,
    count: usize,
    options: *const ashore_save_options,
    save: *mut *mut ashore_save,
) -> i32 {
    run(|| {
        // Do this first, so that each tensor is released even if another argument is wrong.
        // SAFETY: see the safety argument of the crate.
        let tensors = unsafe { given::array("tensors", tensors, count)? };
        let keeps = tensors.iter().map(ashore_tensor::released).collect();
        // SAFETY: see the safety argument of the crate.
        let save = unsafe { save.as_mut() };
        let save = save.map(|save| {
            *save = ptr::null_mut();
            save
        });
        let found = handles::find(executor)?;
        // SAFETY: see the safety argument of the crate.
        let mut state = unsafe { tensor::state(tensors, keeps)? };
        // SAFETY: see the safety argument of the crate.
        let options = unsafe { prepared(given::sized(options)?, &mut state)? };
        let begun = found.save_with(step, state, options)?;
        if let Some(save) = save {
            *save = handles::give(begun, handles::number(executor));
        }
        Ok(ASHORE_OK)
    })
}

/// Puts the values, aliases and groups of the options into the state dict.
///
/// # Safety
/// The safety argument of the crate applies.
unsafe fn prepared(given: ashore_save_options, state: &mut StateDict<'static>) -> Result<SaveOptions> {
    type Put = for<'s> fn(&'s mut StateDict<'static>, &str, &serde_json::Value) -> ashore_core::Result<()>;
    let lists: [(&str, *const ashore_value, usize, Put); 3] = [
        ("value", given.values, given.value_count, |state, name, value| state.value(name, value).map(drop)),
        ("metadata", given.metadata, given.metadata_count, |state, name, value| state.metadata(name, value).map(drop)),
        ("value", given.rank_values, given.rank_value_count, |state, name, value| {
            state.rank_value(name, value).map(drop)
        }),
    ];
    for (what, at, count, put) in lists {
        // SAFETY: the caller guarantees this.
        for value in unsafe { given::array(what, at, count)? } {
            // SAFETY: the caller guarantees this.
            let name = unsafe { given::text("name", value.name)? };
            // SAFETY: the caller guarantees this.
            let json = unsafe { given::text(name, value.json)? };
            put(state, name, &given::json(what, name, json)?)?;
        }
    }
    // SAFETY: the caller guarantees this.
    for alias in unsafe { given::array("aliases", given.aliases, given.alias_count)? } {
        // SAFETY: the caller guarantees this.
        let (name, holder) = unsafe { (given::text("name", alias.name)?, given::text("holder", alias.holder)?) };
        state.alias(name, holder)?;
    }
    // SAFETY: the caller guarantees this.
    for group in unsafe { given::array("groups", given.groups, given.group_count)? } {
        // SAFETY: the caller guarantees this.
        let name = unsafe { given::text("name", group.name)? };
        if group.key.is_null() {
            state.frozen(name)?;
        } else {
            // SAFETY: the caller guarantees this.
            state.group(name, unsafe { given::text("key", group.key)? })?;
        }
    }
    let mut options = SaveOptions::default();
    options.overwrite = given.overwrite != 0;
    if given.at_save != 0 {
        options.snapshot = Snapshot::AtSave;
    }
    if given.deadline_seconds != 0.0 {
        options.timeout = Some(given::seconds(given.deadline_seconds)?);
    }
    Ok(options)
}

/// Waits until nothing will read the tensors of a save any more, and each was released: then the program may
/// write them. With 0 seconds the call only asks: ASHORE_DEADLINE means not yet. Returns the failure of the
/// save if it has failed; then the program may write the tensors, too. That failure can be ASHORE_DEADLINE,
/// for a save that missed its own deadline: see `ashore_save_wait`.
// SAFETY: the name starts with the prefix of this library.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ashore_save_staged(save: *mut ashore_save, seconds: f64) -> i32 {
    run(|| {
        handles::find(save)?.staged().wait(given::seconds(seconds)?)?;
        Ok(ASHORE_OK)
    })
}

/// Waits until a save is durable, or returns its failure. ASHORE_DEADLINE means that the save has not ended
/// and can be waited for again, or that it failed because it missed its own deadline: then the phase of
/// `ashore_save_progress` is ASHORE_PHASE_ENDED. `committed` may be null.
// SAFETY: the name starts with the prefix of this library.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ashore_save_wait(
    save: *mut ashore_save,
    seconds: f64,
    committed: *mut ashore_committed,
) -> i32 {
    run(|| {
        let Outcome::Durable(done) = handles::find(save)?.wait(given::seconds(seconds)?)? else {
            return Ok(ASHORE_SKIPPED);
        };
        let cost = ashore_committed {
            size: 0,
            bytes: done.bytes,
            blocked: done.blocked.as_secs_f64(),
            staged: done.staged.as_secs_f64(),
            durable: done.durable.as_secs_f64(),
            tail: done.tail.as_secs_f64(),
            over_budget: done.over_budget as u64,
            late_chunks: done.late_chunks as u64,
            written_bytes: done.written_bytes,
            cloned_bytes: done.cloned_bytes,
            linked_bytes: done.linked_bytes,
            refused_files: done.refused_files as u64,
        };
        // SAFETY: see the safety argument of the crate.
        unsafe { given::write_sized(committed, &cost)? };
        Ok(ASHORE_OK)
    })
}

/// Calls `done` once, when the save has ended, or at once within this call if it has ended already. `kind` is
/// an `ashore_status`. `error` is its text, valid only within the call, and null for ASHORE_OK and
/// ASHORE_SKIPPED. `done` must return soon, because other saves wait meanwhile. It may begin a save and free
/// handles. A wait for the same executor, a fence and a close are refused in it.
// SAFETY: the name starts with the prefix of this library.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ashore_save_then(
    save: *mut ashore_save,
    done: Option<unsafe extern "C-unwind" fn(context: *mut c_void, kind: i32, error: *const c_char)>,
    context: *mut c_void,
) -> i32 {
    run(|| {
        let save = handles::find(save)?;
        let done = done.ok_or_else(|| Failed::invalid("a function is null function=done"))?;
        let context = Context(context);
        save.on_done(move |ended| {
            let context = context;
            let (kind, error) = match ended {
                Ok(Outcome::Durable(_)) => (ASHORE_OK, None),
                Ok(_) => (ASHORE_SKIPPED, None),
                Err(error) => (ashore_status::from(error.kind()), Some(text(&format!("{error:#}")))),
            };
            let error = error.as_ref().map_or(ptr::null(), |error| error.as_ptr());
            // SAFETY: the program's function and context.
            unsafe { callbacks::done(done, context.0, kind as i32, error) }
        });
        Ok(ASHORE_OK)
    })
}

/// Reports the progress of a save.
// SAFETY: the name starts with the prefix of this library.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ashore_save_progress(save: *mut ashore_save, progress: *mut ashore_progress) -> i32 {
    run(|| {
        let now = handles::find(save)?.progress();
        // SAFETY: see the safety argument of the crate.
        let progress = unsafe { given::result("progress", progress)? };
        let phase = ashore_phase::from(now.phase) as i32;
        *progress = ashore_progress { bytes: now.bytes, staged: now.staged, written: now.written, phase };
        Ok(ASHORE_OK)
    })
}

/// Cancels a save, which ends as ASHORE_CANCELLED at once. The program may write its tensors when
/// ashore_save_staged returns. ASHORE_CONFLICT means that it is too late: the save has ended or is being
/// published.
// SAFETY: the name starts with the prefix of this library.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ashore_save_cancel(save: *mut ashore_save) -> i32 {
    run(|| {
        let save = handles::find(save)?;
        if save.cancel() {
            return Ok(ASHORE_OK);
        }
        let late =
            Error::new(ErrorKind::Conflict, "it is too late to cancel: the save has ended or is being published");
        Err(late.with_step(save.step()).into())
    })
}

/// Frees the handle of a save, which goes on. Does nothing for null or an invalid handle.
// SAFETY: the name starts with the prefix of this library.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ashore_save_free(save: *mut ashore_save) {
    handles::free(save);
}
