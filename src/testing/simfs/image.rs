//! The disk after a crash: a tree of directories and files, with nothing pending.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::hash::{BuildHasher, Hash, Hasher};
use std::sync::Arc;

pub(super) type Ino = u64;
pub(super) type Entries = BTreeMap<OsString, Ino>;

/// The root directory.
pub(super) const ROOT: Ino = 1;

/// The bytes of a file. They are hashed once, and shared by all images that contain them.
#[derive(Debug)]
pub(super) struct Content {
    pub(super) bytes: Arc<Vec<u8>>,
    hash: u64,
}

impl Content {
    pub(super) fn new(bytes: Vec<u8>) -> Arc<Self> {
        let hash = hasher().hash_one(&bytes);
        Arc::new(Self { bytes: Arc::new(bytes), hash })
    }
}

#[derive(Clone, Debug)]
pub(super) enum Node {
    File(Arc<Content>),
    Dir(Arc<Entries>),
}

/// The content of a disk that a machine finds when it boots after a crash.
#[derive(Clone, Debug)]
pub struct Image {
    pub(super) nodes: BTreeMap<Ino, Node>,
}

impl Image {
    /// An empty root directory.
    pub fn empty() -> Self {
        Self { nodes: BTreeMap::from([(ROOT, Node::Dir(Arc::default()))]) }
    }

    /// Hashes every name and every byte, but no inode numbers. The hash is the same for equal trees, in every
    /// run. For a name that begins with `random`, only that prefix counts.
    pub fn hash(&self, random: Option<&str>) -> u64 {
        self.hash_of(ROOT, random.unwrap_or("/").as_bytes())
    }

    fn hash_of(&self, ino: Ino, random: &[u8]) -> u64 {
        let mut hasher = hasher().build_hasher();
        match self.nodes.get(&ino) {
            Some(Node::File(content)) => (1_u8, content.hash, content.bytes.len()).hash(&mut hasher),
            Some(Node::Dir(entries)) => {
                (2_u8, entries.len()).hash(&mut hasher);
                for (name, child) in entries.iter() {
                    let name = name.as_encoded_bytes();
                    let name = if name.starts_with(random) { random } else { name };
                    (name, self.hash_of(*child, random)).hash(&mut hasher);
                }
            }
            None => 0_u8.hash(&mut hasher),
        }
        hasher.finish()
    }

    /// Returns every file with its bytes and every directory with `None`, by path from the root. The root
    /// itself is left out.
    pub fn paths(&self) -> BTreeMap<String, Option<Arc<Vec<u8>>>> {
        let mut paths = BTreeMap::new();
        self.collect(ROOT, "", &mut paths);
        paths
    }

    fn collect(&self, ino: Ino, prefix: &str, paths: &mut BTreeMap<String, Option<Arc<Vec<u8>>>>) {
        let Some(Node::Dir(entries)) = self.nodes.get(&ino) else { return };
        for (name, child) in entries.iter() {
            let path = format!("{prefix}{}", name.to_string_lossy());
            let bytes = match self.nodes.get(child) {
                Some(Node::File(content)) => Some(content.bytes.clone()),
                _ => None,
            };
            self.collect(*child, &format!("{path}/"), paths);
            paths.insert(path, bytes);
        }
    }
}

fn hasher() -> foldhash::quality::FixedState {
    foldhash::quality::FixedState::with_seed(0x61_73_68_6f_72_65)
}
