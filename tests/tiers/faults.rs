//! What a tier does when something is wrong: other owners, foreign steps, damage, marks, settings.

use super::{LONG, Troubled, executor, open, save, shared, steps, until};
use ashore::catalog::Mark;
use ashore::storage::local::Local;
use ashore::tiers::{Tier, TierState};
use ashore::{CheckpointExecutor, ErrorKind, Save, Unpromoted};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// The tier, as another process has it.
fn elsewhere(root: &Path) -> Tier {
    Tier::over("shared", Arc::new(Local::open(root).unwrap()))
}

fn damage(root: &Path, step: u64) {
    let shard = open(root, step).path().join("model.safetensors");
    let mut bytes = std::fs::read(&shard).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&shard, bytes).unwrap();
}

#[test]
fn a_second_executor_of_a_process_is_refused_a_tier_until_the_first_has_ended() {
    let (one, two, tier) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let link = two.path().join("link");
    std::os::unix::fs::symlink(tier.path(), &link).unwrap();
    let first = executor(one.path(), [shared(tier.path())]);
    let builder = || CheckpointExecutor::builder(two.path().join("root")).arena(1 << 20).chunk(64 << 10).alone();
    let refused = builder().tier(shared(&link)).build().unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Invalid);
    assert!(refused.message().contains("another executor of this process has the tier"), "{refused}");
    save(&first, 1).durable_in("shared").wait(LONG).unwrap();
    assert_eq!(first.tiers()[0].state, TierState::Ours);
    first.shutdown(LONG).unwrap();
    let second = builder().tier(shared(&link)).build().unwrap();
    assert_eq!(second.latest().unwrap().unwrap().step(), 1);
    second.shutdown(LONG).unwrap();
}

#[test]
fn a_second_executor_of_a_process_is_refused_a_storage_that_the_first_has_as_a_tier() {
    let (one, two, tier) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let storage = Arc::new(Local::open(tier.path()).unwrap());
    let over = |name: &str| Tier::over(name, storage.clone());
    let first = executor(one.path(), [over("shared")]);
    let builder = || CheckpointExecutor::builder(two.path()).arena(1 << 20).chunk(64 << 10).alone();
    let refused = builder().tier(over("another")).build().unwrap_err();
    assert_eq!((refused.kind(), refused.path()), (ErrorKind::Invalid, Some(tier.path())), "{refused}");
    save(&first, 1).durable_in("shared").wait(LONG).unwrap();
    first.shutdown(LONG).unwrap();
    builder().tier(over("another")).build().unwrap().shutdown(LONG).unwrap();
}

#[test]
fn an_internal_executor_does_not_take_over_the_tier_of_the_environment() {
    const FOLDER: &str = "ASHORE_TIERS_INTERNAL";
    if let Some(folder) = std::env::var_os(FOLDER) {
        let folder = Path::new(&folder);
        let job = executor(&folder.join("root"), []);
        save(&job, 1).durable_in(folder.join("tier").to_str().unwrap()).wait(LONG).unwrap();
        let settings = ashore::Settings::from_env().unwrap();
        let builder = CheckpointExecutor::builder(folder.join("other")).settings(settings).alone();
        let internal = builder.arena(1 << 20).chunk(64 << 10).no_tier_from_env().build().unwrap();
        assert!(internal.tiers().is_empty());
        drop(save(&internal, 7));
        internal.shutdown(LONG).unwrap();
        save(&job, 2).durable_in(folder.join("tier").to_str().unwrap()).wait(LONG).unwrap();
        return job.shutdown(LONG).unwrap();
    }
    let folder = tempfile::tempdir().unwrap();
    let ended = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "faults::an_internal_executor_does_not_take_over_the_tier_of_the_environment"])
        .env("ASHORE_TIER", folder.path().join("tier"))
        .env(FOLDER, folder.path())
        .output()
        .unwrap();
    assert!(ended.status.success(), "{ended:?}");
    assert_eq!(steps(&folder.path().join("tier")), [1, 2]);
}

