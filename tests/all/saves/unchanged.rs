//! Files that have not changed since an older step: adopted, or written after all, with the same bytes in
//! every step.

use crate::fixtures::executor::{LONG, eventually};
use crate::fixtures::hooked::{Call, Hooked};
use ashore::storage::local::Local;
use ashore::{Builder, Catalog, CheckpointExecutor, Committed, Error, ErrorKind, SaveOptions, StateDict};
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Elements of the base: three chunks.
const BASE: usize = 3 << 18;

/// A base that is declared frozen, and an adapter that changes.
#[derive(Clone)]
struct Model {
    base: Vec<f32>,
    adapter: Vec<f32>,
}

impl Model {
    fn new() -> Self {
        Self { base: (0..BASE).map(|i| i as f32).collect(), adapter: vec![0.5; 1000] }
    }

    fn state(&self) -> StateDict<'static> {
        let mut state = self.plain();
        state.frozen("base").unwrap();
        state
    }

    /// Without a declaration.
    fn plain(&self) -> StateDict<'static> {
        let mut state = StateDict::new();
        state.tensor("base", Arc::new(self.base.clone())).unwrap();
        state.tensor("adapter", Arc::new(self.adapter.clone())).unwrap();
        state
    }

    fn train(&mut self) {
        self.adapter.iter_mut().for_each(|weight| *weight += 1.0);
    }

    fn assert_is(&self, root: &Path, step: u64) {
        let checkpoint = Catalog::open(root).unwrap().checkpoint(step).unwrap();
        assert_eq!(checkpoint.read_as::<f32>("base").unwrap(), self.base, "base of step {step}");
        assert_eq!(checkpoint.read_as::<f32>("adapter").unwrap(), self.adapter, "adapter of step {step}");
        checkpoint.verify().unwrap();
    }
}

fn builder(root: &Path) -> Builder {
    CheckpointExecutor::builder(root).arena(4 << 20).chunk(1 << 20)
}

fn save(executor: &CheckpointExecutor, step: u64, state: StateDict<'static>) -> Committed {
    executor.save(step, state).unwrap().wait(LONG).unwrap().committed().unwrap()
}

/// The file of the base; the adapter sorts before it.
fn base_of(root: &Path, step: u64) -> PathBuf {
    root.join(format!("step-{step:08}")).join("model-00002-of-00002.safetensors")
}

fn inode(root: &Path, step: u64) -> u64 {
    fs::metadata(base_of(root, step)).unwrap().ino()
}

/// Bytes of the base that a save did not write.
fn shared(committed: &Committed) -> u64 {
    committed.linked_bytes + committed.cloned_bytes
}

#[test]
fn a_frozen_tensor_is_written_once_and_is_whole_in_every_step() {
    let root = tempfile::tempdir().unwrap();
    let executor = builder(root.path()).build().unwrap();
    let (mut model, mut models) = (Model::new(), Vec::new());
    for step in 1..=5 {
        model.train();
        models.push(model.clone());
        let committed = save(&executor, step, model.state());
        let base = 4 * BASE as u64;
        if step == 1 {
            assert!(shared(&committed) == 0 && committed.written_bytes > base);
        } else {
            assert!(shared(&committed) > base && committed.written_bytes < base / 100, "{committed:?}");
        }
        assert_eq!(committed.refused_files, 0);
    }
    executor.shutdown(LONG).unwrap();
    for (step, model) in (1..).zip(&models) {
        model.assert_is(root.path(), step);
    }
    // What an earlier process has written is not known to be durable, so a run begins with a full save.
    let executor = builder(root.path()).build().unwrap();
    assert_eq!(shared(&save(&executor, 6, model.state())), 0);
    assert!(shared(&save(&executor, 7, model.state())) > 0);
    // The steps of a run without it have the same bytes in every tensor, and no file in common.
    let other = tempfile::tempdir().unwrap();
    let executor = builder(other.path()).links(false).build().unwrap();
    for (step, model) in (1..).zip(&models) {
        assert_eq!(shared(&save(&executor, step, model.state())), 0);
        model.assert_is(other.path(), step);
    }
    assert_ne!(inode(other.path(), 1), inode(other.path(), 2));
}

