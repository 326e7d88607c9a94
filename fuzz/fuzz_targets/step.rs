//! A step whose files were changed in any way: it is refused, or gives exactly what was saved; no panic.
//!
//! The input says what to change: flip bits, cut or lengthen a file, write over a range, delete a file, or
//! exchange two.
#![no_main]

use ashore::id::step_name;
use ashore::storage::Storage;
use ashore::storage::local::Local;
use ashore::storage::local::sys::{Kind, Open, RawFd, Rename, Sys};
use ashore::testing::simfs::{Image, SimFs};
use ashore::{Catalog, Checkpoint, CheckpointExecutor, HostTensor, Result, StateDict};
use std::path::Path;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

const ROOT: &str = "/run";
const STEP: u64 = 7;
const LENGTHS: [usize; 4] = [0, 3, 700, 9000];

/// A step in two files, with tensors of several pages, saved once.
static SAVED: LazyLock<Image> = LazyLock::new(|| {
    let fs = SimFs::new();
    let executor =
        CheckpointExecutor::builder(ROOT).storage(open(&fs)).arena(64 << 10).chunk(16 << 10).files(2).alone();
    let executor = executor.build().unwrap();
    let mut state = StateDict::new();
    for (index, length) in LENGTHS.iter().enumerate() {
        state.tensor(format!("tensor {index}"), HostTensor::new(Arc::new(content(index)), [*length])).unwrap();
    }
    state.value("number", &STEP).unwrap();
    executor.save(STEP, state).unwrap().wait(Duration::from_secs(60)).unwrap();
    executor.shutdown(Duration::from_secs(60)).unwrap();
    fs.history().everything()
});

fn content(index: usize) -> Vec<u8> {
    (0..LENGTHS[index]).map(|at| (at * 7 + index) as u8).collect()
}

fn open(fs: &SimFs) -> Arc<Local> {
    Arc::new(Local::with_sys(Arc::new(fs.clone()), ROOT).unwrap())
}

/// The directory of the step, and the names in it; deleted files are gone from them.
struct Step<'a> {
    fs: &'a SimFs,
    dir: RawFd,
    names: Vec<std::ffi::OsString>,
}

impl Step<'_> {
    fn change(&mut self, what: u8, file: u8, at: u16, bytes: &[u8]) {
        let Some(index) = usize::from(file).checked_rem(self.names.len()) else { return };
        let name = self.names[index].clone();
        let fd = self.fs.open(Some(self.dir), Path::new(&name), Open::Update, false).unwrap();
        let length = self.fs.stat(fd).unwrap().len;
        let at = u64::from(at);
        match what % 5 {
            0 => {
                let mut old = vec![0; bytes.len()];
                let read = self.fs.pread(fd, &mut old, at % (length + 1)).unwrap();
                old.truncate(read);
                old.iter_mut().zip(bytes).for_each(|(old, new)| *old ^= new);
                self.fs.pwrite(fd, &old, at % (length + 1)).unwrap();
            }
            1 => drop(self.fs.pwrite(fd, bytes, at).unwrap()),
            2 => self.fs.ftruncate(fd, at).unwrap(),
            3 => {
                self.fs.unlink(self.dir, Path::new(&name), Kind::File).unwrap();
                self.names.remove(index);
            }
            _ => {
                let other = &self.names[at as usize % self.names.len()];
                let _ = self.fs.rename(self.dir, Path::new(&name), Path::new(other), Rename::Exchange);
            }
        }
        self.fs.close(fd);
    }
}

/// Reads all of the step, and panics when something differs from what was saved.
fn read(fs: &SimFs) -> Result<()> {
    let storage: Arc<dyn Storage> = open(fs);
    let _ = Catalog::over(storage.clone()).survey();
    let checkpoint = Checkpoint::from_storage(storage, &step_name(STEP))?.with_threads(1);
    let sound = checkpoint.verify().is_ok_and(|report| report.is_sound());
    for index in 0..LENGTHS.len() {
        match checkpoint.read(&format!("tensor {index}")) {
            Ok(bytes) => assert_eq!(bytes, content(index), "tensor {index} is another one"),
            Err(error) => assert!(!sound, "a sound step is not read: {error}"),
        }
    }
    assert_eq!(checkpoint.value::<u64>("number").unwrap_or(STEP), STEP);
    Ok(())
}

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let fs = SimFs::boot(&SAVED);
    let path = format!("{ROOT}/{}", step_name(STEP));
    let dir = fs.open(None, Path::new(&path), Open::Dir, false).unwrap();
    let mut step = Step { fs: &fs, dir, names: fs.list(dir).unwrap() };
    step.names.sort();
    for change in input.chunks(8) {
        if let [what, file, low, high, bytes @ ..] = change {
            step.change(*what, *file, u16::from_le_bytes([*low, *high]), bytes);
        }
    }
    let changed = !input.is_empty();
    let read = read(&fs);
    assert!(changed || read.is_ok(), "the step as it was saved is refused: {read:?}");
});
