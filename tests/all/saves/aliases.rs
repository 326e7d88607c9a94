//! Tied tensors: written once, restored under every name.

use crate::fixtures::executor::{LONG, fixture};
use ashore::{ErrorKind, HostTensor, StateDict, Targets};
use std::sync::Arc;

fn embedding() -> HostTensor<Arc<Vec<f32>>> {
    HostTensor::new(Arc::new((0..8).map(|i| i as f32).collect()), [4, 2])
}

#[test]
fn tied_tensors_are_written_once_and_restored_under_both_names() {
    let fixture = fixture(|b| b);
    // With and without aliases in turn: a plan is not taken for the structure of the other.
    for step in 1..=4 {
        let mut state = StateDict::new();
        state.tensor("m.embedding", embedding()).unwrap().tensor("m.bias", Arc::new(vec![1_i64; 2])).unwrap();
        if step % 2 == 0 {
            state.alias("a.head", "m.embedding").unwrap().alias("z.head", "a.head").unwrap();
        }
        assert_eq!(state.bytes(), 48);
        fixture.executor.save(step, state).unwrap().wait(LONG).unwrap();
    }
    let expected: Vec<f32> = (0..8).map(|i| i as f32).collect();
    for step in 1..=4 {
        let checkpoint = fixture.checkpoint(step).unwrap();
        assert!(checkpoint.verify().unwrap().is_sound());
        let names: Vec<_> = checkpoint.tensors().unwrap().map(|tensor| tensor.name).collect();
        if step % 2 == 1 {
            assert_eq!(names, ["m.bias", "m.embedding"]);
            continue;
        }
        assert_eq!(names, ["a.head", "m.bias", "m.embedding", "z.head"]);
        for name in ["a.head", "m.embedding", "z.head"] {
            assert_eq!(checkpoint.tensor(name).unwrap().shape, [4, 2]);
            assert_eq!(checkpoint.read_as::<f32>(name).unwrap(), expected);
        }
        let (mut head, mut body) = ([0.0_f32; 8], [0.0_f32; 8]);
        checkpoint.read_into(Targets::new().elements("z.head", &mut head).elements("m.embedding", &mut body)).unwrap();
        assert_eq!((head, body), (head, head));
        assert_eq!(
            checkpoint.read_slice("a.head", &[1..2, 0..2]).unwrap(),
            [2.0_f32, 3.0].map(f32::to_le_bytes).concat()
        );
        // The bytes are in the file once.
        let entries = checkpoint.contents().unwrap().tensors;
        assert_eq!(entries[0].slices, entries[2].slices);
        let data: u64 = checkpoint.contents().unwrap().files.iter().map(|file| file.length - file.data).sum();
        assert_eq!(data, 48);
    }
}

#[test]
fn a_tensor_in_boxes_has_aliases() {
    let fixture = fixture(|b| b);
    let mut state = StateDict::new();
    for row in 0..4_usize {
        let part = HostTensor::new(Arc::new(vec![row as f32; 2]), [1, 2]);
        state.tensor_box("body", [4, 2], [row, 0], part).unwrap();
    }
    state.alias("head", "body").unwrap();
    fixture.executor.save(1, state).unwrap().wait(LONG).unwrap();
    let checkpoint = fixture.checkpoint(1).unwrap();
    assert_eq!(checkpoint.read_as::<f32>("head").unwrap(), [0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0]);
    assert!(checkpoint.verify().unwrap().is_sound());
}

#[test]
fn aliases_follow_when_names_change() {
    let tied = || {
        let mut state = StateDict::new();
        state.tensor("body", embedding()).unwrap().alias("a", "body").unwrap().alias("b", "body").unwrap();
        state
    };
    let aliases = |state: &StateDict<'_>| -> Vec<(String, String)> {
        state.aliases().map(|(name, holder)| (name.to_owned(), holder.to_owned())).collect()
    };
    let prefixed = tied().renamed(|name| Some(format!("x.{name}"))).unwrap();
    let pair = |name: &str, holder: &str| (name.to_owned(), holder.to_owned());
    assert_eq!(aliases(&prefixed), [pair("x.a", "x.body"), pair("x.b", "x.body")]);
    // Without their holder, an alias becomes the tensor.
    let pruned = tied().renamed(|name| (name != "body").then(|| name.to_owned())).unwrap();
    assert_eq!(pruned.layouts().map(|(name, _)| name).collect::<Vec<_>>(), ["a"]);
    assert_eq!(aliases(&pruned), [pair("b", "a")]);
    let alone = tied().renamed(|name| (name == "body").then(|| name.to_owned())).unwrap();
    assert!(alone.aliases().next().is_none());
}

#[test]
fn aliases_that_name_nothing_or_too_much_are_refused() {
    let mut state = StateDict::new();
    state.tensor("body", embedding()).unwrap().alias("head", "body").unwrap();
    for (name, holder, why) in [
        ("other", "missing", "add that first"),
        ("", "body", "cannot have this name"),
        ("__metadata__", "body", "cannot have this name"),
        ("head", "body", "the same name"),
        ("body", "body", "the same name"),
    ] {
        let error = state.alias(name, holder).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.to_string().contains(why) && error.to_string().contains("alias_of="), "{error}");
    }
    let error = state.tensor("head", embedding()).unwrap_err();
    assert!(error.to_string().contains("the same name"), "{error}");
}
