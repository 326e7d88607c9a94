//! Datarax's handler, method by method.

use super::identical::{assert_saved_by_the_executor, files};
use ashore::compat::datarax::{Checkpointable, IteratorCheckpoint, OrbaxCheckpointHandler, PrngKey, SaveArgs, State};
use ashore::{Dtype, Error, ErrorKind, Result, Settings};
use std::fmt::Debug;
use tempfile::tempdir;

fn handler() -> OrbaxCheckpointHandler {
    let mut settings = Settings::default();
    (settings.arena, settings.chunk) = (1 << 20, 1 << 16);
    OrbaxCheckpointHandler::with_settings(settings)
}

fn state(seed: u32) -> State {
    let mut state = State::new();
    state.array("params.w", (0..5000).map(|i| (i + seed) as f32).collect::<Vec<_>>(), [50, 100]).unwrap();
    state.array("params.steps", vec![seed], []).unwrap();
    state.array("empty", Vec::<u8>::new(), [0, 3]).unwrap();
    state.key("rng", PrngKey::threefry2x32(u64::from(seed) << 31)).unwrap();
    let batch = PrngKey { implementation: "unsafe_rbg".into(), shape: vec![2, 4], data: (seed..seed + 8).collect() };
    state.key("keys", batch).unwrap();
    state.value("name", "threefry2x32 \u{e9}\n$f64").unwrap().value("lr", &f64::NAN.to_bits()).unwrap();
    state.value("seed", &seed).unwrap();
    state
}

#[track_caller]
fn kind<T: Debug>(result: Result<T>) -> ErrorKind {
    result.expect_err("an error").kind()
}

#[test]
fn a_save_with_a_step_and_one_without_are_where_datarax_has_them() {
    let root = tempdir().unwrap();
    let at = |name: &str| root.path().join(name);
    let handler = handler();
    assert_eq!(handler.save(root.path(), &state(1), SaveArgs::default()).unwrap(), at("checkpoint"));
    assert_eq!(handler.save(root.path(), &state(2), SaveArgs::step(1000)).unwrap(), at("ckpt-1000"));
    assert_eq!(handler.restore(root.path(), None).unwrap(), state(2), "steps come first");
    assert_eq!(handler.restore(root.path(), Some(1000)).unwrap(), state(2));
    assert_eq!(ashore::Checkpoint::open(at("checkpoint")).unwrap().value::<u32>("seed").unwrap(), 1);
    handler.close().unwrap();
    assert_eq!(std::fs::read_to_string(at("latest")).unwrap(), "ckpt-1000\n");
    assert_saved_by_the_executor(&at("checkpoint"));
    assert_saved_by_the_executor(&at("ckpt-1000"));
}

#[test]
fn keys_come_back_with_their_implementation_and_strings_as_strings() {
    let root = tempdir().unwrap();
    let handler = handler();
    handler.save(root.path(), &state(7), SaveArgs::default()).unwrap();
    let restored = handler.restore(root.path(), None).unwrap();
    assert_eq!(restored, state(7));
    assert_eq!(restored.get_key("rng").unwrap(), &PrngKey::threefry2x32(7 << 31));
    assert_eq!(restored.get_key("keys").unwrap().implementation, "unsafe_rbg");
    assert_eq!(restored.get_value::<String>("name").unwrap(), "threefry2x32 \u{e9}\n$f64");
    assert_eq!(restored.get_elements::<f32>("params.w").unwrap()[4999], 5006.0);
    let array = restored.get_array("params.w").unwrap();
    assert_eq!((array.dtype(), array.shape()), (Dtype::F32, &[50, 100][..]));
    for wrong in
        [kind(restored.get_array("rng")), kind(restored.get_key("name")), kind(restored.get_value::<u8>("name"))]
    {
        assert_eq!(wrong, ErrorKind::Invalid);
    }
    assert_eq!(kind(restored.get_elements::<u8>("params.w")), ErrorKind::Invalid);
    assert_eq!(kind(restored.get_key("absent")), ErrorKind::NotFound);
}