#[test]
fn a_frozen_tensor_that_changes_is_written_and_is_believed_again_later() {
    let root = tempfile::tempdir().unwrap();
    let executor = builder(root.path()).build().unwrap();
    let mut model = Model::new();
    let mut written = Vec::new();
    for step in 1..=8 {
        if step == 4 {
            // The last chunk alone: the others were passed over by then, and come from the older file.
            model.base[BASE - 1] = -1.0;
        }
        if step == 7 {
            model.base[0] = -7.0;
        }
        let committed = save(&executor, step, model.state());
        written.push(shared(&committed) == 0);
        model.assert_is(root.path(), step);
    }
    // After a change the save that follows is not predicted to be the same; the one after that is.
    assert_eq!(written, [true, false, false, true, true, false, true, true]);
}

#[test]
fn what_was_not_declared_is_learned_from_two_saves() {
    let root = tempfile::tempdir().unwrap();
    let executor = builder(root.path()).build().unwrap();
    let mut model = Model::new();
    model.adapter = Vec::new();
    let shared: Vec<bool> = (1..=4).map(|step| shared(&save(&executor, step, model.plain())) > 0).collect();
    assert_eq!(shared, [false, false, true, true]);
}

#[test]
fn still_tensors_of_several_files_get_files_of_their_own_in_time() {
    let root = tempfile::tempdir().unwrap();
    let executor = builder(root.path()).files(4).keep_last(2).build().unwrap();
    let mut tensors: Vec<Arc<Vec<f32>>> = (0..40).map(|i| Arc::new(vec![i as f32; 1 << 16])).collect();
    let (full, mut written) = (40 << 18_u64, Vec::new());
    for step in 1..=40 {
        // Every fourth tensor trains.
        for (i, tensor) in tensors.iter_mut().enumerate().filter(|(i, _)| i % 4 == 0) {
            *tensor = Arc::new(vec![(step * 100 + i as u64) as f32; 1 << 16]);
        }
        let mut state = StateDict::new();
        for (i, tensor) in tensors.iter().enumerate() {
            state.tensor(format!("t{i:02}"), tensor.clone()).unwrap();
        }
        written.push(save(&executor, step, state).written_bytes);
    }
    assert!(written[..16].iter().all(|bytes| *bytes > full), "{written:?}");
    assert!(written[25..].iter().all(|bytes| *bytes < full * 3 / 10), "{written:?}");
    let last = Catalog::open(root.path()).unwrap().checkpoint(40).unwrap();
    for (i, tensor) in tensors.iter().enumerate() {
        assert_eq!(last.read_as::<f32>(&format!("t{i:02}")).unwrap(), **tensor);
    }
}

#[test]
fn a_group_that_has_not_changed_is_not_written() {
    let root = tempfile::tempdir().unwrap();
    let executor = builder(root.path()).build().unwrap();
    let mut experts = [0, 1, 2].map(|i| vec![i as f32; 1 << 19]);
    let mut written = Vec::new();
    for step in 1..=12_u64 {
        experts[step as usize / 4 % 3].fill(step as f32);
        let mut state = StateDict::new();
        for (i, expert) in experts.iter().enumerate() {
            let name = format!("expert.{i}");
            state.tensor(&name, Arc::new(expert.clone())).unwrap().group(&name, &name).unwrap();
        }
        written.push(save(&executor, step, state).written_bytes >> 21);
        let checkpoint = Catalog::open(root.path()).unwrap().checkpoint(step).unwrap();
        checkpoint.verify().unwrap();
        for (i, expert) in experts.iter().enumerate() {
            assert_eq!(checkpoint.read_as::<f32>(&format!("expert.{i}")).unwrap(), *expert);
        }
    }
    // A group is written in the save after its last change, too: only then is it known to be still.
    assert_eq!(written, [3, 1, 1, 2, 1, 1, 1, 2, 1, 1, 1, 2]);
}

#[test]
fn a_file_system_that_refuses_costs_a_copy_and_no_byte() {
    let root = tempfile::tempdir().unwrap();
    let refuse = Arc::new(AtomicBool::new(true));
    let refusing = refuse.clone();
    let hook = move |call: Call<'_>| match call {
        Call::Adopt if refusing.load(Ordering::Relaxed) => Err(Error::new(ErrorKind::Invalid, "not here")),
        _ => Ok(()),
    };
    let storage = Arc::new(Hooked::new(Local::open(root.path()).unwrap(), hook));
    let executor = builder(root.path()).storage(storage).build().unwrap();
    let mut model = Model::new();
    save(&executor, 1, model.state());
    model.train();
    let committed = save(&executor, 2, model.state());
    assert_eq!((shared(&committed), committed.refused_files), (0, 1));
    model.assert_is(root.path(), 2);
    refuse.store(false, Ordering::Relaxed);
    // It is not asked again at each save.
    let shares = (3..30).find(|step| shared(&save(&executor, *step, model.state())) > 0);
    assert!(shares.is_some_and(|step| step > 10), "{shares:?}");
}

