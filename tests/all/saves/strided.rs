//! Tensors that lie at strides in host memory are saved as their packed copies are.

use crate::fixtures::checkpoint::noise;
use crate::fixtures::executor::{Buffer, LONG, fixture, pattern};
use crate::fixtures::strided::{View, any_view, views};
use ashore::storage::{Memory, Storage};
use ashore::{
    Capture, Checkpoint, CheckpointExecutor, Detect, Dtype, ErrorKind, Fence, HostTensor, SaveOptions, StateDict,
    id::step_name,
};
use proptest::prelude::*;
use std::sync::Arc;

/// Views of every kind, also of elements that lie on one another.
fn sources() -> Vec<(&'static str, View)> {
    let mut all = views();
    all.push(("expanded", View::new(Dtype::F32, &[50, 30, 3], &[0, 4, 0])));
    all.push(("windows", View::new(Dtype::U8, &[300, 40], &[1, 1])));
    all
}

#[test]
fn tensors_at_strides_come_back_packed_in_any_number_of_chunks() {
    for chunk in [4096, 1 << 20] {
        let storage: Arc<dyn Storage> = Arc::new(Memory::new());
        let builder = CheckpointExecutor::builder("unused").storage(storage.clone());
        let executor = builder.arena(4 * chunk).chunk(chunk).detect(Detect::All).build().unwrap();
        let mut expected = Vec::new();
        let mut state = StateDict::new();
        for (seed, (name, view)) in sources().into_iter().enumerate() {
            let memory = pattern(seed as u64, view.len);
            expected.push((name, view.packed(&memory)));
            state.tensor(name, view.source(&Buffer::new(memory))).unwrap();
        }
        let save = executor.save(1, state).unwrap();
        executor.fence().unwrap();
        save.wait(LONG).unwrap();
        let checkpoint = Checkpoint::from_storage(storage, &step_name(1)).unwrap();
        for ((name, bytes), (_, view)) in expected.iter().zip(sources()) {
            assert_eq!(checkpoint.tensor(name).unwrap().shape, view.shape, "{name}");
            assert!(checkpoint.read(name).unwrap() == *bytes, "{name} in chunks of {chunk}");
        }
        assert!(checkpoint.verify().unwrap().is_sound());
        executor.shutdown(LONG).unwrap();
    }
}

#[test]
fn blocks_and_chunks_of_8_mib_end_within_rows_and_elements() {
    let views = [
        ("rows", View::new(Dtype::F32, &[701, 3001], &[12_010, 4])),
        ("transposed", View::new(Dtype::U8, &[3001, 3001], &[1, 3001])),
        ("turned", View::new(Dtype::BF16, &[2100, 2100], &[-2, -4210])),
    ];
    let storage: Arc<dyn Storage> = Arc::new(Memory::new());
    let builder = CheckpointExecutor::builder("unused").storage(storage.clone());
    let executor = builder.arena(8 << 20).chunk((1 << 20) + 4096).build().unwrap();
    let mut state = StateDict::new();
    let mut packed = Vec::new();
    for (seed, (name, view)) in views.iter().enumerate() {
        let memory = noise(view.len, seed as u64);
        packed.push(view.packed(&memory));
        state.tensor(*name, view.source(&Buffer::new(memory))).unwrap();
    }
    let save = executor.save(1, state).unwrap();
    executor.fence().unwrap();
    save.wait(LONG).unwrap();
    let checkpoint = Checkpoint::from_storage(storage, &step_name(1)).unwrap();
    for ((name, _), packed) in views.iter().zip(packed) {
        assert!(packed.len() > 8 << 20);
        assert!(checkpoint.read(name).unwrap() == packed, "{name}");
    }
    executor.shutdown(LONG).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 32, ..ProptestConfig::default() })]
    #[test]
    fn any_tensors_at_strides_are_saved_as_packed_copies_are(
        views in prop::collection::vec(any_view(5), 1..8), seed in any::<u64>(), captured in any::<bool>(),
    ) {
        let fixture = fixture(|b| if captured { b } else { b.capture_budget(0) });
        let (mut strided, mut packed) = (StateDict::new(), StateDict::new());
        for (i, view) in views.iter().enumerate() {
            let memory = noise(view.len, seed >> i);
            let copy = HostTensor::with_dtype(view.packed(&memory), view.dtype, &view.shape);
            packed.tensor(i.to_string(), copy).unwrap();
            strided.tensor(i.to_string(), view.source(&Buffer::new(memory))).unwrap();
        }
        for (step, state) in [(1, strided), (2, packed)] {
            let save = fixture.executor.save(step, state).unwrap();
            fixture.executor.fence().unwrap();
            save.wait(LONG).unwrap();
        }
        let [strided, packed] = [1, 2].map(|step| fixture.checkpoint(step).unwrap());
        for i in 0..views.len() {
            prop_assert_eq!(strided.read(&i.to_string()).unwrap(), packed.read(&i.to_string()).unwrap());
        }
        let digests = |of: &Checkpoint| {
            let tensors = of.contents().unwrap().tensors;
            tensors.iter().map(|tensor| tensor.slices[0].digest).collect::<Vec<_>>()
        };
        prop_assert_eq!(digests(&strided), digests(&packed));
    }
}

