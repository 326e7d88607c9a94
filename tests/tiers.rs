//! Tiers behind the root of an executor: promotion, forks, retention, and what the ends of a process leave.

use ashore::storage::{Storage, local::Local};
use ashore::tiers::{Tier, TierState};
use ashore::{Catalog, Checkpoint, CheckpointExecutor, Error, ErrorKind, Save, SaveOptions, StateDict, Unpromoted};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use troubled::Troubled;

#[path = "../examples/10_tiers.rs"]
#[allow(dead_code)]
mod example;
#[path = "tiers/faults.rs"]
mod faults;
#[path = "tiers/kills.rs"]
mod kills;
#[path = "tiers/ranks.rs"]
mod ranks;
#[path = "tiers/store.rs"]
mod store;
#[path = "tiers/term.rs"]
mod term;
#[path = "tiers/troubled.rs"]
mod troubled;

const LONG: Duration = Duration::from_secs(60);

fn executor(root: &Path, tiers: impl IntoIterator<Item = Tier>) -> CheckpointExecutor {
    let builder = CheckpointExecutor::builder(root).arena(1 << 20).chunk(64 << 10).alone();
    tiers.into_iter().fold(builder, |builder, tier| builder.tier(tier)).build().unwrap()
}

fn shared(root: &Path) -> Tier {
    Tier::at(root.to_str().unwrap()).named("shared")
}

fn state(seed: u64, elements: usize) -> StateDict<'static> {
    let mut state = StateDict::new();
    state.tensor("weights", Arc::new(vec![seed; elements])).unwrap();
    state.value("seed", &seed).unwrap();
    state
}

fn save(executor: &CheckpointExecutor, step: u64) -> Save {
    let save = executor.save(step, state(step, 10_000)).unwrap();
    save.wait(LONG).unwrap();
    executor.fence().unwrap();
    save
}

fn steps(root: &Path) -> Vec<u64> {
    Catalog::open(root).unwrap().list().unwrap().into_iter().map(|entry| entry.step).collect()
}

fn open(root: &Path, step: u64) -> Checkpoint {
    Catalog::open(root).unwrap().checkpoint(step).unwrap()
}

/// Waits until `look` is true.
fn until(what: &str, look: impl Fn() -> bool) {
    let end = Instant::now() + LONG;
    while !look() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Every step of `tier` is whole, and byte for byte that of `root` if that has it.
fn same(root: &Path, tier: &Path) {
    for step in steps(tier) {
        let there = open(tier, step);
        assert!(there.verify().unwrap().is_sound(), "step {step}");
        assert_eq!(there.value::<u64>("seed").unwrap(), step);
        let Ok(here) = Catalog::open(root).unwrap().checkpoint(step) else { continue };
        assert_eq!(here.attempt(), there.attempt(), "step {step}");
        let files = |path: &Path| {
            let mut files: Vec<_> = std::fs::read_dir(path)
                .unwrap()
                .map(|file| file.unwrap().path())
                .map(|path| (path.file_name().unwrap().to_owned(), std::fs::read(&path).unwrap()))
                .collect();
            files.sort();
            files
        };
        assert!(files(here.path()) == files(there.path()), "step {step} has other bytes");
    }
}

#[test]
fn a_step_is_durable_here_first_and_there_second_as_the_same_attempt() {
    let (root, tier) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let running = executor(root.path(), [shared(tier.path())]);
    let saved = save(&running, 1);
    let promoted = saved.durable_in("shared").wait(LONG).unwrap();
    assert_eq!((promoted.step, promoted.tier.as_str(), promoted.attempt), (1, "shared", saved.attempt()));
    assert_eq!(promoted.root, tier.path());
    assert!(open(tier.path(), 1).verify().unwrap().is_sound(), "told only once it is durable");
    assert_eq!(saved.durable_in("elsewhere").wait(LONG).unwrap_err().kind(), ErrorKind::Invalid);
    let report = &running.tiers()[0];
    assert_eq!((report.state, report.newest, report.lacks.len()), (TierState::Ours, Some(1), 0));
    running.shutdown(LONG).unwrap();
    same(root.path(), tier.path());
}

#[test]
fn in_the_example_a_machine_that_is_lost_loses_no_promoted_step() {
    let (dir, lost) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    assert_eq!(example::train(lost.path(), dir.path(), 3).unwrap(), (0, None));
    assert_eq!(example::train(lost.path(), dir.path(), 1).unwrap(), (3, None));
    let other = tempfile::tempdir().unwrap();
    assert_eq!(example::train(other.path(), dir.path(), 1).unwrap(), (4, Some("shared".into())));
}

/// In every language and without a change of the program.
#[test]
fn the_environment_names_a_tier() {
    const FOLDER: &str = "ASHORE_TIERS_ENVIRONMENT";
    if let Some(folder) = std::env::var_os(FOLDER) {
        let running = executor(&Path::new(&folder).join("root"), []);
        (1..=3).for_each(|step| drop(save(&running, step)));
        return running.shutdown(LONG).unwrap();
    }
    let folder = tempfile::tempdir().unwrap();
    let ended = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "the_environment_names_a_tier"])
        .envs([("ASHORE_TIER", folder.path().join("tier").to_str().unwrap()), ("ASHORE_TIER_KEEP_LAST", "2")])
        .env(FOLDER, folder.path())
        .output()
        .unwrap();
    assert!(ended.status.success(), "{ended:?}");
    assert_eq!(steps(&folder.path().join("root")), [1, 2, 3]);
    assert_eq!(steps(&folder.path().join("tier")), [2, 3], "its retention is by number");
    same(&folder.path().join("root"), &folder.path().join("tier"));
}