/// One inode with all the links that it can have made every file of 16 saves be written.
#[test]
fn the_refusal_of_one_file_leaves_the_others_shared() {
    let root = tempfile::tempdir().unwrap();
    let refuse = Arc::new(AtomicBool::new(true));
    let refusing = refuse.clone();
    let hook = move |call: Call<'_>| match call {
        Call::Adopt if refusing.swap(false, Ordering::Relaxed) => Err(Error::new(ErrorKind::Invalid, "too many links")),
        _ => Ok(()),
    };
    let storage = Arc::new(Hooked::new(Local::open(root.path()).unwrap(), hook));
    let executor = builder(root.path()).storage(storage).build().unwrap();
    let state = || {
        let mut state = StateDict::new();
        for (name, value) in [("one", 1.0_f32), ("two", 2.0)] {
            state.tensor(name, Arc::new(vec![value; 1 << 19])).unwrap().group(name, name).unwrap();
        }
        state
    };
    let saves: Vec<Committed> = (1..=5).map(|step| save(&executor, step, state())).collect();
    let refused: Vec<usize> = saves.iter().map(|committed| committed.refused_files).collect();
    let files: Vec<u64> = saves.iter().map(|committed| shared(committed) >> 21).collect();
    assert_eq!((refused, files), (vec![0, 1, 0, 0, 0], vec![0, 1, 1, 1, 1]));
}

#[test]
fn a_step_that_is_pruned_leaves_its_files_to_later_ones() {
    let root = tempfile::tempdir().unwrap();
    let executor = builder(root.path()).keep_last(1).build().unwrap();
    let mut model = Model::new();
    for step in 1..=6 {
        model.train();
        let committed = save(&executor, step, model.state());
        assert_eq!(shared(&committed) > 0, step > 1);
    }
    executor.shutdown(LONG).unwrap();
    let steps: Vec<u64> = Catalog::open(root.path()).unwrap().list().unwrap().iter().map(|step| step.step).collect();
    assert_eq!(steps, [6]);
    model.assert_is(root.path(), 6);
}

#[test]
fn the_source_may_be_deleted_by_another_process_while_a_save_wants_it() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().to_owned();
    let hook = move |call: Call<'_>| {
        if matches!(call, Call::Adopt) {
            fs::remove_dir_all(path.join("step-00000001")).unwrap();
        }
        Ok(())
    };
    let storage = Arc::new(Hooked::new(Local::open(root.path()).unwrap(), hook));
    let executor = builder(root.path()).storage(storage).build().unwrap();
    let mut model = Model::new();
    save(&executor, 1, model.state());
    model.train();
    save(&executor, 2, model.state());
    model.assert_is(root.path(), 2);
}

#[test]
fn a_shared_file_is_written_again_when_it_is_old() {
    let root = tempfile::tempdir().unwrap();
    let executor = builder(root.path()).link_saves(3).link_age(Duration::ZERO).build().unwrap();
    let model = Model::new();
    let written: Vec<bool> = (1..=9).map(|step| shared(&save(&executor, step, model.state())) == 0).collect();
    assert_eq!(written, [true, false, false, false, true, false, false, false, true]);
    // Both must have passed.
    let other = tempfile::tempdir().unwrap();
    let executor = builder(other.path()).link_saves(3).build().unwrap();
    assert!((1..=9).all(|step| (shared(&save(&executor, step, model.state())) == 0) == (step == 1)));
}

/// Changes one byte of the base of a step where it lies.
fn damage(root: &Path, step: u64) {
    let file = fs::OpenOptions::new().read(true).write(true).open(base_of(root, step)).unwrap();
    let (at, mut byte) = (file.metadata().unwrap().len() - 9, [0]);
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 4], at).unwrap();
    file.sync_all().unwrap();
}

#[test]
fn a_shared_file_that_rots_is_found_and_written_anew() {
    let root = tempfile::tempdir().unwrap();
    let executor = builder(root.path()).build().unwrap();
    let model = Model::new();
    assert_eq!(shared(&save(&executor, 1, model.state())), 0);
    assert!(shared(&save(&executor, 2, model.state())) > 0);
    damage(root.path(), 2);
    let mut step = 2;
    // The file is read back after some save, off its path. A save that meets the damage at that moment fails.
    eventually("a damaged file is written anew", || {
        step += 1;
        match executor.save(step, model.state()).unwrap().wait(LONG) {
            Ok(outcome) => shared(&outcome.committed().unwrap()) == 0,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
                false
            }
        }
    });
    model.assert_is(root.path(), step);
    executor.shutdown(LONG).unwrap();
    let newest = Catalog::open(root.path()).unwrap().latest_valid().unwrap().unwrap();
    assert_eq!(newest.checkpoint.step(), step);
}

