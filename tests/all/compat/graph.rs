//! The graph checkpointer: the suite on every implementation, and the errors that only some of them can make.

use crate::compat::identical::{assert_saved_by_the_executor, files};
use crate::fixtures::executor::LONG;
use ashore::compat::graph::{
    ActiveSnapshot, Checkpointer, Directory, GraphState, InMemory, Namespaced, Prune, Sqlite, checkpointer_for,
};
use ashore::testing::block_on;
use ashore::testing::graph::{Sample, run, run_pruning};
use ashore::{ErrorKind, Result, Settings};
use std::collections::HashMap;
use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex, mpsc};
use std::task::{Context, Wake, Waker};
use tempfile::tempdir;
use uuid::Uuid;

const RUN: Uuid = Uuid::from_u128(7);

fn save(checkpointer: &impl Checkpointer<Sample>, run: Uuid, step: u64) {
    block_on(checkpointer.save(run, step, &Sample::new(step))).unwrap();
}

#[test]
fn every_implementation_keeps_the_contract() {
    run(|| Arc::new(InMemory::new()));
    let (root, mut roots) = (tempdir().unwrap(), 0);
    let mut path = |extension: &str| {
        roots += 1;
        root.path().join(format!("{roots}{extension}"))
    };
    run(|| Arc::new(Directory::open(path("")).unwrap()));
    run(|| Arc::new(Sqlite::open(path(".db")).unwrap()));
    run(|| Arc::new(Namespaced::new(InMemory::new(), "subgraph")));
}

#[test]
fn every_implementation_prunes_alike() {
    run_pruning(|| Arc::new(InMemory::new()));
    run_pruning(|| Arc::new(Namespaced::new(InMemory::new(), "subgraph")));
    let (root, mut roots) = (tempdir().unwrap(), 0);
    let mut path = |extension: &str| {
        roots += 1;
        root.path().join(format!("{roots}{extension}"))
    };
    run_pruning(|| Arc::new(Directory::open(path("")).unwrap()));
    run_pruning(|| Arc::new(Sqlite::open(path(".db")).unwrap()));
}

/// A checkpointer as written for the original trait: only its imports and the bounds of its state have
/// changed.
mod written_for_the_original {
    use super::*;
    use async_trait::async_trait;

    pub struct Ledger<S> {
        pub states: Mutex<HashMap<(Uuid, u64), S>>,
    }

    #[async_trait]
    impl<S: GraphState + Clone> Checkpointer<S> for Ledger<S> {
        async fn save(&self, run_id: Uuid, step: u64, state: &S) -> Result<()> {
            self.states.lock().unwrap().insert((run_id, step), state.clone());
            Ok(())
        }

        async fn load(&self, run_id: Uuid, step: Option<u64>) -> Result<Option<S>> {
            let step = match step {
                Some(step) => Some(step),
                None => self.list(run_id).await?.into_iter().max(),
            };
            Ok(step.and_then(|step| self.states.lock().unwrap().get(&(run_id, step)).cloned()))
        }

        async fn list(&self, run_id: Uuid) -> Result<Vec<u64>> {
            Ok(self.states.lock().unwrap().keys().filter(|(run, _)| *run == run_id).map(|(_, step)| *step).collect())
        }
    }
}

#[test]
fn an_implementation_written_for_the_original_compiles_and_has_its_defaults() {
    let ledger: Arc<dyn Checkpointer<Sample>> = Arc::new(written_for_the_original::Ledger { states: Mutex::default() });
    block_on(async {
        ledger.save(RUN, 1, &Sample::new(1)).await.unwrap();
        ledger.save(RUN, 2, &Sample::new(2)).await.unwrap();
        assert_eq!(ledger.load(RUN, None).await.unwrap(), Some(Sample::new(2)));
        let task = ActiveSnapshot { node_name: "a".into(), payload: None };
        ledger.save_active(RUN, 2, &[task]).await.unwrap();
        assert_eq!(ledger.load_active(RUN, 2).await.unwrap(), []);
    });
}

