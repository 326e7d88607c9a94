//! Tests that call the simulated driver as a program calls the real one.

use crate::fixture::{Fixture, query, record, synchronize, to_host, wait};
use crate::symbols::{self, cuda};
use fakecuda::Live;
use std::ffi::{CString, c_void};
use std::time::{Duration, Instant};

#[test]
fn a_copy_to_pinned_memory_is_late_and_its_destination_poisoned() {
    let fixture = Fixture::new();
    let (from, to, stream, event) = (fixture.memory(4096), fixture.pinned(4096), fixture.stream(1), fixture.event());
    fixture.device().poke(from, &[7; 4096]);
    fixture.device().set("hold", 1);
    assert_eq!((to_host(to, from, stream), record(event, stream)), (0, 0));
    assert_eq!((query(event), to[0], to[4095]), (600, 0xCD, 0xCD));
    fixture.device().set("hold", 0);
    assert_eq!(cuda!(cuStreamSynchronize(stream => u64)), 0);
    assert_eq!((query(event), to[0], to[4095]), (0, 7, 7));
}

#[test]
fn device_addresses_fault_on_the_host_and_ranges_are_checked() {
    let fixture = Fixture::new();
    let (from, to) = (fixture.memory(1000), fixture.pinned(4096));
    assert_eq!(to_host(&mut to[..1000], from, 0), 0);
    assert_eq!(to_host(&mut to[..1001], from, 0), 1);
    assert_eq!(to_host(&mut to[..1], from + 1000, 0), 1);
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let mapping = maps.lines().find(|l| {
        let (start, end) = l.split(' ').next().unwrap().split_once('-').unwrap();
        let hex = |text| u64::from_str_radix(text, 16).unwrap();
        (hex(start)..hex(end)).contains(&from)
    });
    assert!(mapping.is_some_and(|l| l.contains("---p")), "{mapping:?}");
}

#[test]
fn memory_freed_under_a_copy_is_an_error_that_stays() {
    let fixture = Fixture::new();
    let (from, to, stream) = (fixture.memory(64), fixture.pinned(64), fixture.stream(1));
    fixture.device().set("hold", 1);
    assert_eq!((to_host(to, from, stream), cuda!(cuMemFree_v2(from => u64))), (0, 0));
    fixture.device().set("hold", 0);
    assert_eq!(synchronize(stream), 700);
    let mut more = 0_u64;
    assert_eq!((cuda!(cuMemAlloc_v2(&mut more => &mut u64, 1 => usize)), fixture.device().sticky()), (700, 700));
}

#[test]
fn pinned_memory_released_under_a_copy_is_an_error() {
    let fixture = Fixture::new();
    let mut own = vec![0_u8; 8192];
    let address = own.as_mut_ptr() as u64;
    assert_eq!(cuda!(cuMemHostRegister_v2(address => u64, 8192_usize => usize, 1 => u32)), 0);
    assert_eq!(cuda!(cuMemHostRegister_v2(address + 4096 => u64, 1_usize => usize, 1 => u32)), 712);
    let (from, stream) = (fixture.memory(8192), fixture.stream(1));
    fixture.device().set("hold", 1);
    assert_eq!(to_host(&mut own, from, stream), 0);
    assert_eq!(cuda!(cuMemHostUnregister(address => u64)), 0);
    fixture.device().set("hold", 0);
    assert_eq!(synchronize(stream), 700);
}

#[test]
fn a_wait_is_for_the_record_before_it_and_none_without_one() {
    let fixture = Fixture::new();
    let (from, to, a, b) = (fixture.memory(64), fixture.pinned(64), fixture.stream(1), fixture.stream(1));
    let (event, other) = (fixture.event(), fixture.event());
    assert_eq!((query(event), wait(b, event), synchronize(b)), (0, 0, 0));
    assert_eq!(record(event, a), 0);
    fixture.device().set("hold", 1);
    assert_eq!((wait(b, event), to_host(to, from, a), record(event, a), record(other, b)), (0, 0, 0, 0));
    // This wait is for the first generation, which is not held back.
    assert_eq!(synchronize(b), 0);
    assert_eq!((query(event), query(other)), (600, 0));
    // This wait is for the second, which is held back.
    assert_eq!((wait(b, event), record(other, b), query(other)), (0, 0, 600));
    fixture.device().set("hold", 0);
    assert_eq!((synchronize(b), query(event), query(other)), (0, 0, 0));
}

