//! Several ranks on a directory, with a tier behind it: rank 0 promotes, and every rank reads what it does.

use super::{LONG, Troubled, open, shared, steps, until};
use ashore::ranks::{Member, SharedDirectory};
use ashore::storage::local::Local;
use ashore::tiers::{Tier, TierState};
use ashore::{Checkpoint, CheckpointExecutor, ErrorKind, HostTensor, Result, StateDict};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Barrier};
use std::time::Duration;

const ROWS: usize = 60;
const COLUMNS: usize = 1000;
const WORLD: u32 = 4;

fn builder(root: &Path, member: Member) -> ashore::Builder {
    let coordinator = Arc::new(SharedDirectory::new(root, member).unwrap());
    let builder = CheckpointExecutor::builder(root).arena(1 << 20).chunk(64 << 10).save_timeout(LONG);
    builder.ranks(coordinator).run("run")
}

/// Runs `work` as every rank, each in a thread.
fn together<T: Send>(world: u32, work: impl Fn(Member) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let start = |rank| {
            scope.spawn({
                let work = &work;
                move || work(Member { rank, world, local_rank: rank })
            })
        };
        let ranks: Vec<_> = (0..world).map(start).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// The rows of a rank.
fn mine(Member { rank, world, .. }: Member) -> std::ops::Range<usize> {
    ROWS * rank as usize / world as usize..ROWS * (rank as usize + 1) / world as usize
}

fn element(step: u64, row: usize) -> u64 {
    step * 1000 + row as u64
}

fn state(member: Member, step: u64) -> StateDict<'static> {
    let rows = mine(member);
    let values = Arc::new(rows.clone().flat_map(|row| [element(step, row); COLUMNS]).collect::<Vec<u64>>());
    let mut state = StateDict::new();
    let tensor = HostTensor::new(values, [rows.len(), COLUMNS]);
    state.tensor_box("weights", [ROWS, COLUMNS], [rows.start, 0], tensor).unwrap();
    state.value("seed", &step).unwrap();
    state
}

fn check(checkpoint: &Checkpoint, rows: std::ops::Range<usize>) {
    let read = checkpoint.read_slice_as::<u64>("weights", &[rows.clone(), 0..COLUMNS]).unwrap();
    let step = checkpoint.step();
    assert!(read.chunks(COLUMNS).zip(rows).all(|(read, row)| read.iter().all(|e| *e == element(step, row))));
    assert_eq!(checkpoint.value::<u64>("seed").unwrap(), step);
}

#[test]
fn rank_0_promotes_and_every_rank_finds_the_newest_step_of_the_tier() {
    let (root, tier, other) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    together(WORLD, |member| {
        let running = builder(root.path(), member).tier(shared(tier.path())).build().unwrap();
        assert!(running.latest().unwrap().is_none());
        let save = running.save(1, state(member, 1)).unwrap();
        save.wait(LONG).unwrap();
        let promoted = save.durable_in("shared").wait(LONG);
        assert_eq!(running.tiers().len(), usize::from(member.rank == 0));
        if member.rank == 0 {
            assert_eq!(promoted.unwrap().attempt, save.attempt());
            assert_eq!(running.tiers()[0].state, TierState::Ours);
        } else {
            let refused = promoted.unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::Invalid);
            assert!(refused.message().contains("rank 0"), "{refused}");
        }
        running.shutdown(LONG).unwrap();
    });
    assert_eq!(steps(tier.path()), [1]);
    // Another machine, where fewer ranks go on.
    together(3, |member| {
        let running = builder(other.path(), member).tier(shared(tier.path())).build().unwrap();
        let newest = running.latest().unwrap().unwrap();
        assert_eq!((newest.step(), newest.tier()), (1, Some("shared")));
        check(&newest, mine(member));
        assert_eq!(running.latest_valid().unwrap().unwrap().checkpoint.attempt(), newest.attempt());
        assert_eq!(running.checkpoint(1).unwrap().attempt(), newest.attempt());
        running.save(2, state(member, 2)).unwrap().wait(LONG).unwrap();
        running.shutdown(LONG).unwrap();
    });
    assert_eq!((steps(tier.path()), steps(other.path())), (vec![1, 2], vec![2]));
    check(&open(tier.path(), 2), 0..ROWS);
}

