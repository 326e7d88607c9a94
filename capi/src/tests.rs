//! Calls the exported functions as a program does. `capi/tests` has the programs in C and C++.
#![expect(unsafe_code, reason = "calls of functions that take pointers to what the test owns")]

use crate::checkpoint::*;
use crate::executor::*;
use crate::failure::*;
use crate::handles::*;
use crate::save::*;
use crate::status::ashore_dtype::*;
use crate::status::ashore_status::{self, *};
use crate::tensor::*;
use crate::tiers::*;
use std::ffi::{CStr, CString, c_char, c_void};
use std::path::Path;
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicU32, Ordering};

const SETTINGS: &CStr = c"{\"arena\": 2097152, \"chunk\": 262144, \"device\": \"host\", \"save_timeout\": 60.5}";

/// Checks a status; returns the text of the last failure.
#[track_caller]
fn expect(status: i32, wanted: ashore_status) -> String {
    // SAFETY: the pointer is never null, and belongs to this thread.
    let text = unsafe { CStr::from_ptr((*ashore_last_error()).text) }.to_string_lossy().into_owned();
    assert_eq!(status, wanted as i32, "{text}");
    text
}

fn opened(root: &Path) -> *mut ashore_executor {
    let (mut executor, root) = (null_mut(), CString::new(root.to_str().unwrap()).unwrap());
    // SAFETY: texts, and a place for the handle.
    expect(unsafe { ashore_open(root.as_ptr(), SETTINGS.as_ptr(), null(), &mut executor) }, ASHORE_OK);
    executor
}

// SAFETY: called with the context of a tensor.
unsafe extern "C-unwind" fn count(counter: *mut c_void) {
    // SAFETY: the context of every tensor here is a counter that outlives it.
    unsafe { &*counter.cast::<AtomicU32>() }.fetch_add(1, Ordering::AcqRel);
}

fn told(name: &CStr, data: &mut [f32], shape: &[i64], counter: &AtomicU32) -> ashore_tensor {
    ashore_tensor {
        name: name.as_ptr(),
        data: data.as_mut_ptr().cast(),
        shape: shape.as_ptr(),
        strides: null(),
        global_shape: null(),
        offset: null(),
        dims: shape.len() as u32,
        dtype: ASHORE_F32 as i32,
        on_device: 0,
        capture: 0,
        stream: ashore_stream { handle: null_mut(), device: 0 },
        release: Some(count),
        context: (&raw const *counter).cast_mut().cast(),
    }
}

#[test]
fn a_step_is_saved_and_restored_and_every_tensor_is_released_once() {
    let (root, counter) = (tempfile::tempdir().unwrap(), AtomicU32::new(0));
    let (mut data, shape) = (vec![1.5_f32; 6], [2, 3]);
    let (w, v) = (told(c"w", &mut data, &shape, &counter), told(c"w", &mut data.clone(), &shape, &counter));
    let executor = opened(root.path());
    let (mut save, mut checkpoint, mut json) = (null_mut(), null_mut(), null_mut());
    let value = ashore_value { name: c"lr".as_ptr(), json: c"[0.1, 18446744073709551615]".as_ptr() };
    let options = ashore_save_options {
        size: size_of::<ashore_save_options>(),
        values: &value,
        value_count: 1,
        ..ashore_save_options::default()
    };
    let mut cost = ashore_committed { size: size_of::<ashore_committed>(), ..ashore_committed::default() };
    // SAFETY: everything that is pointed to outlives the calls, and the tensors their release.
    unsafe {
        // Two tensors of one name: refused, and both are released.
        let both = [w, v];
        let text = expect(ashore_save_begin(executor, 1, both.as_ptr(), 2, null(), &mut save), ASHORE_INVALID);
        assert!(text.contains("two tensors have the same name"), "{text}");
        assert_eq!((counter.load(Ordering::Acquire), save.is_null()), (2, true));

        expect(ashore_save_begin(executor, 1, both.as_ptr(), 1, &options, &mut save), ASHORE_OK);
        expect(ashore_fence(executor, null(), 0), ASHORE_OK);
        assert_eq!(counter.load(Ordering::Acquire), 3);
        expect(ashore_save_wait(save, 60.0, &mut cost), ASHORE_OK);
        assert_eq!(cost.bytes, 24);
        ashore_save_free(save);
        expect(ashore_latest(executor, &mut checkpoint), ASHORE_OK);
        expect(ashore_close(executor, 60.0), ASHORE_OK);

        data.fill(0.0);
        let target = told(c"w", &mut data, &shape, &counter);
        expect(ashore_restore(checkpoint, &target, 1), ASHORE_OK);
        expect(ashore_checkpoint_json(checkpoint, c"lr".as_ptr(), &mut json), ASHORE_OK);
        assert_eq!(CStr::from_ptr(json), c"[0.1,18446744073709551615]");
        ashore_text_free(json);
        ashore_checkpoint_free(checkpoint);
    }
    assert_eq!((data[5], counter.load(Ordering::Acquire)), (1.5, 3));
}

