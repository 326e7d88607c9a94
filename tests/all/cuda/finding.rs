//! Finding CUDA: errors name what is missing, nothing panics, and `DeviceChoice::Auto` reports the reason for
//! its choice.

use super::loader::{Found, pass, path_of, run, text, with_driver};
use super::program::{Gpu, at_fence, left_out, library, open_device, real, rig_on};
use crate::fixtures::executor::{LONG, one, pattern};
use crate::fixtures::process::alone;
use ashore::internal::device::choose;
use ashore::{CheckpointExecutor, DeviceChoice, Dtype, ErrorKind};
use std::path::Path;

fn open(path: &str) -> ashore::Error {
    open_device(Path::new(path), 0).unwrap_err()
}

#[test]
fn cuda_library_that_is_missing_is_named() {
    let error = open("/nowhere/libcuda.so.1");
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("/nowhere/libcuda.so.1"), "{error}");
}

#[test]
fn cuda_library_without_the_symbols_is_named_with_the_first_that_is_missing() {
    let error = open("libc.so.6");
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("symbol=cuInit") && error.to_string().contains("libc.so.6"), "{error}");
}

#[test]
fn cuda_device_that_is_not_there_is_named() {
    let gpu = Gpu::take();
    let error = open_device(&library(), 999).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("cuda:999"), "{error}");
    drop(gpu);
}

/// The simulated driver is found by its name once another test of this process has opened it: the choice then
/// takes device 0, which a test that counts objects may have claimed.
#[test]
fn cuda_choice_says_why() {
    if !alone(path_of!(cuda_choice_says_why)) {
        return;
    }
    let (_, host) = choose(DeviceChoice::Host).unwrap();
    assert_eq!(host.to_string(), "host (as requested)");
    let (_, auto) = choose(DeviceChoice::Auto).unwrap();
    match choose(DeviceChoice::Cuda(0)) {
        Ok((_, asked)) => assert_eq!(asked.name, auto.name),
        Err(error) => {
            assert_eq!((auto.name.as_str(), &auto.why), ("host", &format!("{error:#}")));
            assert!(matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Device), "{error}");
        }
    }
}

#[test]
fn cuda_driver_that_does_not_work_is_named_and_the_host_copies() {
    const EXPECTED: &str = "EXPECTED";
    if let Ok(expected) = std::env::var(EXPECTED) {
        return the_host_copies(&expected);
    }
    if real() {
        return left_out();
    }
    let here = path_of!(cuda_driver_that_does_not_work_is_named_and_the_host_copies);
    for variables in [
        &[("FAKECUDA_INIT", "34"), (EXPECTED, "the stub of a toolkit")],
        &[("FAKECUDA_INIT", "100"), (EXPECTED, "no device")],
        &[("FAKECUDA_DEVICES", "0"), (EXPECTED, "no device")],
        &[("FAKECUDA_INIT", "803"), (EXPECTED, "driver and library do not fit")],
        &[("FAKECUDA_INIT", "987"), (EXPECTED, "code=987")],
    ] {
        pass(here, &Found { variables, ..Found::default() });
    }
    let variables = &[(EXPECTED, "too old or none symbol=cuStreamIsCapturing library=\"libcuda.so.1\"")];
    pass(here, &Found { without: &["cuStreamIsCapturing"], variables });
}

fn the_host_copies(expected: &str) {
    let (_, auto) = choose(DeviceChoice::Auto).unwrap();
    assert!(auto.name == "host" && auto.why.contains(expected), "{auto}");
    let folder = tempfile::tempdir().unwrap();
    let builder = || CheckpointExecutor::builder(folder.path()).arena(1 << 20).chunk(1 << 16);
    let error = builder().device(DeviceChoice::Cuda(0)).build().unwrap_err();
    assert_eq!((error.kind(), error.to_string()), (ErrorKind::Unavailable, auto.why));
    let executor = builder().build().unwrap();
    executor.save(1, one("t", pattern(1, 100_000))).unwrap().wait(LONG).unwrap();
    assert_eq!(executor.checkpoint(1).unwrap().read("t").unwrap(), pattern(1, 100_000));
}

/// A driver without the functions that only fences on the device need was refused entirely, and with it the
/// gathering of small tensors.
#[test]
fn cuda_driver_that_writes_no_numbers_in_streams_gathers_and_its_fences_wait() {
    let here = path_of!(cuda_driver_that_writes_no_numbers_in_streams_gathers_and_its_fences_wait);
    if real() {
        return left_out();
    }
    if !super::loader::here() {
        return pass(here, &Found { without: &["cuStreamWriteValue64_v2"], variables: &[] });
    }
    for (scratch, why) in [(0, "setting=scratch"), (16 * 4096, "symbol=cuStreamWriteValue64_v2")] {
        let fixture = rig_on(Gpu::take(), |b| b.scratch(scratch));
        let device = fixture.executor.device();
        assert_eq!(device.gather, Ok(64 << 10));
        assert!(device.scratch.as_ref().unwrap_err().contains(why), "{device:?}");
        let (stream, tensor) = (fixture.gpu.stream(), fixture.gpu.tensor(&pattern(1, 30_000)));
        let mut state = at_fence(tensor.source(stream));
        state.tensor("strided", tensor.strided(stream, 1, Dtype::U8, &[100, 2], &[5, 2])).unwrap();
        let save = fixture.executor.save(1, state).unwrap();
        fixture.executor.fence_on(&[stream.0]).unwrap();
        stream.fill(&tensor, 0xEE);
        save.wait(LONG).unwrap();
        let saved = fixture.checkpoint(1).unwrap();
        let strided: Vec<u8> = (0..200).map(|i| pattern(1, 30_000)[1 + i / 2 * 5 + i % 2 * 2]).collect();
        assert_eq!((saved.read("t").unwrap(), saved.read("strided").unwrap()), (pattern(1, 30_000), strided));
    }
    let alone = rig_on(Gpu::take(), |b| b.gather(0).scratch(16 * 4096));
    let device = alone.executor.device();
    assert!(device.gather.is_err() && device.scratch.as_ref().unwrap_err().contains("symbol="), "{device:?}");
}

#[test]
fn cuda_driver_is_found_by_its_own_name_and_described() {
    with_driver!(cuda_driver_is_found_by_its_own_name_and_described);
    let (_, auto) = choose(DeviceChoice::Auto).unwrap();
    assert!(auto.name == "cuda:0" && auto.why.contains(", CUDA "), "{auto}");
    if real() {
        return left_out();
    }
    let here = path_of!(cuda_driver_is_found_by_its_own_name_and_described);
    match std::env::var("FAKECUDA_VERSION") {
        Ok(_) => assert_eq!(auto.why, "Simulated device, CUDA 11.4, the first"),
        Err(_) => pass(here, &Found { variables: &[("FAKECUDA_VERSION", "11040")], ..Found::default() }),
    }
}

#[test]
fn cuda_tests_that_were_to_run_on_a_real_device_refuse_the_simulated_one() {
    if real() {
        return left_out();
    }
    let variables = &[("ASHORE_REQUIRE_GPU", "1")];
    let output = run(path_of!(cuda_device_that_is_not_there_is_named), &Found { variables, ..Found::default() });
    let text = text(&output);
    assert!(!output.status.success() && text.contains("a real device was asked for"), "{text}");
}
