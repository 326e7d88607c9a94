//! Restores into device memory: which bytes arrive, after which work, and which never get there.

use super::program::{Gpu, Stream, Tensor, fixture};
use crate::fixtures::checkpoint::{MadeCheckpoint, noise, open};
use crate::fixtures::executor::{LONG, one, pattern};
use ashore::internal::format::entries::BLOCK;
use ashore::{Checkpoint, DeviceChoice, Dtype, ErrorKind, Targets};

const MIB: usize = 1 << 20;

/// Tensors of bytes, by name.
pub fn step(tensors: &[(&str, &[u8])]) -> MadeCheckpoint {
    let add = |made: MadeCheckpoint, &(name, bytes): &(&str, &[u8])| {
        made.tensor(name, Dtype::U8, &[bytes.len()], bytes.into())
    };
    tensors.iter().fold(MadeCheckpoint::new(7), add)
}

/// A checkpoint of these tensors, opened for a device.
pub fn opened(gpu: &Gpu, tensors: &[(&str, &[u8])]) -> Checkpoint {
    step(tensors).open().unwrap().with_made_device(gpu.device())
}

/// Memory with other bytes in it.
pub fn blank(gpu: &Gpu, len: usize) -> Tensor {
    gpu.tensor(&vec![0xEE; len])
}

#[test]
fn cuda_tensors_of_any_length_are_restored_to_any_address_bit_for_bit() {
    let gpu = Gpu::take();
    gpu.set("lag_us", 300);
    let streams = [gpu.stream(), gpu.stream(), Stream::legacy(gpu.ordinal)];
    let sizes = [0, 1, 3, 100, 4095, 4096, 4097, 70_001, 8 * MIB, 8 * MIB + 1, 19 * MIB + 5];
    let made = sizes.iter().fold(MadeCheckpoint::new(7).shards(2), |made, &n| {
        made.tensor(&format!("t{n}"), Dtype::U8, &[n], noise(n, n as u64))
    });
    // Real files, so that reads bypass the page cache where they can.
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("step-00000007");
    std::fs::create_dir(&path).unwrap();
    for (name, bytes) in made.files() {
        std::fs::write(path.join(name), bytes).unwrap();
    }
    let checkpoint = Checkpoint::open(&path).unwrap().with_made_device(gpu.device());
    for threads in [1, 3, 32] {
        // A tensor in the middle of other memory, which stays as it is.
        let memory: Vec<_> = sizes.iter().map(|n| blank(&gpu, n + 32)).collect();
        let mut targets = Targets::new();
        for (i, (n, memory)) in sizes.iter().zip(&memory).enumerate() {
            targets = targets.device(format!("t{n}"), memory.target_at(i + 1, *n, streams[i % 3]));
        }
        checkpoint.clone().with_threads(threads).read_into(targets).unwrap();
        for (i, (&n, memory)) in sizes.iter().zip(&memory).enumerate() {
            let mut expected = vec![0xEE; n + 32];
            expected[i + 1..][..n].copy_from_slice(&noise(n, n as u64));
            assert!(memory.read() == expected, "{n} bytes by {threads} threads");
        }
    }
}

#[test]
fn cuda_restores_many_small_tensors_and_those_of_the_host_in_one_call() {
    let gpu = Gpu::take();
    let stream = gpu.stream();
    let bytes = |i: usize| pattern(i as u64, i * 7 % 1000);
    let made = (0..2000).fold(MadeCheckpoint::new(7).shards(3), |made, i| {
        made.tensor(&format!("t{i}"), Dtype::U8, &[bytes(i).len()], bytes(i))
    });
    let checkpoint = made.open().unwrap().with_made_device(gpu.device());
    let device: Vec<_> = (0..2000).step_by(2).map(|i| (i, blank(&gpu, bytes(i).len()))).collect();
    let mut host: Vec<_> = (0..2000).skip(1).step_by(2).map(|i| (i, vec![0xEE; bytes(i).len()])).collect();
    let mut targets = Targets::new();
    for (i, tensor) in &device {
        targets = targets.device(format!("t{i}"), tensor.target(stream));
    }
    for (i, memory) in &mut host {
        targets = targets.bytes(format!("t{i}"), memory);
    }
    checkpoint.read_into(targets).unwrap();
    assert!(device.iter().all(|(i, tensor)| tensor.read() == bytes(*i)));
    assert!(host.iter().all(|(i, memory)| *memory == bytes(*i)));
}

