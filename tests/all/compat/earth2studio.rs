//! earth2studio's catalog and session, method by method.

use super::identical::{assert_saved_by_the_executor, files};
use ashore::compat::earth2studio::{
    Bound, Builder, Checkpoint, CheckpointEntry, CheckpointSerializationError, CheckpointSession, CheckpointState,
    CheckpointStateCollision, CheckpointStateSchemaError, Metadata, Mode, NullCheckpoint, Tensor, active,
    bind_checkpoint_state, checkpoint_state,
};
use ashore::testing::{LateDevice, block_on};
use ashore::{Error, ErrorKind, Result, Settings};
use std::error::Error as _;
use std::fmt::Debug;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tempfile::tempdir;

#[derive(Debug, PartialEq)]
struct Rollout {
    lead: u32,
    label: Option<String>,
    field: Tensor<f32>,
    mask: Tensor<u8>,
}
checkpoint_state!(Rollout { values: { lead: u32, label: Option<String> }, tensors: { field: f32, mask: u8 } });

impl Rollout {
    fn new(lead: u32) -> Self {
        let field = Tensor::new(vec![lead as f32; 600], [20, 30]);
        Self { lead, label: Some(format!("at {lead}")), field, mask: Tensor::new(vec![lead as u8; 3], [3]) }
    }
}

struct Clock(u64);

impl CheckpointState for Clock {
    const ID: &'static str = "clock";
    const FIELDS: &'static [ashore::compat::earth2studio::Field] = &[];

    fn save(&self, fields: &mut ashore::compat::earth2studio::Fields<'_>) -> Result<()> {
        fields.value("ticks", &self.0)
    }

    fn load(&mut self, saved: &ashore::compat::earth2studio::Saved<'_>) -> Result<()> {
        self.0 = saved.value("ticks")?;
        Ok(())
    }
}

fn builder(path: &Path) -> Builder {
    let mut settings = Settings::default();
    (settings.arena, settings.chunk) = (1 << 18, 1 << 16);
    Checkpoint::builder("test").path(path).settings(settings)
}

fn appending(path: &Path) -> Checkpoint {
    builder(path).mode(Mode::Append).build().unwrap()
}

fn lead(lead: u32) -> Metadata {
    Metadata::new().set("lead_time", &lead).unwrap()
}

#[track_caller]
fn kind<T: Debug>(result: Result<T>) -> ErrorKind {
    result.expect_err("an error").kind()
}

#[track_caller]
fn typed<E: std::error::Error + Clone + 'static>(error: &Error) -> E {
    assert_eq!(error.kind(), ErrorKind::Invalid);
    error.source().and_then(|source| source.downcast_ref::<E>()).expect("the contract's error").clone()
}

/// Commits a row with this lead.
fn row(session: &CheckpointSession, bound: &Bound<Rollout>, to: u32) -> CheckpointEntry {
    bound.update(|rollout| *rollout = Rollout::new(to));
    session.write(lead(to)).unwrap().expect("a row")
}

#[test]
fn settings_that_cannot_be_are_refused() {
    let root = tempdir().unwrap();
    let at = root.path().join("new");
    for wrong in [
        builder(&at).flush_interval(0),
        builder(&at).history_size(0),
        builder(&at).level(3),
        builder(&at).rank(2, 2),
        builder(&at).rank(0, 0),
        Checkpoint::builder("../up").path(&at),
        Checkpoint::builder(""),
    ] {
        assert_eq!(kind(wrong.build()), ErrorKind::Invalid);
    }
    assert_eq!(kind("sideways".parse::<Mode>()), ErrorKind::Invalid);
    assert_eq!(
        ("append".parse::<Mode>().unwrap(), "overwrite".parse::<Mode>().unwrap()),
        (Mode::Append, Mode::Overwrite)
    );
    let default = Checkpoint::builder("by name").build().unwrap();
    assert!(default.rank_path().ends_with("checkpoints/by name"));
    assert!(!at.exists());
}