#[test]
fn a_tier_has_a_wait_and_a_report_of_its_own() {
    let (root, tier, counter) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), AtomicU32::new(0));
    let (mut data, shape) = (vec![1.5_f32; 6], [6]);
    let w = told(c"w", &mut data, &shape, &counter);
    let (at, behind) = (root.path().to_str().unwrap(), tier.path().to_str().unwrap());
    let at = CString::new(at).unwrap();
    let settings = |more: &str| {
        let tiers = format!(r#"[{{"root": {behind:?}, "name": "shared"{more}}}]"#);
        CString::new(format!(r#"{{"arena": 2097152, "chunk": 262144, "device": "host", "tiers": {tiers}}}"#)).unwrap()
    };
    let (mut executor, mut save, mut json) = (null_mut(), null_mut(), null_mut());
    // SAFETY: everything that is pointed to outlives the calls, and the tensor its release.
    unsafe {
        let wrong = settings(r#", "keep": 1"#);
        let text = expect(ashore_open(at.as_ptr(), wrong.as_ptr(), null(), &mut executor), ASHORE_INVALID);
        assert!(text.contains("tiers") && text.contains("keep"), "{text}");
        let good = settings(r#", "keep_last": 2"#);
        expect(ashore_open(at.as_ptr(), good.as_ptr(), null(), &mut executor), ASHORE_OK);
        expect(ashore_save_begin(executor, 1, &w, 1, null(), &mut save), ASHORE_OK);
        let text = expect(ashore_save_durable_in(save, c"other".as_ptr(), 60.0), ASHORE_INVALID);
        assert!(text.contains("other"), "{text}");
        expect(ashore_save_durable_in(save, null(), 60.0), ASHORE_INVALID);
        expect(ashore_save_durable_in(save, c"shared".as_ptr(), 60.0), ASHORE_OK);
        assert!(tier.path().join("step-00000001/manifest.json").exists());
        expect(ashore_tiers(executor, &mut json), ASHORE_OK);
        let report: serde_json::Value = serde_json::from_str(CStr::from_ptr(json).to_str().unwrap()).unwrap();
        let (tier, state, newest) = (&report[0]["tier"], &report[0]["state"], &report[0]["newest"]);
        assert!(tier == "shared" && state == "ours" && *newest == 1, "{report}");
        ashore_text_free(json);
        ashore_save_free(save);
        expect(ashore_close(executor, 60.0), ASHORE_OK);
    }
}

#[test]
fn a_frozen_tensor_has_a_file_that_the_next_step_shares() {
    let (root, counter) = (tempfile::tempdir().unwrap(), AtomicU32::new(0));
    let (mut data, shape) = (vec![1.5_f32; 1 << 18], [1 << 18]);
    let executor = opened(root.path());
    let group = |name: &'static CStr, key| ashore_group { name: name.as_ptr(), key };
    let options = |group: &ashore_group| ashore_save_options {
        size: size_of::<ashore_save_options>(),
        groups: group,
        group_count: 1,
        ..ashore_save_options::default()
    };
    let (frozen, unknown) = (group(c"w", null()), group(c"v", c"expert".as_ptr()));
    let mut shared = Vec::new();
    // SAFETY: everything that is pointed to outlives the calls, and the tensors their release.
    unsafe {
        for step in [1, 2] {
            let mut save = null_mut();
            let mut done = ashore_committed { size: size_of::<ashore_committed>(), ..ashore_committed::default() };
            let w = told(c"w", &mut data, &shape, &counter);
            expect(ashore_save_begin(executor, step, &w, 1, &options(&frozen), &mut save), ASHORE_OK);
            expect(ashore_save_wait(save, 60.0, &mut done), ASHORE_OK);
            shared.push(done.linked_bytes + done.cloned_bytes);
            ashore_save_free(save);
        }
        let mut save = null_mut();
        let w = told(c"w", &mut data, &shape, &counter);
        let text = expect(ashore_save_begin(executor, 3, &w, 1, &options(&unknown), &mut save), ASHORE_INVALID);
        assert!(text.contains("\"v\""), "{text}");
        expect(ashore_close(executor, 60.0), ASHORE_OK);
    }
    assert!(shared[0] == 0 && shared[1] > 1 << 20, "{shared:?}");
}

#[test]
fn an_alias_is_restored_from_the_newest_step_that_is_as_written() {
    let (root, counter) = (tempfile::tempdir().unwrap(), AtomicU32::new(0));
    let (mut data, shape) = (vec![1.5_f32; 6], [6]);
    let executor = opened(root.path());
    let tied = ashore_alias { name: c"head".as_ptr(), holder: c"embedding".as_ptr() };
    let options = ashore_save_options {
        size: size_of::<ashore_save_options>(),
        aliases: &tied,
        alias_count: 1,
        ..ashore_save_options::default()
    };
    let (mut checkpoint, mut skipped) = (null_mut(), null_mut());
    // SAFETY: everything that is pointed to outlives the calls, and the tensors their release.
    unsafe {
        for step in [1, 2] {
            let mut save = null_mut();
            let w = told(c"embedding", &mut data, &shape, &counter);
            expect(ashore_save_begin(executor, step, &w, 1, &options, &mut save), ASHORE_OK);
            expect(ashore_save_wait(save, 60.0, null_mut()), ASHORE_OK);
            ashore_save_free(save);
        }
        let shard = root.path().join("step-00000002/model.safetensors");
        let mut bytes = std::fs::read(&shard).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&shard, bytes).unwrap();

        expect(ashore_latest_valid(executor, &mut checkpoint, &mut skipped), ASHORE_OK);
        let told_of = CString::from_raw(skipped).into_string().unwrap();
        assert!(told_of.starts_with(r#"[{"kind":7,"path":""#) && told_of.contains(r#""step":2,"#), "{told_of}");
        assert_eq!(ashore_checkpoint_step(checkpoint), 1);
        data.fill(0.0);
        let target = told(c"head", &mut data, &shape, &counter);
        expect(ashore_restore(checkpoint, &target, 1), ASHORE_OK);
        ashore_checkpoint_free(checkpoint);
        expect(ashore_close(executor, 60.0), ASHORE_OK);
    }
    assert_eq!(data, [1.5; 6]);
}

#[test]
fn handles_that_are_null_freed_or_of_another_kind_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let executor = opened(root.path());
    let mut checkpoint = null_mut();
    // SAFETY: handles are never followed, and there is a place for the result.
    unsafe {
        expect(ashore_latest(executor, &mut checkpoint), ASHORE_OK);
        assert!(checkpoint.is_null());
        for wrong in [0_usize, 1, 8, executor.addr() + 4096, usize::MAX] {
            let text =
                expect(ashore_save_wait(std::ptr::without_provenance_mut(wrong), 0.0, null_mut()), ASHORE_INVALID);
            assert!(text.contains("handle=save"), "{text}");
            ashore_save_free(std::ptr::without_provenance_mut(wrong));
        }
        assert_eq!(ashore_checkpoint_step(executor.cast()), -1);
        ashore_checkpoint_free(executor.cast());
        expect(ashore_fence(executor, null(), 0), ASHORE_OK);
        expect(ashore_close(executor, 60.0), ASHORE_OK);
        expect(ashore_fence(executor, null(), 0), ASHORE_INVALID);
        expect(ashore_close(executor, 60.0), ASHORE_INVALID);
        expect(ashore_close(null_mut(), 60.0), ASHORE_OK);
    }
}

#[test]
fn values_of_other_languages_come_as_the_step_has_them() {
    let root = tempfile::tempdir().unwrap();
    let mut state = ashore_core::StateDict::new();
    state.value("nan", &f64::NAN).unwrap().value("plain", &[1, 2]).unwrap().rank_value("inf", &f64::INFINITY).unwrap();
    let executor = ashore_core::CheckpointExecutor::builder(root.path()).arena(2 << 20).chunk(1 << 18).build().unwrap();
    executor.save(1, state).unwrap().wait(std::time::Duration::from_secs(60)).unwrap();
    let path = CString::new(root.path().join("step-00000001").to_str().unwrap()).unwrap();
    let mut checkpoint = null_mut();
    // SAFETY: a text, and places for results; texts are freed once.
    unsafe {
        expect(ashore_checkpoint_open(path.as_ptr(), &mut checkpoint), ASHORE_OK);
        let json = |name: *const c_char, rank: bool| {
            let mut json = null_mut();
            let status = if rank {
                ashore_checkpoint_rank_json(checkpoint, 0, name, &mut json)
            } else {
                ashore_checkpoint_json(checkpoint, name, &mut json)
            };
            expect(status, ASHORE_OK);
            CString::from_raw(json).into_string().unwrap()
        };
        assert_eq!(json(c"nan".as_ptr(), false), r#"{"$f64":"7ff8000000000000"}"#);
        assert_eq!(json(c"inf".as_ptr(), true), r#"{"$f64":"7ff0000000000000"}"#);
        let all = json(null(), false);
        assert!(all.contains(r#""nan":{"$f64":"7ff8000000000000"}"#) && all.contains(r#""plain":[1,2]"#), "{all}");
        ashore_checkpoint_free(checkpoint);
    }
}

#[test]
fn the_last_error_is_that_of_the_thread() {
    // SAFETY: a null handle.
    let fails = || unsafe { ashore_save_cancel(null_mut()) };
    expect(fails(), ASHORE_INVALID);
    std::thread::spawn(|| assert_eq!(expect(0, ASHORE_OK), "")).join().unwrap();
    // SAFETY: the pointer is never null, and belongs to this thread.
    let last = unsafe { &*ashore_last_error() };
    assert_eq!((last.kind, last.step, last.rank), (ASHORE_INVALID as i32, -1, -1));
    assert!(last.tensor.is_null() && last.path.is_null());
}

#[test]
fn what_is_done_is_told_once_also_of_a_save_that_has_ended() {
    // SAFETY: called with a counter as context.
    unsafe extern "C-unwind" fn told_of(counter: *mut c_void, kind: i32, error: *const c_char) {
        assert_eq!((kind, error.is_null()), (ASHORE_OK as i32, true));
        // SAFETY: the caller guarantees this.
        unsafe { count(counter) }
    }
    let (root, counter, ends) = (tempfile::tempdir().unwrap(), AtomicU32::new(0), AtomicU32::new(0));
    let (mut data, shape) = (vec![1.5_f32; 6], [6]);
    let (executor, tensor) = (opened(root.path()), told(c"w", &mut data, &shape, &counter));
    let (mut save, context) = (null_mut(), (&raw const ends).cast_mut().cast());
    // SAFETY: everything that is pointed to outlives the executor.
    unsafe {
        expect(ashore_save_begin(executor, 1, &tensor, 1, null(), &mut save), ASHORE_OK);
        expect(ashore_save_then(save, Some(told_of), context), ASHORE_OK);
        expect(ashore_close(executor, 60.0), ASHORE_OK);
        assert_eq!(ends.load(Ordering::Acquire), 1);
        expect(ashore_save_then(save, Some(told_of), context), ASHORE_OK);
        assert_eq!(ends.load(Ordering::Acquire), 2);
        expect(ashore_save_then(save, None, context), ASHORE_INVALID);
        expect(ashore_save_cancel(save), ASHORE_CONFLICT);
        ashore_save_free(save);
    }
}
