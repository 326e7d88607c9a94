//! Traces of copies from GPUs: times by events of the device, which are made only for a trace.

use super::program::{Gpu, at_fence, fixture, rig_on};
use crate::fixtures::executor::{LONG, pattern};
use serde_json::Value;
use std::path::Path;

fn events(trace: &Path) -> Vec<Value> {
    serde_json::from_str(&std::fs::read_to_string(trace).unwrap()).unwrap()
}

#[test]
fn cuda_copies_in_a_trace_lie_in_their_save_and_say_how_far_they_may_be_off() {
    for (lag_us, batch) in [(0, false), (300, false), (300, true)] {
        let folder = tempfile::tempdir().unwrap();
        let trace = folder.path().join("trace.json");
        let fixture = rig_on(Gpu::take(), |b| b.trace(trace.to_str().unwrap()).batch(batch));
        fixture.gpu.set("lag_us", lag_us);
        let (stream, tensor) = (fixture.gpu.stream(), fixture.gpu.tensor(&pattern(1, 20_000)));
        for step in 1..=3 {
            let save = fixture.executor.save(step, at_fence(tensor.source(stream))).unwrap();
            fixture.executor.fence_on(&[stream.0]).unwrap();
            save.wait(LONG).unwrap();
        }
        fixture.executor.shutdown(LONG).unwrap();
        let events = events(&trace);
        let row = format!("rank 0: GPU {} (device clock)", fixture.gpu.ordinal);
        let named = events.iter().find(|event| event["args"]["name"] == row.as_str()).unwrap();
        for step in 1..=3 {
            let of = |ph: &str| events.iter().find(|e| e["ph"] == ph && e["args"]["step"] == step).unwrap();
            let ends = ["b", "e"].map(|ph| of(ph)["ts"].as_u64().unwrap());
            let copies = |e: &&Value| e["ph"] == "X" && e["pid"] == named["pid"] && e["args"]["step"] == step;
            let copies: Vec<_> = events.iter().filter(copies).collect();
            // The header's chunk has some of the tensor.
            assert_eq!(copies.len(), 5, "{copies:?}");
            let mut last = ends[0];
            for copy in copies {
                let (begin, length) = (copy["ts"].as_u64().unwrap(), copy["dur"].as_u64().unwrap());
                assert!(last <= begin && begin + length <= ends[1], "{copy} of {ends:?} after {last}");
                last = begin + length;
                let error = copy["args"]["error_us"].as_f64().unwrap();
                assert!(error > 0.0 && error <= (ends[1] - ends[0]) as f64 + 1.0, "{copy} of {ends:?}");
            }
        }
    }
}

#[test]
fn cuda_events_are_timed_only_for_a_trace() {
    let fixture = fixture(|b| b);
    let (stream, tensor) = (fixture.gpu.stream(), fixture.gpu.tensor(&pattern(1, 20_000)));
    let save = fixture.executor.save(1, at_fence(tensor.source(stream))).unwrap();
    fixture.executor.fence().unwrap();
    save.wait(LONG).unwrap();
    let Some(fake) = fixture.gpu.fake() else { return };
    assert_eq!(fake.calls("cuEventElapsedTime"), 0);
    let (events, streams) = (fake.calls("cuEventCreate"), fake.calls("cuStreamCreateWithPriority"));
    for step in 2..=5 {
        let save = fixture.executor.save(step, at_fence(tensor.source(stream))).unwrap();
        fixture.executor.fence().unwrap();
        save.wait(LONG).unwrap();
    }
    let after = (fake.calls("cuEventCreate"), fake.calls("cuStreamCreateWithPriority"));
    assert_eq!(after, (events, streams), "nothing is made while a program trains");
}

/// A driver that cannot say when an event was reached costs the trace its exact times, and no save.
#[test]
fn cuda_copies_are_traced_by_what_the_host_saw_where_the_driver_does_not_tell_times() {
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("trace.json");
    let fixture = rig_on(Gpu::take(), |b| b.trace(trace.to_str().unwrap()));
    let Some(fake) = fixture.gpu.fake() else { return };
    (1..=5).for_each(|nth| fake.fault(&format!("cuEventElapsedTime:{nth}:801")));
    let (stream, tensor) = (fixture.gpu.stream(), fixture.gpu.tensor(&pattern(1, 20_000)));
    let save = fixture.executor.save(1, at_fence(tensor.source(stream))).unwrap();
    fixture.executor.fence().unwrap();
    save.wait(LONG).unwrap();
    fixture.executor.shutdown(LONG).unwrap();
    let events = events(&trace);
    let copies: Vec<_> = events.iter().filter(|event| event["args"]["error_us"].is_number()).collect();
    assert_eq!(copies.len(), 5);
    assert_eq!(copies.iter().filter(|copy| copy["tid"] == 1).count(), 5);
}