#[test]
fn a_row_is_selected_by_its_place_from_either_end() {
    let root = tempdir().unwrap();
    let checkpoint = appending(root.path());
    assert_eq!(checkpoint.catalog().unwrap(), []);
    assert_eq!(kind(checkpoint.select(-1)), ErrorKind::NotFound);
    let session = checkpoint.session().unwrap();
    let bound = session.bind(Rollout::new(0)).unwrap();
    let rows: Vec<_> = [6, 12, 18].map(|to| row(&session, &bound, to)).into();
    assert_eq!(checkpoint.catalog().unwrap(), rows);
    for (at, to) in [(0, 6), (2, 18), (-1, 18), (-3, 6)] {
        let session = checkpoint.select(at).unwrap();
        assert_eq!(session.lead_time::<u32>().unwrap(), Some(to), "row {at}");
        let restored = session.bind(Rollout::new(99)).unwrap();
        assert!(restored.is_loaded());
        restored.update(|rollout| assert_eq!(*rollout, Rollout::new(to)));
    }
    for at in [3, -4, isize::MIN, isize::MAX] {
        assert_eq!(kind(checkpoint.select(at)), ErrorKind::NotFound, "row {at}");
    }
}

#[test]
fn overwrite_keeps_one_row_and_append_its_history() {
    for (mode, history, kept) in
        [(Mode::Overwrite, None, &[18][..]), (Mode::Append, None, &[6, 12, 18]), (Mode::Append, Some(2), &[12, 18])]
    {
        let root = tempdir().unwrap();
        let checkpoint = builder(root.path()).mode(mode).history_size(history).build().unwrap();
        let session = checkpoint.session().unwrap();
        let bound = session.bind(Rollout::new(0)).unwrap();
        for to in [6, 12, 18] {
            row(&session, &bound, to);
        }
        let leads = || -> Vec<u32> {
            checkpoint.catalog().unwrap().iter().map(|row| row.metadata.get("lead_time").unwrap()).collect()
        };
        assert_eq!(leads(), kept, "{mode:?} {history:?}");
        drop((session, bound));
        let again = builder(root.path()).mode(Mode::Append).build().unwrap();
        drop(checkpoint);
        assert_eq!(again.catalog().unwrap().len(), kept.len(), "what goes is gone from disk, too");
    }
}

#[test]
fn a_session_goes_on_where_its_row_ended() {
    let root = tempdir().unwrap();
    let checkpoint = appending(root.path());
    for round in 0..3 {
        let session = checkpoint.session().unwrap();
        assert_eq!((session.exists(), session.write_count()), (round > 0, round));
        let bound = session.bind(Rollout::new(0)).unwrap();
        assert_eq!(bound.is_loaded(), round > 0);
        let there = bound.update(|rollout| rollout.lead);
        assert_eq!(there, round as u32 * 6);
        let row = row(&session, &bound, there + 6);
        assert_eq!(
            (session.exists(), session.commit_id(), row.write_count),
            (true, Some(row.commit_id.clone()), round + 1)
        );
        assert!(row.commit_id.starts_with(&format!("commit_{:08}_", round + 1)), "{row:?}");
        assert_eq!(row.state_ids, [Rollout::ID]);
        assert_eq!((row.rank, row.world_size), (0, 1));
    }
    let first = checkpoint.select(0).unwrap();
    let bound = first.bind(Rollout::new(0)).unwrap();
    assert_eq!(row(&first, &bound, 100).write_count, 2, "an older row goes on by its own count");
    assert_eq!(checkpoint.select(-1).unwrap().lead_time::<u32>().unwrap(), Some(100));
}

#[test]
fn a_scope_makes_a_session_active_on_its_thread() {
    let root = tempdir().unwrap();
    let (checkpoint, other) = (appending(root.path()), appending(&root.path().join("other")));
    assert!(active().is_none() && checkpoint.active().is_none());
    let outer = checkpoint.enter().unwrap();
    assert!(outer.is_active() && checkpoint.active().is_some() && other.active().is_none());
    {
        let inner = other.enter().unwrap();
        assert!(inner.is_active() && !outer.is_active() && checkpoint.active().is_none());
        std::thread::scope(|scope| scope.spawn(|| assert!(active().is_none())).join().unwrap());
    }
    let again = checkpoint.enter().unwrap();
    again.bind(Clock(1)).unwrap();
    assert_eq!(kind(outer.bind(Clock(2)).map(drop)), ErrorKind::Invalid, "the active session is entered again");
    drop(outer);
    assert!(again.is_active());
    again.write(Metadata::new().set("a", &1).unwrap()).unwrap();
    drop(again);
    assert!(active().is_none());
}

