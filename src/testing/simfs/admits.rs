//! Decides whether a crash can leave a tree that was found on a disk.

use super::disk::{Change, Disk, Object, Op, SECTOR, enter, names};
use super::image::{Entries, Ino, ROOT};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::io;
use std::path::Path;
use std::sync::Arc;

/// Maximum number of pending operations that share names for which each of their sets is tried.
const LINKED_MAX: usize = 20;

/// The contents of a directory or file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tree {
    /// The bytes of a file.
    File(Vec<u8>),
    /// The entries of a directory.
    Dir(BTreeMap<OsString, Tree>),
}

impl Tree {
    /// Reads the tree at `path`, without the entries named in `without`, at any depth.
    ///
    /// # Errors
    /// The errors of reading, and `InvalidData` for an entry that is neither a file nor a directory.
    pub fn read(path: &Path, without: &[&str]) -> io::Result<Self> {
        let mut entries = BTreeMap::new();
        for entry in path.read_dir()? {
            let (entry, kind) = entry.and_then(|entry| entry.file_type().map(|kind| (entry, kind)))?;
            if without.iter().any(|name| entry.file_name() == *name) {
                continue;
            }
            let below = match (kind.is_dir(), kind.is_file()) {
                (true, _) => Self::read(&entry.path(), without)?,
                (_, true) => Self::File(std::fs::read(entry.path())?),
                _ => return Err(io::Error::new(io::ErrorKind::InvalidData, format!("{entry:?} is no file"))),
            };
            entries.insert(entry.file_name(), below);
        }
        Ok(Self::Dir(entries))
    }
}

impl Disk {
    /// Returns why a crash now cannot leave `found`, or None if it can.
    ///
    /// The check considers every set of pending changes that [`Disk::pending`] allows. For a directory, it
    /// tries the sets of operations that share names, because operations on different names are independent.
    /// For a file, it tries the lengths and then each sector separately.
    pub(super) fn refuses(&self, found: &Tree) -> Option<String> {
        self.look(ROOT, found).err()
    }

    fn look(&self, ino: Ino, found: &Tree) -> Result<(), String> {
        match (self.objects.get(&ino), found) {
            (Some(Object::Dir { durable, pending }), Tree::Dir(entries)) => {
                let linked = linked(pending);
                let all: BTreeSet<&OsString> = durable.keys().chain(entries.keys()).collect();
                for name in all.into_iter().filter(|name| !linked.iter().any(|group| group.names.contains(name))) {
                    self.same(name, durable, entries)?;
                }
                linked.iter().try_for_each(|group| self.some_set(group, durable, pending, entries))
            }
            (Some(Object::File { durable, pending }), Tree::File(bytes)) => content(&durable.bytes, pending, bytes),
            _ => Err("it is a file, and was a directory, or the other way round".to_owned()),
        }
    }

    /// Whether a name leads to the same object in a simulated directory and in the directory that was found.
    fn same(&self, name: &OsString, left: &Entries, found: &BTreeMap<OsString, Tree>) -> Result<(), String> {
        let below = |why: String| format!("{}: {why}", name.to_string_lossy());
        match (left.get(name), found.get(name)) {
            (None, None) => Ok(()),
            (Some(child), Some(tree)) => self.look(*child, tree).map_err(below),
            (Some(_), None) => Err(below("it must be there".to_owned())),
            (None, Some(_)) => Err(below("it must not be there".to_owned())),
        }
    }

    /// Whether some set of a group of operations leaves what was found under the group's names.
    fn some_set(
        &self,
        group: &Linked<'_>,
        durable: &Arc<Entries>,
        pending: &[Op],
        found: &BTreeMap<OsString, Tree>,
    ) -> Result<(), String> {
        assert!(group.ops.len() <= LINKED_MAX, "too many pending operations to try all sets of them: {group:?}");
        let mut why = Vec::new();
        for set in 0_u32..1 << group.ops.len() {
            let kept = |i: usize| group.ops.iter().zip(0..).any(|(op, at)| *op == i && set >> at & 1 == 1);
            let earlier_lost =
                |i: usize| group.ops.iter().any(|&j| j < i && !kept(j) && shares(&pending[i], &pending[j]));
            if group.ops.iter().any(|&i| kept(i) && earlier_lost(i)) {
                continue;
            }
            let left = enter(durable, pending, kept);
            match group.names.iter().try_for_each(|name| self.same(name, &left, found)) {
                Ok(()) => return Ok(()),
                Err(one) => why.push(one),
            }
        }
        Err(why.join("; or "))
    }
}

