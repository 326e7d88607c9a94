//! Finding CUDA: what is missing is named, nothing panics, and a choice that was left to us says why it fell as it did.

use super::program::{Gpu, library, open_device};
use ashore::device::choose;
use ashore::{DeviceChoice, ErrorKind};
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

#[test]
fn cuda_choice_says_why() {
    let (_, host) = choose(DeviceChoice::Host).unwrap();
    assert_eq!(host.to_string(), "host (as asked for)");
    let (_, auto) = choose(DeviceChoice::Auto).unwrap();
    match choose(DeviceChoice::Cuda(0)) {
        Ok((_, asked)) => assert_eq!(asked.name, auto.name),
        Err(error) => {
            assert_eq!((auto.name.as_str(), &auto.why), ("host", &error.to_string()));
            assert!(matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Device), "{error}");
        }
    }
}
