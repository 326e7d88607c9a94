//! Tensors in boxes, and what one rank saves of them.

use ashore::storage::{Memory, Storage};
use ashore::{Checkpoint, CheckpointExecutor, Dtype, ErrorKind, HostTensor, StateDict, id::step_name};
use std::sync::Arc;
use std::time::Duration;

const LONG: Duration = Duration::from_secs(60);

fn executor(storage: &Arc<dyn Storage>) -> CheckpointExecutor {
    CheckpointExecutor::builder("unused").storage(storage.clone()).arena(4 * 4096).chunk(4096).build().unwrap()
}

/// Rows `from..to` of a tensor of 3 columns in which every element is its own index.
fn rows(from: u32, to: u32) -> HostTensor<Vec<u32>> {
    HostTensor::new((3 * from..3 * to).collect(), [(to - from) as usize, 3])
}

#[test]
fn one_rank_saves_boxes_that_cover_their_tensor() {
    let storage: Arc<dyn Storage> = Arc::new(Memory::new());
    let executor = executor(&storage);
    for (step, cuts) in [(7, vec![0, 2, 2, 5, 3000]), (8, vec![0, 3000])] {
        let mut state = StateDict::new();
        // The last boxes first: the order does not matter.
        for pair in cuts.windows(2).rev() {
            state.tensor_box("w", [3000, 3], [pair[0] as usize, 0], rows(pair[0], pair[1])).unwrap();
        }
        state.tensor("whole", vec![1_u8; 5]).unwrap();
        state.tensor_box("nothing", [0, 4], [0, 2], HostTensor::new(vec![0_f32; 0], [0, 2])).unwrap();
        state.value("epoch", &3).unwrap().rank_value("next_sample", &4096).unwrap();
        executor.save(step, state).unwrap().wait(LONG).unwrap();
        let checkpoint = Checkpoint::from_storage(storage.clone(), &step_name(step)).unwrap();
        assert_eq!(checkpoint.read_as::<u32>("w").unwrap(), (0..9000).collect::<Vec<u32>>());
        assert_eq!(checkpoint.read_slice_as::<u32>("w", &[1..3, 1..2]).unwrap(), [4, 7]);
        assert_eq!(checkpoint.read("whole").unwrap(), [1; 5]);
        assert_eq!(checkpoint.tensor("nothing").unwrap().shape, [0, 4]);
        assert_eq!(checkpoint.value::<u64>("next_sample").unwrap(), 4096);
        let report = checkpoint.verify().unwrap();
        assert!(report.is_sound(), "{report:?}");
    }
    executor.shutdown(LONG).unwrap();
}

#[test]
fn one_rank_refuses_boxes_that_do_not_cover_their_tensor() {
    let storage: Arc<dyn Storage> = Arc::new(Memory::new());
    let executor = executor(&storage);
    for (boxes, why) in [
        (vec![(0, 4)], "this executor saves for one rank, and its boxes do not cover a tensor"),
        (vec![(0, 4), (3, 10)], "boxes of a tensor overlap and are not the same"),
    ] {
        let mut state = StateDict::new();
        for (from, to) in boxes {
            state.tensor_box("w", [10, 3], [from as usize, 0], rows(from, to)).unwrap();
        }
        let refused = executor.save(7, state).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Invalid);
        assert!(refused.message().starts_with(why) && refused.message().contains("tensor=\"w\""), "{refused}");
    }
    assert!(storage.list().unwrap().is_empty());
    executor.shutdown(LONG).unwrap();
}

