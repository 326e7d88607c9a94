//! Runs tests that change their process in a process of their own.

use std::process::Command;

const ALONE: &str = "ASHORE_TEST_ALONE";

/// True in a process in which the test `path` runs alone; elsewhere runs the test in such a process, where it
/// must pass.
pub fn alone(path: &str) -> bool {
    if std::env::var_os(ALONE).is_some() {
        return true;
    }
    let mut again = Command::new(std::env::current_exe().unwrap());
    again.args(["--exact", path, "--nocapture", "--test-threads", "1"]).env(ALONE, "");
    let output = again.output().unwrap();
    let text = [&output.stdout[..], &output.stderr].map(String::from_utf8_lossy).concat();
    assert!(output.status.success() && text.contains("1 passed"), "{}\n{text}", output.status);
    false
}