#[test]
fn a_step_that_is_missing_is_an_error_not_another_checkpoint() {
    let root = tempdir().unwrap();
    let handler = handler();
    assert_eq!(kind(handler.restore(root.path().join("nowhere"), None)), ErrorKind::NotFound);
    assert_eq!(kind(handler.restore(root.path(), None)), ErrorKind::NotFound);
    handler.save(root.path(), &state(1), SaveArgs::default()).unwrap();
    handler.save(root.path(), &state(2), SaveArgs::step(7)).unwrap();
    let error = handler.restore(root.path(), Some(8)).unwrap_err();
    assert_eq!((error.kind(), error.step()), (ErrorKind::NotFound, Some(8)));
    assert_eq!(kind(handler.restore_metadata(root.path(), Some(8))), ErrorKind::NotFound);
    assert_eq!(handler.list_checkpoints(root.path().join("nowhere")).unwrap().len(), 0);
}

#[test]
fn only_the_newest_steps_are_kept() {
    let root = tempdir().unwrap();
    let handler = handler();
    let steps = || handler.get_checkpoint_steps(root.path()).unwrap();
    handler.save(root.path(), &state(0), SaveArgs::default()).unwrap();
    for step in [9, 10, 100] {
        handler.save(root.path(), &state(step as u32), SaveArgs::step(step).keep(None)).unwrap();
    }
    assert_eq!(steps(), [9, 10, 100]);
    handler.save(root.path(), &state(101), SaveArgs::step(101).keep(3)).unwrap();
    assert_eq!(steps(), [10, 100, 101]);
    handler.save(root.path(), &state(102), SaveArgs::step(102).keep(0)).unwrap();
    assert_eq!(steps(), [10, 100, 101, 102]);
    handler.save(root.path(), &state(103), SaveArgs::step(103)).unwrap();
    assert_eq!((steps(), handler.latest_step(root.path()).unwrap()), (vec![103], Some(103)));
    assert!(root.path().join("checkpoint").exists(), "one without a step is not counted");
}

#[test]
fn steps_are_found_under_their_names_and_listed_where_they_are() {
    let root = tempdir().unwrap();
    let handler = handler();
    for step in [5, 20] {
        handler.save(root.path(), &state(step as u32), SaveArgs::step(step).keep(None)).unwrap();
    }
    std::fs::rename(root.path().join("ckpt-5"), root.path().join("5")).unwrap();
    std::fs::create_dir(root.path().join("ckpt-99")).unwrap();
    std::fs::create_dir(root.path().join("77")).unwrap();
    let listed = handler.list_checkpoints(root.path()).unwrap();
    assert_eq!(listed.into_iter().collect::<Vec<_>>(), [(5, root.path().join("5")), (20, root.path().join("ckpt-20"))]);
    assert_eq!(handler.restore(root.path(), Some(5)).unwrap(), state(5));
    assert_eq!(kind(handler.save(root.path(), &state(6), SaveArgs::step(5))), ErrorKind::Conflict);
    let again = handler.save(root.path(), &state(6), SaveArgs::step(5).keep(None).overwrite()).unwrap();
    assert_eq!(again, root.path().join("5"), "a step has one place");
    assert_eq!(handler.restore(root.path(), Some(5)).unwrap(), state(6));
}

#[test]
fn an_existing_checkpoint_is_replaced_only_with_overwrite() {
    let root = tempdir().unwrap();
    let handler = handler();
    for args in [SaveArgs::default(), SaveArgs::step(3)] {
        let path = handler.save(root.path(), &state(1), args.clone()).unwrap();
        let before = files(&path);
        assert_eq!(kind(handler.save(root.path(), &state(2), args.clone())), ErrorKind::Conflict);
        assert!(files(&path) == before);
        handler.save(root.path(), &state(2), args.clone().overwrite()).unwrap();
        assert_eq!(handler.restore(root.path(), args.step).unwrap(), state(2));
    }
}