#[test]
fn boxes_outside_their_tensor_are_refused() {
    let mut state = StateDict::new();
    let four = || HostTensor::new(vec![0_f32; 4], [2, 2]);
    let f4 = |shape: [usize; 2]| HostTensor::with_dtype(vec![0_u8; shape[0] * shape[1] / 2], Dtype::F4, shape);
    let f6 = |shape: [usize; 2]| HostTensor::with_dtype(vec![0_u8; shape[0] * shape[1] * 6 / 8], Dtype::F6_E2M3, shape);
    state.tensor_box("w", [4, 2], [2, 0], four()).unwrap();
    state.tensor("whole", vec![0_u8]).unwrap();
    let wrong = [
        ("beyond", state.tensor_box("v", [4, 2], [3, 0], four()).err()),
        ("overflow", state.tensor_box("v", [4, 2], [usize::MAX, 0], four()).err()),
        ("dimensions of the begin", state.tensor_box("v", [4, 2], [2], four()).err()),
        ("dimensions of the tensor", state.tensor_box("v", [4, 2, 1], [2, 0, 0], four()).err()),
        ("too large", state.tensor_box("v", [usize::MAX, 2], [2, 0], four()).err()),
        ("no name", state.tensor_box("", [4, 2], [2, 0], four()).err()),
        ("another shape", state.tensor_box("w", [5, 2], [0, 0], four()).err()),
        ("another dtype", state.tensor_box("w", [4, 2], [0, 0], HostTensor::new(vec![0_i32; 4], [2, 2])).err()),
        ("whole and in boxes", state.tensor_box("whole", [1], [0], vec![0_u8]).err()),
        ("in boxes and whole", state.tensor("w", four()).err()),
        ("half a byte", state.tensor_box("f4", [2, 8], [0, 3], f4([2, 2])).err()),
        ("half a byte of the whole", state.tensor_box("f4", [2, 7], [0, 2], f4([2, 2])).err()),
        ("rows of 6 bits", state.tensor_box("f6", [4, 6], [0, 0], f6([2, 2])).err()),
    ];
    for (why, error) in wrong {
        let error = error.expect(why);
        assert_eq!(error.kind(), ErrorKind::Invalid, "{why}");
        assert!(error.message().contains(" tensor="), "{why}: {error}");
    }
    state.tensor_box("f4", [2, 8], [0, 2], f4([2, 2])).unwrap();
    state.tensor_box("f6", [4, 6], [0, 0], f6([2, 6])).unwrap();
    state.tensor_box("g6", [4, 8], [2, 0], f6([2, 4])).unwrap();
    assert_eq!(state.len(), 5);
}

#[test]
fn values_of_one_rank_and_of_all_share_their_names() {
    let mut state = StateDict::new();
    state.value("a", &1).unwrap().rank_value("b", &2).unwrap();
    for error in [
        state.value("b", &1).unwrap_err(),
        state.rank_value("a", &1).unwrap_err(),
        state.rank_value("b", &1).unwrap_err(),
    ] {
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    }
    let renamed = state.renamed(|name| Some(format!("m.{name}"))).unwrap();
    assert_eq!(renamed.value_names().collect::<Vec<_>>(), ["m.a"]);
}

/// Regression: a shard of a process that saved boxes alone was taken for a file of values.
#[test]
fn values_of_a_process_that_saves_boxes_alone_are_found() {
    let storage: Arc<dyn Storage> = Arc::new(Memory::new());
    let executor = executor(&storage);
    let mut state = StateDict::new();
    for row in 0..2_usize {
        let part = HostTensor::new(Arc::new(vec![row as f32; 2]), [1, 2]);
        state.tensor_box("t", [2, 2], [row, 0], part).unwrap();
    }
    state.rank_value("seed", &7).unwrap();
    executor.save(1, state).unwrap().wait(LONG).unwrap();
    let checkpoint = Checkpoint::from_storage(storage, &step_name(1)).unwrap();
    assert_eq!(checkpoint.rank_value::<u64>(0, "seed").unwrap(), 7);
    assert_eq!(checkpoint.rank_values::<u64>("seed").unwrap(), [(0, 7)].into());
    for file in 0..checkpoint.contents().unwrap().files.len() {
        assert!(checkpoint.values_beside(file).unwrap().is_empty());
    }
}