#[test]
fn cuda_slices_are_restored_packed_also_when_they_overlap() {
    let gpu = Gpu::take();
    let stream = gpu.stream();
    // Rows of 3000 bytes, and of 120,000: blocks of 8 MiB end in the middle of one.
    let bytes = [noise(6000 * 3000, 5), noise(150 * 120_000, 6)];
    let made = MadeCheckpoint::new(7).tensor("t", Dtype::F32, &[6000, 750], bytes[0].clone());
    let made = made.tensor("u", Dtype::U8, &[150, 120_000], bytes[1].clone());
    let checkpoint = made.open().unwrap().with_made_device(gpu.device());
    let slices = [
        ("t", [0..6000, 7..8]),
        ("t", [100..5900, 700..750]),
        ("t", [2790..2800, 0..750]),
        ("t", [5..5, 0..750]),
        ("t", [0..6000, 0..750]),
        ("u", [0..150, 1000..90_000]),
        ("u", [60..80, 100..60_000]),
    ];
    let memory: Vec<_> = slices
        .iter()
        .map(|(name, [a, b])| {
            let size = if *name == "t" { 4 } else { 1 };
            blank(&gpu, a.len() * b.len() * size)
        })
        .collect();
    let right = |chosen: &[usize]| {
        let mut on_host = vec![0; 40];
        let mut targets = Targets::new().slice("t", &[0..10, 7..8], &mut on_host);
        for &i in chosen {
            stream.fill(&memory[i], 0xEE);
            targets = targets.device_slice(slices[i].0, &slices[i].1, memory[i].target(stream));
        }
        checkpoint.read_into(targets).unwrap();
        for &i in chosen {
            let (name, slice) = &slices[i];
            assert!(memory[i].read() == checkpoint.read_slice(name, slice).unwrap(), "{name} {slice:?} of {chosen:?}");
        }
        assert_eq!(on_host, checkpoint.read_slice("t", &[0..10, 7..8]).unwrap());
    };
    right(&[0, 1, 2, 3, 4, 5, 6]);
    (0..slices.len()).for_each(|i| right(&[i]));
    // What has no neighbour over the same bytes.
    let mut targets = Targets::new();
    for i in [1, 5] {
        stream.fill(&memory[i], 0xEE);
        targets = targets.device_slice(slices[i].0, &slices[i].1, memory[i].target(stream));
    }
    checkpoint.read_into(targets).unwrap();
    for i in [1, 5] {
        assert!(memory[i].read() == checkpoint.read_slice(slices[i].0, &slices[i].1).unwrap());
    }
    let Some(fake) = gpu.fake() else { return };
    let before = fake.calls("cuMemcpyHtoDAsync_v2");
    checkpoint.read_into(Targets::new().device_slice("t", &slices[0].1, memory[0].target(stream))).unwrap();
    assert_eq!(fake.calls("cuMemcpyHtoDAsync_v2") - before, 3, "one for each block");
}

#[test]
fn cuda_restores_to_two_devices_at_once() {
    let gpus = [Gpu::take(), Gpu::take()];
    gpus[1].set("lag_us", 500);
    let bytes = [noise(9 * MIB, 1), noise(5000, 2), noise(3000, 3)];
    let checkpoint = opened(&gpus[0], &[("a", &bytes[0]), ("b", &bytes[1]), ("c", &bytes[2])]);
    let streams = gpus.each_ref().map(Gpu::stream);
    let memory = [blank(&gpus[1], 9 * MIB), blank(&gpus[0], 5000), blank(&gpus[1], 3000)];
    for (tensor, stream) in [(&memory[0], streams[1]), (&memory[2], streams[1]), (&memory[1], streams[0])] {
        stream.fill(tensor, 0xDD);
    }
    let targets = Targets::new().device("a", memory[0].target(streams[1])).device("b", memory[1].target(streams[0]));
    checkpoint.read_into(targets.device("c", memory[2].target(streams[1]))).unwrap();
    for (memory, bytes) in memory.iter().zip(&bytes) {
        assert!(memory.read() == *bytes);
    }
}

