//! Checkpoints made by hand, file by file, so that they can be damaged and mixed up.

use ashore::internal::digest::Digest;
use ashore::internal::format::manifest::{BLOCK, FileEntry, MANIFEST, Manifest, SliceEntry, TensorEntry};
use ashore::internal::format::shard::{HeaderTemplate, Stamp, index_json, shard_names};
use ashore::storage::{FileReading, FileWriting, IoMode, Memory, Reading, Storage, Sweep, Swept, Writing};
use ashore::{Attempt, Checkpoint, Dtype, Result};
use std::collections::{BTreeMap, HashSet};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

/// A checkpoint to be made.
#[derive(Clone)]
pub struct Made {
    pub step: u64,
    pub attempt: Attempt,
    pub shards: usize,
    pub tensors: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>,
    pub values: BTreeMap<String, serde_json::Value>,
}

impl Made {
    pub fn new(step: u64) -> Self {
        let (tensors, values) = (BTreeMap::new(), BTreeMap::new());
        Self { step, attempt: Attempt::new(), shards: 1, tensors, values }
    }

    pub fn tensor(mut self, name: &str, dtype: Dtype, shape: &[usize], bytes: Vec<u8>) -> Self {
        assert_eq!(shape.iter().product::<usize>() * dtype.bitsize(), 8 * bytes.len(), "{name}");
        self.tensors.insert(name.into(), (dtype, shape.into(), bytes));
        self
    }

    pub fn shards(mut self, shards: usize) -> Self {
        self.shards = shards;
        self
    }

    /// All files, the manifest last. Tensors go to the shards in turn.
    pub fn files(&self) -> Vec<(String, Vec<u8>)> {
        let names = shard_names(self.shards);
        let (mut files, mut tensors, mut map) = (Vec::new(), Vec::new(), BTreeMap::new());
        let mut entries = Vec::new();
        for (number, shard) in names.iter().enumerate() {
            let mine: Vec<_> = self.tensors.iter().skip(number).step_by(self.shards).collect();
            let mut end = 0;
            let described: Vec<_> = mine
                .iter()
                .map(|(name, (dtype, shape, bytes))| {
                    let start = end;
                    end += bytes.len() as u64;
                    (name.as_str(), *dtype, shape.as_slice(), start..end)
                })
                .collect();
            let header = HeaderTemplate::new(described).unwrap();
            let mut bytes = vec![0; header.len() as usize];
            assert!(header.copy(&Stamp::new(self.step, self.attempt), 0, &mut bytes));
            let data = bytes.len() as u64;
            for (name, (dtype, shape, contents)) in mine {
                map.insert(name.as_str(), shard.as_str());
                tensors.push(TensorEntry {
                    name: name.clone(),
                    dtype: *dtype,
                    shape: shape.clone(),
                    slices: vec![slice(number, bytes.len() as u64, shape, contents)],
                });
                bytes.extend_from_slice(contents);
            }
            entries.push(entry(shard, data, &bytes));
            files.push((shard.clone(), bytes));
        }
        if self.shards > 1 {
            let bytes = index_json(0, map).unwrap();
            entries.push(entry("model.safetensors.index.json", 0, &bytes));
            files.push(("model.safetensors.index.json".into(), bytes));
        }
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        let manifest = Manifest {
            format: "ashore".into(),
            version: 1,
            step: self.step,
            attempt: self.attempt,
            world: 1,
            metadata: [("run".into(), "first".into())].into(),
            values: self.values.clone(),
            files: entries,
            tensors,
        };
        files.push((MANIFEST.into(), manifest.to_bytes().unwrap()));
        files
    }

    /// Puts it into `storage` as `name`, replacing what is there.
    pub fn publish(&self, storage: &Memory, name: &str) {
        publish(storage, name, &self.files());
    }

    /// Puts it into a storage of its own and opens it.
    pub fn open(&self) -> Result<Checkpoint> {
        open(&self.files())
    }
}

fn slice(file: usize, offset: u64, shape: &[usize], bytes: &[u8]) -> SliceEntry {
    let blocks: Vec<_> = bytes.chunks(BLOCK as usize).map(Digest::of).collect();
    SliceEntry {
        file,
        offset,
        length: bytes.len() as u64,
        at: vec![0; shape.len()],
        shape: shape.into(),
        digest: Digest::of(bytes),
        blocks: if blocks.len() > 1 { blocks } else { Vec::new() },
    }
}

fn entry(name: &str, data: u64, bytes: &[u8]) -> FileEntry {
    let header = Digest::of(&bytes[..data as usize]);
    FileEntry { name: name.into(), length: bytes.len() as u64, data, header, digest: Digest::of(bytes) }
}

pub fn publish(storage: &Memory, name: &str, files: &[(String, Vec<u8>)]) {
    let writing = storage.begin(name, Attempt::new(), true).unwrap();
    for (file, bytes) in files {
        writing.put(file, bytes).unwrap();
    }
    writing.publish(true).unwrap();
    writing.settle().unwrap();
}

