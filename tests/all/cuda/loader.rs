//! Processes whose loader finds a driver by its own name: the simulated one, unless a real one was asked for.

use super::program::real;
use std::os::unix::fs::symlink;
use std::process::{Command, Output};

/// Set in such a process.
const HERE: &str = "ASHORE_DRIVER_FOUND";

/// Runs this very test again, in such a process and with these variables; returns true in that process. `test` is the path of the test.
pub fn found(test: &str, variables: &[(&str, &str)]) -> bool {
    if std::env::var_os(HERE).is_some() || (real() && variables.is_empty()) {
        return true;
    }
    let output = run(test, variables);
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && out.contains("1 passed"), "{}\n{out}\n{err}", output.status);
    false
}

/// What becomes of `test` in such a process.
pub fn run(test: &str, variables: &[(&str, &str)]) -> Output {
    let folder = tempfile::tempdir().unwrap();
    for name in ["libcuda.so", "libcuda.so.1"] {
        symlink(fakecuda::library(), folder.path().join(name)).unwrap();
    }
    let mut again = Command::new(std::env::current_exe().unwrap());
    again.args(["--exact", test, "--include-ignored", "--test-threads", "1"]);
    again.env("LD_LIBRARY_PATH", folder.path()).env(HERE, "").envs(variables.iter().copied());
    again.output().unwrap()
}

/// Goes on only in a process whose loader finds the driver: runs the test, whose name it is given, again in one.
macro_rules! with_driver {
    ($test:ident) => {
        let path = concat!(module_path!(), "::", stringify!($test)).split_once("::").unwrap().1;
        if !$crate::cuda::loader::found(path, &[]) {
            return;
        }
    };
}
pub(super) use with_driver;
