//! Errors and the log say what happened; each of these messages once said something else.

use crate::fixtures::executor::{LONG, eventually, fixture, one, pattern};
use crate::fixtures::log::LogLines;
use crate::fixtures::process::alone;
use ashore::internal::device::choose;
use ashore::{CheckpointExecutor, DeviceChoice, Dtype, ErrorKind, HostTensor, StateDict, Targets};
use std::error::Error as _;
use std::sync::Arc;

/// An error's text contained its sources, so `anyhow` and similar crates, which print an error and then its
/// sources, printed them twice.
#[test]
fn the_text_of_an_error_leaves_its_cause_to_the_cause() {
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("file");
    std::fs::write(&file, "").unwrap();
    let error = CheckpointExecutor::builder(&file).build().unwrap_err();
    let cause = error.source().expect("a system call refused it").to_string();
    assert!(!error.to_string().contains(&cause), "{error}");
    assert_eq!(format!("{error:#}"), format!("{error}: {cause}"));
    assert_eq!(format!("{error:?}"), format!("{:?}: {error}: {cause}", error.kind()));
}

/// The message was "value a value is not of this type type=... value=...: " with the cause twice.
#[test]
fn a_value_of_another_type_is_named_once_with_what_it_is_and_what_was_wanted() {
    let fixture = fixture(|b| b);
    let mut state = StateDict::new();
    state.value("epoch", &3).unwrap();
    fixture.executor.save(1, state).unwrap().wait(LONG).unwrap();
    let error = fixture.checkpoint(1).unwrap().value::<String>("epoch").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert_eq!(error.message(), "the value has another type value=\"epoch\" wanted=alloc::string::String");
    assert!(format!("{error:#}").contains(": invalid type: integer `3`, expected a string"), "{error:#}");
}

#[test]
fn lengths_have_a_unit() {
    let fixture = fixture(|b| b);
    fixture.executor.save(1, one("t", Arc::new(pattern(1, 4096)))).unwrap().wait(LONG).unwrap();
    let mut short = [0_f32; 7];
    let targets = Targets::new().elements("t", &mut short);
    assert!(fixture.checkpoint(1).unwrap().read_into(targets).is_err(), "another dtype");
    let mut short = [0_u8; 28];
    let error = fixture.checkpoint(1).unwrap().read_into(Targets::new().bytes("t", &mut short)).unwrap_err();
    assert!(error.message().ends_with("expected_bytes=4096 found_bytes=28"), "{error}");
    let error = StateDict::new().tensor("t", HostTensor::new(vec![1_u8; 5], [2, 3])).err().unwrap();
    assert!(error.message().contains("expected_bytes=6 found_bytes=5"), "{error}");
}

/// The library saved such a tensor, and torch then refused the whole file, with every other tensor in it.
#[test]
fn half_bytes_with_an_odd_last_dimension_are_refused() {
    for (shape, bytes) in [(&[2, 3][..], 3), (&[3], 2), (&[], 1), (&[4, 1], 2)] {
        let tensor = HostTensor::with_dtype(vec![0_u8; bytes], Dtype::F4, shape);
        let error = StateDict::new().tensor("nibbles", tensor).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.message().contains("torch refuses") && error.message().contains("nibbles"), "{error}");
    }
    StateDict::new().tensor("even", HostTensor::with_dtype(vec![0_u8; 3], Dtype::F4, [3, 2])).unwrap();
}

/// A machine without a GPU logged a field `error` at INFO.
#[test]
#[cfg_attr(miri, ignore = "starts processes")]
fn a_machine_without_a_gpu_is_no_error() {
    // Beside a test of CUDA the choice would find the simulated driver, and take its device 0.
    if !alone("saves::messages::a_machine_without_a_gpu_is_no_error") {
        return;
    }
    let heard = LogLines::default();
    let chosen = tracing::subscriber::with_default(heard.clone(), || choose(DeviceChoice::Auto).unwrap());
    let lines = heard.0.lock().unwrap();
    assert_eq!(lines.len(), 1, "{lines:?}");
    if chosen.1.name == "host" {
        assert!(lines[0].starts_with("INFO") && lines[0].contains("no GPU"), "{lines:?}");
    }
    assert!(!lines[0].contains("error="), "{lines:?}");
}

/// A save that the program itself cancelled was logged as a warning: "the save failed".
#[test]
#[cfg_attr(miri, ignore = "starts processes")]
fn a_save_that_was_cancelled_is_not_logged_as_a_failure() {
    if !alone("saves::messages::a_save_that_was_cancelled_is_not_logged_as_a_failure") {
        return;
    }
    let heard = LogLines::default();
    tracing::subscriber::set_global_default(heard.clone()).unwrap();
    let fixture = fixture(|b| b);
    fixture.device.hold();
    let save = fixture.executor.save(1, one("t", Arc::new(pattern(1, 50_000)))).unwrap();
    assert!(save.cancel());
    fixture.device.release();
    let said = || heard.0.lock().unwrap().iter().any(|line| line.contains("the save was cancelled"));
    eventually("the cancelled save is logged", said);
    fixture.executor.shutdown(LONG).unwrap();
    let lines = heard.0.lock().unwrap();
    assert!(!lines.iter().any(|line| line.starts_with("WARN") && line.contains("save")), "{lines:?}");
}
