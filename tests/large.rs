//! A tensor of more than 4 GiB through an arena of 256 MiB: bytes right beyond every 32-bit boundary, memory
//! flat.
//!
//! Ignored by default because it writes 4.5 GiB; `just large` runs it. A process of its own, so that its peak
//! is its own.
//!
//! # Safety argument
//! The tensor is an anonymous mapping that lives to the end of the process; it is written before `save` only.
#![expect(unsafe_code, reason = "a mapping that costs no memory until it is touched")]

use ashore::{CheckpointExecutor, Dtype, RawHost, StateDict};
use std::time::Duration;

const LONG: Duration = Duration::from_secs(600);
const SIZE: usize = (4 << 30) + (512 << 20) + 4096 + 1;
const ARENA: u64 = 256 << 20;

fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

#[test]
#[ignore = "writes 4.5 GiB to the temporary directory"]
fn more_than_four_gibibytes_in_one_tensor_and_memory_flat() {
    // SAFETY: a fresh anonymous mapping.
    let base = unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        libc::mmap(std::ptr::null_mut(), SIZE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
    };
    assert_ne!(base, libc::MAP_FAILED);
    let base: *mut u8 = base.cast();
    let marks = [0, 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 32) + (8 << 20), SIZE - 1];
    for (i, &at) in marks.iter().enumerate() {
        // SAFETY: inside the mapping, before anything reads it.
        unsafe { base.add(at).write(i as u8 + 1) };
    }
    let directory = tempfile::tempdir().unwrap();
    let executor =
        CheckpointExecutor::builder(directory.path()).arena(ARENA).detect(ashore::Detect::Never).build().unwrap();
    let before = peak_bytes();

    let mut state = StateDict::new();
    // SAFETY: the mapping stays, and nothing writes it any more.
    state.tensor("large", unsafe { RawHost::new(base, SIZE as u64, Dtype::U8, [SIZE], ()) }).unwrap();
    let save = executor.save(1, state).unwrap();
    executor.fence().unwrap();
    let committed = save.wait(LONG).unwrap().committed().unwrap();
    let peak = peak_bytes();
    println!(
        "bytes={} durable={:?} mode={:?} peak={} MiB, of which {} MiB before the save",
        committed.bytes,
        committed.durable,
        committed.mode,
        peak >> 20,
        before >> 20
    );
    assert!(peak < ARENA + (64 << 20), "the peak is {} MiB", peak >> 20);

    let checkpoint = executor.latest().unwrap().unwrap();
    let bytes = |range| checkpoint.read_slice("large", std::slice::from_ref(&range)).unwrap();
    for (i, &at) in marks.iter().enumerate() {
        assert_eq!(bytes(at..at + 1), [i as u8 + 1], "at {at}");
    }
    assert_eq!(bytes((1 << 32) - 2..(1 << 32) + 1), [0, 5, 6]);
    assert!(checkpoint.verify().unwrap().damage.is_empty());
    assert!(peak_bytes() < ARENA + (128 << 20), "reading is bounded, too");
    executor.shutdown(LONG).unwrap();
}