#[test]
fn leaving_a_scope_does_not_flush() {
    let root = tempdir().unwrap();
    let checkpoint = builder(root.path()).flush_interval(None).build().unwrap();
    checkpoint.enter().unwrap().write(lead(6)).unwrap();
    assert_eq!(checkpoint.catalog().unwrap(), []);
}

#[test]
fn a_second_state_of_a_type_is_a_collision() {
    let root = tempdir().unwrap();
    let session = appending(root.path()).session().unwrap();
    let bound = session.bind(Rollout::new(1)).unwrap();
    let error = session.bind(Rollout::new(2)).unwrap_err();
    assert_eq!(typed::<CheckpointStateCollision>(&error).state_id, "all::compat::earth2studio::Rollout");
    session.bind(bound.clone()).unwrap();
    session.bind(Clock(1)).unwrap();
    assert_eq!(session.write(Metadata::new()).unwrap().unwrap().state_ids.len(), 2);
}

mod drifted {
    use super::*;

    #[derive(Debug, PartialEq)]
    pub struct Rollout {
        pub lead: u64,
    }

    impl CheckpointState for Rollout {
        const ID: &'static str = super::Rollout::ID;
        const FIELDS: &'static [ashore::compat::earth2studio::Field] =
            &[ashore::compat::earth2studio::Field { name: "lead", of: "u64" }];

        fn save(&self, fields: &mut ashore::compat::earth2studio::Fields<'_>) -> Result<()> {
            fields.value("lead", &self.lead)
        }

        fn load(&mut self, saved: &ashore::compat::earth2studio::Saved<'_>) -> Result<()> {
            self.lead = saved.value("lead")?;
            Ok(())
        }
    }
}

#[test]
fn a_state_whose_fields_have_changed_is_not_restored() {
    let root = tempdir().unwrap();
    let checkpoint = appending(root.path());
    let session = checkpoint.session().unwrap();
    let bound = session.bind(Rollout::new(1)).unwrap();
    row(&session, &bound, 6);
    drop((session, bound, checkpoint));
    let before = files(root.path());
    let session = appending(root.path()).select(-1).unwrap();
    let state = Bound::from(drifted::Rollout { lead: 3 });
    let error = session.bind(state.clone()).unwrap_err();
    let typed = typed::<CheckpointStateSchemaError>(&error);
    assert_eq!((typed.saved.len(), &*typed.current), (4, &["lead: u64".to_owned()][..]));
    assert_eq!(state.update(|state| state.lead), 3);
    assert!(!state.is_loaded() && files(root.path()) == before);
    session.bind(Rollout::new(0)).unwrap().update(|rollout| assert_eq!(*rollout, Rollout::new(6)));
}

#[test]
fn every_few_writes_make_a_flush_and_metadata_adds_up() {
    let root = tempdir().unwrap();
    let checkpoint = builder(root.path()).mode(Mode::Append).flush_interval(3).build().unwrap();
    let session = checkpoint.session().unwrap();
    let more = |name: &str| Metadata::new().set(name, &f64::NAN.to_bits()).unwrap();
    assert_eq!(session.flush(Metadata::new()).unwrap(), None, "nothing to flush");
    assert_eq!(session.write(lead(1).set("a", &1).unwrap()).unwrap(), None);
    assert_eq!(session.write(lead(2)).unwrap(), None);
    assert!(checkpoint.catalog().unwrap().is_empty() && !session.exists() && session.metadata().is_empty());
    let row = session.write(more("b")).unwrap().expect("the third write flushes");
    assert_eq!(row.metadata.names().collect::<Vec<_>>(), ["a", "b", "lead_time"]);
    assert_eq!((session.lead_time::<u32>().unwrap(), session.metadata_value::<u8>("a").unwrap()), (Some(2), 1));
    assert_eq!((session.artifacts(), session.artifact::<u8>("a").unwrap()), (row.metadata, 1));
    assert_eq!(kind(session.metadata_value::<u8>("c")), ErrorKind::NotFound);
    assert_eq!(kind(session.lead_time::<String>()), ErrorKind::Invalid);
    assert_eq!(session.flush(Metadata::new()).unwrap(), None);
    assert_eq!(session.write(lead(4)).unwrap(), None);
    assert_eq!(session.flush(Metadata::new()).unwrap().expect("a row").write_count, 4);
    assert_eq!(session.flush(lead(5)).unwrap().expect("more metadata is a reason").write_count, 4);
    assert_eq!(checkpoint.catalog().unwrap().len(), 3);
    // A row's states belong to that row: a session that resumes from it begins with none.
    let resumed = checkpoint.session().unwrap();
    assert!(resumed.metadata_value::<u8>("a").is_ok());
    let row = resumed.flush(lead(6)).unwrap().expect("a row");
    assert_eq!(row.metadata.names().collect::<Vec<_>>(), ["lead_time"]);
}

