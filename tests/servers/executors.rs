//! Executors whose store answers late, wrongly or not at all: what was told holds afterwards.

use crate::proxy::{Chance, Fault, Proxy};
use crate::roots::{executor, numbers, on_azure, on_s3, state};
use crate::servers;
use crate::servers::{azurite, moto, prefix};
use ashore::storage::{ObjectStore, Storage, Sweep};
use ashore::{Attempt, Catalog, CheckpointExecutor, Error, ErrorKind, Outcome};
use std::sync::Arc;
use std::time::{Duration, Instant};

const SOON: Duration = Duration::from_secs(60);

fn save(executor: &CheckpointExecutor, step: u64) -> Result<(), Error> {
    let saved = executor.save(step, state(step)).and_then(|save| save.wait(SOON));
    saved.map(|outcome| assert!(matches!(outcome, Outcome::Durable(_)), "{outcome:?}"))
}

/// The numbers of the steps that a reader finds, each compared byte by byte.
fn found(storage: &Arc<dyn Storage>) -> Vec<u64> {
    let catalog = Catalog::over(storage.clone());
    let (entries, problems) = catalog.survey().unwrap();
    assert!(problems.is_empty(), "{problems:?}");
    for entry in &entries {
        let checkpoint = catalog.checkpoint(entry.step).unwrap();
        assert!(checkpoint.verify().unwrap().is_sound());
        assert_eq!(checkpoint.read_as::<u64>("weights").unwrap(), numbers(entry.step));
        assert_eq!(checkpoint.value::<u64>("step").unwrap(), entry.step);
    }
    entries.iter().map(|entry| entry.step).collect()
}