#[test]
fn a_step_that_is_marked_bad_is_not_promoted_and_not_the_newest() {
    let (root, tier) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let running = executor(root.path(), [shared(tier.path())]);
    for step in [1, 2] {
        save(&running, step).durable_in("shared").wait(LONG).unwrap();
    }
    running.catalog().mark(2, Some(ashore::catalog::Mark::Bad)).unwrap();
    assert_eq!(running.latest().unwrap().unwrap().step(), 1);
    assert_eq!(running.latest_valid().unwrap().unwrap().checkpoint.step(), 1);
    running.shutdown(LONG).unwrap();
}

#[test]
fn a_promotion_is_told_only_after_the_tier_has_published() {
    let (root, tier) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let slow = Troubled::slow(Local::open(tier.path()).unwrap(), Duration::from_millis(300));
    let running = executor(root.path(), [Tier::over("shared", Arc::new(slow))]);
    let saved = save(&running, 1);
    let there = tier.path().to_owned();
    let promoted = saved.durable_in("shared");
    assert_eq!(promoted.wait(Duration::ZERO).unwrap_err().kind(), ErrorKind::Deadline);
    promoted.wait(LONG).unwrap();
    assert_eq!(steps(&there), [1]);
}

#[test]
fn saves_go_on_while_a_tier_is_slow_and_it_gets_the_newest_first() {
    let (root, tier) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let slow = Arc::new(Troubled::slow(Local::open(tier.path()).unwrap(), Duration::from_millis(200)));
    let running = executor(root.path(), [Tier::over("shared", slow.clone())]);
    slow.held.store(true, Ordering::Relaxed);
    let saves: Vec<Save> = (1..=5).map(|step| save(&running, step)).collect();
    assert!(steps(tier.path()).is_empty(), "no save waits for a promotion");
    until("a promotion takes no slab", || running.arena().free() == running.arena().report().slabs);
    slow.held.store(false, Ordering::Relaxed);
    saves[4].durable_in("shared").wait(LONG).unwrap();
    assert!(!steps(tier.path()).contains(&2), "{:?}: the newest comes first", steps(tier.path()));
    running.shutdown(LONG).unwrap();
    assert_eq!(steps(tier.path()), [1, 2, 3, 4, 5], "a shutdown waits for promotions");
    same(root.path(), tier.path());
}

#[test]
fn a_tier_that_is_away_does_not_stop_saves_and_gets_them_when_it_is_back() {
    let (root, away) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (tier, gone) = (away.path().join("tier"), away.path().join("gone"));
    let running = executor(root.path(), [shared(&tier)]);
    save(&running, 1).durable_in("shared").wait(LONG).unwrap();
    std::fs::rename(&tier, &gone).unwrap();
    std::fs::write(&tier, "no directory").unwrap();
    std::fs::remove_dir_all(&gone).unwrap();
    let saved = save(&running, 2);
    until("the error is reported", || running.tiers()[0].error.is_some());
    let report = &running.tiers()[0];
    assert_eq!((report.state, &report.lacks[..]), (TierState::Away, &[2][..]), "{report:?}");
    let error = format!("{:#}", report.error.as_ref().unwrap());
    assert!(error.contains("tier=\"shared\"") && error.contains(tier.to_str().unwrap()), "{error}");
    let late = saved.durable_in("shared").wait(Duration::from_millis(10)).unwrap_err();
    assert_eq!(late.kind(), ErrorKind::Deadline);
    std::fs::remove_file(&tier).unwrap();
    saved.durable_in("shared").wait(LONG).unwrap();
    running.shutdown(LONG).unwrap();
    assert!(steps(&tier).contains(&2));
    same(root.path(), &tier);
}

