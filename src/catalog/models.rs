//! Models for `just loom`: `prune` concurrent with a publish of the same process. The steps have no tensors.

use super::{Catalog, PruneOptions, Retention, Verify};
use crate::format::v1;
use crate::id::{Attempt, step_name};
use crate::storage::Memory;
use loom::thread;
use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::Arc;

/// How a publish ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Acknowledged,
    /// It is unknown whether the step is durable.
    Doubted,
    /// Nothing was published.
    Withdrawn,
}

/// Publishes step `step` as the committer does. An announced attempt is neither counted nor deleted before
/// its outcome is known.
fn publish(catalog: &Catalog, step: u64, attempt: Attempt, end: End) {
    let name = step_name(step);
    catalog.announce(&name, attempt).unwrap();
    if end != End::Withdrawn {
        put(catalog, step, attempt);
        // The locks of the storage are loom's, too, so another thread may run before each call.
        let found = catalog.try_open(step, &name).unwrap().map(|found| found.attempt());
        assert_eq!(found, Some(attempt), "an announced step was deleted before its end was known");
    }
    match end {
        End::Acknowledged => catalog.acknowledge(attempt),
        End::Doubted => catalog.doubt(attempt),
        End::Withdrawn => catalog.withdraw(attempt),
    }
}

/// Puts a step under its name, as another process may.
fn put(catalog: &Catalog, step: u64, attempt: Attempt) {
    let writing = catalog.storage.begin(&step_name(step), attempt, true).unwrap();
    writing.put("manifest.json", &manifest(step, attempt)).unwrap();
    writing.publish(true).unwrap();
}

fn manifest(step: u64, attempt: Attempt) -> Vec<u8> {
    let (metadata, values, files, tensors) = (BTreeMap::new(), BTreeMap::new(), Vec::new(), Vec::new());
    let format = "ashore".to_owned();
    v1::Manifest { format, version: 1, step, attempt, world: 1, metadata, values, files, tensors }.to_bytes().unwrap()
}

/// Makes the same attempts in every run, because loom repeats what it has explored.
fn attempt(number: u8) -> Attempt {
    Attempt::parse(&format!("67e55044-10b1-426f-9247-bb680e5fe0{number:02x}")).unwrap()
}

fn catalog(steps: RangeInclusive<u64>) -> Catalog {
    let catalog = Catalog::over(Arc::new(Memory::new()));
    steps.for_each(|step| publish(&catalog, step, attempt(step as u8), End::Acknowledged));
    catalog
}

/// Explores `body`, on a stack that is large enough for a prune.
fn explore(body: impl Fn() + Copy + Send + Sync + 'static) {
    loom::model(move || spawn(body).join().unwrap());
}

fn spawn(body: impl FnOnce() + Send + 'static) -> thread::JoinHandle<()> {
    thread::Builder::new().stack_size(1 << 20).spawn(body).unwrap()
}

fn steps(catalog: &Catalog) -> Vec<u64> {
    catalog.list().unwrap().into_iter().map(|entry| entry.step).collect()
}

#[test]
fn a_prune_beside_a_publish_leaves_a_durable_step_however_the_publish_ends() {
    for end in [End::Acknowledged, End::Doubted, End::Withdrawn] {
        explore(move || {
            let catalog = catalog(1..=0);
            // A step of another process, because a prune would keep a step of this process as its newest own
            // step.
            put(&catalog, 1, attempt(1));
            let publisher = catalog.clone();
            let publisher = spawn(move || publish(&publisher, 2, attempt(2), end));
            // A full read would start threads that loom does not control.
            let options = PruneOptions::new().verify(Verify::No);
            catalog.prune(&Retention::last(1), options).unwrap().complete().unwrap();
            publisher.join().unwrap();
            let left = steps(&catalog);
            match end {
                // Step 1 is deleted if the prune came last.
                End::Acknowledged => assert!(left == [2] || left == [1, 2], "{left:?}"),
                End::Doubted => assert_eq!(left, [1, 2]),
                End::Withdrawn => assert_eq!(left, [1]),
            }
        });
    }
}

#[test]
fn a_prune_deletes_no_step_that_is_being_replaced() {
    explore(|| {
        let catalog = catalog(1..=2);
        let publisher = catalog.clone();
        let publisher = spawn(move || publish(&publisher, 1, attempt(9), End::Acknowledged));
        let pruned = catalog.prune(&Retention::last(1), PruneOptions::new()).unwrap();
        publisher.join().unwrap();
        let left = steps(&catalog);
        assert!(left == [2] || left == [1, 2], "{left:?} {pruned:?}");
    });
}
