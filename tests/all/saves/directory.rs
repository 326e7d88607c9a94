//! Checkpoints that become a directory of the program's, beside the root.

use crate::fixtures::executor::{LONG, eventually, hidden, one, pattern};
use ashore::storage::local::Local;
use ashore::storage::{Memory, Storage};
use ashore::{Attempt, Checkpoint, CheckpointExecutor, ErrorKind, Result, SaveOptions};
use std::path::Path;
use std::sync::Arc;

fn executor(dir: &Path) -> CheckpointExecutor {
    let builder = CheckpointExecutor::builder(dir.join("root")).arena(4 * 4096).chunk(4096);
    builder.keep_last(1).build().unwrap()
}

fn save(executor: &CheckpointExecutor, seed: u64, options: SaveOptions) -> Result<()> {
    executor.save_with(seed, one("t", Arc::new(pattern(seed, 9000))), options)?.wait(LONG).map(drop)
}

fn into(path: impl AsRef<Path>) -> SaveOptions {
    SaveOptions::default().directory(path.as_ref())
}

fn holds(path: &Path, seed: u64) {
    let checkpoint = Checkpoint::open(path).unwrap();
    assert_eq!((checkpoint.step(), checkpoint.read("t").unwrap().to_vec()), (seed, pattern(seed, 9000)));
    checkpoint.verify().unwrap();
}

#[test]
fn a_checkpoint_becomes_a_directory_that_is_absent_or_empty_and_no_step() {
    let dir = tempfile::tempdir().unwrap();
    let executor = executor(dir.path());
    let (absent, empty) = (dir.path().join("runs/a/epoch=3-loss=0.1.ckpt"), dir.path().join("empty"));
    std::fs::create_dir(&empty).unwrap();
    for (seed, path) in [(3, &absent), (4, &empty)] {
        save(&executor, seed, into(path)).unwrap();
        assert_eq!(hidden(path.parent().unwrap()), [""; 0], "nothing hidden is left when the future resolves");
        holds(path, seed);
    }
    assert!(executor.latest().unwrap().is_none());
    assert!(executor.catalog().list().unwrap().is_empty());
    assert!(!dir.path().join("root/latest").exists());
}

/// The catalog protects a step that is being saved; a directory with the name of a step is another one.
#[test]
fn directories_named_like_steps_are_saved_beside_the_steps_of_the_root() {
    let dir = tempfile::tempdir().unwrap();
    let executor = executor(dir.path());
    let (first, second) = (dir.path().join("x/step-00000001"), dir.path().join("y/step-00000001"));
    let saves = [SaveOptions::default(), into(&first), into(&second)].map(|options| {
        let save = executor.save_with(1, one("t", Arc::new(pattern(1, 9000))), options).unwrap();
        executor.fence().unwrap();
        save
    });
    saves.iter().for_each(|save| drop(save.wait(LONG).unwrap()));
    // Retention keeps one step of the root, and deletes none of the others.
    save(&executor, 2, SaveOptions::default()).unwrap();
    save(&executor, 1, into(dir.path().join("x/step-00000007"))).unwrap();
    eventually("the first step is pruned", || !dir.path().join("root/step-00000001").exists());
    for path in [&first, &second, &dir.path().join("x/step-00000007")] {
        holds(path, 1);
    }
    assert_eq!(executor.latest().unwrap().unwrap().step(), 2);
}

#[test]
fn what_is_there_is_replaced_only_if_it_is_a_checkpoint_and_may_be_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let executor = executor(dir.path());
    let (ours, foreign, file) = (dir.path().join("ours"), dir.path().join("foreign"), dir.path().join("file"));
    save(&executor, 1, into(&ours)).unwrap();
    std::fs::create_dir(&foreign).unwrap();
    std::fs::write(foreign.join("thesis.tex"), "years of work").unwrap();
    std::fs::write(&file, "a file").unwrap();
    for path in [&ours, &foreign, &file] {
        let refused = save(&executor, 2, into(path)).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Conflict, "{refused}");
        assert_eq!(refused.path(), Some(path.as_path()));
    }
    save(&executor, 2, into(&ours).overwrite()).unwrap();
    holds(&ours, 2);
    for path in [&foreign, &file] {
        let refused = save(&executor, 3, into(path).overwrite()).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Conflict, "{refused}");
    }
    assert_eq!(std::fs::read_to_string(foreign.join("thesis.tex")).unwrap(), "years of work");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "a file");
    assert_eq!(hidden(dir.path()), [""; 0]);
}

