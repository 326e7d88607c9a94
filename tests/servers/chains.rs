//! Chains of published versions in stores: publishers and followers of URLs.

use crate::executors::passing;
use crate::program::said;
use crate::proxy::{Chance, Proxy};
use crate::roots::{numbers, on_azure, on_s3};
use crate::servers::{azurite, moto, prefix};
use ashore::chain::{Chain, Follow, Kind, Publisher, Switch, Weights};
use ashore::storage::Storage;
use ashore::{Error, ErrorKind, HostTensor, StateDict};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

const SOON: Duration = Duration::from_secs(60);

/// Weights of which every version changes a few.
fn weights(version: u64) -> Vec<u64> {
    let mut weights = numbers(1);
    (1..=version).for_each(|version| weights[version as usize * 100] = version);
    weights
}

fn publisher(storage: Arc<dyn Storage>) -> Publisher {
    Publisher::over(storage).full_every(3).grace(2).arena(512 << 10).build().unwrap()
}

fn publish(publisher: &Publisher, turn: u64) -> Result<Kind, Error> {
    let mut state = StateDict::new();
    state.tensor("weights", HostTensor::new(Arc::new(weights(turn)), [weights(turn).len()]))?;
    state.value("turn", &turn)?;
    publisher.publish(state)?.wait(SOON).map(|published| published.kind)
}

fn a_chain(storage: &dyn Fn() -> Arc<dyn Storage>) {
    let own = tempfile::tempdir().unwrap();
    let first = publisher(storage());
    assert_eq!(publish(&first, 1).unwrap(), Kind::Full);
    let follower = Follow::over(storage()).switch(Switch::Double).copy_to(own.path()).unwrap();
    let mut follow = follower.poll_every(Duration::from_millis(20)).start(Weights::new()).unwrap();
    let is = |follow: &Follow<'_>, turn: u64| {
        assert_eq!(follow.weights().elements::<u64>("weights").unwrap(), weights(turn));
        follow.weights().verify().unwrap();
    };
    assert_eq!(follow.advance(SOON).unwrap(), Some(1));
    for version in 2..=5 {
        let kind = publish(&first, version).unwrap();
        assert!(matches!(kind, Kind::Delta { base, changed: 1 } if base == version - 1), "{kind:?}");
        assert_eq!(follow.advance(SOON).unwrap(), Some(version));
        is(&follow, version);
    }
    // Another publisher reads what it builds on, and ends the first one.
    let second = publisher(storage());
    assert_eq!(second.newest(), Some(5));
    for version in 6..=9 {
        assert!(matches!(publish(&second, version).unwrap(), Kind::Delta { changed: 1, .. }));
    }
    let error = publish(&first, 6).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error:#}");
    assert_eq!(follow.advance(SOON).unwrap(), Some(9));
    is(&follow, 9);
    drop((first, second));
    // One that begins now takes the newest full, and one of the first versions is gone.
    let chain = Chain::over(storage());
    let versions = chain.versions().unwrap();
    assert!(chain.holes().unwrap().is_empty(), "{versions:?}");
    assert!(versions[0].number > 1 && versions.iter().any(|v| v.base.is_none() && v.number > 1), "{versions:?}");
    let mut late = Follow::over(storage()).start(Weights::new()).unwrap();
    assert_eq!(late.advance(SOON).unwrap(), Some(9));
    is(&late, 9);
    drop(follow);
    let again = Follow::over(storage()).copy_to(own.path()).unwrap().start(Weights::new()).unwrap();
    assert_eq!(again.version(), Some(9), "its own copy is enough");
    is(&again, 9);
}

#[test]
fn publishers_and_followers_share_a_chain_on_s3() {
    let prefix = prefix("chain");
    a_chain(&|| on_s3(&moto(), &prefix));
    let url = format!("s3://bucket/{prefix}");
    assert!(said(&["chain", &url]).lines().any(|line| line.split_whitespace().any(|word| word == "9")));
    let into = tempfile::tempdir().unwrap();
    let followed = said(&["follow", &url, "--into", into.path().to_str().unwrap(), "--idle", "0"]);
    assert!(followed.contains("version 9"), "{followed}");
    assert!(Chain::open(into.path()).unwrap().versions().unwrap().iter().any(|version| version.number == 9));
}

#[test]
fn publishers_and_followers_share_a_chain_on_azure() {
    let prefix = prefix("chain");
    a_chain(&|| on_azure(&azurite(), &prefix));
}

#[test]
fn under_faults_a_follower_has_nothing_but_published_versions_and_reaches_the_newest() {
    for seed in 0..2 {
        let (proxy, prefix) = (Proxy::before(&moto()), prefix("chain"));
        let publisher = publisher(on_s3(&proxy.url(), &prefix));
        publish(&publisher, 1).unwrap();
        let mut follow = Follow::over(on_s3(&proxy.url(), &prefix)).start(Weights::new()).unwrap();
        proxy.chance(Chance { seed, one_in: 6, faults: passing(), left: 40 });
        let (mut told, mut turns) = (0, BTreeMap::new());
        for turn in 2..=10 {
            told += u32::from(publish(&publisher, turn).is_ok());
            // A read that fails is tried again by the next call.
            while let Ok(Some(update)) = follow.next(Duration::ZERO) {
                let turn = update.value::<u64>("turn").unwrap();
                turns.insert(follow.apply(update).unwrap(), turn);
                assert_eq!(follow.weights().elements::<u64>("weights").unwrap(), weights(turn));
            }
        }
        let met = proxy.seen().iter().filter(|seen| seen.fault.is_some()).count();
        assert!(met > 5 && told > 3 && turns.len() > 1, "{met} faults, {told} published, {turns:?} followed");
        proxy.calm();
        publish(&publisher, 11).unwrap();
        while follow.advance(Duration::from_secs(1)).unwrap().is_some() {}
        assert_eq!(follow.weights().elements::<u64>("weights").unwrap(), weights(11));
        assert!(Chain::over(on_s3(&moto(), &prefix)).holes().unwrap().is_empty());
    }
}
