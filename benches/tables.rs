//! Measures time and memory for opening and looking up a step of a million tensors, from its table and
//! manifest alone. `cargo bench --bench tables` runs this bench. The files are in the page cache.

use ashore::internal::digest::Digest;
use ashore::internal::format::columns::TENSORS_TABLE;
use ashore::internal::format::entries::{FileEntry, SliceEntry, TensorEntry};
use ashore::internal::format::index::{Index, Medium};
use ashore::internal::format::manifest::{Manifest, Sealed};
use ashore::internal::format::table::Source;
use ashore::internal::format::template::TableTemplate;
use ashore::testing::AlignedBuffer;
use ashore::{Attempt, Dtype, Result};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

const TENSORS: usize = 1_000_000;
const HEADER: u64 = 100_000_000;

#[derive(Debug)]
struct Directory(PathBuf);

#[derive(Debug)]
struct OnDisk(File, PathBuf);

impl Medium for Directory {
    fn table(&self, name: &str) -> Result<Arc<dyn Source>> {
        let path = self.0.join(name);
        Ok(Arc::new(OnDisk(File::open(&path).expect("a table"), path)))
    }
}

impl Source for OnDisk {
    fn length(&self) -> u64 {
        self.0.metadata().expect("a length").len()
    }

    fn fill(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.0.read_exact_at(buffer, offset).expect("bytes");
        Ok(())
    }

    fn path(&self) -> PathBuf {
        self.1.clone()
    }
}

fn name(number: usize) -> String {
    format!("model.layers.{:07}.attention.query_projection.weight", number)
}

/// Writes the table and manifest of a step of `TENSORS` tensors of 16 bytes in one file.
fn write(root: &Path) {
    let tensors: Vec<_> = (0..TENSORS)
        .map(|number| {
            let slice = SliceEntry {
                file: 0,
                offset: HEADER + 16 * number as u64,
                length: 16,
                at: vec![0, 0],
                shape: vec![2, 4],
                digest: Digest::EMPTY,
                blocks: vec![],
            };
            TensorEntry { name: name(number), dtype: Dtype::BF16, shape: vec![2, 4], slices: vec![slice] }
        })
        .collect();
    let length = HEADER + 16 * TENSORS as u64;
    let file = FileEntry {
        name: "model.safetensors".into(),
        length,
        data: HEADER,
        header: Digest::EMPTY,
        digest: Digest::EMPTY,
    };
    let began = Instant::now();
    let template = TableTemplate::new(&[file], &tensors, &BTreeMap::new()).expect("a template");
    println!("template                 {:>10.2?}", began.elapsed());
    let mut bytes = AlignedBuffer::new(0);
    let fill = |bytes: &mut AlignedBuffer| {
        let slices = (0..TENSORS).map(|number| (Digest::from_bits(number as u64), &[][..]));
        template.fill((7, Attempt::default()), [(Digest::EMPTY, Digest::EMPTY)], slices, bytes).expect("a table")
    };
    fill(&mut bytes);
    let began = Instant::now();
    let entry = fill(&mut bytes);
    println!("fill                     {:>10.2?}  {} bytes", began.elapsed(), bytes.len());
    std::fs::write(root.join(TENSORS_TABLE), &bytes[..]).expect("written");
    let manifest = Manifest { tables: vec![entry], ..Manifest::new(7, Attempt::default()) };
    std::fs::write(root.join("manifest.json"), manifest.to_bytes().expect("json")).expect("written");
}

fn open(root: &Path) -> Index {
    let manifest = std::fs::read(root.join("manifest.json")).expect("a manifest");
    let medium = Box::new(Directory(root.into()));
    Index::new(Sealed::parse(&manifest).expect("a manifest"), medium).expect("an index")
}

/// The peak memory of this process, in KiB.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find(|line| line.starts_with("VmHWM")).expect("a line");
    line.split_whitespace().nth(1).expect("a number").parse().expect("a number")
}

fn measure(root: &Path, what: &str, work: impl Fn(&Index)) {
    // Each runs in a separate process, because memory that was freed counts in the peak.
    let before = peak();
    let mut best = f64::MAX;
    for _ in 0..5 {
        let began = Instant::now();
        let index = open(root);
        work(&index);
        best = best.min(began.elapsed().as_secs_f64());
    }
    println!("{what:<24} {:>8.2} ms  {:>6} KiB", best * 1e3, peak() - before);
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, root, case] = &arguments[..]
        && Path::new(root).is_dir()
    {
        let root = Path::new(root);
        let look = |index: &Index, numbers: &mut dyn Iterator<Item = usize>| {
            numbers.for_each(|number| assert!(index.find(&name(number)).expect("found").is_some()));
        };
        match case.as_str() {
            "open" => measure(root, "open", |_| {}),
            "neighbours" => measure(root, "open, 1000 neighbours", |index| look(index, &mut (500_000..501_000))),
            "spread" => measure(root, "open, 1000 spread", |index| look(index, &mut (0..TENSORS).step_by(1000))),
            "all" => measure(root, "all, checked", |index| index.check().expect("sound")),
            _ => {}
        }
        return;
    }
    let root = tempfile::tempdir().expect("a directory");
    write(root.path());
    for case in ["open", "neighbours", "spread", "all"] {
        let program = std::env::current_exe().expect("a path");
        let done = std::process::Command::new(program).arg(root.path()).arg(case).status().expect("a process");
        assert!(done.success());
    }
}
