//! Deltas that do not fit, and followers that cannot write: typed errors that name version and tensor, and
//! memory that is as it was.

use crate::fixtures::{MINUTE, Model, publish, small};
use ashore::chain::{Chain, Follow, Publisher, Weights, apply_files, delta_file};
use ashore::storage::local::{Linux, Local};
use ashore::testing::{Call, Effect, Fault, Faulty};
use ashore::{CheckpointExecutor, Dtype, Error, ErrorKind, Form, HostTensor, StateDict};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A step of one tensor.
fn step(root: &Path, step: u64, dtype: Dtype, shape: &[usize], bytes: Vec<u8>) -> PathBuf {
    let executor = CheckpointExecutor::builder(root).arena(4 << 20).chunk(1 << 20).build().unwrap();
    let mut state = StateDict::new();
    state.tensor("w", HostTensor::from_owner(bytes, dtype, shape)).unwrap();
    let save = executor.save(step, state).unwrap();
    save.wait(MINUTE).unwrap().committed().unwrap().path
}

fn names(error: &Error, step: u64) {
    let text = error.to_string();
    assert!(text.contains("tensor=\"w\"") && text.contains(&format!("step={step}")), "{text}");
}

#[test]
fn a_delta_for_another_base_dtype_or_shape_names_version_and_tensor() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let bytes = |seed: u8| (0..4096).map(|i| (i as u8).wrapping_mul(seed)).collect::<Vec<u8>>();
    let old = step(&at("a"), 1, Dtype::BF16, &[2048], bytes(3));
    let mut changed = bytes(3);
    changed[100] ^= 1;
    let new = step(&at("a"), 2, Dtype::BF16, &[2048], changed.clone());
    let report = delta_file(&old, &new, Form::Packed, &at("delta")).unwrap();
    assert_eq!((report.version, report.changed), (2, 1));

    let wrong = [
        step(&at("b"), 1, Dtype::BF16, &[2048], bytes(5)),
        step(&at("c"), 1, Dtype::F16, &[2048], bytes(3)),
        step(&at("d"), 1, Dtype::BF16, &[2, 1024], bytes(3)),
        step(&at("e"), 1, Dtype::BF16, &[1024], bytes(3)[..2048].to_vec()),
    ];
    for (number, base) in wrong.iter().enumerate() {
        let error = apply_files(base, &[at("delta")], &at("out")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{number}: {error}");
        names(&error, 2);
        assert!(!at("out").exists());
    }
    apply_files(&old, &[at("delta")], &at("out")).unwrap();
    assert_eq!(ashore::Checkpoint::open(at("out")).unwrap().read("w").unwrap(), changed);
    assert_eq!(delta_file(&new, &old, Form::Packed, &at("back")).unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(delta_file(&old, &wrong[1], Form::Packed, &at("x")).unwrap_err().kind(), ErrorKind::Invalid);

    let columns = at("delta").join("delta.safetensors");
    let mut damaged = std::fs::read(&columns).unwrap();
    *damaged.last_mut().unwrap() ^= 1;
    std::fs::write(columns, damaged).unwrap();
    let kind = |base: &Path| apply_files(base, &[at("delta")], &at("y")).unwrap_err().kind();
    assert_eq!(kind(&old), ErrorKind::Corrupt);
    assert_eq!(kind(&wrong[2]), ErrorKind::Invalid, "compared with the base before its columns are read");
}

/// A chain of two versions, and a follower at the first.
fn behind(root: &Path) -> (Model, Follow<'static>) {
    let publisher = small(Publisher::open(root).unwrap());
    let mut model = Model::new(1, 8000);
    publish(&publisher, &model).unwrap();
    let first = model.clone();
    let mut follow = Follow::open(root).unwrap().start(Weights::new()).unwrap();
    follow.advance(MINUTE).unwrap();
    model.update(2, 50);
    publish(&publisher, &model).unwrap();
    (first, follow)
}

#[test]
fn any_byte_of_a_delta_that_changes_is_found_before_the_first_write() {
    let root = tempfile::tempdir().unwrap();
    let (first, mut follow) = behind(root.path());
    let folder = root.path().join("v-00000002");
    let file = folder.join("delta.safetensors");
    let good = std::fs::read(&file).unwrap();
    for at in (4096..good.len()).step_by(37) {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        std::fs::write(&file, bad).unwrap();
        let error = follow.advance(MINUTE).unwrap_err();
        assert_eq!((error.kind(), error.step()), (ErrorKind::Corrupt, Some(2)), "{error}");
        assert!(error.to_string().contains("tensor="), "{error}");
        first.assert_equals(follow.weights());
    }
    std::fs::write(&file, &good[..good.len() - 1]).unwrap();
    assert_eq!(follow.advance(MINUTE).unwrap_err().kind(), ErrorKind::Corrupt);
    first.assert_equals(follow.weights());
    std::fs::write(&file, good).unwrap();
    assert_eq!(follow.advance(MINUTE).unwrap(), Some(2));
}

#[test]
fn a_version_with_a_damaged_manifest_is_no_version() {
    let root = tempfile::tempdir().unwrap();
    let (first, mut follow) = behind(root.path());
    let file = root.path().join("v-00000002/manifest.json");
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    assert_eq!(Chain::open(root.path()).unwrap().versions().unwrap().len(), 1);
    assert_eq!(follow.advance(std::time::Duration::ZERO).unwrap(), None);
    first.assert_equals(follow.weights());
}

#[test]
fn lent_memory_of_another_dtype_or_shape_is_not_written() {
    let root = tempfile::tempdir().unwrap();
    let publisher = small(Publisher::open(root.path()).unwrap());
    publish(&publisher, &Model::new(1, 8000)).unwrap();
    for (name, dtype, shape) in [
        ("layer.weight", Dtype::F16, [1000, 8]),
        ("layer.weight", Dtype::BF16, [8, 1000]),
        ("other", Dtype::BF16, [1000, 8]),
    ] {
        let (mut memory, mut weights) = (vec![7_u8; 16_000], Weights::new());
        weights.lend(name, dtype, &shape, &mut memory).unwrap();
        let mut follow = Follow::open(root.path()).unwrap().start(weights).unwrap();
        let error = follow.advance(MINUTE).unwrap_err();
        let text = error.to_string();
        assert_eq!((error.kind(), error.step()), (ErrorKind::Invalid, Some(1)), "{text}");
        assert!(text.contains(&format!("tensor={name:?}")), "{text}");
        assert_eq!(follow.version(), None);
        drop(follow);
        assert_eq!(memory, [7; 16_000]);
    }
    let mut memory = [0; 3];
    assert_eq!(Weights::new().lend("w", Dtype::BF16, &[2], &mut memory).unwrap_err().kind(), ErrorKind::Invalid);
}

#[test]
fn lent_memory_is_all_of_a_version_and_tied_as_the_version_is_where_the_program_says_so() {
    let root = tempfile::tempdir().unwrap();
    let publisher = small(Publisher::open(root.path()).unwrap());
    let model = Model::new(1, 8000);
    publish(&publisher, &model).unwrap();
    let embedding = ("embedding.weight", Dtype::BF16, vec![1000, 8]);
    let layer = ("layer.weight", Dtype::BF16, vec![1000, 8]);
    let scale = ("scale", Dtype::F32, vec![4]);
    // Each case: the lent memory, a second name of its first tensor, and the tensor that the error names.
    for (lent, tied, named) in [
        (vec![&embedding, &layer], None, Some("scale")),
        (vec![&embedding, &layer, &scale], None, None),
        (vec![&embedding, &layer, &scale], Some("head.weight"), None),
        (vec![&embedding, &scale], Some("layer.weight"), Some("layer.weight")),
        (vec![&embedding, &layer, &scale], Some("other"), Some("other")),
    ] {
        let mut memory = vec![vec![7_u8; 16_000]; 3];
        let mut weights = Weights::new();
        for ((name, dtype, shape), memory) in lent.iter().zip(&mut memory) {
            let length = shape.iter().product::<usize>() * dtype.bitsize() / 8;
            weights.lend(*name, *dtype, shape, &mut memory[..length]).unwrap();
        }
        if let Some(name) = tied {
            weights.lend_alias(name, "embedding.weight");
        }
        weights.strict();
        let mut follow = Follow::open(root.path()).unwrap().start(weights).unwrap();
        let advanced = follow.advance(MINUTE);
        let Some(named) = named else {
            assert_eq!(advanced.unwrap(), Some(1));
            model.assert_equals(follow.weights());
            assert_eq!(follow.weights().holder("head.weight"), Some("embedding.weight"));
            assert_eq!((follow.weights().holder("scale"), follow.weights().holder("none")), (Some("scale"), None));
            continue;
        };
        let error = advanced.unwrap_err();
        let text = error.to_string();
        assert_eq!((error.kind(), error.step()), (ErrorKind::Invalid, Some(1)), "{text}");
        assert!(text.contains(&format!("tensor={named:?}")), "{text}");
        drop(follow);
        assert!(memory.iter().flatten().all(|byte| *byte == 7));
    }
}

#[test]
fn a_follower_without_space_or_without_write_access_keeps_its_version() {
    for (call, code, kind) in [
        (Call::Pwrite, libc::ENOSPC, ErrorKind::NoSpace),
        (Call::Mkdir, libc::EACCES, ErrorKind::Invalid),
        (Call::Mkdir, libc::EROFS, ErrorKind::Unavailable),
        (Call::Fsync, libc::EIO, ErrorKind::Unavailable),
    ] {
        let (root, own) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let publisher = small(Publisher::open(root.path()).unwrap());
        let mut model = Model::new(1, 8000);
        publish(&publisher, &model).unwrap();
        let first = model.clone();
        let faulty = Faulty::unsynced(Arc::new(Linux));
        let copies = Arc::new(Local::with_sys(faulty.clone(), own.path()).unwrap());
        let follower = Follow::open(root.path()).unwrap().copy_to_storage(copies);
        let mut follow = follower.start(Weights::new()).unwrap();
        follow.advance(MINUTE).unwrap();
        model.update(2, 50);
        publish(&publisher, &model).unwrap();
        faulty.fail(Fault { call: Some(call), after: 0, sticky: true, effect: Effect::Refused(code) });
        let error = follow.advance(MINUTE).unwrap_err();
        assert_eq!((error.kind(), error.step()), (kind, Some(2)), "{call:?}: {error}");
        assert!(error.path().unwrap().starts_with(own.path()), "{error}");
        first.assert_equals(follow.weights());
        faulty.heal();
        assert_eq!(follow.advance(MINUTE).unwrap(), Some(2), "once it can write again");
        model.assert_equals(follow.weights());
    }
}