#[test]
fn cuda_work_that_was_queued_before_a_restore_does_not_overwrite_it() {
    let gpu = Gpu::take();
    gpu.set("lag_us", 1000);
    let (streams, bytes) = ([gpu.stream(), gpu.stream()], pattern(3, 50_000));
    let checkpoint = opened(&gpu, &[("t", &bytes), ("u", &bytes)]);
    let memory = [blank(&gpu, bytes.len()), blank(&gpu, bytes.len())];
    for _ in 0..10 {
        for (stream, tensor) in streams.iter().zip(&memory) {
            stream.fill(tensor, 0xDD);
            stream.fill(tensor, 0xCC);
        }
        let targets = Targets::new().device("t", memory[0].target(streams[0]));
        checkpoint.read_into(targets.device("u", memory[1].target(streams[1]))).unwrap();
        // The earlier work has ended, and so have the copies.
        assert!(memory[0].read() == bytes && memory[1].read() == bytes);
        streams[0].fill(&memory[0], 0xBB);
        streams[0].wait();
        assert!(memory[0].read().iter().all(|&byte| byte == 0xBB));
    }
}

#[test]
fn cuda_slabs_are_not_read_into_while_they_are_copied_from() {
    let gpu = Gpu::take();
    gpu.set("lag_us", 3000);
    let stream = gpu.stream();
    let tensors: Vec<_> = (0..12).map(|i| (format!("t{i}"), noise(100_000, i))).collect();
    // Each in a file of its own, so that one thread copies them one after the other.
    let add = |made: MadeCheckpoint, (name, bytes): &(String, Vec<u8>)| {
        made.tensor(name, Dtype::U8, &[100_000], bytes.clone())
    };
    let made = tensors.iter().fold(MadeCheckpoint::new(7).shards(12), add);
    let checkpoint = made.open().unwrap().with_made_device(gpu.device()).with_threads(1);
    let memory: Vec<_> = tensors.iter().map(|_| blank(&gpu, 100_000)).collect();
    let targets = tensors.iter().zip(&memory);
    let targets = targets.fold(Targets::new(), |t, ((name, _), memory)| t.device(name, memory.target(stream)));
    checkpoint.read_into(targets).unwrap();
    assert!(tensors.iter().zip(&memory).all(|((_, bytes), memory)| memory.read() == *bytes));
}

#[test]
fn cuda_bytes_that_are_not_what_was_written_never_get_to_the_device() {
    let gpu = Gpu::take();
    let (big, small) = (noise(20 * MIB, 1), noise(3000, 2));
    let made = step(&[("big", &big), ("small", &small)]);
    let stream = gpu.stream();
    for (name, place) in [("big", 9 * MIB), ("big", 20 * MIB - 1), ("small", 1234)] {
        let mut files = made.files();
        let checkpoint = made.open().unwrap();
        let offset =
            checkpoint.contents().unwrap().tensors.iter().find(|t| t.name == name).unwrap().slices[0].offset as usize;
        files[0].1[offset + place] ^= 4;
        let checkpoint = open(&files).unwrap().with_made_device(gpu.device());
        for lag in [0, 2000] {
            gpu.set("lag_us", lag);
            let memory = [blank(&gpu, big.len()), blank(&gpu, small.len())];
            let targets = Targets::new().device("big", memory[0].target(stream));
            let error = checkpoint.read_into(targets.device("small", memory[1].target(stream))).unwrap_err();
            assert_eq!((error.kind(), error.step()), (ErrorKind::Corrupt, Some(7)));
            assert!(error.to_string().contains(&format!("tensor={name:?}")), "{error}");
            let wrong = &memory[usize::from(name == "small")].read();
            let block = place / BLOCK as usize * BLOCK as usize;
            assert!(wrong[block..].iter().take(BLOCK as usize).all(|&byte| byte == 0xEE), "{name} {place}");
            // The library writes there no more: memory freed under a copy would be a sticky error.
            drop(memory);
            stream.wait();
        }
    }
    assert!(gpu.is_well());
}