#[test]
fn a_flush_is_a_future_and_states_may_change_meanwhile() {
    let root = tempdir().unwrap();
    let checkpoint = builder(root.path()).mode(Mode::Append).flush_interval(None).build().unwrap();
    let session = checkpoint.session().unwrap();
    let bound = session.bind(Rollout::new(6)).unwrap();
    session.write(lead(6)).unwrap();
    let flush = session.flush_async(Metadata::new()).unwrap().expect("a flush");
    bound.update(|rollout| {
        rollout.field.make_mut().fill(-1.0);
        rollout.lead = 7;
    });
    let row = block_on(flush).unwrap();
    assert_eq!(checkpoint.catalog().unwrap(), [row]);
    let restored = checkpoint.session().unwrap().bind(Rollout::new(0)).unwrap();
    restored.update(|rollout| assert_eq!(*rollout, Rollout::new(6)));
    session.write(lead(7)).unwrap();
    let flush = session.flush_async(Metadata::new()).unwrap().expect("a flush");
    assert_eq!(flush.wait(Duration::from_secs(60)).unwrap(), *flush.row());
    assert_eq!(session.commit_id().as_ref(), Some(&flush.row().commit_id));
}

/// Occupies the name of the next row, so that a commit fails.
fn obstruct(root: &Path, step: u64) -> impl FnOnce() {
    let path = root.join(format!("step-{step:08}"));
    std::fs::create_dir_all(path.join("theirs")).unwrap();
    move || std::fs::remove_dir_all(path).unwrap()
}

#[test]
fn a_flush_that_fails_restores_the_session() {
    let root = tempdir().unwrap();
    let checkpoint = appending(root.path());
    let session = checkpoint.session().unwrap();
    let clear = obstruct(root.path(), 1);
    for _ in 0..2 {
        assert_eq!(kind(session.write(lead(1).set("a", &1).unwrap())), ErrorKind::Conflict);
        assert_eq!((session.write_count(), session.exists()), (0, false));
    }
    assert_eq!(session.flush(Metadata::new()).unwrap(), None, "nothing is left to flush");
    let there = files(&root.path().join("step-00000001"));
    assert_eq!(there.keys().collect::<Vec<_>>(), ["theirs/"]);
    clear();
    let row = session.write(lead(2)).unwrap().expect("a row");
    assert_eq!((row.write_count, row.metadata.names().collect::<Vec<_>>()), (1, vec!["lead_time"]));
}

#[test]
fn the_next_flush_returns_the_failure_of_one_without_a_waiter() {
    let root = tempdir().unwrap();
    let checkpoint = builder(root.path()).flush_interval(2).build().unwrap();
    let session = checkpoint.session().unwrap();
    let clear = obstruct(root.path(), 1);
    session.write(lead(1)).unwrap();
    drop(session.write_async(lead(2)).unwrap().expect("a flush"));
    assert_eq!(kind(session.flush(lead(3))), ErrorKind::Conflict);
    assert_eq!(session.write_count(), 1, "as before the write that flushed");
    clear();
    let row = session.flush(Metadata::new()).unwrap().expect("still to be flushed");
    assert_eq!((row.write_count, row.metadata.get::<u32>("lead_time").unwrap()), (1, 1));
}