/// Opens a checkpoint of these files.
pub fn open(files: &[(String, Vec<u8>)]) -> Result<Checkpoint> {
    let storage = Memory::new();
    publish(&storage, "step-00000007", files);
    Checkpoint::from_storage(Arc::new(storage), "step-00000007")
}

/// `len` bytes that differ from all others.
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    let mut bytes: Vec<u8> = (0..len.div_ceil(8)).flat_map(|_| next()).collect();
    bytes.truncate(len);
    bytes
}

/// A storage that records and disturbs its users' calls.
#[derive(Clone, Debug, Default)]
pub struct Watched {
    pub memory: Memory,
    pub seen: Arc<Mutex<Seen>>,
}

#[derive(Debug, Default)]
pub struct Seen {
    /// The reads: file, offset, length.
    pub reads: Vec<(String, Range<u64>)>,
    /// The confirmations and removals, in order.
    pub confirmed: Vec<String>,
    pub removed: Vec<String>,
    /// Names whose confirmation or removal fails.
    pub broken: HashSet<String>,
    /// Done once, before a file is opened that is not the manifest.
    pub before_shard: Option<BeforeShard>,
    /// The step that is removed, as by another process, when its confirmation is requested.
    pub vanishing: Option<String>,
    /// Done once, after an attempt was begun that may replace a step.
    pub after_begin: Option<BeforeShard>,
}

pub struct BeforeShard(pub Box<dyn FnOnce() + Send>);

impl std::fmt::Debug for BeforeShard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("BeforeShard")
    }
}

impl Watched {
    fn check(&self, name: &str) -> Result<()> {
        if self.seen.lock().unwrap().broken.contains(name) {
            return Err(ashore::Error::new(ashore::ErrorKind::Unavailable, "broken on purpose"));
        }
        Ok(())
    }
}

impl Storage for Watched {
    fn begin(&self, name: &str, attempt: Attempt, overwrite: bool) -> Result<Arc<dyn Writing>> {
        let begun = self.memory.begin(name, attempt, overwrite)?;
        let disturb = if overwrite { self.seen.lock().unwrap().after_begin.take() } else { None };
        disturb.into_iter().for_each(|BeforeShard(disturb)| disturb());
        Ok(begun)
    }
    fn open(&self, name: &str) -> Result<Arc<dyn Reading>> {
        let (reading, storage, name) = (self.memory.open(name)?, self.clone(), name.into());
        Ok(Arc::new(WatchedReading { reading, storage, name }))
    }
    fn list(&self) -> Result<Vec<String>> {
        self.memory.list()
    }
    fn confirm(&self, name: &str) -> Result<()> {
        self.check(name)?;
        let mut seen = self.seen.lock().unwrap();
        seen.confirmed.push(name.into());
        if seen.vanishing.as_deref() == Some(name) {
            self.memory.remove(name)?;
        }
        self.memory.confirm(name)
    }
    fn remove(&self, name: &str) -> Result<()> {
        self.check(name)?;
        self.seen.lock().unwrap().removed.push(name.into());
        self.memory.remove(name)
    }
    fn sweep(&self, how: Sweep) -> Result<Swept> {
        self.memory.sweep(how)
    }
    fn hint(&self, name: &str) -> Result<()> {
        self.memory.hint(name)
    }
    fn describe(&self, name: &str) -> PathBuf {
        self.memory.describe(name)
    }
}

#[derive(Debug)]
struct WatchedReading {
    reading: Arc<dyn Reading>,
    storage: Watched,
    name: String,
}

impl Reading for WatchedReading {
    fn open(&self, file: &str) -> Result<Arc<dyn FileReading>> {
        let disturb = if file == MANIFEST { None } else { self.storage.seen.lock().unwrap().before_shard.take() };
        if let Some(BeforeShard(disturb)) = disturb {
            disturb();
            // As on a disk where the directory was removed after it was opened.
            return Err(ashore::Error::new(ashore::ErrorKind::NotFound, "gone on purpose"));
        }
        let (reading, storage) = (self.reading.open(file)?, self.storage.clone());
        Ok(Arc::new(WatchedFile { reading, storage, name: format!("{}/{file}", self.name) }))
    }
    fn list(&self) -> Result<Vec<String>> {
        self.reading.list()
    }
}

#[derive(Debug)]
struct WatchedFile {
    reading: Arc<dyn FileReading>,
    storage: Watched,
    name: String,
}

impl FileReading for WatchedFile {
    fn len(&self) -> u64 {
        self.reading.len()
    }
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let range = offset..offset + buffer.len() as u64;
        self.storage.seen.lock().unwrap().reads.push((self.name.clone(), range));
        self.reading.read_at(offset, buffer)
    }
}

// Named so that a change of the seam is noticed here.
const _: fn(&dyn FileWriting) -> IoMode = |file| file.mode();