/// Pending operations of one directory that share names, directly or through other operations.
#[derive(Debug)]
struct Linked<'a> {
    ops: Vec<usize>,
    names: BTreeSet<&'a OsString>,
}

fn linked(pending: &[Op]) -> Vec<Linked<'_>> {
    let mut groups: Vec<Linked<'_>> = Vec::new();
    for (i, op) in pending.iter().enumerate() {
        let mut whole = Linked { ops: vec![i], names: names(op).into_iter().flatten().collect() };
        for group in groups.extract_if(.., |group| !group.names.is_disjoint(&whole.names)).collect::<Vec<_>>() {
            whole.ops.extend(group.ops);
            whole.names.extend(group.names);
        }
        groups.push(whole);
    }
    groups
}

fn shares(one: &Op, other: &Op) -> bool {
    names(other).iter().flatten().any(|name| names(one).contains(&Some(name)))
}

/// Whether a crash can leave `found` as the content of a file. Each sector is checked separately, because
/// each sector keeps or loses a write independently. The lengths are kept in their order.
fn content(durable: &[u8], pending: &[Change], found: &[u8]) -> Result<(), String> {
    let lengths: Vec<usize> =
        pending.iter().filter_map(|c| if let Change::Size(len) = c { Some(*len) } else { None }).collect();
    let mut why = format!("{} bytes, and the lengths were {} and {lengths:?}", found.len(), durable.len());
    for kept in 0..=lengths.len() {
        if kept.checked_sub(1).map_or(durable.len(), |last| lengths[last]) != found.len() {
            continue;
        }
        let foreign = |at: &usize| {
            let sector = &found[*at..found.len().min(at + SECTOR)];
            !versions(durable, pending, kept, *at).iter().any(|version| version.starts_with(sector))
        };
        let Some(at) = (0..found.len()).step_by(SECTOR).find(foreign) else { return Ok(()) };
        why = format!("{} bytes, and the sector at {at} holds what it never held", found.len());
    }
    Err(why)
}