#[test]
fn metadata_is_read_without_the_tensors() {
    let root = tempdir().unwrap();
    let handler = handler();
    let args = SaveArgs::step(1).metadata("epoch", &10).unwrap().metadata("config", &[("lr", 1e-3)]).unwrap();
    let path = handler.save(root.path(), &state(1), args).unwrap();
    let shard = path.join("model.safetensors");
    let mut bytes = std::fs::read(&shard).unwrap();
    let len = bytes.len();
    bytes[len - 1] ^= 1;
    std::fs::write(&shard, bytes).unwrap();
    let metadata = handler.restore_metadata(root.path(), None).unwrap();
    assert_eq!((metadata.get::<u32>("epoch").unwrap(), metadata.keys().len()), (10, 2));
    assert_eq!(metadata.get::<Vec<(String, f64)>>("config").unwrap(), [("lr".to_owned(), 1e-3)]);
    assert_eq!(kind(metadata.get::<u32>("nothing")), ErrorKind::NotFound);
    assert_eq!(kind(handler.restore(root.path(), None)), ErrorKind::Corrupt);
}

/// Restores its own fields, all or none.
#[derive(Debug, PartialEq)]
struct Pipeline {
    position: u64,
    rng: PrngKey,
}

impl Checkpointable for Pipeline {
    fn get_state(&self) -> Result<State> {
        let mut state = State::new();
        state.value("position", &self.position)?.key("rng", self.rng.clone())?;
        Ok(state)
    }

    fn set_state(&mut self, state: State) -> Result<()> {
        *self = Self { position: state.get_value("position")?, rng: state.get_key("rng")?.clone() };
        Ok(())
    }
}

/// Has no state to give.
struct Stateless;

impl Checkpointable for Stateless {
    fn get_state(&self) -> Result<State> {
        Err(Error::new(ErrorKind::Unavailable, "no state today"))
    }

    fn set_state(&mut self, _: State) -> Result<()> {
        Ok(())
    }
}

#[test]
fn an_object_gives_its_state_and_takes_it_back() {
    let root = tempdir().unwrap();
    let handler = handler();
    let there = Pipeline { position: 640, rng: PrngKey::threefry2x32(9) };
    handler.save(root.path(), &there, SaveArgs::step(1)).unwrap();
    let new = || Pipeline { position: 0, rng: PrngKey::threefry2x32(0) };
    let mut restored = new();
    handler.restore_into(root.path(), None, &mut restored).unwrap();
    assert_eq!(restored, there);
    handler.save(root.path(), &state(1), SaveArgs::step(2).keep(None)).unwrap();
    let mut unchanged = new();
    assert_eq!(kind(handler.restore_into(root.path(), Some(2), &mut unchanged)), ErrorKind::Invalid, "another schema");
    assert_eq!(kind(handler.restore_into(root.path(), Some(3), &mut unchanged)), ErrorKind::NotFound);
    assert_eq!(unchanged, new());
}

#[test]
fn an_asynchronous_save_is_waited_for_by_what_comes_next() {
    let root = tempdir().unwrap();
    let handler = handler().asynchronous();
    for step in 1..5 {
        handler.save(root.path(), &state(step as u32), SaveArgs::step(step).keep(2)).unwrap();
    }
    assert_eq!(handler.restore(root.path(), None).unwrap(), state(4));
    assert_eq!(handler.get_checkpoint_steps(root.path()).unwrap(), [3, 4]);
    std::fs::create_dir(root.path().join("ckpt-5")).unwrap();
    std::fs::write(root.path().join("ckpt-5/notes"), "of another program").unwrap();
    handler.save(root.path(), &state(5), SaveArgs::step(5)).unwrap();
    assert_eq!(kind(handler.wait_until_finished()), ErrorKind::Conflict);
    handler.save(root.path(), &state(6), SaveArgs::step(6)).unwrap();
    drop(handler);
    assert_eq!(self::handler().restore(root.path(), Some(6)).unwrap(), state(6), "dropping it waits");
}