#[test]
fn writes_go_on_during_a_flush_and_stand_when_it_fails() {
    let root = tempdir().unwrap();
    let device = LateDevice::default();
    let checkpoint = builder(root.path()).flush_interval(None).made_device(Arc::new(device.clone())).build().unwrap();
    let session = checkpoint.session().unwrap();
    let bound = session.bind(Rollout::new(1)).unwrap();
    session.write(lead(1)).unwrap();
    device.hold();
    let flush = session.flush_async(Metadata::new()).unwrap().expect("a flush");
    session.write(lead(2).set("late", &1).unwrap()).unwrap();
    bound.update(|rollout| *rollout = Rollout::new(2));
    let clear = obstruct(root.path(), 1);
    device.release();
    assert_eq!(kind(flush.wait(Duration::from_secs(60))), ErrorKind::Conflict);
    assert_eq!((session.write_count(), session.exists()), (2, false));
    clear();
    let row = session.flush(Metadata::new()).unwrap().expect("all of it is still to be flushed");
    assert_eq!((row.write_count, row.metadata.names().collect::<Vec<_>>()), (2, vec!["late", "lead_time"]));
    checkpoint.select(-1).unwrap().bind(Rollout::new(0)).unwrap().update(|it| assert_eq!(*it, Rollout::new(2)));
}

#[test]
fn a_path_that_cannot_be_written_fails_the_flush_alone() {
    let root = tempdir().unwrap();
    std::fs::write(root.path().join("file"), "theirs").unwrap();
    let before = files(root.path());
    let checkpoint = appending(&root.path().join("file/below"));
    let outcome = checkpoint.session().and_then(|session| session.write(lead(1)));
    assert_eq!(kind(outcome), ErrorKind::Invalid);
    assert!(files(root.path()) == before);
}

#[test]
fn what_cannot_be_kept_is_refused_and_changes_nothing() {
    let root = tempdir().unwrap();
    let at = root.path().join("run");
    let session = appending(&at).session().unwrap();
    for (name, error) in [
        ("empty", Metadata::new().set("empty", &Some(None::<u8>)).unwrap_err()),
        ("", Metadata::new().set("", &1).unwrap_err()),
    ] {
        assert_eq!(typed::<CheckpointSerializationError>(&error).name, name);
    }
    let bound = session.bind(Rollout::new(1)).unwrap();
    bound.update(|rollout| rollout.mask = Tensor::new(vec![1_u8; 2], [3]));
    let error = session.write(lead(1)).unwrap_err();
    assert_eq!(typed::<CheckpointSerializationError>(&error).name, format!("{}.mask", Rollout::ID));
    assert_eq!((session.write_count(), at.exists()), (0, false));
    let busy = bound.update(|_| session.write(lead(1)));
    assert_eq!((kind(busy), at.exists()), (ErrorKind::Busy, false));
}

#[test]
fn ranks_have_directories_of_their_own() {
    let root = tempdir().unwrap();
    for rank in 0..2 {
        let checkpoint = builder(root.path()).rank(rank, 2).build().unwrap();
        assert_eq!(checkpoint.rank_path(), root.path().join(format!("rank_{rank:06}")));
        let row = checkpoint.session().unwrap().write(lead(rank)).unwrap().expect("a row");
        assert_eq!((row.rank, row.world_size), (rank, 2));
        assert_eq!(checkpoint.catalog().unwrap(), [row]);
    }
    let alone = builder(root.path()).level(1).build().unwrap();
    assert_eq!((alone.rank_path(), alone.catalog().unwrap().len()), (root.path().to_owned(), 0));
    assert_eq!((alone.level(), alone.name()), (1, "test"));
    let session = alone.session().unwrap();
    assert_eq!((session.device(), alone.device()), (ashore::DeviceChoice::Host, ashore::DeviceChoice::Host));
}

