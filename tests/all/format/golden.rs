//! Steps that earlier writers left, byte for byte: a later library reads every one of them.

use ashore::{Catalog, Checkpoint, Dtype};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn samples(version: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/all/format/golden").join(version)
}

/// Checks the contents that all samples share.
fn check(checkpoint: &Checkpoint) {
    let weight: Vec<f32> = checkpoint.read_as("layer.1.weight").unwrap();
    assert_eq!(weight, [-0.5, 0.5, 1.5, 2.5, 3.5, 4.5]);
    assert_eq!(checkpoint.tensor("layer.1.weight").unwrap().shape, [2, 3]);
    assert_eq!(checkpoint.read_as::<i64>("layer.1.bias").unwrap(), [-1, 7]);
    assert_eq!(checkpoint.read_as::<f64>("scalar").unwrap(), [0.1]);
    let empty = checkpoint.tensor("empty").unwrap();
    assert_eq!((empty.dtype, empty.shape, empty.bytes), (Dtype::F32, &[3, 0][..], 0));
    assert_eq!(checkpoint.read("caf\u{e9} \"quoted\"").unwrap(), (0..40).collect::<Vec<u8>>());
    assert_eq!(checkpoint.value::<u32>("epoch").unwrap(), 3);
    let rates: BTreeMap<String, f64> = checkpoint.value("rates").unwrap();
    assert!(rates["bad"].is_nan() && rates["lr"] == 0.1);
    assert_eq!(checkpoint.metadata::<String>("run").unwrap(), "golden");
    assert_eq!(checkpoint.world(), 1);
    let report = checkpoint.verify().unwrap();
    assert!(report.is_sound() && report.tensors == 5, "{report:?}");
}

#[test]
fn steps_of_every_version_are_read_in_full() {
    for version in ["v1", "v2"] {
        for step in [101, 102] {
            let checkpoint = Checkpoint::open(samples(version).join(format!("step-{step:08}"))).unwrap();
            assert_eq!(format!("v{}", checkpoint.manifest().version), version);
            check(&checkpoint);
        }
        let steps = Catalog::open(samples(version)).unwrap().list().unwrap();
        assert_eq!(steps.iter().map(|entry| entry.step).collect::<Vec<_>>(), [101, 102]);
    }
}

/// A program that knew only `docs/format.md` made this one from the step of the same number of version 2.
#[test]
fn a_step_with_split_tables_is_read_in_full() {
    let checkpoint = Checkpoint::open(samples("split/step-00000102")).unwrap();
    check(&checkpoint);
    assert_eq!(checkpoint.manifest().tables.len(), 2);
    assert_eq!(checkpoint.values_beside(1).unwrap(), [("rng".into(), 1.into())].into());
}