#[test]
fn bad_input_is_refused_and_changes_nothing() {
    let root = tempdir().unwrap();
    let directory = root.path().join("checkpoints");
    let handler = handler();
    assert_eq!(kind(SaveArgs::default().metadata("empty", &Some(None::<u8>))), ErrorKind::Invalid);
    assert_eq!(kind(State::new().value("empty", &Some(None::<u8>))), ErrorKind::Invalid);
    assert_eq!(kind(State::new().value("a", &1).unwrap().value("a", &2)), ErrorKind::Invalid);
    let save = |state: &State, args| handler.save(&directory, state, args);
    let mut short = State::new();
    short.array("a", vec![1_u8; 3], [4]).unwrap();
    assert_eq!(kind(save(&short, SaveArgs::default())), ErrorKind::Invalid);
    let mut key = State::new();
    key.key("rng", PrngKey { shape: vec![3], ..PrngKey::threefry2x32(1) }).unwrap();
    assert_eq!(kind(save(&key, SaveArgs::default())), ErrorKind::Invalid);
    let nameless = SaveArgs::default().metadata("", &1).unwrap();
    assert_eq!(kind(save(&state(1), nameless)), ErrorKind::Invalid);
    assert_eq!(kind(handler.save(&directory, &Stateless, SaveArgs::default())), ErrorKind::Unavailable);
    assert!(!directory.exists());
    std::fs::write(&directory, "a file").unwrap();
    assert_eq!(kind(save(&state(1), SaveArgs::default())), ErrorKind::Invalid);
    assert_eq!(files(root.path())["checkpoints"], b"a file");
}

#[test]
fn a_foreign_directory_is_never_replaced() {
    let root = tempdir().unwrap();
    let foreign = |name: &str| {
        std::fs::create_dir(root.path().join(name)).unwrap();
        std::fs::write(root.path().join(name).join("data"), "theirs").unwrap();
    };
    foreign("checkpoint");
    foreign("ckpt-4");
    let handler = handler();
    for args in [SaveArgs::default(), SaveArgs::step(4)] {
        assert_eq!(kind(handler.save(root.path(), &state(1), args.clone())), ErrorKind::Conflict);
        assert_eq!(kind(handler.save(root.path(), &state(1), args.clone().overwrite())), ErrorKind::Conflict);
        assert_eq!(kind(handler.restore(root.path(), args.step)), ErrorKind::NotFound);
    }
    handler.close().unwrap();
    let there = files(root.path());
    assert_eq!(
        there.keys().collect::<Vec<_>>(),
        ["checkpoint/", "checkpoint/data", "ckpt-4/", "ckpt-4/data"],
        "{there:?}"
    );
}

#[test]
fn a_part_of_a_state_is_a_state() {
    let root = tempdir().unwrap();
    let mut whole = State::new();
    whole.nested("model", state(1)).unwrap().nested("loader.0", state(2)).unwrap().value("epoch", &3).unwrap();
    let handler = handler();
    let path = handler.save_to_directory(root.path(), &whole, SaveArgs::step(1)).unwrap();
    assert_eq!(ashore::Checkpoint::open(path).unwrap().value::<u32>("model.seed").unwrap(), 1);
    let restored = handler.restore(root.path(), None).unwrap();
    assert_eq!(restored.get_nested("model").unwrap(), state(1));
    assert_eq!(restored.get_nested("loader").unwrap().get_nested("0").unwrap(), state(2));
    assert_eq!(kind(restored.get_nested("epoch")), ErrorKind::NotFound);
    assert_eq!(kind(restored.get_nested("mod")), ErrorKind::NotFound, "not a part of the name");
    assert_eq!(kind(whole.nested("model", state(1)).map(drop)), ErrorKind::Invalid);
}