#[test]
fn the_catalog_lists_its_commits_and_ignores_other_files() {
    let root = tempdir().unwrap();
    let checkpoint = appending(root.path());
    let session = checkpoint.session().unwrap();
    let bound = session.bind(Rollout::new(0)).unwrap();
    let rows: Vec<_> = [6, 12, 18].map(|to| row(&session, &bound, to)).into();
    std::fs::write(root.path().join("catalog.json"), "{ damaged").unwrap();
    std::fs::write(root.path().join("latest"), "step-00000999").unwrap();
    std::fs::create_dir(root.path().join("step-00000077")).unwrap();
    assert_eq!(checkpoint.catalog().unwrap(), rows);
    let manifest = rows[2].path.join("manifest.json");
    let mut bytes = std::fs::read(&manifest).unwrap();
    bytes[300] ^= 4;
    std::fs::write(&manifest, bytes).unwrap();
    assert_eq!(checkpoint.catalog().unwrap(), rows[..2]);
    assert_eq!(appending(root.path()).session().unwrap().lead_time::<u32>().unwrap(), Some(12));
    let next = row(&appending(root.path()).session().unwrap(), &bound, 24);
    assert_eq!(next.step, 4, "a damaged row's number is not used again");
}

#[test]
fn rows_are_saved_by_the_one_executor() {
    let root = tempdir().unwrap();
    let checkpoint = appending(root.path());
    let session = checkpoint.session().unwrap();
    let bound = session.bind(Rollout::new(0)).unwrap();
    assert_saved_by_the_executor(&row(&session, &bound, 6).path);
}

#[test]
fn at_level_0_states_are_neither_saved_nor_restored() {
    let root = tempdir().unwrap();
    let session = appending(root.path()).session().unwrap();
    let bound = session.bind(Rollout::new(0)).unwrap();
    row(&session, &bound, 6);
    let least = builder(root.path()).mode(Mode::Append).level(0).build().unwrap();
    let session = least.session().unwrap();
    let bound = session.bind(Rollout::new(99)).unwrap();
    assert!(!bound.is_loaded() && bound.checkpoint_level() == 0);
    bound.update(|rollout| assert_eq!(*rollout, Rollout::new(99)));
    let row = session.write(lead(12)).unwrap().expect("a row");
    assert!(row.state_ids.is_empty());
    assert_eq!(least.select(-1).unwrap().lead_time::<u32>().unwrap(), Some(12));
}

#[test]
fn the_states_of_a_session_that_is_left_are_bound_again_by_the_next_that_is_entered() {
    let root = tempdir().unwrap();
    let checkpoint = appending(root.path());
    let scope = checkpoint.enter().unwrap();
    let bound = scope.bind(Rollout::new(0)).unwrap();
    row(&scope, &bound, 6);
    assert!(bound.session().is_some());
    drop(scope);
    assert!(bound.session().is_none() && bound.checkpoint().is_some());
    bound.update(|rollout| *rollout = Rollout::new(50));
    let scope = checkpoint.enter().unwrap();
    assert!(bound.is_loaded(), "restored from the row");
    bound.update(|rollout| assert_eq!(*rollout, Rollout::new(6)));
    assert_eq!(row(&scope, &bound, 12).state_ids, [Rollout::ID], "and committed with the next");
    // Another of its type may replace it, once.
    let other = scope.bind(Rollout::new(0)).unwrap();
    other.update(|rollout| assert_eq!(*rollout, Rollout::new(6)));
    assert_eq!(kind(scope.bind(Rollout::new(1))), ErrorKind::Invalid);
    drop(scope);

    // One that cannot be restored leaves the session unentered.
    drop((bound, other));
    let drifted = checkpoint.session().unwrap();
    let waits = bind_checkpoint_state(drifted::Rollout { lead: 1 }).unwrap();
    assert_eq!(kind(drifted.enter().map(drop)), ErrorKind::Invalid);
    assert!(active().is_none() && !waits.is_loaded());
}