/// A step of several ranks that did not reach the tier is promoted by the next session, with other ranks.
#[test]
fn what_a_session_of_ranks_did_not_promote_is_promoted_by_the_next() {
    let (root, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let tier = folder.path().join("tier");
    let built = Barrier::new(2);
    together(2, |member| {
        let running = builder(root.path(), member).tier(shared(&tier)).build().unwrap();
        built.wait();
        if member.rank == 0 {
            std::fs::remove_dir_all(&tier).unwrap();
            std::fs::write(&tier, "no directory").unwrap();
        }
        running.save(1, state(member, 1)).unwrap().wait(LONG).unwrap();
        let ended = running.shutdown(Duration::from_millis(500));
        assert_eq!(ended.is_err(), member.rank == 0, "only rank 0 promotes: {ended:?}");
    });
    std::fs::remove_file(&tier).unwrap();
    together(3, |member| {
        let running = builder(root.path(), member).tier(shared(&tier)).build().unwrap();
        assert_eq!(running.latest().unwrap().unwrap().step(), 1);
        running.shutdown(LONG).unwrap();
    });
    assert_eq!(steps(&tier), [1]);
}

#[test]
fn ranks_with_other_tiers_are_told_so() {
    let (root, tier) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let built = together(2, |member| {
        let name = if member.rank == 0 { "shared" } else { "another" };
        builder(root.path(), member).tier(shared(tier.path()).named(name)).build()
    });
    for error in built.into_iter().map(Result::unwrap_err) {
        assert_eq!((error.kind(), error.ranks()), (ErrorKind::Invalid, &[1][..]), "{error}");
        assert!(error.message().contains("\"another\"") && error.message().contains("ASHORE_TIER"), "{error}");
    }
    assert!(steps(tier.path()).is_empty());
}

/// The same path names a disk of its own on each node.
#[test]
fn a_rank_that_sees_another_directory_as_the_tier_is_told_so() {
    let (root, tier) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let built = together(2, |member| {
        let seen = tier.path().join(member.rank.to_string());
        builder(root.path(), member).tier(Tier::over("shared", Arc::new(Local::open(seen).unwrap()))).build()
    });
    assert!(built[0].is_ok());
    let error = built[1].as_ref().unwrap_err();
    assert_eq!((error.kind(), error.ranks()), (ErrorKind::Invalid, &[1][..]), "{error}");
    assert!(format!("{error:#}").contains("tier=\"shared\""), "{error:#}");
    assert!(format!("{error:#}").contains("the same shared directory or URL"), "{error:#}");
}

/// Rank 0 alone knows when a tier is back. Until it has noted that, no rank reads the tier.
#[test]
fn a_tier_that_is_away_for_rank_0_is_read_by_no_rank_until_rank_0_has_taken_it_over() {
    let (root, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (tier, away) = (folder.path().join("tier"), folder.path().join("away"));
    together(2, |member| {
        let running = builder(root.path(), member).tier(shared(&tier)).build().unwrap();
        for step in [1, 2] {
            running.save(step, state(member, step)).unwrap().wait(LONG).unwrap();
        }
        running.shutdown(LONG).unwrap();
    });
    std::fs::remove_dir_all(open(root.path(), 2).path()).unwrap();
    std::fs::rename(&tier, &away).unwrap();
    // As a mount that is missing.
    std::os::unix::fs::symlink(folder.path().join("nowhere"), &tier).unwrap();
    let all = Barrier::new(2);
    together(2, |member| {
        let running = builder(root.path(), member).tier(shared(&tier)).build().unwrap();
        let found = || running.latest().unwrap().map(|newest| newest.step());
        assert_eq!(found(), Some(1));
        all.wait();
        if member.rank == 0 {
            assert_eq!(running.tiers()[0].state, TierState::Away);
            std::fs::remove_file(&tier).unwrap();
            std::fs::rename(&away, &tier).unwrap();
        }
        until("the tier is not read", || found() == Some(2));
        check(&running.checkpoint(2).unwrap(), mine(member));
        all.wait();
        if member.rank == 0 {
            assert_eq!(running.tiers()[0].state, TierState::Ours);
        }
        running.shutdown(LONG).unwrap();
    });
}

/// A process alone leaves a tier out that it cannot list. A rank that did so would find another step than
/// the other ranks.
#[test]
fn a_rank_that_does_not_reach_the_tier_fails_and_the_other_ranks_go_on() {
    let (root, tier) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (storage, all) = (|| Troubled::slow(Local::open(tier.path()).unwrap(), Duration::ZERO), Barrier::new(2));
    together(2, |member| {
        let storage = Arc::new(storage());
        let running = builder(root.path(), member).tier(Tier::over("shared", storage.clone())).build().unwrap();
        let save = running.save(1, state(member, 1)).unwrap();
        save.wait(LONG).unwrap();
        if member.rank == 0 {
            save.durable_in("shared").wait(LONG).unwrap();
        }
        all.wait();
        storage.away.store(member.rank == 1, Ordering::Relaxed);
        let (newest, valid) = (running.latest(), running.latest_valid());
        if member.rank == 1 {
            for error in [newest.unwrap_err(), valid.unwrap_err()] {
                assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:#}");
                assert!(format!("{error:#}").contains("tier=\"shared\""), "{error:#}");
            }
            storage.away.store(false, Ordering::Relaxed);
            assert_eq!(running.latest().unwrap().unwrap().step(), 1, "it is opened again");
        } else {
            assert_eq!((newest.unwrap().unwrap().step(), valid.unwrap().unwrap().checkpoint.step()), (1, 1));
        }
        all.wait();
        running.shutdown(LONG).unwrap();
    });
}

/// What rank 0 has noted is read by the other ranks. So it leaves none of it out itself.
#[test]
fn rank_0_fails_too_when_a_tier_that_it_has_noted_is_away() {
    let (root, tier) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let all = Barrier::new(2);
    together(2, |member| {
        let storage = Arc::new(Troubled::slow(Local::open(tier.path()).unwrap(), Duration::ZERO));
        let running = builder(root.path(), member).tier(Tier::over("shared", storage.clone())).build().unwrap();
        running.save(1, state(member, 1)).unwrap().wait(LONG).unwrap();
        all.wait();
        storage.away.store(member.rank == 0, Ordering::Relaxed);
        let newest = running.latest();
        all.wait();
        if member.rank == 0 {
            let error = newest.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:#}");
            assert!(format!("{error:#}").contains("tier=\"shared\""), "{error:#}");
            storage.away.store(false, Ordering::Relaxed);
            until("the tier is not read again", || running.latest().is_ok_and(|newest| newest.is_some()));
        } else {
            assert_eq!(newest.unwrap().unwrap().step(), 1);
        }
        all.wait();
        running.shutdown(LONG).unwrap();
    });
}

/// The folder of the tier, the root, the rank, the world and the last step of a process that is a rank.
const RANK: [&str; 5] =
    ["ASHORE_TIERS_TIER", "ASHORE_TIERS_ROOT", "ASHORE_TIERS_RANK", "ASHORE_TIERS_WORLD", "ASHORE_TIERS_STEPS"];

/// How often ranks are killed; `ASHORE_TIERS_RANK_KILLS` changes it.
const KILLS: u64 = 5;

/// Ranks are processes. One rank or all are killed; then another machine goes on with another number of
/// ranks, from the tier alone, and after that the first machine from where that one has come to.
#[test]
fn after_kills_another_number_of_ranks_goes_on_from_the_tier_alone() {
    if let Some(variables) = RANK.iter().map(std::env::var_os).collect::<Option<Vec<_>>>() {
        let text = |at: usize| variables[at].to_str().unwrap();
        let (rank, world) = (text(2).parse().unwrap(), text(3).parse().unwrap());
        let last = text(4).parse().unwrap();
        return train(Path::new(text(0)), Path::new(text(1)), Member { rank, world, local_rank: rank }, last);
    }
    let folder = tempfile::tempdir().unwrap();
    let (tier, home) = (folder.path().join("tier"), folder.path().join("home"));
    let kills = std::env::var("ASHORE_TIERS_RANK_KILLS").map_or(KILLS, |kills| kills.parse().unwrap());
    let mut seed = u64::from_le_bytes(uuid::Uuid::new_v4().as_bytes()[..8].try_into().unwrap());
    let mut newest = 0;
    for number in 0..kills {
        let mut ranks: Vec<Rank> = (0..WORLD).map(|rank| Rank::start(&tier, &home, rank, WORLD, u64::MAX)).collect();
        for rank in &mut ranks {
            assert_eq!(rank.hear("found"), newest, "all ranks find the newest step of the tier");
        }
        ranks[0].hear("durable");
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        std::thread::sleep(Duration::from_millis((seed >> 33) % 100));
        let dead = if number % 5 == 4 { 0..WORLD } else { (number % 5) as u32..(number % 5) as u32 + 1 };
        for rank in dead.clone() {
            ranks[rank as usize].child.kill().unwrap();
        }
        let mut promoted = Vec::new();
        for (number, rank) in (0..).zip(ranks) {
            let (status, said) = rank.end();
            // One that is to be killed may have ended before, because another one was.
            let dead = dead.contains(&number) && status == Some(9);
            assert!(dead || said.iter().any(|line| line.starts_with("failed")), "rank {number} {status:?}: {said:?}");
            promoted.extend(said.iter().filter_map(|line| line.strip_prefix("promoted ")?.parse::<u64>().ok()));
        }
        let there = steps(&tier);
        assert!(promoted.iter().all(|step| there.contains(step)), "told {promoted:?}, and there are {there:?}");
        there.iter().for_each(|step| check(&open(&tier, *step), 0..ROWS));

        let (elsewhere, world) = (folder.path().join(format!("machine-{number}")), [2, 5, 3][number as usize % 3]);
        let found = there.last().copied().unwrap_or(0);
        let ranks: Vec<Rank> = (0..world).map(|rank| Rank::start(&tier, &elsewhere, rank, world, found + 1)).collect();
        for mut rank in ranks {
            assert_eq!(rank.hear("found"), found, "killed: {dead:?}");
            let (status, said) = rank.end();
            assert_eq!(status, Some(0), "{said:?}");
        }
        newest = found + 1;
        assert_eq!(steps(&tier).last(), Some(&newest));
        check(&open(&tier, newest), 0..ROWS);
    }
    let left = std::fs::read_dir(&tier).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let left: Vec<String> = left.filter(|name| name.starts_with(".step-")).collect();
    assert!(left.is_empty(), "attempts of killed processes are left: {left:?}");
}

/// A process that is a rank.
struct Rank {
    child: Child,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
    said: Vec<String>,
}

impl Rank {
    fn start(tier: &Path, root: &Path, rank: u32, world: u32, last: u64) -> Self {
        let values = [tier.into(), root.into(), rank.to_string().into(), world.to_string().into()];
        let values = values.into_iter().chain([PathBuf::from(last.to_string())]);
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "ranks::after_kills_another_number_of_ranks_goes_on_from_the_tier_alone", "--nocapture"])
            .envs(RANK.iter().zip(values))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, lines, said: Vec::new() }
    }

    /// The number behind the next line that begins with `word`.
    fn hear(&mut self, word: &str) -> u64 {
        for line in self.lines.by_ref() {
            let line = line.unwrap();
            self.said.push(line.clone());
            if let Some(number) = line.strip_prefix(word) {
                return number.trim().parse().unwrap();
            }
        }
        panic!("a rank ended before it said {word:?}: {:?}", self.said);
    }

    /// Its exit code, or the signal that ended it, and what it said.
    fn end(mut self) -> (Option<i32>, Vec<String>) {
        use std::os::unix::process::ExitStatusExt;
        self.said.extend(self.lines.map_while(std::result::Result::ok));
        let status = self.child.wait().unwrap();
        (status.signal().or(status.code()), self.said)
    }
}

/// Saves until `last`, or until a save fails because another rank is gone.
fn train(tier: &Path, root: &Path, member: Member, last: u64) {
    let running = builder(root, member).tier(shared(tier)).build().unwrap();
    let newest = running.latest().unwrap();
    let mut step = newest.as_ref().map_or(0, |newest| newest.step());
    newest.inspect(|newest| check(newest, mine(member)));
    // The harness may have left a line open.
    println!("\nfound {step}");
    while step < last {
        step += 1;
        // A step that this root has, and that the job redid elsewhere, is replaced.
        let options = ashore::SaveOptions::default().overwrite();
        let saved = running.save_with(step, state(member, step), options).and_then(|save| {
            save.wait(LONG)?;
            println!("durable {step}");
            if member.rank == 0 && save.durable_in("shared").wait(LONG).is_ok() {
                println!("promoted {step}");
            }
            Ok(())
        });
        if let Err(error) = saved {
            println!("failed {error:#}");
            drop(running.shutdown(LONG));
            return;
        }
    }
    running.shutdown(LONG).unwrap();
}