#[test]
fn a_late_owner_that_reaches_the_tier_again_leaves_it_to_its_new_owner() {
    let (old, new, away) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (tier, moved) = (away.path().join("tier"), away.path().join("moved"));
    let late = executor(old.path(), [shared(&tier)]);
    save(&late, 1).durable_in("shared").wait(LONG).unwrap();
    let copied = std::process::Command::new("cp").arg("-a").args([&tier, &moved]).status().unwrap();
    assert!(copied.success());
    std::fs::remove_dir_all(&tier).unwrap();
    std::fs::write(&tier, "no directory").unwrap();
    let saved = save(&late, 2);
    until("the tier is away", || late.tiers()[0].state == TierState::Away && late.tiers()[0].error.is_some());
    let owner = executor(new.path(), [elsewhere(&moved)]);
    save(&owner, 2).durable_in("shared").wait(LONG).unwrap();
    std::fs::remove_file(&tier).unwrap();
    std::os::unix::fs::symlink(&moved, &tier).unwrap();
    until("the tier is lost", || late.tiers()[0].state == TierState::Lost);
    assert_eq!(saved.durable_in("shared").wait(LONG).unwrap_err().kind(), ErrorKind::Conflict);
    save(&owner, 3).durable_in("shared").wait(LONG).unwrap();
    assert_eq!(owner.tiers()[0].state, TierState::Ours);
    owner.shutdown(LONG).unwrap();
    late.shutdown(LONG).unwrap();
    assert_eq!(open(&moved, 2).attempt(), open(new.path(), 2).attempt());
}

#[test]
fn a_full_first_tier_fails_saves_by_name_and_loses_nothing_that_any_tier_has() {
    let (root, tier) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let first = Arc::new(Troubled::slow(Local::open(root.path()).unwrap(), Duration::ZERO));
    let builder = CheckpointExecutor::builder(root.path()).arena(1 << 20).chunk(64 << 10).alone();
    let running = builder.storage(first.clone()).tier(shared(tier.path())).build().unwrap();
    save(&running, 1).durable_in("shared").wait(LONG).unwrap();
    first.full.store(true, Ordering::Relaxed);
    let failed = running.save(2, super::state(2, 10_000)).unwrap();
    let error = failed.wait(LONG).unwrap_err();
    assert_eq!((error.kind(), error.step()), (ErrorKind::NoSpace, Some(2)), "{error:#}");
    let text = format!("{error:#}");
    assert!(text.contains(&format!("first_tier={}", root.path().display())), "{text}");
    assert!(text.contains("keep_last") && text.contains("\"shared\" Ours newest=Some(1)"), "{text}");
    assert_eq!(failed.durable_in("shared").wait(LONG).unwrap_err().kind(), ErrorKind::NoSpace);
    running.fence().unwrap();
    until("the slabs are back", || running.arena().free() == running.arena().report().slabs);
    assert_eq!((steps(root.path()), steps(tier.path())), (vec![1], vec![1]));
    first.full.store(false, Ordering::Relaxed);
    save(&running, 2).durable_in("shared").wait(LONG).unwrap();
    running.shutdown(LONG).unwrap();
}

#[test]
fn a_full_tier_holds_up_no_save_and_gets_the_steps_when_it_has_room() {
    let (root, tier) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let behind = Arc::new(Troubled::slow(Local::open(tier.path()).unwrap(), Duration::ZERO));
    let running = executor(root.path(), [Tier::over("shared", behind.clone())]);
    save(&running, 1).durable_in("shared").wait(LONG).unwrap();
    behind.full.store(true, Ordering::Relaxed);
    let saves = [2, 3].map(|step| save(&running, step));
    until("the error is reported", || running.tiers()[0].error.is_some());
    let report = &running.tiers()[0];
    let error = report.error.as_ref().unwrap();
    assert_eq!((error.kind(), report.newest, &report.lacks[..]), (ErrorKind::NoSpace, Some(1), &[2, 3][..]));
    assert!(format!("{error:#}").contains("tier=\"shared\""), "{error:#}");
    behind.full.store(false, Ordering::Relaxed);
    saves.iter().for_each(|save| drop(save.durable_in("shared").wait(LONG).unwrap()));
    running.shutdown(LONG).unwrap();
    assert_eq!(steps(tier.path()), [1, 2, 3]);
}