#[test]
fn cuda_state_goes_from_the_gpu_to_disk_and_back() {
    let fixture = fixture(|b| b);
    fixture.gpu.set("lag_us", 200);
    let stream = fixture.gpu.stream();
    let tensor = fixture.gpu.tensor(&pattern(1, 100_000));
    for step in 1..=5 {
        let expected = tensor.read();
        fixture.executor.save(step, one("t", tensor.source(stream))).unwrap().wait(LONG).unwrap();
        stream.fill(&tensor, step as u8);
        // The next step is saved while the last is read.
        let other = fixture.gpu.tensor(&pattern(step, 60_000));
        let save = fixture.executor.save(100 + step, one("o", other.source(stream))).unwrap();
        let checkpoint = fixture.executor.checkpoint(step).unwrap();
        checkpoint.read_into(Targets::new().device("t", tensor.target(stream))).unwrap();
        assert!(tensor.read() == expected);
        fixture.executor.fence().unwrap();
        save.wait(LONG).unwrap();
        let newest = fixture.executor.latest().unwrap().unwrap();
        stream.fill(&other, 0xEE);
        newest.read_into(Targets::new().device("o", other.target(stream))).unwrap();
        assert!(other.read() == pattern(step, 60_000));
    }
}

#[test]
fn cuda_targets_that_cannot_be_filled_are_named_before_anything_is_read() {
    let gpu = Gpu::take();
    let (bytes, stream) = (pattern(1, 4000), gpu.stream());
    let checkpoint = opened(&gpu, &[("t", &bytes)]);
    let memory = blank(&gpu, 4000);
    let refused = |checkpoint: &Checkpoint, targets: Targets<'_>| {
        let error = checkpoint.read_into(targets).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        assert!(error.to_string().contains("\"t\""), "{error}");
        format!("{error:#}")
    };
    let whole = || Targets::new().device("t", memory.target(stream));
    let without = step(&[("t", &bytes)]).open().unwrap();
    assert!(refused(&without, whole()).contains("no device"));
    refused(&without.with_device(DeviceChoice::Host).unwrap(), whole());
    assert!(
        refused(&checkpoint, Targets::new().device("t", memory.target_at(0, 3999, stream)))
            .contains("found_bytes=3999")
    );
    let wrong = memory.target(stream).with_dtype(Dtype::F32);
    assert!(refused(&checkpoint, Targets::new().device("t", wrong)).contains("stored=U8 asked=F32"));
    stream.capture(|| assert!(refused(&checkpoint, whole()).contains("captured")));
    assert!(memory.read().iter().all(|&byte| byte == 0xEE));
    checkpoint.read_into(Targets::new().device("t", memory.target(stream).with_dtype(Dtype::U8))).unwrap();
    assert!(memory.read() == bytes);
}

#[test]
fn cuda_capture_elsewhere_and_a_restore_do_not_disturb_each_other() {
    let gpu = Gpu::take();
    let (bytes, streams) = (noise(9 * MIB, 1), [gpu.stream(), gpu.stream()]);
    let checkpoint = opened(&gpu, &[("t", &bytes)]);
    let memory = blank(&gpu, bytes.len());
    streams[0].capture(|| {
        checkpoint.read_into(Targets::new().device("t", memory.target(streams[1]))).unwrap();
        // An event of the restore, which goes back to a pool, was recorded in no stream that is captured.
        streams[0].fill(&memory, 0);
    });
    assert!(memory.read() == bytes);
}

#[test]
fn cuda_memory_that_cannot_be_pinned_only_makes_a_restore_slower() {
    let gpu = Gpu::take();
    let Some(fake) = gpu.fake() else { return };
    let (bytes, stream) = (noise(9 * MIB, 1), gpu.stream());
    let checkpoint = opened(&gpu, &[("t", &bytes)]);
    fake.fault("cuMemHostRegister_v2:1:2");
    let memory = blank(&gpu, bytes.len());
    checkpoint.read_into(Targets::new().device("t", memory.target(stream))).unwrap();
    assert!(memory.read() == bytes);
}
