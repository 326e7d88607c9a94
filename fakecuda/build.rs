//! Compiles the project's kernels for the processor, and lists them for `src/kernel.rs`.

use std::fmt::Write;
use std::path::Path;

fn main() -> std::io::Result<()> {
    let kernels = Path::new("../kernels").canonicalize()?;
    let out = std::env::var("OUT_DIR").expect("cargo sets it");
    let mut build = cc::Build::new();
    build.include(&kernels).include("shim").opt_level(2).flag("-ffp-contract=off").flag("-fno-strict-aliasing");
    build.warnings(true).extra_warnings(true).warnings_into_errors(false);
    let mut list = String::new();
    let mut sources: Vec<_> = std::fs::read_dir(&kernels)?.filter_map(|e| Some(e.ok()?.path())).collect();
    sources.sort();
    for source in sources.iter().filter(|s| s.extension().is_some_and(|e| e == "cu")) {
        let name = source.file_stem().and_then(|n| n.to_str()).expect("kernels have plain names");
        // A C compiler takes nothing that ends in .cu.
        let wrapper = Path::new(&out).join(format!("{name}.c"));
        std::fs::write(&wrapper, format!("#include \"{}\"\n", source.display()))?;
        build.file(wrapper);
        let text = std::fs::read_to_string(source)?;
        for kernel in text.lines().filter_map(|l| l.strip_prefix("KERNEL(")?.split(',').next()) {
            writeln!(list, "kernel!({kernel}, fakecuda_bytes_{kernel}, fakecuda_run_{kernel});").expect("to a string");
        }
    }
    std::fs::write(Path::new(&out).join("kernels.rs"), format!("[{}]", list.replace(';', ",")))?;
    build.compile("ashore_kernels");
    // cudarc looks for this name first and takes a library of it that the process has opened before, wherever
    // that lies.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libcuda.so");
    println!("cargo:rustc-link-lib=m");
    println!("cargo:rerun-if-changed=../kernels");
    println!("cargo:rerun-if-changed=shim");
    Ok(())
}
