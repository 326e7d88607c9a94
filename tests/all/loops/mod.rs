//! Runs the training loops that the documents show: a restarted run ends as an uninterrupted one.
//!
//!
//! The loop of the README once saved as a step the weights from before that step's update, and resumed with
//! the update after it: each restart lost one update. Doc tests compare the loops in the crate's
//! documentation in the same way.

mod readme;
#[expect(dead_code, reason = "its `main` is for a terminal")]
#[path = "../../../examples/01_save_and_resume.rs"]
mod save_and_resume;

#[path = "../../../examples/from_datarax.rs"]
mod from_datarax;
#[path = "../../../examples/from_earth2studio.rs"]
mod from_earth2studio;
#[expect(dead_code, reason = "its `main` starts itself again")]
#[path = "../../../examples/from_graph.rs"]
mod from_graph;
#[path = "../../../examples/from_orbax.rs"]
mod from_orbax;

use ashore::compat::graph::{Directory, InMemory};
use futures_executor::block_on;

#[test]
fn the_loop_of_the_readme_loses_no_update_at_a_restart() {
    let (whole, restarted) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for steps in [3, 6] {
        readme::train(restarted.path(), steps).unwrap();
    }
    let ends = readme::train(restarted.path(), 8).unwrap();
    assert!(ends[0] < -1.0, "it has trained");
    assert_eq!(ends[0], readme::train(whole.path(), 8).unwrap()[0]);
}

/// A document cannot include a part of a file, so what it shows is compared with what is run.
#[test]
fn the_readme_shows_the_loop_that_is_run() {
    let shown = include_str!("readme.rs").replace("pub fn train", "fn train");
    let readme = include_str!("../../../README.md");
    assert!(readme.contains(&format!("```rust\n{shown}```")), "README.md and tests/all/loops/readme.rs differ");
}

#[test]
fn the_first_example_goes_on_where_it_ended() {
    let (whole, restarted) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for more in [5, 7] {
        save_and_resume::train(restarted.path(), more).unwrap();
    }
    let ends = save_and_resume::train(restarted.path(), 1).unwrap();
    assert!(ends == save_and_resume::train(whole.path(), 13).unwrap(), "a restarted run ends elsewhere");
}

/// Each example compares a stopped run with an uninterrupted one, and fails when they differ.
#[test]
fn the_loops_of_other_systems_go_on_where_they_ended() {
    from_datarax::main().unwrap();
    from_earth2studio::main().unwrap();
    from_orbax::main().unwrap();
    let root = tempfile::tempdir().unwrap();
    for supersteps in [5, 12] {
        block_on(from_graph::run(&Directory::open(root.path()).unwrap(), supersteps)).unwrap();
    }
    let resumed = block_on(from_graph::run(&Directory::open(root.path()).unwrap(), 20)).unwrap();
    assert_eq!(resumed, block_on(from_graph::run(&InMemory::new(), 20)).unwrap());
}