#[test]
fn an_error_of_the_first_tier_does_not_make_the_tier_away() {
    let (root, tier) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let first = Arc::new(Troubled::slow(Local::open(root.path()).unwrap(), Duration::ZERO));
    let builder = CheckpointExecutor::builder(root.path()).arena(1 << 20).chunk(64 << 10).alone();
    let running = builder.storage(first.clone()).tier(shared(tier.path())).build().unwrap();
    save(&running, 1).durable_in("shared").wait(LONG).unwrap();
    first.away.store(true, Ordering::Relaxed);
    let saved = save(&running, 2);
    until("the error is reported", || running.tiers()[0].error.is_some());
    let report = &running.tiers()[0];
    assert_eq!((report.state, report.newest, &report.lacks[..]), (TierState::Ours, Some(1), &[2][..]), "{report:?}");
    first.away.store(false, Ordering::Relaxed);
    saved.durable_in("shared").wait(LONG).unwrap();
    running.shutdown(LONG).unwrap();
}

#[test]
fn what_was_in_a_directory_before_it_became_a_tier_stays() {
    let (root, tier) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let earlier = executor(tier.path(), []);
    let theirs = save(&earlier, 1);
    earlier.shutdown(LONG).unwrap();
    let running = executor(root.path(), [shared(tier.path())]);
    let saved = save(&running, 1);
    assert_eq!(saved.durable_in("shared").wait(LONG).unwrap_err().kind(), ErrorKind::Conflict);
    assert_eq!(running.tiers()[0].forks, [1]);
    assert_eq!(running.latest().unwrap().unwrap().attempt(), theirs.attempt(), "the tier's counts");
    save(&running, 2).durable_in("shared").wait(LONG).unwrap();
    running.shutdown(LONG).unwrap();
    assert_eq!(open(tier.path(), 1).attempt(), theirs.attempt());
    assert_eq!(steps(tier.path()), [1, 2]);
}

#[test]
fn a_step_that_cannot_be_promoted_stays_in_every_report() {
    let (root, tier) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let before = executor(root.path(), []);
    drop(save(&before, 1));
    drop(save(&before, 2));
    before.shutdown(LONG).unwrap();
    damage(root.path(), 2);
    let running = executor(root.path(), [shared(tier.path())]);
    until("the others are promoted", || steps(tier.path()) == [1]);
    for _ in 0..2 {
        std::thread::sleep(Duration::from_millis(200));
        let report = &running.tiers()[0];
        assert_eq!((report.state, &report.lacks[..]), (TierState::Ours, &[2][..]), "{report:?}");
        assert_eq!(
            report.error.as_ref().map(|error| (error.kind(), error.step())),
            Some((ErrorKind::Corrupt, Some(2)))
        );
    }
    let named = running.shutdown(LONG).unwrap_err();
    assert!(named.message().contains("steps=[2]"), "{named}");
}

/// A step that was saved while the thread looked is not forgotten, and retention keeps it.
#[test]
fn steps_saved_while_a_promotion_runs_are_kept_if_the_tier_blocks() {
    for _ in 0..5 {
        let (root, tier) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let slow = Troubled::slow(Local::open(tier.path()).unwrap(), Duration::from_millis(20));
        let tier_of = Tier::over("shared", Arc::new(slow)).unpromoted(Unpromoted::Block);
        let builder = CheckpointExecutor::builder(root.path()).arena(1 << 20).chunk(64 << 10).keep_last(1).alone();
        let running = builder.tier(tier_of).build().unwrap();
        let saves: Vec<Save> = (1..=12).map(|step| save(&running, step)).collect();
        for saved in &saves {
            saved.durable_in("shared").wait(LONG).unwrap();
        }
        running.shutdown(LONG).unwrap();
        assert_eq!(steps(tier.path()), (1..=12).collect::<Vec<_>>());
    }
}

#[test]
fn a_run_that_went_back_has_its_newest_step_in_the_tier() {
    let (root, tier) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let running = executor(root.path(), [shared(tier.path()).keep_last(2)]);
    for step in [10, 11, 3, 4] {
        save(&running, step).durable_in("shared").wait(LONG).unwrap();
    }
    running.shutdown(LONG).unwrap();
    assert_eq!(steps(tier.path()), [4, 10, 11]);
}

#[test]
fn a_step_that_is_marked_keep_in_the_root_is_kept_in_the_tier() {
    let (root, tier) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let running = executor(root.path(), [shared(tier.path()).keep_last(1)]);
    save(&running, 1).durable_in("shared").wait(LONG).unwrap();
    running.catalog().mark(1, Some(Mark::Keep)).unwrap();
    for step in [2, 3] {
        save(&running, step).durable_in("shared").wait(LONG).unwrap();
    }
    running.shutdown(LONG).unwrap();
    assert_eq!(steps(tier.path()), [1, 3]);
}