#[test]
fn a_saved_state_is_there_after_reopening() {
    let root = tempdir().unwrap();
    let check = |open: &dyn Fn() -> Box<dyn Checkpointer<Sample>>| {
        let task = [ActiveSnapshot { node_name: "a".into(), payload: Some(1.into()) }];
        let first = open();
        block_on(first.save(RUN, 5, &Sample::new(5))).unwrap();
        block_on(first.save_active(RUN, 6, &task)).unwrap();
        drop(first);
        let second = open();
        assert_eq!(block_on(second.load(RUN, None)).unwrap(), Some(Sample::new(5)));
        assert_eq!(block_on(second.load_active(RUN, 6)).unwrap(), task);
    };
    check(&|| Box::new(Directory::open(root.path().join("runs")).unwrap()));
    check(&|| Box::new(Sqlite::open(root.path().join("runs.db")).unwrap()));
}

#[test]
fn a_state_of_another_type_is_invalid_and_stays() {
    let root = tempdir().unwrap();
    save(&Directory::open(root.path()).unwrap(), RUN, 3);
    let before = files(root.path());
    let directory = Directory::open(root.path()).unwrap();
    for step in [None, Some(3)] {
        let loaded: Result<Option<Vec<u8>>> = block_on(directory.load(RUN, step));
        assert_eq!(loaded.unwrap_err().kind(), ErrorKind::Invalid);
    }
    assert!(files(root.path()) == before);
    let memory = InMemory::new();
    save(&memory, RUN, 3);
    let loaded: Result<Option<Vec<u8>>> = block_on(memory.load(RUN, Some(3)));
    assert_eq!((loaded.as_ref().unwrap_err().kind(), loaded.unwrap_err().step()), (ErrorKind::Invalid, Some(3)));
}

#[test]
fn records_are_saved_by_the_one_executor() {
    let root = tempdir().unwrap();
    let directory = Directory::open(root.path()).unwrap();
    block_on(directory.save(RUN, 3, &vec![("a".to_owned(), 1.5)])).unwrap();
    block_on(Checkpointer::<Sample>::save_active(&directory, RUN, 4, &[])).unwrap();
    drop(directory);
    let run = root.path().join(RUN.to_string());
    assert_saved_by_the_executor(&run.join("step-00000003"));
    assert_saved_by_the_executor(&run.join("active/step-00000004"));
}

#[test]
fn a_directory_that_is_not_a_run_stays() {
    let root = tempdir().unwrap();
    let run = root.path().join(RUN.to_string());
    std::fs::create_dir_all(run.join("step-00000009")).unwrap();
    std::fs::write(run.join("step-00000009/notes"), "mine").unwrap();
    let directory = Directory::open(root.path()).unwrap();
    assert_eq!(block_on(Checkpointer::<Sample>::list(&directory, RUN)).unwrap(), [] as [u64; 0]);
    let before = files(root.path());
    let refused = block_on(directory.save(RUN, 9, &Sample::new(9)));
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Conflict);
    save(&directory, RUN, 3);
    block_on(directory.prune(RUN, 0)).unwrap();
    let after = files(root.path());
    assert!(before.iter().all(|(name, bytes)| after.get(name) == Some(bytes)), "{after:?}");
}

