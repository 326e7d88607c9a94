//! Values of single ranks, names that share their bytes, and boxes, of steps that one rank saved.

use super::fixtures::{Expected, MINUTE, assert_equal, assert_plain, convert, json, of_session};
use ashore::{CheckpointExecutor, Dtype, HostTensor, StateDict};
use std::path::{Path, PathBuf};

/// Saves `state` as step 1 by an executor.
fn saved(root: &Path, executor: &CheckpointExecutor, state: StateDict<'static>) -> PathBuf {
    executor.save(1, state).unwrap().wait(MINUTE).unwrap();
    executor.shutdown(MINUTE).unwrap();
    root.join("step-00000001")
}

fn alone(root: &Path) -> CheckpointExecutor {
    CheckpointExecutor::builder(root).arena(4 << 20).chunk(1 << 20).alone().build().unwrap()
}

fn f32s(shape: &[usize]) -> (Dtype, Vec<usize>, Vec<u8>) {
    (Dtype::F32, shape.to_vec(), (0..4 * shape.iter().product::<usize>()).map(|i| i as u8).collect())
}

const LAYOUTS: [&[&str]; 2] = [&["--to", "hf"], &["--to", "ranks", "2"]];

/// The shard of such a rank is named as that of a process that saved alone, and its values stand beside it.
#[test]
fn a_session_of_one_rank_keeps_its_values() {
    let root = tempfile::tempdir().unwrap();
    let mut state = StateDict::new();
    let tensor = f32s(&[4, 2]);
    state.tensor("weight", HostTensor::with_dtype(tensor.2.clone(), tensor.0, tensor.1.clone())).unwrap();
    state.rank_value("seed", &100).unwrap().value("epoch", &3).unwrap();
    let step = saved(root.path(), &of_session(root.path(), 0, 1), state);
    assert!(step.join("model.table").exists());
    let expected: Expected = [("weight".into(), tensor)].into();
    for to in LAYOUTS {
        let output = root.path().join(to.concat());
        let report = json(&convert(&[to, &["--json"]].concat(), &step, &output).output().unwrap());
        assert_eq!(report["left_out"], serde_json::json!([]));
        let checkpoint = assert_equal(&output, &expected);
        assert_eq!(checkpoint.rank_value::<u32>(0, "seed").unwrap(), 100, "{to:?}");
        assert_eq!(checkpoint.value::<u32>("epoch").unwrap(), 3);
    }
}

/// One process has rows of a tensor and no others, as a rank that saves by itself.
#[test]
fn boxes_of_one_process_become_whole_tensors_and_parts() {
    let root = tempfile::tempdir().unwrap();
    let (mut state, tensor) = (StateDict::new(), f32s(&[6, 2]));
    for (at, rows) in [(0, 4), (4, 2)] {
        let bytes = tensor.2[8 * at..8 * (at + rows)].to_vec();
        let part = HostTensor::with_dtype(bytes, tensor.0, vec![rows, 2]);
        state.tensor_box("weight", [6, 2], [at, 0], part).unwrap();
    }
    state.rank_value("seed", &100).unwrap().value("epoch", &3).unwrap();
    let step = saved(root.path(), &alone(root.path()), state);
    let expected: Expected = [("weight".into(), tensor)].into();
    for to in LAYOUTS {
        let output = root.path().join(to.concat());
        json(&convert(&[to, &["--json"]].concat(), &step, &output).output().unwrap());
        let checkpoint = assert_equal(&output, &expected);
        assert_eq!(checkpoint.value::<u32>("epoch").unwrap(), 3);
        assert_eq!(checkpoint.value::<u32>("seed").unwrap(), 100);
        if to == LAYOUTS[0] {
            assert_plain(&output, &expected);
        }
    }
}

/// Of the names of a tied tensor, readers of the shards find the one that the model has the bytes under, also
/// where another one comes before it in the alphabet.
#[test]
fn the_holder_of_the_step_holds_the_bytes() {
    let root = tempfile::tempdir().unwrap();
    let (holder, tied, tensor) = ("model.embed_tokens.weight", "lm_head.weight", f32s(&[4, 2]));
    let mut state = StateDict::new();
    state.tensor(holder, HostTensor::with_dtype(tensor.2.clone(), tensor.0, tensor.1.clone())).unwrap();
    state.alias(tied, holder).unwrap().alias("output.weight", holder).unwrap();
    let step = saved(root.path(), &alone(root.path()), state);
    let of = |names: &[&str]| -> Expected { names.iter().map(|name| ((*name).into(), tensor.clone())).collect() };
    for to in LAYOUTS {
        let output = root.path().join(to.concat());
        let report = json(&convert(&[to, &["--json"]].concat(), &step, &output).output().unwrap());
        assert_eq!(report["aliases"], serde_json::json!([tied, "output.weight"]));
        assert_equal(&output, &of(&[holder, tied, "output.weight"]));
        if to == LAYOUTS[0] {
            assert_plain(&output, &of(&[holder]));
        }
    }
    // Without its holder, an alias has the bytes.
    let head = root.path().join("head");
    let report = json(&convert(&["--to", "hf", "--json", "--prefix", "lm_head."], &step, &head).output().unwrap());
    assert_eq!(report["aliases"], serde_json::json!([]));
    assert_plain(&head, &of(&[tied]));
}
