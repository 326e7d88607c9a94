//! Many writers of one step: exactly one wins, and each loser knows.

use crate::proxy::{Chance, Fault, Proxy};
use crate::roots;
use crate::servers::{azurite, moto, prefix};
use ashore::ErrorKind;
use ashore::id::Attempt;
use ashore::storage::Storage;
use std::sync::{Arc, Barrier};
use std::time::Duration;

const WRITERS: usize = 32;

/// A server that answers 32 clients, each as slowly as the machine is loaded, is not a store that is away.
const PATIENCE: Duration = Duration::from_secs(240);

fn on_s3(url: &str, prefix: &str) -> Arc<dyn Storage> {
    roots::patient(crate::servers::s3(url, "bucket"), prefix, PATIENCE)
}

fn on_azure(url: &str, prefix: &str) -> Arc<dyn Storage> {
    roots::patient(crate::servers::azure(url, "bucket"), prefix, PATIENCE)
}

/// Rounds of 32 writers that take the root from each other, for one of those in one session: they make thirty
/// times as many requests.
const FEWER: usize = 50;

/// Rounds in CI; `ASHORE_STORE_ROUNDS` is another number.
fn rounds(usual: usize) -> usize {
    std::env::var("ASHORE_STORE_ROUNDS").map_or(usual, |text| text.parse().expect("ASHORE_STORE_ROUNDS is a number"))
}

/// Lets writers, one storage each, publish the step at once; returns what each was told.
fn race(storages: Vec<Arc<dyn Storage>>) -> Vec<(Attempt, ashore::Result<()>)> {
    let ready = Arc::new(Barrier::new(storages.len()));
    let writers = storages.into_iter().map(|storage| {
        let ready = ready.clone();
        std::thread::spawn(move || {
            let attempt = Attempt::new();
            ready.wait();
            let published = storage.begin("step-1", attempt, false).and_then(|writing| {
                writing.put("manifest.json", attempt.to_string().as_bytes())?;
                writing.publish(false)
            });
            (attempt, published)
        })
    });
    let writers: Vec<_> = writers.collect();
    writers.into_iter().map(|writer| writer.join().unwrap()).collect()
}

/// Exactly one was told that it won, that one is what a reader finds, and every other was told a failure that
/// is certain.
fn judge(told: &[(Attempt, ashore::Result<()>)], reader: &Arc<dyn Storage>) {
    let won: Vec<_> = told.iter().filter(|(_, published)| published.is_ok()).map(|(attempt, _)| *attempt).collect();
    let said =
        |kind| told.iter().filter(|(_, published)| matches!(published, Err(error) if error.kind() == kind)).count();
    assert_eq!(won.len(), 1, "told: {told:?}");
    assert_eq!(said(ErrorKind::Conflict), told.len() - 1, "told: {told:?}");
    let file = reader.open("step-1").unwrap().open("manifest.json").unwrap();
    let mut text = vec![0; file.len() as usize];
    file.read_at(0, &mut text).unwrap();
    assert_eq!(String::from_utf8(text).unwrap(), won[0].to_string());
}

#[test]
fn of_32_writers_in_one_session_exactly_one_wins_on_moto() {
    for _ in 0..rounds(20) {
        let root = on_s3(&moto(), &prefix("race"));
        judge(&race(vec![root.clone(); WRITERS]), &root);
    }
}

#[test]
fn of_32_writers_in_one_session_exactly_one_wins_on_azurite() {
    for _ in 0..rounds(10) {
        let root = on_azure(&azurite(), &prefix("race"));
        judge(&race(vec![root.clone(); WRITERS]), &root);
    }
}

#[test]
fn of_32_writers_that_take_the_root_from_each_other_exactly_one_wins() {
    for _ in 0..rounds(3 * FEWER).div_ceil(FEWER) {
        let prefix = prefix("race");
        let told = race((0..WRITERS).map(|_| on_s3(&moto(), &prefix)).collect());
        judge(&told, &on_s3(&moto(), &prefix));
    }
}

/// Lets 32 writers race through a network that loses answers and makes conflicts without an object.
/// `storages` makes theirs.
fn race_through_faults(round: u64, storages: impl FnOnce(&str, &str) -> Vec<Arc<dyn Storage>>) {
    let proxy = Proxy::before(&moto());
    let prefix = prefix("race");
    let storages = storages(&proxy.url(), &prefix);
    // The root exists before anything goes wrong.
    storages[0].take_over().unwrap();
    let faults = vec![
        Fault::AnswerLost,
        Fault::LandsThen(500),
        Fault::Status(409, "ConditionalRequestConflict"),
        Fault::Status(503, "SlowDown"),
        Fault::ResetAfter,
        Fault::ResetBefore,
        Fault::LandsLater(Duration::from_millis(300)),
    ];
    // The first change meets each of them in turn, and what follows by chance.
    proxy.fault("PUT", "/ashore.json", faults[round as usize % faults.len()], 1);
    proxy.chance(Chance { seed: round, one_in: 3, faults, left: 40 });
    let told = race(storages);
    assert!(proxy.seen().iter().filter(|seen| seen.fault.is_some()).count() > 1, "round {round}: no faults");
    proxy.calm();
    judge(&told, &on_s3(&moto(), &prefix));
    println!("round {round}: one of {WRITERS} has won");
}

#[test]
fn lost_answers_and_conflicts_without_an_object_change_nothing_about_that() {
    for round in 0..rounds(28).max(7) as u64 {
        race_through_faults(round, |url, prefix| vec![on_s3(url, prefix); WRITERS]);
    }
}

#[test]
fn nor_do_they_when_the_writers_take_the_root_from_each_other() {
    for round in 0..rounds(7 * FEWER).div_ceil(FEWER).max(7) as u64 {
        race_through_faults(round, |url, prefix| (0..WRITERS).map(|_| on_s3(url, prefix)).collect());
    }
}
