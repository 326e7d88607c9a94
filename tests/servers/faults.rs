//! The faults are what they say, seen by a client that ashore does not wrap.

use crate::proxy::{Chance, Fault, Proxy};
use crate::run;
use crate::servers::{moto, prefix, s3};
use object_store::{Error, ObjectStore, ObjectStoreExt, PutMode, PutOptions, path::Path};
use std::time::{Duration, Instant};

#[test]
fn a_request_whose_answer_is_lost_has_landed_and_the_retry_is_told_that_it_exists() {
    let proxy = Proxy::before(&moto());
    let (client, key) = (s3(&proxy.url(), "bucket"), Path::from(prefix("faults")));
    proxy.fault("PUT", "", Fault::AnswerLost, 1);
    let told = run(client.put_opts(&key, "mine".into(), PutOptions::from(PutMode::Create)));
    assert!(matches!(told, Err(Error::AlreadyExists { .. })), "{told:?}");
    assert_eq!(run(async { client.get(&key).await.unwrap().bytes().await.unwrap() }), "mine");
    assert_eq!(
        proxy.seen().iter().map(|seen| (seen.method.as_str(), seen.status)).collect::<Vec<_>>(),
        [("PUT", 0), ("PUT", 412), ("GET", 200)]
    );
}

#[test]
fn a_conflict_by_the_proxy_leaves_no_object() {
    let proxy = Proxy::before(&moto());
    let (client, key) = (s3(&proxy.url(), "bucket"), Path::from(prefix("faults")));
    proxy.fault("PUT", "", Fault::Status(409, "ConditionalRequestConflict"), 1);
    let told = run(client.put_opts(&key, "mine".into(), PutOptions::from(PutMode::Create)));
    assert!(matches!(told, Err(Error::AlreadyExists { .. })), "{told:?}");
    let there = run(client.head(&key));
    assert!(matches!(there, Err(Error::NotFound { .. })), "{there:?}");
}

#[test]
fn a_request_that_lands_later_is_there_only_then() {
    let proxy = Proxy::before(&moto());
    let (client, key) = (s3(&proxy.url(), "bucket"), Path::from(prefix("faults")));
    proxy.fault("PUT", "", Fault::LandsLater(Duration::from_secs(1)), 3);
    run(client.put_opts(&key, "mine".into(), PutOptions::from(PutMode::Create))).unwrap_err();
    assert!(matches!(run(client.head(&key)), Err(Error::NotFound { .. })));
    let until = Instant::now() + Duration::from_secs(10);
    while run(client.head(&key)).is_err() {
        assert!(Instant::now() < until, "it has not landed");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn a_part_whose_bytes_change_on_the_way_is_refused_by_its_checksum() {
    let proxy = Proxy::before(&moto());
    let (client, key) = (s3(&proxy.url(), "bucket"), Path::from(prefix("faults")));
    proxy.fault("PUT", "", Fault::FlippedRequest, 1);
    let told = run(client.put(&key, vec![7; 100_000].into()));
    assert!(told.unwrap_err().to_string().contains("BadDigest"));
    run(client.put(&key, vec![7; 100_000].into())).unwrap();
}

#[test]
fn a_byte_that_is_another_in_an_answer_goes_unseen_by_the_client() {
    let proxy = Proxy::before(&moto());
    let (client, key) = (s3(&proxy.url(), "bucket"), Path::from(prefix("faults")));
    run(client.put(&key, vec![7; 1000].into())).unwrap();
    proxy.fault("GET", "", Fault::FlippedAnswer, 1);
    let got = run(async { client.get(&key).await.unwrap().bytes().await.unwrap() });
    assert_eq!((got.len(), got.iter().filter(|byte| **byte != 7).count()), (1000, 1));
}

#[test]
fn bodies_that_end_or_stop_early_and_resets_are_seen_or_asked_again() {
    let proxy = Proxy::before(&moto());
    let (client, key) = (s3(&proxy.url(), "bucket"), Path::from(prefix("faults")));
    run(client.put(&key, vec![7; 1 << 20].into())).unwrap();
    let faults =
        [Fault::Truncated, Fault::Stalled(Duration::from_millis(500)), Fault::SlowBody(Duration::from_millis(200))];
    for fault in faults.into_iter().chain([Fault::Status(500, "InternalError"), Fault::Status(503, "SlowDown")]) {
        proxy.fault("GET", "", fault, 1);
        let got = run(async { client.get(&key).await.unwrap().bytes().await.unwrap() });
        assert!(got.len() == 1 << 20 && got.iter().all(|byte| *byte == 7), "{fault:?}");
    }
    for fault in [Fault::ResetBefore, Fault::ResetAfter] {
        proxy.fault("PUT", "", fault, 3);
        run(client.put(&key, vec![7; 1 << 20].into())).expect_err(&format!("{fault:?}"));
        proxy.calm();
    }
}

#[test]
fn the_same_seed_makes_the_same_faults_and_no_more_than_asked() {
    let faults = |seed| {
        let proxy = Proxy::before(&moto());
        let client = s3(&proxy.url(), "bucket");
        proxy.chance(Chance {
            seed,
            one_in: 3,
            faults: vec![Fault::Status(400, "Bad"), Fault::Status(404, "No")],
            left: 5,
        });
        for _ in 0..30 {
            let _ = run(client.head(&Path::from("nothing")));
        }
        proxy.seen().iter().map(|seen| seen.fault).collect::<Vec<_>>()
    };
    let first = faults(1);
    assert_eq!(first.iter().flatten().count(), 5);
    assert_eq!(first, faults(1));
    assert_ne!(first, faults(2));
}

#[test]
fn a_store_that_is_away_is_not_reached_and_is_back_when_told() {
    let proxy = Proxy::before(&moto());
    let client = s3(&proxy.url(), "bucket");
    proxy.away(true);
    run(client.put(&Path::from(prefix("faults")), "mine".into())).unwrap_err();
    proxy.calm();
    run(client.put(&Path::from(prefix("faults")), "mine".into())).unwrap();
}