#[test]
fn the_legacy_stream_is_ordered_with_blocking_streams_only() {
    let fixture = Fixture::new();
    let (from, to) = (fixture.memory(64), fixture.pinned(64));
    let (blocking, free) = (fixture.stream(0), fixture.stream(1));
    let events = [fixture.event(), fixture.event(), fixture.event()];
    fixture.device().set("hold", 1);
    assert_eq!(to_host(to, from, blocking), 0);
    assert_eq!(cuda!(cuMemsetD8Async(from => u64, 1 => u8, 64_usize => usize, 0 => u64)), 0);
    for (event, stream) in events.into_iter().zip([0, blocking, free]) {
        assert_eq!(record(event, stream), 0);
    }
    assert_eq!((synchronize(free), query(events[2])), (0, 0));
    assert_eq!((query(events[0]), query(events[1]), fixture.device().peek(from, 1)), (600, 600, vec![0xCD]));
    fixture.device().set("hold", 0);
    assert_eq!((synchronize(blocking), fixture.device().peek(from, 1)), (0, vec![1]));
    // A thread's default stream is a blocking one, not the legacy one.
    fixture.device().set("hold", 1);
    assert_eq!((to_host(to, from, 2), record(events[0], 0), record(events[2], free)), (0, 0, 0));
    assert_eq!((synchronize(free), query(events[2]), query(events[0])), (0, 0, 600));
    fixture.device().set("hold", 0);
    assert_eq!((synchronize(0), query(events[0])), (0, 0));
}

#[test]
fn pageable_copies_block_the_host() {
    let fixture = Fixture::new();
    let (from, stream) = (fixture.memory(100), fixture.stream(1));
    fixture.device().poke(from, &[9; 100]);
    fixture.device().set("lag_us", 5000);
    let (mut own, begin) = ([0; 100], Instant::now());
    assert_eq!((to_host(&mut own, from, stream), own), (0, [9; 100]));
    assert!(begin.elapsed() >= Duration::from_millis(5));
}

#[test]
fn faults_strike_the_nth_call_at_once_or_later() {
    let fixture = Fixture::new();
    let (from, to, stream) = (fixture.memory(64), fixture.pinned(64), fixture.stream(1));
    fixture.device().fault("cuMemcpyDtoHAsync_v2:2:2");
    assert_eq!([0; 3].map(|_| to_host(to, from, stream)), [0, 2, 0]);
    fixture.device().fault("*:1:801");
    assert_eq!([synchronize(stream), synchronize(stream)], [801, 0]);
    fixture.device().fault("cuMemcpyDtoHAsync_v2:1:719:async");
    assert_eq!((to_host(to, from, stream), synchronize(stream), fixture.device().sticky()), (0, 719, 719));
    assert_eq!(cuda!(cuStreamSynchronize(stream => u64)), 719);
    // Work behind the failure does not run.
    assert_eq!(to_host(to, from, stream), 719);
}