#[test]
fn a_damaged_state_is_never_the_newest_and_is_corrupt_by_its_number() {
    let root = tempdir().unwrap();
    let directory = Directory::open(root.path()).unwrap();
    save(&directory, RUN, 3);
    save(&directory, RUN, 4);
    let manifest = root.path().join(RUN.to_string()).join("step-00000004/manifest.json");
    let mut bytes = std::fs::read(&manifest).unwrap();
    bytes[200] ^= 1;
    std::fs::write(&manifest, bytes).unwrap();
    let load = |step| block_on(Checkpointer::<Sample>::load(&directory, RUN, step));
    assert_eq!(load(None).unwrap(), Some(Sample::new(3)));
    assert_eq!(load(Some(4)).unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(block_on(Checkpointer::<Sample>::list(&directory, RUN)).unwrap(), [3]);
}

#[test]
fn a_damaged_record_of_a_database_is_corrupt() {
    let root = tempdir().unwrap();
    let path = root.path().join("runs.db");
    let database = Sqlite::open(&path).unwrap();
    save(&database, RUN, 3);
    drop(database);
    let other = rusqlite::Connection::open(&path).unwrap();
    assert_eq!(other.execute("UPDATE record SET value = replace(value, 'node 3', 'node 4')", []).unwrap(), 1);
    drop(other);
    let error = block_on(Checkpointer::<Sample>::load(&Sqlite::open(&path).unwrap(), RUN, None)).unwrap_err();
    assert_eq!((error.kind(), error.step()), (ErrorKind::Corrupt, Some(3)));
}

#[test]
fn places_that_cannot_be_are_refused_and_left_as_they_were() {
    let root = tempdir().unwrap();
    let at = |name: &str| root.path().join(name);
    std::fs::write(at("text"), "not a database, not a directory; longer than a header of a database file would be.")
        .unwrap();
    rusqlite::Connection::open(at("other.db")).unwrap().execute_batch("CREATE TABLE theirs (x)").unwrap();
    let before = files(root.path());
    let kind = |result: Result<()>| result.unwrap_err().kind();
    let directory = |path: &Path| Directory::open(path).map(drop);
    let sqlite = |path: &Path| Sqlite::open(path).map(drop);
    for path in [at("text"), at("text/below")] {
        assert_eq!(kind(directory(&path)), ErrorKind::Invalid, "{path:?}");
        assert_eq!(kind(sqlite(&path)), ErrorKind::Invalid, "{path:?}");
    }
    assert_eq!(kind(sqlite(&at("other.db"))), ErrorKind::Invalid);
    let mut settings = Settings::default();
    settings.chunk = 5;
    assert_eq!(kind(Directory::open_with(at("new"), settings).map(drop)), ErrorKind::Invalid);
    assert!(files(root.path()) == before);
}

#[test]
fn more_runs_than_stay_open_are_all_there() {
    let root = tempdir().unwrap();
    let directory = Directory::open(root.path()).unwrap();
    let runs: Vec<_> = (0..12).map(Uuid::from_u128).collect();
    for step in 0..2 {
        runs.iter().for_each(|run| save(&directory, *run, step));
    }
    for run in runs {
        assert_eq!(block_on(Checkpointer::<Sample>::list(&directory, run)).unwrap(), [0, 1]);
    }
}

#[test]
fn a_save_whose_future_is_dropped_half_way_happens_whole() {
    let root = tempdir().unwrap();
    let directory = Directory::open(root.path()).unwrap();
    {
        let state = Sample::new(3);
        let mut save = directory.save(RUN, 3, &state);
        let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
        let _ = save.as_mut().poll(&mut cx);
    }
    assert_eq!(block_on(directory.load(RUN, None)).unwrap(), Some(Sample::new(3)));
}

#[test]
fn namespaces_of_one_store_know_nothing_of_each_other() {
    let root = tempdir().unwrap();
    let store = Arc::new(Directory::open(root.path()).unwrap());
    let [whole, outer, inner] = ["", "a", "a/b"].map(|name| Namespaced::new(store.clone(), name));
    let load = |of: &dyn Checkpointer<Sample>| block_on(of.load(RUN, None)).unwrap();
    save(&store, RUN, 1);
    save(&outer, RUN, 2);
    assert_eq!(load(&whole), Some(Sample::new(1)), "the empty one is the store itself");
    assert_eq!((load(&outer), load(&inner)), (Some(Sample::new(2)), None));
    let other = Uuid::from_u128(8);
    assert!(block_on(Checkpointer::<Sample>::list(&outer, other)).unwrap().is_empty());
    assert_eq!(block_on(Checkpointer::<Sample>::list(&outer, RUN)).unwrap(), [2]);
    drop((whole, outer, inner, store));
    let again = Namespaced::new(Directory::open(root.path()).unwrap(), "a");
    assert_eq!(load(&again), Some(Sample::new(2)), "a namespace has the same place in every process");
}

/// A small engine that owns the trait: its bounds on a state are not serde's, and its errors and snapshots
/// are its own.
mod engine {
    use super::Uuid;
    use async_trait::async_trait;

    pub trait GraphState: Sized + Send + Sync + 'static {
        type Update: Default + Send + 'static;
        fn apply(&mut self, update: Self::Update);
        fn reset_ephemeral(&mut self) {}
    }

    #[derive(Debug, PartialEq)]
    pub struct ActiveSnapshot {
        pub node_name: String,
        pub payload: Option<serde_json::Value>,
    }

    #[derive(Debug)]
    pub enum Failed {
        Store(String),
    }

    #[async_trait]
    pub trait Checkpointer<S: GraphState>: Send + Sync {
        async fn save(&self, run_id: Uuid, step: u64, state: &S) -> Result<(), Failed>;
        async fn load(&self, run_id: Uuid, step: Option<u64>) -> Result<Option<S>, Failed>;
        async fn list(&self, run_id: Uuid) -> Result<Vec<u64>, Failed>;
        async fn save_active(&self, run: Uuid, step: u64, active: &[ActiveSnapshot]) -> Result<(), Failed>;
        async fn load_active(&self, run_id: Uuid, step: u64) -> Result<Vec<ActiveSnapshot>, Failed>;
    }

    impl GraphState for super::Sample {
        type Update = ();
        fn apply(&mut self, (): ()) {}
    }
}

