use crate::fixtures::checkpoint::{MadeCheckpoint, noise, publish};
use ashore::storage::Memory;
use ashore::{Catalog, Dtype, ErrorKind};
use std::sync::Arc;

fn made(step: u64) -> MadeCheckpoint {
    MadeCheckpoint::new(step).tensor("x", Dtype::U8, &[64], noise(64, step))
}

fn catalog(storage: &Memory) -> Catalog {
    Catalog::over(Arc::new(storage.clone()))
}

fn names(catalog: &Catalog) -> Vec<String> {
    catalog.list().unwrap().into_iter().map(|entry| entry.name).collect()
}

#[test]
fn steps_come_in_the_order_of_numbers_under_any_accepted_name() {
    let storage = Memory::new();
    for (step, name) in
        [(10_000, "step-10000"), (9_000, "9000"), (1, "ckpt-1"), (20, "iter_0000020"), (3, "step-00000003")]
    {
        made(step).publish(&storage, name);
    }
    let catalog = catalog(&storage);
    assert_eq!(names(&catalog), ["ckpt-1", "step-00000003", "iter_0000020", "9000", "step-10000"]);
    assert_eq!(catalog.latest().unwrap().unwrap().step(), 10_000);
    let entry = &catalog.list().unwrap()[0];
    let lengths: usize = made(1).files().iter().map(|(_, bytes)| bytes.len()).sum();
    assert_eq!((entry.step, entry.bytes), (1, lengths as u64));
    assert_eq!(entry.path, catalog.checkpoint(1).unwrap().path());
}

#[test]
fn an_empty_root_has_no_steps() {
    let catalog = catalog(&Memory::new());
    assert!(catalog.list().unwrap().is_empty() && catalog.latest().unwrap().is_none());
    assert!(catalog.latest_valid().unwrap().is_none());
}

#[test]
fn a_missing_step_is_never_another_step() {
    let storage = Memory::new();
    made(100).publish(&storage, "step-00000100");
    let missing = catalog(&storage).checkpoint(99).unwrap_err();
    assert_eq!((missing.kind(), missing.step()), (ErrorKind::NotFound, Some(99)));
    assert!(missing.path().is_some_and(|path| path.ends_with("step-00000099")), "{missing}");
}

#[test]
fn the_name_that_an_executor_gives_comes_before_other_names_of_a_step() {
    let storage = Memory::new();
    let (ours, a, b) = (made(7), made(7), made(7));
    a.publish(&storage, "checkpoint-7");
    b.publish(&storage, "ckpt-7");
    ours.publish(&storage, "step-00000007");
    let catalog = catalog(&storage);
    let (entries, problems) = catalog.survey().unwrap();
    assert_eq!(
        entries.iter().map(|entry| &entry.name[..]).collect::<Vec<_>>(),
        ["step-00000007"],
        "one step, not three"
    );
    let others: Vec<_> = problems.iter().map(|problem| (&problem.name[..], problem.error.kind())).collect();
    assert_eq!(others, [("checkpoint-7", ErrorKind::Conflict), ("ckpt-7", ErrorKind::Conflict)]);
    assert_eq!(catalog.checkpoint(7).unwrap().attempt(), ours.attempt);
    assert_eq!(catalog.latest().unwrap().unwrap().attempt(), ours.attempt);
    let mut broken = ours.files();
    broken[0].1.truncate(10);
    publish(&storage, "step-00000007", &broken);
    assert_eq!(catalog.checkpoint(7).unwrap().attempt(), a.attempt);
    assert_eq!(catalog.latest().unwrap().unwrap().attempt(), a.attempt);
}

#[test]
fn a_foreign_directory_is_not_listed_and_not_a_problem() {
    let storage = Memory::new();
    let file = |name: &str, bytes: &[u8]| vec![(name.to_string(), bytes.to_vec())];
    publish(&storage, "100", &file("weights.bin", b"x"));
    publish(&storage, "step-00000200", &file("weights.bin", b"x"));
    publish(&storage, "checkpoint-300", &file("manifest.json", b"{\"format\":\"theirs\"}"));
    made(1).publish(&storage, "best-model");
    let catalog = catalog(&storage);
    let (entries, problems) = catalog.survey().unwrap();
    assert!(entries.is_empty() && problems.is_empty(), "{entries:?} {problems:?}");
    assert!(catalog.latest_valid().unwrap().is_none());
}

#[test]
fn a_broken_step_of_ours_is_a_problem_with_a_reason() {
    let storage = Memory::new();
    made(1).publish(&storage, "step-00000001");
    made(2).publish(&storage, "step-00000003");
    let mut files = made(4).files();
    files[0].1.pop();
    publish(&storage, "ckpt-4", &files);
    let mut files = made(5).files();
    files.last_mut().unwrap().1.truncate(100);
    publish(&storage, "ckpt-5", &files);
    publish(&storage, "step-00000006", &[("manifest.json".into(), vec![0; 50])]);
    let catalog = catalog(&storage);
    assert_eq!(names(&catalog), ["step-00000001"]);
    assert_eq!(catalog.latest().unwrap().unwrap().step(), 1);
    let problems = catalog.problems().unwrap();
    let found: Vec<_> = problems.iter().map(|problem| (problem.step, &problem.name[..])).collect();
    assert_eq!(found, [(3, "step-00000003"), (4, "ckpt-4"), (5, "ckpt-5"), (6, "step-00000006")]);
    let (conflict, corrupt) = (ErrorKind::Conflict, ErrorKind::Corrupt);
    let why = [
        ("different steps manifest=2", conflict),
        ("wrong length", corrupt),
        ("damaged", corrupt),
        ("damaged", corrupt),
    ];
    for (problem, (reason, kind)) in problems.iter().zip(why) {
        assert_eq!(problem.error.kind(), kind);
        assert!(problem.error.message().contains(reason), "{}", problem.error);
    }
    assert_eq!(catalog.checkpoint(4).unwrap_err().kind(), ErrorKind::Corrupt);
}

#[test]
fn only_latest_valid_falls_back_and_it_reports_that() {
    let storage = Memory::new();
    for step in [1, 2] {
        made(step).publish(&storage, &format!("step-{step}"));
    }
    let flip = |step: u64| {
        let mut files = made(step).files();
        *files[0].1.last_mut().unwrap() ^= 1;
        publish(&storage, &format!("step-{step}"), &files);
    };
    let catalog = catalog(&storage);
    flip(3);
    let mut files = made(4).files();
    files[0].1.pop();
    publish(&storage, "step-4", &files);
    let newest = catalog.latest().unwrap().unwrap();
    assert_eq!(newest.step(), 3, "tensor data is checked when it is read");
    assert_eq!(newest.read("x").unwrap_err().kind(), ErrorKind::Corrupt);
    let found = catalog.latest_valid().unwrap().unwrap();
    assert_eq!(found.checkpoint.step(), 2);
    let skipped: Vec<_> = found.skipped.iter().map(|problem| (problem.step, problem.error.kind())).collect();
    assert_eq!(skipped, [(4, ErrorKind::Corrupt), (3, ErrorKind::Corrupt)]);
    assert!(found.skipped[1].error.message().contains("tensor=\"x\""), "{}", found.skipped[1].error);
    flip(1);
    flip(2);
    let none = catalog.latest_valid().unwrap_err();
    assert_eq!(
        (none.kind(), none.step()),
        (ErrorKind::Corrupt, Some(4)),
        "steps, but none sound, is not an empty start"
    );
}
