//! The committed PTX is what this source compiles to, as far as sums can say, and old drivers take it.

use crate::rig::Rig;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernels")
}

/// Name and content of every file from which, or to which, kernels are compiled.
fn files() -> BTreeMap<String, Vec<u8>> {
    let all = std::fs::read_dir(folder()).unwrap().map(|e| e.unwrap().path());
    let kept = all.filter(|p| p.extension().is_some_and(|e| e == "cu" || e == "h" || e == "ptx"));
    kept.map(|p| (p.file_name().unwrap().to_str().unwrap().to_owned(), std::fs::read(p).unwrap())).collect()
}

#[test]
fn source_and_ptx_have_the_recorded_sums() {
    let hex = |bytes: &[u8]| Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect::<String>();
    let found: String = files().iter().map(|(name, bytes)| format!("{}  {name}\n", hex(bytes))).collect();
    let recorded = std::fs::read_to_string(folder().join("SHA256SUMS")).unwrap();
    assert!(found == recorded, "a kernel was changed: run `just ptx`\nfound\n{found}recorded\n{recorded}");
}

#[test]
fn every_kernel_is_in_its_module_with_the_argument_that_was_compiled_here() {
    let rig = Rig::new();
    let files = files();
    let mut kernels = 0;
    for (name, source) in files.iter().filter_map(|(n, s)| Some((n.strip_suffix(".cu")?, s))) {
        let source = std::str::from_utf8(source).unwrap();
        for kernel in source.lines().filter_map(|l| l.strip_prefix("KERNEL(")?.split(',').next()) {
            // Fails when the sizes of the argument differ.
            rig.kernel(name, kernel);
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
