//! The committed PTX has the kernels that are compiled here, and old drivers accept it. The build checks its
//! checksums.

use crate::fixture::Fixture;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernels")
}

/// Name and content of every source and PTX.
fn files() -> BTreeMap<String, Vec<u8>> {
    let all = std::fs::read_dir(folder()).unwrap().map(|e| e.unwrap().path());
    let kept = all.filter(|p| p.extension().is_some_and(|e| e == "cu" || e == "h" || e == "ptx"));
    kept.map(|p| (p.file_name().unwrap().to_str().unwrap().to_owned(), std::fs::read(p).unwrap())).collect()
}

#[test]
fn every_kernel_is_in_its_module_with_the_argument_that_was_compiled_here() {
    let fixture = Fixture::new();
    let files = files();
    let mut kernels = 0;
    for (name, source) in files.iter().filter_map(|(n, s)| Some((n.strip_suffix(".cu")?, s))) {
        let source = std::str::from_utf8(source).unwrap();
        for kernel in source.lines().filter_map(|l| l.strip_prefix("KERNEL(")?.split(',').next()) {
            // This fails when the sizes of the argument differ.
            fixture.kernel(name, kernel);
            kernels += 1;
        }
    }
    assert!(kernels >= 9, "{kernels}");
}

#[test]
fn drivers_from_12_4_on_and_devices_from_compute_8_0_on_take_it() {
    for (name, ptx) in files().iter().filter(|(n, _)| n.ends_with(".ptx")) {
        let ptx = std::str::from_utf8(ptx).unwrap();
        assert!(ptx.contains("\n.version 8.4\n") && ptx.contains("\n.target sm_80\n"), "{name}");
    }
}