#[test]
fn a_shutdown_names_what_was_not_promoted() {
    let (root, away) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let tier = away.path().join("tier");
    let running = executor(root.path(), [shared(&tier)]);
    std::fs::remove_dir_all(&tier).unwrap();
    std::fs::write(&tier, "no directory").unwrap();
    let saved = save(&running, 7);
    let late = running.shutdown(Duration::from_millis(500)).unwrap_err();
    assert_eq!(late.kind(), ErrorKind::Deadline);
    assert!(late.message().contains("steps=[7]") && late.message().contains("shared"), "{late}");
    assert_eq!(saved.durable_in("shared").wait(LONG).unwrap_err().kind(), ErrorKind::Deadline);
    assert_eq!(steps(root.path()), [7], "the first tier has it");
}

#[test]
fn a_node_that_comes_back_late_promotes_nothing_that_the_job_redid() {
    let (old, new, tier) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let first = executor(old.path(), [shared(tier.path())]);
    save(&first, 1).durable_in("shared").wait(LONG).unwrap();
    first.shutdown(LONG).unwrap();
    // The same session's steps that never reached the tier.
    let died = executor(old.path(), [shared(tier.path())]);
    save(&died, 2).durable_in("shared").wait(LONG).unwrap();
    save(&died, 3).durable_in("shared").wait(LONG).unwrap();
    died.shutdown(LONG).unwrap();
    for step in [2, 3] {
        Local::open(tier.path()).unwrap().remove(&ashore::id::step_name(step)).unwrap();
    }
    let note = std::fs::read_dir(old.path().join(".ranks")).unwrap().next().unwrap().unwrap().path();
    let _ = std::fs::remove_file(note.join("tiers.json"));
    // The job goes on elsewhere, and redoes step 2.
    let redone = executor(new.path(), [shared(tier.path())]);
    assert_eq!(redone.latest().unwrap().unwrap().step(), 1);
    let second = save(&redone, 2);
    second.durable_in("shared").wait(LONG).unwrap();
    redone.shutdown(LONG).unwrap();
    // The node comes back.
    let late = executor(old.path(), [shared(tier.path())]);
    until("the fork is reported", || late.tiers()[0].forks == [2]);
    let newest = late.latest().unwrap().unwrap();
    assert_eq!((newest.step(), newest.attempt(), newest.tier()), (2, second.attempt(), Some("shared")));
    save(&late, 4).durable_in("shared").wait(LONG).unwrap();
    late.shutdown(LONG).unwrap();
    assert_eq!(steps(tier.path()), [1, 2, 4], "step 3 is of a session that the tier knows as overtaken");
    assert_eq!(open(tier.path(), 2).attempt(), second.attempt(), "the tier's copy is never replaced");
    assert_ne!(open(old.path(), 2).attempt(), second.attempt());
}

#[test]
fn a_session_that_lost_the_tier_promotes_nothing_more_and_says_so() {
    let (old, new, tier) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let zombie = executor(old.path(), [shared(tier.path())]);
    save(&zombie, 1).durable_in("shared").wait(LONG).unwrap();
    // As another process has it: one process has a tier once.
    let owner = executor(new.path(), [Tier::over("shared", Arc::new(Local::open(tier.path()).unwrap()))]);
    let saved = save(&zombie, 2);
    let refused = saved.durable_in("shared").wait(LONG).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Conflict, "{refused}");
    assert_eq!(zombie.tiers()[0].state, TierState::Lost);
    assert_eq!(steps(tier.path()), [1]);
    save(&owner, 2).durable_in("shared").wait(LONG).unwrap();
    zombie.shutdown(LONG).unwrap();
    owner.shutdown(LONG).unwrap();
}

#[test]
fn retention_of_each_tier_is_its_own_and_what_it_dropped_is_not_promoted_again() {
    let (root, tier) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let running = executor(root.path(), [shared(tier.path()).keep_last(2)]);
    for step in 1..=5 {
        save(&running, step).durable_in("shared").wait(LONG).unwrap();
    }
    running.shutdown(LONG).unwrap();
    assert_eq!((steps(root.path()), steps(tier.path())), (vec![1, 2, 3, 4, 5], vec![4, 5]));
    let again = executor(root.path(), [shared(tier.path()).keep_last(2)]);
    again.shutdown(LONG).unwrap();
    assert_eq!(steps(tier.path()), [4, 5]);
    // Deleted by hand in the tier, which keeps all now.
    Local::open(tier.path()).unwrap().remove("step-00000004").unwrap();
    let again = executor(root.path(), [shared(tier.path())]);
    again.shutdown(LONG).unwrap();
    assert!(!steps(tier.path()).contains(&4), "{:?}", steps(tier.path()));
}

