//! Starts processes whose loader finds a driver by its own name: the simulated driver, unchanged or without
//! some functions.

use super::program::real;
use std::os::unix::fs::symlink;
use std::process::{Command, Output};

/// Set in such a process.
const HERE: &str = "ASHORE_DRIVER_FOUND";

/// The driver that the loader finds.
#[derive(Default)]
pub struct Found {
    /// Functions that the driver does not have.
    pub without: &'static [&'static str],
    pub variables: &'static [(&'static str, &'static str)],
}

/// Whether this is such a process, or the loader finds a real driver anyway.
pub fn here() -> bool {
    std::env::var_os(HERE).is_some() || real()
}

/// Runs only the test `path` again, in such a process.
pub fn run(path: &str, driver: &Found) -> Output {
    let folder = tempfile::tempdir().unwrap();
    let mut library = fakecuda::library();
    if !driver.without.is_empty() {
        let mut bytes = std::fs::read(&library).unwrap();
        for symbol in driver.without {
            take_away(&mut bytes, symbol);
        }
        library = folder.path().join("older");
        std::fs::write(&library, bytes).unwrap();
    }
    for name in ["libcuda.so", "libcuda.so.1"] {
        symlink(&library, folder.path().join(name)).unwrap();
    }
    let mut again = Command::new(std::env::current_exe().unwrap());
    again.args(["--exact", path, "--nocapture", "--test-threads", "1"]);
    again.env("LD_LIBRARY_PATH", folder.path()).env(HERE, "").envs(driver.variables.iter().copied());
    again.output().unwrap()
}

/// Renames a symbol.
fn take_away(library: &mut [u8], symbol: &str) {
    let finder: Vec<_> = [b"\0", symbol.as_bytes(), b"\0"].concat();
    let found = |at: &usize| library[*at..].starts_with(&finder);
    let found: Vec<_> = (0..library.len() - finder.len()).filter(found).collect();
    assert!(!found.is_empty(), "the driver has no {symbol}");
    found.into_iter().for_each(|at| library[at + 1] = b'_');
}

/// The process's whole output.
pub fn text(output: &Output) -> String {
    [&output.stdout[..], &output.stderr].map(String::from_utf8_lossy).concat()
}

/// Runs the process, which must succeed.
pub fn pass(path: &str, driver: &Found) {
    let output = run(path, driver);
    let text = text(&output);
    assert!(output.status.success() && text.contains("1 passed"), "{}\n{text}", output.status);
}

/// The path of a test in this module.
macro_rules! path_of {
    ($test:ident) => {
        concat!(module_path!(), "::", stringify!($test)).split_once("::").unwrap().1
    };
}
pub(super) use path_of;

/// Continues only in a process whose loader finds the driver; elsewhere runs the named test again in one.
macro_rules! with_driver {
    ($test:ident) => {
        if !$crate::cuda::loader::here() {
            return $crate::cuda::loader::pass($crate::cuda::loader::path_of!($test), &Default::default());
        }
    };
}
pub(super) use with_driver;