#[test]
fn calls_that_name_a_device_fail_without_a_current_one() {
    let fixture = Fixture::new();
    assert_eq!(cuda!(cuCtxSetCurrent(0 => u64)), 0);
    let (mut context, mut value) = (0_u64, 0_i32);
    fixture.device().fault("cuDevicePrimaryCtxRetain:1:46");
    fixture.device().fault("cuDeviceGetAttribute:1:801");
    let mut retain = || cuda!(cuDevicePrimaryCtxRetain(&mut context => &mut u64, fixture.ordinal() => i32));
    assert_eq!([retain(), retain()], [46, 0]);
    let mut attribute = || cuda!(cuDeviceGetAttribute(&mut value => &mut i32, 75 => i32, fixture.ordinal() => i32));
    assert_eq!([attribute(), attribute()], [801, 0]);
    fixture.device().fault("cuCtxSetCurrent:1:3");
    assert_eq!([(); 2].map(|()| cuda!(cuCtxSetCurrent(context => u64))), [3, 0]);
    assert_eq!(cuda!(cuDevicePrimaryCtxRelease_v2(fixture.ordinal() => i32)), 0);
}

#[test]
fn a_kernel_that_touches_what_is_not_there_fails() {
    let fixture = Fixture::new();
    let (from, to, stream) = (fixture.memory(100), fixture.memory(100), fixture.stream(1));
    // `struct Piece`: 100 bytes from the second byte on.
    let pieces = fixture.upload(&[from + 1, 0, 0, 100, 0]);
    // `struct Gather`: the first piece, and one of them.
    let argument = [pieces, 0, to, 1 << 32];
    assert_eq!(fixture.launch(fixture.kernel("gather", "gather"), 1, 32, stream, argument), 0);
    assert_eq!((synchronize(stream), fixture.device().sticky()), (700, 700));
}

#[test]
fn a_capture_writes_down_what_graphs_replay() {
    let fixture = Fixture::new();
    let (at, stream, other, event) = (fixture.memory(64), fixture.stream(1), fixture.stream(1), fixture.event());
    let fill = |value, stream| cuda!(cuMemsetD8Async(at => u64, value => u8, 64_usize => usize, stream => u64));
    let status = |stream| {
        let mut status = 9;
        assert_eq!(cuda!(cuStreamIsCapturing(stream => u64, &mut status => &mut u32)), 0);
        status
    };
    assert_eq!(cuda!(cuStreamBeginCapture_v2(stream => u64, 2 => i32)), 0);
    assert_eq!((fill(3, stream), record(event, stream), wait(other, event), fill(4, other)), (0, 0, 0, 0));
    assert_eq!((status(stream), status(other), query(event)), (1, 1, 907));
    let (mut graph, mut executable) = (0_u64, 0_u64);
    assert_eq!(cuda!(cuStreamEndCapture(stream => u64, &mut graph => &mut u64)), 0);
    assert_eq!((status(stream), status(other), fixture.device().peek(at, 1)), (0, 0, vec![0xCD]));
    assert_eq!(cuda!(cuGraphInstantiateWithFlags(&mut executable => &mut u64, graph => u64, 0 => u64)), 0);
    assert_eq!((cuda!(cuGraphLaunch(executable => u64, stream => u64)), synchronize(stream)), (0, 0));
    assert_eq!(fixture.device().peek(at, 1), [4]);
}

#[test]
fn a_query_from_another_thread_breaks_a_capture_unless_its_mode_is_relaxed() {
    let fixture = Fixture::new();
    let (stream, event) = (fixture.stream(1), fixture.event());
    let context = {
        let mut context = 0;
        assert_eq!(cuda!(cuCtxGetCurrent(&mut context => &mut u64)), 0);
        context
    };
    let query_elsewhere = |mode: i32| {
        let ask = move || {
            let mut mode = mode;
            assert_eq!(cuda!(cuCtxSetCurrent(context => u64)), 0);
            assert_eq!(cuda!(cuThreadExchangeStreamCaptureMode(&mut mode => &mut i32)), 0);
            query(event)
        };
        std::thread::spawn(ask).join().unwrap()
    };
    let mut graph = 0_u64;
    for (mode, answer, end) in [(0, 900, 901), (1, 0, 0), (2, 0, 0)] {
        assert_eq!(cuda!(cuStreamBeginCapture_v2(stream => u64, 0 => i32)), 0);
        assert_eq!((query_elsewhere(mode), mode), (answer, mode));
        let mut relaxed = 2;
        assert_eq!(cuda!(cuThreadExchangeStreamCaptureMode(&mut relaxed => &mut i32)), 0);
        assert_eq!((query(event), cuda!(cuThreadExchangeStreamCaptureMode(&mut relaxed => &mut i32))), (0, 0));
        assert_eq!((cuda!(cuStreamEndCapture(stream => u64, &mut graph => &mut u64)), mode), (end, mode));
    }
}