/// Returns the possible contents of the sector at `at` when the first `kept` changes of the length are on the
/// disk.
fn versions(durable: &[u8], pending: &[Change], kept: usize, at: usize) -> Vec<Vec<u8>> {
    let mut first = durable.get(at..durable.len().min(at + SECTOR)).unwrap_or_default().to_vec();
    first.resize(SECTOR, 0);
    let (mut all, mut sizes) = (vec![first], 0);
    for change in pending {
        match change {
            Change::Size(len) => {
                sizes += 1;
                if sizes <= kept {
                    let freed = len.saturating_sub(at).min(SECTOR);
                    all.iter_mut().for_each(|version| version[freed..].fill(0));
                }
            }
            Change::Sectors { at: first, bytes } => {
                let new = at.checked_sub(*first).and_then(|from| bytes.get(from..from + SECTOR));
                all.extend(new.map(<[u8]>::to_vec));
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::super::{Image, SimFs};
    use super::*;
    use crate::storage::local::sys::{Open, RawFd, Rename, Sys};

    impl Tree {
        fn of(image: &Image) -> Self {
            let mut root = Self::Dir(BTreeMap::new());
            for (path, bytes) in image.paths() {
                root.put(&path, bytes.map_or(Self::Dir(BTreeMap::new()), |bytes| Self::File(bytes.to_vec())));
            }
            root
        }

        fn entries(&mut self) -> &mut BTreeMap<OsString, Self> {
            if let Self::Dir(entries) = self { entries } else { panic!("not a directory: {self:?}") }
        }

        fn at(&mut self, path: &str) -> &mut Self {
            path.split('/').fold(self, |at, name| at.entries().get_mut(&OsString::from(name)).unwrap())
        }

        /// A directory that exists keeps its entries: `paths` may name these before the directory.
        fn put(&mut self, path: &str, tree: Self) {
            let mut at = self;
            let mut names = path.split('/').peekable();
            while let Some(name) = names.next() {
                let last = if names.peek().is_some() { Self::Dir(BTreeMap::new()) } else { tree.clone() };
                at = at.entries().entry(name.into()).or_insert(last);
            }
        }
    }

    fn make(fs: &SimFs, path: &str, bytes: &[u8]) -> RawFd {
        let fd = fs.open(None, Path::new(path), Open::Create { direct: false }, false).unwrap();
        fs.pwrite(fd, bytes, 0).unwrap();
        fd
    }

    /// A program that publishes a step after another one, and then deletes the older one. At some moment each
    /// kind of operation is pending.
    fn program() -> SimFs {
        let fs = SimFs::new();
        let root = fs.open(None, Path::new("/"), Open::Dir, false).unwrap();
        for step in ["a", "b"] {
            fs.mkdir(None, Path::new("new")).unwrap();
            let fd = make(&fs, "new/shard", &[1; 1300]);
            fs.fallocate(fd, 2048).unwrap();
            fs.pwrite(fd, &[2; 700], 512).unwrap();
            fs.ftruncate(fd, 1200).unwrap();
            fs.fsync(fd).unwrap();
            let new = fs.open(None, Path::new("new"), Open::Dir, false).unwrap();
            fs.fsync(new).unwrap();
            fs.rename(root, Path::new("new"), Path::new(step), Rename::NoReplace).unwrap();
            if step == "a" {
                fs.fsync(root).unwrap();
            }
        }
        fs.rename(root, Path::new("a"), Path::new("trash"), Rename::Plain).unwrap();
        let trash = fs.open(None, Path::new("trash"), Open::Dir, false).unwrap();
        fs.unlink(trash, Path::new("shard"), crate::storage::local::sys::Kind::File).unwrap();
        fs
    }

    fn disk(fs: &SimFs, position: usize) -> Disk {
        let mut disk = Disk::new(&Image::empty());
        fs.history().log[..position].iter().for_each(|op| disk.apply(op));
        disk
    }

    #[test]
    fn every_disk_that_the_model_makes_is_admitted_and_none_of_them_with_a_byte_more() {
        let fs = program();
        let mut seen = 0;
        for crash in fs.history().crashes(0..fs.position() + 1, 3, 300) {
            let disk = disk(&fs, crash.position);
            let mut found = Tree::of(&crash.image);
            assert_eq!(disk.refuses(&found), None, "{found:?} at {}", crash.position);
            let name = found.entries().keys().next().cloned();
            if let Some(Tree::Dir(entries)) = name.and_then(|name| found.entries().get_mut(&name))
                && let Some(Tree::File(bytes)) = entries.values_mut().next()
            {
                bytes.push(0);
                seen += 1;
                assert!(disk.refuses(&found).is_some(), "{found:?} at {}", crash.position);
            }
        }
        assert!(seen > 100, "{seen}");
    }

    #[test]
    fn trees_that_no_crash_leaves_are_refused_and_the_reason_names_the_place() {
        let fs = program();
        let disk = disk(&fs, fs.position());
        let whole = Tree::of(&fs.history().everything());
        let refused = |change: &dyn Fn(&mut Tree)| {
            let mut found = whole.clone();
            change(&mut found);
            disk.refuses(&found).unwrap()
        };
        assert_eq!(disk.refuses(&whole), None);
        let flipped = refused(&|tree| {
            let Tree::File(bytes) = tree.at("b/shard") else { panic!() };
            bytes[700] ^= 1;
        });
        assert!(flipped.contains("b: shard: 1200 bytes, and the sector at 512 holds what it never held"), "{flipped}");
        let cut = refused(&|tree| *tree.at("b/shard") = Tree::File(vec![1; 700]));
        assert!(cut.contains("b: shard: 700 bytes, and the lengths were 1200 and []"), "{cut}");
        // `a` was durable, and is now `trash`: it can neither be missing nor exist twice.
        let gone = refused(&|tree| drop(tree.entries().remove(&OsString::from("trash"))));
        assert!(gone.contains("trash: it must be there"), "{gone}");
        let twice = refused(&|tree| tree.put("a", Tree::Dir(BTreeMap::new())));
        assert!(twice.contains("a: it must not be there"), "{twice}");
        let foreign = refused(&|tree| tree.put("c", Tree::File(Vec::new())));
        assert_eq!(foreign, "c: it must not be there");
    }
}
