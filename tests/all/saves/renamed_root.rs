//! A root that is renamed while an executor writes to it.

use crate::fixtures::executor::{LONG, one, pattern};
use ashore::CheckpointExecutor;
use std::sync::Arc;

/// The executor writes by descriptor, so steps went to the renamed directory; `Committed::path` had its old
/// name.
#[test]
fn paths_name_what_is_there() {
    let directory = tempfile::tempdir().unwrap();
    let (old, new) = (directory.path().join("run"), directory.path().join("renamed"));
    let executor = CheckpointExecutor::builder(&old).arena(4 * 4096).chunk(4096).build().unwrap();
    let save = |step| {
        let save = executor.save(step, one("t", Arc::new(pattern(step, 900)))).unwrap();
        executor.fence().unwrap();
        save.wait(LONG).unwrap().committed().unwrap().path
    };
    assert_eq!(save(1), old.join("step-00000001"));
    std::fs::rename(&old, &new).unwrap();
    assert_eq!(save(2), new.join("step-00000002"));
    // What has taken its name is another directory.
    std::fs::create_dir(&old).unwrap();
    assert_eq!(save(3), new.join("step-00000003"));
    assert_eq!(executor.latest().unwrap().unwrap().path(), new.join("step-00000003"));
    let listed = executor.catalog().list().unwrap();
    assert!(listed.iter().all(|entry| entry.path.join("manifest.json").exists()), "{listed:?}");
    executor.shutdown(LONG).unwrap();
    assert_eq!(std::fs::read_dir(&old).unwrap().count(), 0);
}