#[test]
fn what_a_killed_process_left_beside_a_checkpoint_is_deleted_after_the_next_save_there() {
    let dir = tempfile::tempdir().unwrap();
    let executor = executor(dir.path());
    let parent = dir.path().join("epochs");
    let dead = Local::open(&parent).unwrap().begin("epoch-1", Attempt::new(), false).unwrap();
    dead.put("model.safetensors", &[7; 100]).unwrap();
    drop(dead);
    assert_eq!(hidden(&parent).len(), 2);
    save(&executor, 2, into(parent.join("epoch-2"))).unwrap();
    eventually("the dead attempt is swept", || hidden(&parent).is_empty());
    holds(&parent.join("epoch-2"), 2);
}

#[test]
fn a_directory_that_cannot_be_one_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let executor = executor(dir.path());
    let in_memory = CheckpointExecutor::builder("in memory").storage(Arc::new(Memory::new()));
    let in_memory = in_memory.arena(4 * 4096).chunk(4096).build().unwrap();
    std::fs::write(dir.path().join("file"), "").unwrap();
    let path = dir.path().join("a");
    for (executor, options, why) in [
        (&executor, into(&path).name("b"), "a directory or a name"),
        (&executor, into("/"), "must end in a UTF-8 name"),
        (&executor, into(dir.path().join("..")), "must end in a UTF-8 name"),
        (&executor, into(dir.path().join(".hidden")), "not hidden"),
        (&executor, into(dir.path().join("latest")), "latest"),
        (&executor, into(dir.path().join("file/a")), "cannot open directory"),
        (&in_memory, into(&path), "no directories beside its root"),
    ] {
        let refused = save(executor, 1, options).unwrap_err();
        assert!(refused.to_string().contains(why), "{refused}");
        assert!(refused.path().is_some() || why == "latest" || why == "not hidden", "{refused:?}");
    }
    assert_eq!(hidden(dir.path()), [""; 0]);
    save(&executor, 1, into(&path)).unwrap();
    holds(&path, 1);
}

/// Commits of two saves may end in any order: the older state could be the one that stayed, and both saves
/// had reported that they were durable.
#[test]
fn a_place_that_is_overwritten_holds_what_was_saved_last() {
    let dir = tempfile::tempdir().unwrap();
    let builder = CheckpointExecutor::builder(dir.path().join("root")).arena(16 * 4096).chunk(4096);
    let executor = builder.overlap(ashore::Overlap::Queue(8)).build().unwrap();
    let path = dir.path().join("last.ckpt");
    let places = [into(&path), SaveOptions::default().name("last")];
    for (place, held) in places.into_iter().zip([path, dir.path().join("root/last")]) {
        for first in (0..40).step_by(4) {
            let begin = |seed| {
                let options = place.clone().overwrite();
                let save = executor.save_with(seed, one("t", Arc::new(pattern(seed, 9000))), options).unwrap();
                executor.fence().unwrap();
                save
            };
            let saves: Vec<_> = (first..first + 4).map(begin).collect();
            saves.iter().for_each(|save| drop(save.wait(LONG).unwrap()));
            holds(&held, first + 3);
        }
    }
}

#[test]
fn a_directory_is_no_step_of_the_root() {
    let dir = tempfile::tempdir().unwrap();
    let executor = executor(dir.path());
    std::os::unix::fs::symlink(dir.path().join("root"), dir.path().join("link")).unwrap();
    for root in ["root", "link"] {
        let refused = save(&executor, 5, into(dir.path().join(root).join("step-00000005"))).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Invalid);
        assert!(refused.to_string().contains("a step of the executor's root"), "{refused}");
    }
    assert!(executor.catalog().list().unwrap().is_empty());
    save(&executor, 5, into(dir.path().join("root/best"))).unwrap();
    holds(&dir.path().join("root/best"), 5);
}