checkpointer_for! {
    /// A store, for the engine above.
    struct Store for engine, |error| engine::Failed::Store(error.to_string()) => engine::Failed
}

/// An engine that owns the trait could not use a store of ours.
#[test]
fn a_store_can_be_handed_to_an_engine_that_owns_the_trait() {
    let root = tempdir().unwrap();
    let store: Arc<dyn engine::Checkpointer<Sample>> = Arc::new(Store(Directory::open(root.path()).unwrap()));
    let mut sample = Sample::new(3);
    engine::GraphState::reset_ephemeral(&mut sample);
    engine::GraphState::apply(&mut sample, ());
    block_on(store.save(RUN, 3, &sample)).unwrap();
    assert_eq!(block_on(store.load(RUN, None)).unwrap(), Some(Sample::new(3)));
    assert_eq!((block_on(store.load(RUN, Some(4))).unwrap(), block_on(store.list(RUN)).unwrap()), (None, vec![3]));
    let active = || vec![engine::ActiveSnapshot { node_name: "act".into(), payload: Some(serde_json::json!([1])) }];
    block_on(store.save_active(RUN, 4, &active())).unwrap();
    assert_eq!(block_on(store.load_active(RUN, 4)).unwrap(), active());
    std::fs::write(root.path().join(RUN.to_string()).join("step-00000003/manifest.json"), "{").unwrap();
    let engine::Failed::Store(why) = block_on(store.load(RUN, Some(3))).unwrap_err();
    assert!(why.contains("step-00000003"), "{why}");
}

/// Polls its task in `wake`, as bridges to other languages do.
struct Inline(Mutex<Option<Pin<Box<dyn Future<Output = ()> + Send>>>>);

impl Wake for Inline {
    fn wake(self: Arc<Self>) {
        let mut task = self.0.lock().unwrap().take().unwrap();
        assert!(task.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready());
    }
}

/// A task that a waker polls in the thread of a checkpointer may drop its last owner there. The drop joined
/// that thread, which panicked.
#[test]
fn a_checkpointer_that_its_own_thread_drops_does_not_wait_for_itself() {
    let root = tempdir().unwrap();
    let (checkpointer, (ended, end)) = (Directory::open(root.path()).unwrap(), mpsc::channel());
    let mut task: Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(async move {
        checkpointer.save(RUN, 1, &Sample::new(1)).await.unwrap();
        drop(checkpointer);
        ended.send(()).unwrap();
    });
    let inline = Arc::new(Inline(Mutex::new(None)));
    let mut slot = inline.0.lock().unwrap();
    if task.as_mut().poll(&mut Context::from_waker(&Waker::from(inline.clone()))).is_pending() {
        *slot = Some(task);
    }
    drop(slot);
    end.recv_timeout(LONG).unwrap();
    let again = Directory::open(root.path()).unwrap();
    assert_eq!(block_on(Checkpointer::<Sample>::list(&again, RUN)).unwrap(), [1]);
    crate::compat::drop_in_a_child(&again);
    save(&again, RUN, 2);
}
