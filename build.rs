//! Embeds the GPU kernels: checks `kernels/` against its checksums and writes `kernels.rs`, which
//! `device/cuda/embedded.rs` includes.
//!
//! - `ASHORE_KERNELS=stale` turns a wrong checksum into a warning, for work on a kernel.
//! - `ASHORE_KERNELS=build` also assembles the PTX for each architecture of `ASHORE_CUDA_ARCHS`
//!   (`sm_90,sm_100`) with `$PTXAS` (`ptxas` by default), so that a GPU of these architectures loads its
//!   kernels without compiling them. The PTX stays embedded for all other GPUs.
//!
//! Without the feature `cuda` this script does nothing. It needs neither a CUDA toolkit nor a GPU.

use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// The error is a message for the person who builds.
type Result<T> = std::result::Result<T, String>;

/// The modules that the library loads; `training` is for the program only.
const EMBEDDED: [&str; 3] = ["digest", "gather", "late_copy"];
const SUMS: &str = "SHA256SUMS";
const SETTINGS: [&str; 3] = ["ASHORE_KERNELS", "ASHORE_CUDA_ARCHS", "PTXAS"];

fn main() {
    for setting in SETTINGS {
        println!("cargo::rerun-if-env-changed={setting}");
    }
    println!("cargo::rerun-if-changed=kernels");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    if let Err(error) = embed() {
        println!("cargo::error={error}");
    }
}

fn embed() -> Result<()> {
    let kernels = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("kernels");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let (stale, build) = match setting("ASHORE_KERNELS").as_str() {
        "" => (false, false),
        "stale" => (true, false),
        "build" => (false, true),
        other => return Err(format!("ASHORE_KERNELS={other} is unknown: set stale or build")),
    };
    let level = if stale { "warning" } else { "error" };
    for name in changed(&kernels)? {
        println!("cargo::{level}=kernels/{name} changed: run just ptx");
    }
    let architectures = if build { architectures()? } else { Vec::new() };
    let mut source = String::new();
    if !architectures.is_empty() {
        // Machine code is an ELF file, whose structures are aligned.
        source += "#[repr(C, align(16))] struct Aligned<const N: usize>([u8; N]);\n";
    }
    for name in EMBEDDED {
        let ptx = kernels.join(name).with_extension("ptx");
        let mut cubins = String::new();
        for architecture in &architectures {
            let cubin = out.join(format!("{name}.{architecture}.cubin"));
            assemble(&ptx, architecture, &cubin)?;
            write!(cubins, "&Aligned(*include_bytes!({cubin:?})).0, ").expect("to a string");
        }
        let upper = name.to_uppercase();
        let text = format!("concat!(include_str!({ptx:?}), \"\\0\")");
        writeln!(source, "pub(super) static {upper}: Images = Images {{ cubins: &[{cubins}], ptx: {text} }};")
            .expect("to a string");
    }
    write(&out.join("kernels.rs"), &source)?;
    // The kernels' id in reports, figures and `ashore --version`. The checksums cover every source and every
    // PTX.
    let sums = hash(&read(&kernels.join(SUMS))?);
    let compiler = compiler(&kernels.join("gather.ptx"))?;
    let also: String = architectures.iter().map(|architecture| format!(" {architecture}")).collect();
    println!("cargo::rustc-env=ASHORE_KERNELS_ID={} ptx-{compiler}{also}", &sums[..16]);
    Ok(())
}

/// Lists files whose content differs from the checksums, that have no checksum, or that are missing.
fn changed(kernels: &Path) -> Result<Vec<String>> {
    let sums = String::from_utf8(read(&kernels.join(SUMS))?).map_err(|_| format!("kernels/{SUMS} is not text"))?;
    let mut recorded: BTreeMap<&str, &str> =
        sums.lines().filter_map(|line| line.split_once("  ")).map(|(sum, name)| (name, sum)).collect();
    let mut changed = Vec::new();
    let listed = fs::read_dir(kernels).map_err(|error| format!("{}: {error}", kernels.display()))?;
    for path in listed.filter_map(|entry| Some(entry.ok()?.path())) {
        let kernel = path.extension().is_some_and(|extension| ["cu", "h", "ptx"].map(OsStr::new).contains(&extension));
        let Some(name) = path.file_name().and_then(OsStr::to_str).filter(|_| kernel) else { continue };
        if recorded.remove(name) != Some(&hash(&read(&path)?)) {
            changed.push(name.to_owned());
        }
    }
    changed.extend(recorded.into_keys().map(str::to_owned));
    changed.sort();
    Ok(changed)
}

fn architectures() -> Result<Vec<String>> {
    let asked = setting("ASHORE_CUDA_ARCHS");
    let list: Vec<_> = asked.split(',').map(str::trim).filter(|name| !name.is_empty()).map(str::to_owned).collect();
    match list.iter().find(|name| !name.starts_with("sm_")) {
        Some(wrong) => Err(format!("ASHORE_CUDA_ARCHS has the unknown name {wrong}: write sm_90, or sm_90,sm_100")),
        None if list.is_empty() => Err("ASHORE_KERNELS=build needs ASHORE_CUDA_ARCHS, such as sm_90,sm_100".into()),
        None => Ok(list),
    }
}

fn assemble(ptx: &Path, architecture: &str, cubin: &Path) -> Result<()> {
    let ptxas = env::var_os("PTXAS").unwrap_or_else(|| "ptxas".into());
    let mut command = Command::new(&ptxas);
    command.arg(format!("-arch={architecture}")).arg(ptx).arg("-o").arg(cubin);
    let ended = command.output().map_err(|error| {
        format!("PTXAS={}: {error}: name ptxas of a CUDA toolkit, or of the package nvidia-cuda-nvcc", ptxas.display())
    })?;
    if ended.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&ended.stderr);
    let line = said.lines().find(|line| !line.trim().is_empty()).unwrap_or("no reason given");
    Err(format!("{} cannot assemble {} for {architecture}: {line}", ptxas.display(), ptx.display()))
}

/// Returns the version of the compiler that made a PTX text, from the comment at its head.
fn compiler(ptx: &Path) -> Result<String> {
    let text = String::from_utf8(read(ptx)?).map_err(|_| format!("{} is not text", ptx.display()))?;
    let version = text.lines().find_map(|line| line.strip_prefix("// Cuda compilation tools, ")?.split(", V").nth(1));
    version.map(|version| version.trim().to_owned()).ok_or_else(|| format!("{} names no compiler", ptx.display()))
}

fn setting(name: &str) -> String {
    env::var(name).unwrap_or_default()
}

fn hash(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("to a string");
        text
    })
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(|error| format!("{}: {error}", path.display()))
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))
}