#[test]
fn a_damaged_file_is_not_copied_into_a_new_step() {
    let root = tempfile::tempdir().unwrap();
    let refuse = |call: Call<'_>| match call {
        Call::Adopt => Err(Error::new(ErrorKind::Invalid, "not here")),
        _ => Ok(()),
    };
    let storage = Arc::new(Hooked::new(Local::open(root.path()).unwrap(), refuse));
    let executor = builder(root.path()).storage(storage).build().unwrap();
    let model = Model::new();
    save(&executor, 1, model.state());
    damage(root.path(), 1);
    let error = executor.save(2, model.state()).unwrap().wait(LONG).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error:#}");
    assert!(error.to_string().contains("the next save writes the file anew"), "{error:#}");
    save(&executor, 3, model.state());
    model.assert_is(root.path(), 3);
}

#[test]
fn saves_that_overlap_and_saves_elsewhere_share_only_what_is_durable_in_the_root() {
    let (root, beside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let executor = builder(root.path()).build().unwrap();
    let mut model = Model::new();
    let mut models = Vec::new();
    let mut saves = Vec::new();
    for step in 1..=8 {
        model.train();
        models.push(model.clone());
        saves.push(executor.save(step, model.state()).unwrap());
        if step == 4 {
            let options = SaveOptions::default().directory(beside.path().join("export"));
            let committed = executor.save_with(100, model.state(), options).unwrap().wait(LONG).unwrap();
            assert_eq!(shared(&committed.committed().unwrap()), 0);
        }
    }
    saves.into_iter().for_each(|save| drop(save.wait(LONG).unwrap()));
    for (step, model) in (1..).zip(&models) {
        model.assert_is(root.path(), step);
    }
}

/// Regression: the files of a step were opened by its name after its publish, and taken for those that were
/// written, whichever attempt had the name by then.
#[test]
fn a_step_that_another_process_has_replaced_is_no_source() {
    let (root, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (mut model, mut theirs) = (Model::new(), Model::new());
    theirs.base.fill(-1.0);
    save(&builder(other.path()).build().unwrap(), 1, theirs.state());
    let (from, to) = (base_of(other.path(), 1), base_of(root.path(), 1));
    let replaced = AtomicBool::new(false);
    let hook = move |call: Call<'_>| {
        if matches!(call, Call::Open { file } if file.contains("00002-of")) && !replaced.swap(true, Ordering::Relaxed) {
            fs::copy(&from, &to).unwrap();
        }
        Ok(())
    };
    let storage = Arc::new(Hooked::new(Local::open(root.path()).unwrap(), hook));
    let executor = builder(root.path()).storage(storage).build().unwrap();
    save(&executor, 1, model.state());
    model.train();
    assert_eq!(shared(&save(&executor, 2, model.state())), 0);
    model.assert_is(root.path(), 2);
    assert!(shared(&save(&executor, 3, model.state())) > 0, "the next one is a source again");
}

/// Regression: a file that could not be read any more stayed the one to copy from, and failed every save.
#[test]
fn an_older_file_that_cannot_be_read_fails_one_save_and_no_other() {
    let root = tempfile::tempdir().unwrap();
    let gone = Arc::new(AtomicBool::new(false));
    let unreadable = gone.clone();
    let hook = move |call: Call<'_>| match call {
        Call::Adopt => Err(Error::new(ErrorKind::Invalid, "not here")),
        Call::Read { step: "step-00000001", .. } if unreadable.load(Ordering::Relaxed) => {
            Err(Error::new(ErrorKind::Unavailable, "a bad sector"))
        }
        _ => Ok(()),
    };
    let storage = Arc::new(Hooked::new(Local::open(root.path()).unwrap(), hook));
    let executor = builder(root.path()).storage(storage).build().unwrap();
    let model = Model::new();
    save(&executor, 1, model.state());
    gone.store(true, Ordering::Relaxed);
    let error = executor.save(2, model.state()).unwrap().wait(LONG).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:#}");
    save(&executor, 3, model.state());
    model.assert_is(root.path(), 3);
}