/// The handler gave the restored state to the target unchecked: a target with other arrays failed later, or
/// never.
#[test]
fn a_target_of_another_structure_is_refused_and_left_as_it_was() {
    let root = tempdir().unwrap();
    let handler = handler();
    handler.save(root.path(), &state(1), SaveArgs::step(1)).unwrap();
    let mut same = state(9);
    handler.restore_into(root.path(), None, &mut same).unwrap();
    assert_eq!(same, state(1));
    let mut empty = State::new();
    handler.restore_into(root.path(), None, &mut empty).unwrap();
    assert_eq!(empty, state(1), "a state with nothing in it takes what there is");
    let without = |name: &str| {
        let mut other = State::new();
        for there in state(1).names().filter(|there| *there != name) {
            match there {
                "params.w" => other.array("params.w", vec![0_f32; 5000], [50, 100]).map(drop),
                "params.steps" => other.array("params.steps", vec![0_u32], []).map(drop),
                "empty" => other.array("empty", Vec::<u8>::new(), [0, 3]).map(drop),
                "rng" | "keys" => other.key(there, state(1).get_key(there).unwrap().clone()).map(drop),
                _ => other.value(there, &0).map(drop),
            }
            .unwrap();
        }
        other
    };
    let mut cases = vec![(without("name"), "name")];
    for (name, change) in [
        ("more", (|it: &mut State| it.value("more", &1).map(drop)) as fn(&mut State) -> Result<()>),
        ("params.w", |it| it.array("params.w", vec![0_f32; 5000], [100, 50]).map(drop)),
        ("params.w", |it| it.array("params.w", vec![0_u32; 5000], [50, 100]).map(drop)),
        ("params.w", |it| it.value("params.w", &1).map(drop)),
        ("rng", |it| it.key("rng", PrngKey { implementation: "rbg".into(), ..PrngKey::threefry2x32(0) }).map(drop)),
    ] {
        let mut other = without(name);
        change(&mut other).unwrap();
        cases.push((other, name));
    }
    for (target, name) in cases {
        let mut restored = target.clone();
        let error = handler.restore_into(root.path(), None, &mut restored).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.to_string().contains(&format!("{name:?}")), "{error}");
        assert_eq!(restored, target);
    }
}

/// An iterator over a shard of something.
#[derive(Clone, Debug, PartialEq)]
struct Shuffled {
    position: u64,
    buffer: Vec<u32>,
    shards: u32,
    sampler: &'static str,
}

impl Checkpointable for Shuffled {
    fn get_state(&self) -> Result<State> {
        let mut state = State::new();
        state.value("position", &self.position)?.array("buffer", self.buffer.clone(), [self.buffer.len()])?;
        state.value("shard_count", &self.shards)?.value("sampler_repr", self.sampler)?;
        Ok(state)
    }

    fn set_state(&mut self, state: State) -> Result<()> {
        (self.position, self.buffer) = (state.get_value("position")?, state.get_elements("buffer")?);
        Ok(())
    }
}

#[test]
fn an_iterator_is_restored_into_one_over_the_same_data_only() {
    let root = tempdir().unwrap();
    let new = || Shuffled { position: 0, buffer: Vec::new(), shards: 4, sampler: "shuffled(42)" };
    let checkpoints = IteratorCheckpoint::new(root.path(), handler());
    assert_eq!(kind(checkpoints.restore_latest(&mut new())), ErrorKind::NotFound);
    let mut iterator = new();
    for step in 1..=40 {
        (iterator.position, iterator.buffer) = (step * 32, vec![step as u32; step as usize]);
        assert_eq!(checkpoints.save_to_step(&iterator, step, 5, 4).unwrap().is_some(), step % 5 == 0);
    }
    assert_eq!(checkpoints.list_checkpoints().unwrap().into_keys().collect::<Vec<_>>(), [25, 30, 35, 40]);
    let mut restored = new();
    checkpoints.restore_latest(&mut restored).unwrap();
    assert_eq!(restored, iterator, "its buffer has another length, which is its own business");
    for (other, field) in [
        (Shuffled { shards: 8, ..new() }, "shard_count"),
        (Shuffled { sampler: "shuffled(43)", ..new() }, "sampler_repr"),
    ] {
        let mut target = other.clone();
        let error = checkpoints.restore(&mut target, Some(25)).unwrap_err();
        assert!(error.kind() == ErrorKind::Invalid && error.to_string().contains(field), "{error}");
        assert_eq!(target, other);
    }
    assert_eq!(kind(checkpoints.save_to_step(&iterator, 1, 0, None)), ErrorKind::Invalid);
    checkpoints.close().unwrap();
}

/// Only the next call deleted the steps that an asynchronous save need not keep: after the last call they
/// stayed.
#[test]
fn a_handler_that_is_dropped_deletes_what_its_last_save_need_not_keep() {
    let root = tempdir().unwrap();
    let handler = handler().asynchronous();
    for step in 1..=3 {
        handler.save(root.path(), &state(1), SaveArgs::step(step)).unwrap();
    }
    drop(handler);
    assert_eq!(ashore::Catalog::open(root.path()).unwrap().list().unwrap().len(), 1);
}