#[test]
fn a_state_that_is_bound_before_a_session_waits_for_one() {
    let root = tempdir().unwrap();
    assert!(bind_checkpoint_state(Clock(1)).unwrap().checkpoint().is_none(), "no catalog was built on this thread");
    let checkpoint = builder(root.path()).mode(Mode::Append).flush_interval(2).build().unwrap();
    let waits = bind_checkpoint_state(Rollout::new(6)).unwrap();
    assert!(waits.checkpoint().is_some() && waits.session().is_none() && !waits.checkpoint_is_flush_due());
    let scope = checkpoint.enter().unwrap();
    let clock = bind_checkpoint_state(Clock(3)).unwrap();
    assert!(clock.session().is_some() && !waits.checkpoint_is_flush_due());
    scope.write(lead(3)).unwrap();
    assert!(waits.checkpoint_is_flush_due() && scope.is_flush_due());
    assert_eq!(scope.write(lead(6)).unwrap().expect("it was due").state_ids.len(), 2);
    drop(scope);
    // A state that the program has dropped no longer waits.
    drop((waits, clock));
    let again = checkpoint.enter().unwrap();
    again.bind(Rollout::new(0)).unwrap().update(|rollout| assert_eq!(*rollout, Rollout::new(6)));

    let none = NullCheckpoint;
    let free = none.bind(Clock(7)).unwrap();
    assert!(none.write(lead(1)).unwrap().is_none() && none.flush(lead(1)).unwrap().is_none());
    assert_eq!(
        (none.exists(), none.write_count(), free.checkpoint_level(), free.update(|clock| clock.0)),
        (false, 0, 0, 7)
    );
}

/// A session that began during a flush of its catalog looked for the latest row before that flush had made
/// it: it restored the states of the row before, and the next flush committed those as the newest row.
#[test]
fn a_session_entered_during_a_flush_goes_on_from_its_row() {
    let (root, device) = (tempdir().unwrap(), LateDevice::default());
    let checkpoint = builder(root.path()).mode(Mode::Append).made_device(Arc::new(device.clone())).build().unwrap();
    let session = checkpoint.enter().unwrap();
    let bound = session.bind(Rollout::new(0)).unwrap();
    row(&session, &bound, 6);
    bound.update(|rollout| *rollout = Rollout::new(12));
    device.hold();
    drop(session.write_async(lead(12)).unwrap().expect("a flush"));
    drop(session);
    let (entered, wait) = std::sync::mpsc::channel::<()>();
    let entered_again = std::thread::scope(|scope| {
        // Released when the session was entered, which must wait, or a moment later.
        let held = &device;
        scope.spawn(move || {
            let _ = wait.recv_timeout(Duration::from_millis(100));
            held.release();
        });
        let again = checkpoint.enter().unwrap();
        let _ = entered.send(());
        again.write_count()
    });
    assert_eq!(entered_again, 2);
    bound.update(|rollout| assert_eq!(*rollout, Rollout::new(12)));
    assert_eq!(checkpoint.select(-1).unwrap().lead_time::<u32>().unwrap(), Some(12));

    // A failed flush is reported once, before the states are restored.
    let session = checkpoint.enter().unwrap();
    let clear = obstruct(root.path(), 3);
    drop(session.write_async(lead(18)).unwrap().expect("a flush"));
    drop(session);
    assert_eq!(kind(checkpoint.enter().map(drop)), ErrorKind::Conflict);
    clear();
    assert_eq!(row(&checkpoint.enter().unwrap(), &bound, 18).write_count, 3);
}

/// A state that could not be restored kept the states after it out of the session, and out of every later
/// one.
#[test]
fn a_session_that_cannot_be_entered_leaves_every_state_waiting() {
    let root = tempdir().unwrap();
    let checkpoint = appending(root.path());
    let session = checkpoint.session().unwrap();
    row(&session, &session.bind(Rollout::new(0)).unwrap(), 6);
    session.bind(Clock(6)).unwrap();
    session.flush(lead(6)).unwrap().expect("a row");
    drop(session);
    let drifted = bind_checkpoint_state(drifted::Rollout { lead: 3 }).unwrap();
    let clock = bind_checkpoint_state(Clock(0)).unwrap();
    let session = checkpoint.session().unwrap();
    for _ in 0..2 {
        assert_eq!(kind(session.enter().map(drop)), ErrorKind::Invalid);
    }
    drop((session, drifted));
    let session = checkpoint.enter().unwrap();
    assert!(clock.is_loaded() && clock.session().is_some());
    assert_eq!(clock.update(|clock| clock.0), 6);
    assert_eq!(session.flush(lead(7)).unwrap().expect("a row").state_ids, [Clock::ID]);
}