/// Ends the executor, and waits until the last request has dropped its slab.
fn end(executor: &CheckpointExecutor) {
    let _ = executor.shutdown(SOON);
    let (arena, until) = (executor.arena(), Instant::now() + SOON);
    while arena.free() < arena.report().slabs {
        assert!(Instant::now() < until, "slabs are not home: {} of {}", arena.free(), arena.report().slabs);
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Every kind of fault that a network or a store makes and a retry can cure.
pub fn passing() -> Vec<Fault> {
    vec![
        Fault::Status(500, "InternalError"),
        Fault::Status(503, "SlowDown"),
        Fault::Status(429, "TooManyRequests"),
        Fault::Status(409, "ConditionalRequestConflict"),
        Fault::Status(400, "ExpiredToken"),
        Fault::LandsThen(500),
        Fault::AnswerLost,
        Fault::LandsLater(Duration::from_millis(400)),
        Fault::ResetBefore,
        Fault::ResetAfter,
        Fault::Slow(Duration::from_millis(200)),
        Fault::SlowBody(Duration::from_millis(200)),
        Fault::Truncated,
        Fault::Stalled(Duration::from_millis(300)),
    ]
}

fn saves_under_faults(server: &str, faults: &[Fault], on: fn(&str, &str) -> Arc<dyn Storage>) {
    let mut durable = 0;
    for seed in 0..3 {
        let (proxy, prefix) = (Proxy::before(server), prefix("faults"));
        let executor = executor(on(&proxy.url(), &prefix)).save_timeout(Duration::from_secs(20)).build().unwrap();
        proxy.chance(Chance { seed, one_in: 4, faults: faults.to_vec(), left: 60 });
        let told: Vec<_> = (1..=8).map(|step| (step, save(&executor, step))).collect();
        let met = proxy.seen().iter().filter(|seen| seen.fault.is_some()).count();
        assert!(met > 5, "only {met} faults were met");
        proxy.calm();
        // What was on its way has arrived.
        std::thread::sleep(Duration::from_millis(500));
        let found = found(&on(server, &prefix));
        for (step, told) in &told {
            match told {
                Ok(()) => assert!(found.contains(step), "step {step} was durable and is not there: {found:?} {told:?}"),
                Err(error) if error.kind() == ErrorKind::Indeterminate => {}
                Err(error) => assert!(!found.contains(step), "step {step} failed and is there: {error:#}"),
            }
        }
        durable += told.iter().filter(|(_, told)| told.is_ok()).count();
        save(&executor, 9).unwrap();
        end(&executor);
    }
    assert!(durable >= 12, "of 24 saves only {durable} came through");
}

#[test]
fn after_the_faults_what_was_durable_is_there_and_what_failed_is_not_on_s3() {
    saves_under_faults(&moto(), &[passing(), vec![Fault::FlippedRequest]].concat(), on_s3);
}

#[test]
fn after_the_faults_what_was_durable_is_there_and_what_failed_is_not_on_azure() {
    let account = azurite();
    let (server, account) = account.rsplit_once('/').unwrap();
    assert_eq!(account, crate::servers::given("ASHORE_TEST_ACCOUNT"));
    // No client sends Azure a checksum that it would judge: TLS alone keeps the bytes on their way.
    saves_under_faults(server, &passing(), |url, prefix| on_azure(&format!("{url}/devstoreaccount1"), prefix));
}

#[test]
fn a_store_that_is_away_for_two_seconds_delays_a_save_and_fails_none() {
    let (proxy, prefix) = (Proxy::before(&moto()), prefix("away"));
    let executor = executor(on_s3(&proxy.url(), &prefix)).build().unwrap();
    save(&executor, 1).unwrap();
    proxy.away(true);
    let second = executor.save(2, state(2)).unwrap();
    std::thread::sleep(Duration::from_secs(2));
    assert!(second.try_get().is_none(), "{:?}", second.try_get());
    proxy.away(false);
    second.wait(SOON).unwrap();
    assert_eq!(found(&on_s3(&moto(), &prefix)), [1, 2]);
    end(&executor);
}

#[test]
fn a_store_that_is_away_for_longer_than_a_save_may_take_fails_it_and_takes_the_next() {
    let (proxy, prefix) = (Proxy::before(&moto()), prefix("away"));
    let executor = executor(on_s3(&proxy.url(), &prefix)).save_timeout(Duration::from_secs(4)).build().unwrap();
    save(&executor, 1).unwrap();
    proxy.away(true);
    let began = Instant::now();
    let error = save(&executor, 2).unwrap_err();
    assert!(began.elapsed() < Duration::from_secs(20), "it took {:?}", began.elapsed());
    assert!([ErrorKind::Unavailable, ErrorKind::Deadline].contains(&error.kind()), "{error:#}");
    assert_eq!(error.step(), Some(2), "{error:#}");
    proxy.away(false);
    save(&executor, 3).unwrap();
    assert_eq!(found(&on_s3(&moto(), &prefix)), [1, 3]);
    end(&executor);
}

#[test]
fn a_store_that_goes_away_for_good_leaves_older_steps_and_every_slab() {
    let (proxy, prefix) = (Proxy::before(&moto()), prefix("away"));
    let executor = executor(on_s3(&proxy.url(), &prefix)).save_timeout(Duration::from_secs(4)).build().unwrap();
    save(&executor, 1).unwrap();
    proxy.away(true);
    for step in 2..4 {
        save(&executor, step).unwrap_err();
    }
    end(&executor);
    assert_eq!(found(&on_s3(&moto(), &prefix)), [1]);
}

#[test]
fn the_older_of_two_jobs_on_one_root_is_told_at_its_next_save_and_the_newer_saves_on() {
    let prefix = prefix("two-jobs");
    let older = executor(on_s3(&moto(), &prefix)).build().unwrap();
    save(&older, 1).unwrap();
    let newer = executor(on_s3(&moto(), &prefix)).build().unwrap();
    let error = save(&older, 2).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error:#}");
    assert!(format!("{error:#}").contains("newer session"), "{error:#}");
    assert_eq!(error.step(), Some(2), "{error:#}");
    save(&newer, 2).unwrap();
    save(&older, 3).unwrap_err();
    assert_eq!(found(&on_s3(&moto(), &prefix)), [1, 2]);
    end(&older);
    end(&newer);
}

#[test]
fn bytes_that_change_on_their_way_back_are_read_again_and_a_restore_gets_what_was_saved() {
    let (proxy, prefix) = (Proxy::before(&moto()), prefix("flipped"));
    let executor = executor(on_s3(&moto(), &prefix)).build().unwrap();
    save(&executor, 1).unwrap();
    let catalog = Catalog::over(on_s3(&proxy.url(), &prefix));
    let checkpoint = catalog.checkpoint(1).unwrap();
    proxy.fault("GET", ".safetensors", Fault::FlippedAnswer, 1);
    assert_eq!(checkpoint.read_as::<u64>("weights").unwrap(), numbers(1));
    proxy.fault("GET", ".safetensors", Fault::FlippedAnswer, 100);
    let error = checkpoint.read_as::<u64>("weights").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error:#}");
    end(&executor);
}

#[test]
fn a_save_costs_the_requests_that_the_page_says() {
    let (proxy, prefix) = (Proxy::before(&moto()), prefix("costs"));
    let executor = executor(on_s3(&proxy.url(), &prefix)).build().unwrap();
    save(&executor, 1).unwrap();
    proxy.seen();
    save(&executor, 2).unwrap();
    end(&executor);
    let seen = proxy.seen();
    let count =
        |method: &str, what: &str| seen.iter().filter(|seen| seen.method == method && seen.path.contains(what)).count();
    // One shard, one table, one manifest, each below the size of a part; one change of the root. Looks at it
    // come before a save, and after, where one may serve several saves.
    let gets = count("GET", "/ashore.json");
    let costs = [count("PUT", "/step-00000002/"), count("PUT", "/ashore.json"), seen.len() - gets];
    assert_eq!(costs, [3, 1, 4], "{seen:#?}");
    assert!(gets <= 2, "{seen:#?}");
}

#[test]
fn an_attempt_whose_commit_may_still_arrive_is_not_swept() {
    let (proxy, prefix) = (Proxy::before(&moto()), prefix("unclear"));
    let root = servers::s3(&proxy.url(), "bucket");
    let root = ObjectStore::over(Arc::new(root), &format!("s3://bucket/{prefix}")).unwrap();
    let root = root.patience(Duration::from_secs(2));
    root.take_over().unwrap();
    let writing = root.begin("step-1", Attempt::new(), false).unwrap();
    writing.put("manifest.json", b"whole").unwrap();
    // The commit is on its way, and the store answers nothing else.
    proxy.fault("PUT", "ashore.json", Fault::LandsLater(Duration::from_secs(12)), 1);
    proxy.fault("", "", Fault::Status(503, "SlowDown"), usize::MAX);
    let error = writing.publish(false).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Indeterminate, "{error:#}");
    drop(writing);
    proxy.calm();
    let reader = on_s3(&moto(), &prefix);
    assert!(reader.list().unwrap().is_empty(), "it arrived before the sweep");
    root.sweep(Sweep::default()).unwrap();
    let until = Instant::now() + SOON;
    while reader.list().unwrap().is_empty() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(200));
    }
    // A sweep that deletes it must have made sure that it does not arrive.
    if reader.list().unwrap().is_empty() {
        return;
    }
    let file = reader.open("step-1").unwrap().open("manifest.json").unwrap();
    let mut text = [0; 5];
    file.read_at(0, &mut text).unwrap();
    assert_eq!(&text, b"whole");
}