#[test]
fn values_are_written_and_awaited_in_stream_order() {
    let fixture = Fixture::new();
    let (mark, flag, stream) = (fixture.memory(8), fixture.pinned(8), fixture.stream(1));
    let flag_at = flag.as_ptr() as u64;
    assert_eq!(cuda!(cuStreamWaitValue32_v2(stream => u64, flag_at => u64, 5 => u32, 0 => u32)), 0);
    assert_eq!(cuda!(cuStreamWriteValue64_v2(stream => u64, mark => u64, 77 => u64, 0 => u32)), 0);
    assert_eq!(cuda!(cuStreamQuery(stream => u64)), 600);
    fixture.device().poke(flag_at, &5_u32.to_le_bytes());
    assert_eq!((synchronize(stream), fixture.device().peek(mark, 8)), (0, 77_u64.to_le_bytes().to_vec()));
    assert_eq!(cuda!(cuStreamWriteValue32_v2(stream => u64, mark + 2 => u64, 0 => u32, 0 => u32)), 1);
}

#[test]
fn a_batch_copies_all_of_it() {
    let fixture = Fixture::new();
    let (from, to, stream) = (fixture.memory(256), fixture.pinned(256), fixture.stream(1));
    fixture.device().poke(from, &(0..=255).collect::<Vec<u8>>());
    let at = to.as_ptr() as u64;
    let (targets, sources, sizes) = ([at, at + 100], [from, from + 100], [100_usize, 156]);
    let (attributes, starts) = ([3_u32, 0, 0, 0, 0, 0], [0_usize]);
    let batch = |stream| {
        cuda!(cuMemcpyBatchAsync_v2(
            targets.as_ptr() => *const u64, sources.as_ptr() => *const u64, sizes.as_ptr() => *const usize, 2_usize => usize,
            attributes.as_ptr() => *const u32, starts.as_ptr() => *const usize, 1_usize => usize, stream => u64
        ))
    };
    assert_eq!((batch(stream), synchronize(stream), batch(0)), (0, 0, 1));
    assert_eq!(to, (0..=255).collect::<Vec<u8>>());
}

#[test]
fn rows_are_copied_with_their_distances() {
    let fixture = Fixture::new();
    let (from, to, stream) = (fixture.pinned(40), fixture.memory(100), fixture.stream(1));
    from.iter_mut().zip(0..).for_each(|(byte, i)| *byte = i);
    fixture.device().poke(to, &[0xEE; 100]);
    let copy = |from_pitch: u64, height: u64| {
        let arguments = [0, 0, 1, from.as_ptr() as u64, 0, 0, from_pitch, 2, 1, 2, 0, to, 0, 30, 4, height];
        cuda!(cuMemcpy2DAsync_v2(arguments.as_ptr() => *const u64, stream => u64))
    };
    assert_eq!((copy(10, 3), synchronize(stream)), (0, 0));
    let mut expected = [0xEE; 100];
    (0..3_u8)
        .for_each(|row| (0..4_u8).for_each(|i| expected[32 + 30 * usize::from(row)..][usize::from(i)] = 10 * row + i));
    assert_eq!(fixture.device().peek(to, 96), expected[..96]);
    // Rows that overlap, and rows outside the memory.
    assert_eq!([copy(3, 3), copy(10, 4), copy(1 << 31, 1)], [1, 1, 1]);
}