/// A tensor of 40 by 400 bytes, transposed.
fn transposed() -> View {
    View::new(Dtype::U8, &[40, 400], &[1, 40])
}

#[test]
fn a_tensor_at_strides_written_without_a_fence_fails_the_save_and_is_named() {
    let fixture = fixture(|b| b);
    let (view, buffer) = (transposed(), Buffer::new(pattern(1, 16_000)));
    fixture.device.hold();
    let mut state = StateDict::new();
    // It fills all slabs before the other is read.
    state.tensor("a.first", Arc::new(pattern(3, 50_000))).unwrap().tensor("b.view", view.source(&buffer)).unwrap();
    let save = fixture.executor.save(1, state).unwrap();
    buffer.fill(&pattern(2, 16_000));
    fixture.device.release();
    let error = save.wait(LONG).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.to_string().contains("b.view"), "{error}");
    assert!(fixture.checkpoint(1).is_err());
}

#[test]
fn a_small_tensor_at_strides_may_change_right_after_save() {
    let fixture = fixture(|b| b);
    let view = View::new(Dtype::F32, &[30, 20], &[-4, 160]);
    let (first, second) = (pattern(1, view.len), pattern(2, view.len));
    for (step, capture) in [(1, None), (2, Some(Capture::AtSave))] {
        let buffer = Buffer::new(first.clone());
        fixture.device.hold();
        let mut state = StateDict::new();
        match capture {
            None => state.tensor("t", view.source(&buffer)).unwrap(),
            Some(capture) => state.tensor_captured("t", view.source(&buffer), capture).unwrap(),
        };
        let save = fixture.executor.save(step, state).unwrap();
        buffer.fill(&second);
        fixture.device.release();
        save.wait(LONG).unwrap();
        assert_eq!(fixture.checkpoint(step).unwrap().read("t").unwrap(), view.packed(&first));
    }
}

#[test]
fn bytes_between_elements_may_change_at_any_time() {
    let fixture = fixture(|b| b.detect(Detect::All));
    let view = View::new(Dtype::U8, &[9000], &[2]);
    let (before, mut after) = (pattern(1, view.len), pattern(2, view.len));
    (0..view.len).step_by(2).for_each(|i| after[i] = before[i]);
    let buffer = Buffer::new(before.clone());
    let mut state = StateDict::new();
    state.tensor("a", Arc::new(pattern(3, 50_000))).unwrap().tensor("t", view.source(&buffer)).unwrap();
    fixture.device.hold();
    let save = fixture.executor.save(1, state).unwrap();
    buffer.fill(&after);
    fixture.device.release();
    save.wait(LONG).unwrap();
    assert_eq!(fixture.checkpoint(1).unwrap().read("t").unwrap(), view.packed(&before));
}

#[test]
fn boxes_and_tied_tensors_lie_at_strides() {
    let fixture = fixture(|b| b);
    let (view, memory) = (transposed(), pattern(1, 16_000));
    let expected = view.packed(&memory);
    let buffer = Buffer::new(memory);
    let half = |at: usize| View { shape: vec![20, 400], first: at, ..view.clone() };
    let mut state = StateDict::new();
    // A row of the tensor is 1 byte after the one before.
    state.tensor_box("boxes", [40, 400], [20, 0], half(20).source(&buffer)).unwrap();
    state.tensor_box("boxes", [40, 400], [0, 0], half(0).source(&buffer)).unwrap();
    state.tensor("body", view.source(&buffer)).unwrap().alias("head", "body").unwrap();
    let save = fixture.executor.save(1, state).unwrap();
    fixture.executor.fence().unwrap();
    save.wait(LONG).unwrap();
    let checkpoint = fixture.checkpoint(1).unwrap();
    for name in ["boxes", "body", "head"] {
        assert!(checkpoint.read(name).unwrap() == expected, "{name}");
    }
}

#[test]
fn a_scope_saves_tensors_at_strides() {
    let fixture = fixture(|b| b);
    let (view, memory) = (transposed(), pattern(1, 16_000));
    let buffer = Buffer::new(memory.clone());
    let save = fixture.executor.scope(Fence::host(), |scope| {
        let mut state = StateDict::new();
        state.tensor("t", view.source(&buffer)).unwrap().tensor("u", &memory[..]).unwrap();
        scope.save_with(1, state, SaveOptions::default())
    });
    let save = save.unwrap().unwrap();
    buffer.fill(&pattern(2, 16_000));
    assert_eq!(Arc::strong_count(&buffer), 1);
    save.wait(LONG).unwrap();
    assert!(fixture.checkpoint(1).unwrap().read("t").unwrap() == view.packed(&memory));
}