#[test]
fn retention_keeps_steps_that_a_tier_lacks_if_it_is_told_to_block() {
    for (unpromoted, kept) in [(Unpromoted::Block, vec![1, 2, 3, 4]), (Unpromoted::Warn, vec![4])] {
        let (root, away) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let tier = away.path().join("tier");
        let builder = CheckpointExecutor::builder(root.path()).arena(1 << 20).chunk(64 << 10).keep_last(1).alone();
        let running = builder.tier(shared(&tier).unpromoted(unpromoted)).build().unwrap();
        std::fs::remove_dir_all(&tier).unwrap();
        std::fs::write(&tier, "no directory").unwrap();
        let saves: Vec<Save> = (1..=4).map(|step| save(&running, step)).collect();
        let _ = running.shutdown(Duration::from_millis(300));
        assert_eq!(steps(root.path()), kept, "{unpromoted:?}");
        let first = saves[0].durable_in("shared").wait(LONG).unwrap_err();
        let expected = if unpromoted == Unpromoted::Warn { ErrorKind::Cancelled } else { ErrorKind::Deadline };
        assert_eq!(first.kind(), expected, "{first}");
    }
}

#[test]
fn a_damaged_copy_falls_back_to_the_tier() {
    let (root, tier) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let running = executor(root.path(), [shared(tier.path())]);
    save(&running, 1).durable_in("shared").wait(LONG).unwrap();
    let newest = running.latest().unwrap().unwrap();
    assert_eq!((newest.step(), newest.tier()), (1, None), "the nearest copy");
    let file = std::fs::read_dir(newest.path()).unwrap().map(|file| file.unwrap().path());
    let shard = file.into_iter().find(|path| path.extension().is_some_and(|end| end == "safetensors")).unwrap();
    let mut bytes = std::fs::read(&shard).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&shard, bytes).unwrap();
    let found = running.latest_valid().unwrap().unwrap();
    assert_eq!((found.checkpoint.step(), found.checkpoint.tier()), (1, Some("shared")));
    std::fs::remove_file(newest.path().join("manifest.json")).unwrap();
    assert_eq!(running.latest().unwrap().unwrap().tier(), Some("shared"));
    assert_eq!(running.checkpoint(1).unwrap().read_as::<u64>("weights").unwrap()[0], 1);
    running.shutdown(LONG).unwrap();
}

#[test]
fn a_step_that_is_overwritten_is_overwritten_in_the_tier_too() {
    let (root, tier) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let running = executor(root.path(), [shared(tier.path())]);
    save(&running, 1).durable_in("shared").wait(LONG).unwrap();
    let again = running.save_with(1, state(1, 20), SaveOptions::default().overwrite()).unwrap();
    again.durable_in("shared").wait(LONG).unwrap();
    assert_eq!(open(tier.path(), 1).attempt(), again.attempt());
    running.shutdown(LONG).unwrap();
    same(root.path(), tier.path());
}

#[test]
fn two_tiers_have_futures_of_their_own_and_memory_can_be_one() {
    let (root, tier) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let memory = ashore::storage::Memory::new();
    let slow = Troubled::slow(Local::open(tier.path()).unwrap(), Duration::from_millis(300));
    let near = Tier::over("near", Arc::new(memory.clone()));
    let running = executor(root.path(), [near, Tier::over("far", Arc::new(slow))]);
    let saved = save(&running, 1);
    saved.durable_in("near").wait(LONG).unwrap();
    assert_eq!(saved.durable_in("far").wait(Duration::ZERO).unwrap_err().kind(), ErrorKind::Deadline);
    saved.durable_in("far").wait(LONG).unwrap();
    let copy = Catalog::over(Arc::new(memory)).latest().unwrap().unwrap();
    assert_eq!((copy.step(), copy.read_as::<u64>("weights").unwrap()[0]), (1, 1));
    running.shutdown(LONG).unwrap();
}

/// Damage of the source never reaches the tier.
#[test]
fn a_damaged_step_is_not_promoted() {
    let (root, tier) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let running = executor(root.path(), []);
    drop(save(&running, 1));
    running.shutdown(LONG).unwrap();
    let step = open(root.path(), 1);
    for name in ["model.safetensors", "tensors.table"] {
        let path = step.path().join(name);
        let whole = std::fs::read(&path).unwrap();
        let mut bytes = whole.clone();
        let at = bytes.len() - 20;
        bytes[at] ^= 4;
        std::fs::write(&path, bytes).unwrap();
        let to: Arc<dyn Storage> = Arc::new(Local::open(tier.path()).unwrap());
        let damaged: Result<_, Error> =
            Checkpoint::open(step.path()).and_then(|step| ashore::tiers::copy(&step, &to, |_, _| {}));
        assert_eq!(damaged.unwrap_err().kind(), ErrorKind::Corrupt, "{name}");
        std::fs::write(&path, whole).unwrap();
    }
    assert!(steps(tier.path()).is_empty());
    assert_eq!(std::fs::read_dir(tier.path()).unwrap().count(), 0, "no attempt is left");
}