#[test]
fn what_is_not_given_back_is_counted() {
    let fixture = Fixture::new();
    assert_eq!(fixture.device().live(), Live::default());
    let (memory, pinned, stream, event) = (fixture.memory(100), fixture.pinned(8), fixture.stream(1), fixture.event());
    let all = Live { bytes: 100, blocks: 1, host: 1, streams: 1, events: 1, ..Live::default() };
    assert_eq!(fixture.device().live(), all);
    assert_eq!(cuda!(cuMemFree_v2(memory => u64)), 0);
    assert_eq!(cuda!(cuMemFreeHost(pinned.as_ptr() => *const u8)), 0);
    assert_eq!(cuda!(cuStreamDestroy_v2(stream => u64)), 0);
    assert_eq!(cuda!(cuEventDestroy_v2(event => u64)), 0);
    assert_eq!(fixture.device().live(), Live::default());
    assert_eq!([cuda!(cuStreamDestroy_v2(stream => u64)), cuda!(cuEventDestroy_v2(event => u64))], [400, 400]);
}

#[test]
fn what_an_address_belongs_to_is_told() {
    let fixture = Fixture::new();
    let (memory, pinned) = (fixture.memory(1000), fixture.pinned(8));
    let ask = |asked: i32, address: u64| {
        let mut value = [0_u8; 8];
        let code = cuda!(cuPointerGetAttribute(value.as_mut_ptr() => *mut u8, asked => i32, address => u64));
        (code, u64::from_le_bytes(value))
    };
    let ordinal = fixture.device().ordinal() as u64;
    assert_eq!([2, 9, 11, 12].map(|a| ask(a, memory + 5)), [(0, 2), (0, ordinal), (0, memory), (0, 1000)]);
    assert_eq!(ask(2, pinned.as_ptr() as u64), (0, 1));
    assert_eq!((ask(2, memory + 1000).0, ask(2, &raw const ordinal as u64).0), (1, 1));
}

#[test]
fn a_stream_can_use_memory_of_another_device_after_its_event() {
    let (first, second) = (Fixture::new(), Fixture::new());
    let (memory, pinned, here) = (second.memory(64), second.pinned(64), second.stream(1));
    let mut context = 0_u64;
    assert_eq!(cuda!(cuDevicePrimaryCtxRetain(&mut context => &mut u64, first.device().ordinal() as i32 => i32)), 0);
    assert_eq!(cuda!(cuCtxPushCurrent_v2(context => u64)), 0);
    let (there, event) = (first.stream(1), first.event());
    first.device().set("lag_us", 3000);
    assert_eq!(cuda!(cuMemsetD8Async(memory => u64, 6 => u8, 64_usize => usize, there => u64)), 0);
    assert_eq!(record(event, there), 0);
    assert_eq!(cuda!(cuCtxPopCurrent_v2(&mut context => &mut u64)), 0);
    assert_eq!((wait(here, event), to_host(pinned, memory, here), synchronize(here)), (0, 0, 0));
    assert_eq!(pinned, [6; 64]);
    assert_eq!(cuda!(cuDevicePrimaryCtxRelease_v2(first.device().ordinal() as i32 => i32)), 0);
}

#[test]
fn addresses_of_symbols_are_found_without_their_versions() {
    let (mut found, mut status) = (std::ptr::null_mut::<c_void>(), 9);
    let mut find = |name: &str, version: i32| {
        let name = CString::new(name).unwrap();
        let code = cuda!(cuGetProcAddress_v2(
            name.as_ptr() => *const _, &mut found => &mut *mut c_void, version => i32, 0 => u64, &mut status => &mut i32
        ));
        (code, found)
    };
    assert_eq!(find("cuMemAlloc", 12_000), (0, symbols::find("cuMemAlloc_v2")));
    assert_eq!(find("cuMemcpyBatchAsync", 12_080), (0, symbols::find("cuMemcpyBatchAsync")));
    assert_eq!(find("cuMemcpyBatchAsync", 13_000), (0, symbols::find("cuMemcpyBatchAsync_v2")));
    assert_eq!(find("cuNothing", 13_000).0, 500);
}