#[test]
fn a_sweep_beside_a_commit_leaves_what_was_committed() {
    let (proxy, prefix) = (Proxy::before(&moto()), prefix("beside"));
    let root = on_s3(&proxy.url(), &prefix);
    let publish = |content: &[u8]| {
        let writing = root.begin("step-1", Attempt::new(), true).unwrap();
        writing.put("manifest.json", content).unwrap();
        writing.publish(true).unwrap();
        writing
    };
    publish(b"first").settle().unwrap();
    // The sweep has read the root, and waits for the list.
    proxy.fault("GET", "list-type=2", Fault::Slow(Duration::from_secs(4)), 1);
    proxy.seen();
    let sweeping = std::thread::spawn({
        let root = root.clone();
        move || root.sweep(Sweep::default())
    });
    let until = Instant::now() + SOON;
    while !proxy.seen().iter().any(|seen| seen.path.contains("list-type=2")) {
        assert!(Instant::now() < until, "the sweep lists nothing");
        std::thread::sleep(Duration::from_millis(20));
    }
    // What this one has replaced cannot be deleted.
    let second = publish(b"other");
    proxy.fault("GET", "list-type=2", Fault::Status(403, "SignatureDoesNotMatch"), 1);
    second.settle().unwrap_err();
    drop(second);
    proxy.calm();
    sweeping.join().unwrap().unwrap();
    let file = root.open("step-1").unwrap().open("manifest.json").unwrap();
    let mut text = [0; 5];
    file.read_at(0, &mut text).unwrap();
    assert_eq!(&text, b"other");
}
