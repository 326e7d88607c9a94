//! Marks of steps.

use crate::run::Run;
use ashore::catalog::Verify;
use ashore::{Catalog, ErrorKind, PruneOptions, Retention};

fn kept(run: &Run) -> Vec<u64> {
    Catalog::open(run.root()).unwrap().list().unwrap().iter().map(|entry| entry.step).collect()
}

#[test]
fn a_step_marked_bad_is_passed_over_and_does_not_count() {
    let run = Run::new([10, 20, 30]);
    run.shows("mark-bad", &["mark", "run", "30", "bad"]);
    let catalog = Catalog::open(run.root()).unwrap();
    assert_eq!(catalog.latest().unwrap().unwrap().step(), 20);
    let found = catalog.latest_valid().unwrap().unwrap();
    assert_eq!((found.checkpoint.step(), found.skipped[0].step), (20, 30));
    assert!(found.skipped[0].error.message().contains("marked bad"));
    assert_eq!(catalog.checkpoint(30).unwrap().step(), 30, "by its number it is found");
    let pruned = run.json(&["prune", "run", "--keep-last", "1", "--yes", "--json"], 0);
    assert_eq!(pruned["removed"].as_array().unwrap().len(), 1);
    assert_eq!(kept(&run), [20, 30], "20 is the one that counts");

    run.json(&["mark", "run/step-00000030", "none", "--json"], 0);
    assert_eq!(catalog.latest().unwrap().unwrap().step(), 30);
    run.json(&["mark", "run", "30", "bad", "--json"], 0);
    run.json(&["mark", "run", "20", "bad", "--json"], 0);
    let none = catalog.latest_valid().unwrap_err();
    assert!(none.message().contains("marked bad") && catalog.latest().unwrap().is_none());
}

#[test]
fn a_step_marked_keep_outlives_every_retention() {
    let run = Run::new([10, 20, 30, 40]);
    run.shows("mark-keep", &["mark", "run", "20", "keep"]);
    run.json(&["prune", "run", "--keep-last", "1", "--yes", "--json"], 0);
    assert_eq!(kept(&run), [20, 40]);
    let catalog = Catalog::open(run.root()).unwrap();
    let refused = catalog.delete(20, PruneOptions::new().verify(Verify::No)).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Invalid);
    catalog.discard_after(20, PruneOptions::new()).unwrap();
    run.save([50]);
    let policy = |steps: &[ashore::catalog::Candidate]| vec![false; steps.len()];
    catalog.prune_by(&Retention::last(1), &policy, PruneOptions::new()).unwrap();
    assert_eq!(kept(&run), [20, 50], "no policy deletes it");
}

#[test]
fn a_mark_belongs_to_an_attempt_and_a_broken_file_of_marks_stops_deletion_only() {
    let run = Run::new([10, 20]);
    run.json(&["mark", "run", "20", "bad", "--json"], 0);
    std::fs::remove_dir_all(run.step(20)).unwrap();
    run.save([20]);
    let catalog = Catalog::open(run.root()).unwrap();
    assert_eq!(catalog.latest().unwrap().unwrap().step(), 20, "another attempt has no mark");
    run.json(&["mark", "run", "10", "keep", "--json"], 0);
    assert_eq!(catalog.marks().unwrap().len(), 1, "marks of steps that are gone are forgotten");

    std::fs::write(run.step(10).join("manifest.json"), "").unwrap();
    let spared = run.json(&["prune", "run", "--damaged", "--yes", "--json"], 0);
    assert_eq!((&spared["damaged"], spared["doubtful"][0]["step"].as_u64()), (&serde_json::json!([]), Some(10)));
    assert!(run.step(10).exists(), "it may still be repaired");
    std::fs::remove_dir_all(run.step(10)).unwrap();
    run.save([10]);

    std::fs::write(run.root().join(".marks.json"), "{").unwrap();
    assert_eq!(catalog.latest().unwrap().unwrap().step(), 20, "a run starts");
    let refused = catalog.prune(&Retention::last(1), PruneOptions::new()).unwrap_err();
    assert_eq!((refused.kind(), kept(&run)), (ErrorKind::Corrupt, vec![10, 20]));
    run.shows("marks-broken", &["prune", "run", "--keep-last", "1"]);
}
