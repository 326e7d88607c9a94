//! The simulated disk: what is durable, and which changes are pending.
//!
//! The disk is rebuilt from the log of operations up to the crash. The crash may keep or lose each pending
//! [`Change`] independently, within the order that every file system keeps: see [`Disk::pending`].

use super::image::{Content, Entries, Image, Ino, Node, ROOT};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::sync::Arc;

/// The unit of writing: a disk writes a sector completely or not at all.
pub(super) const SECTOR: usize = 512;

/// The effect of a call on the file system. The log has the effects in order.
#[derive(Clone, Debug)]
pub(super) enum Op {
    /// Creates an empty file or directory, and an entry with its name.
    Create { dir: Ino, name: OsString, ino: Ino, file: bool },
    /// Gives a file another name.
    Link { dir: Ino, name: OsString, ino: Ino },
    /// Removes a name.
    Unlink { dir: Ino, name: OsString },
    /// Moves a name, or exchanges two.
    Rename { dir: Ino, from: OsString, to: OsString, exchange: bool },
    /// Writes whole sectors, with the content that the running system sees after the write. `grown` is the
    /// new length, if the write made the file longer.
    Write { ino: Ino, at: usize, sectors: Arc<[u8]>, grown: Option<usize> },
    /// Sets a length. The added part of a longer file reads as zeros; a shorter file frees the rest.
    Resize { ino: Ino, len: usize },
    /// Makes a file or directory durable.
    Fsync { ino: Ino },
    /// A failed fsync: the kernel drops the data that it could not write.
    Lose { ino: Ino },
}

#[derive(Clone, Debug)]
pub(super) enum Change {
    Size(usize),
    Sectors { at: usize, bytes: Arc<[u8]> },
}

#[derive(Clone, Debug)]
pub(super) enum Object {
    File { durable: Arc<Content>, pending: Vec<Change> },
    Dir { durable: Arc<Entries>, pending: Vec<Op> },
}

/// A change that a crash may keep or lose.
#[derive(Debug)]
pub(super) struct Unit {
    /// The inode that the unit changes.
    pub(super) ino: Ino,
    /// The units that name this object, if all its names are pending too; empty otherwise. If all these units
    /// are lost, this unit is not visible.
    pub(super) under: Vec<usize>,
    /// The units without which this one cannot be on the disk.
    pub(super) needs: Vec<usize>,
    pub(super) what: What,
    /// True if the last operation made the unit. Without the unit, the image was already possible.
    pub(super) newest: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    /// An operation on names.
    Name,
    /// The length of a file.
    Size { len: usize },
    /// The number of sectors of a file from an offset on, and the durable length of the file.
    Data { at: usize, sectors: usize, durable: usize },
}

/// How much of a [`Unit`] the crash keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Take {
    Nothing,
    Everything,
    /// The sectors of a write whose bit is set. After 64 sectors the bits repeat.
    Torn(u64),
}

impl Take {
    fn keeps(self, sector: usize) -> bool {
        match self {
            Self::Nothing => false,
            Self::Everything => true,
            Self::Torn(mask) => mask >> (sector % 64) & 1 == 1,
        }
    }
}

#[derive(Clone, Debug)]
pub(super) struct Disk {
    pub(super) objects: BTreeMap<Ino, Object>,
    /// The inode that the last operation changed, and its number of changes.
    last: (Ino, usize),
}

impl Disk {
    pub(super) fn new(image: &Image) -> Self {
        let object = |node: &Node| match node {
            Node::File(content) => Object::File { durable: content.clone(), pending: Vec::new() },
            Node::Dir(entries) => Object::Dir { durable: entries.clone(), pending: Vec::new() },
        };
        Self { objects: image.nodes.iter().map(|(ino, node)| (*ino, object(node))).collect(), last: (ROOT, 0) }
    }

    /// Performs `op` on the running system: `op` becomes pending, or makes pending changes durable.
    pub(super) fn apply(&mut self, op: &Op) {
        self.last = match op {
            Op::Create { dir, .. } | Op::Link { dir, .. } | Op::Unlink { dir, .. } | Op::Rename { dir, .. } => {
                (*dir, 1)
            }
            Op::Write { ino, grown, .. } => (*ino, 1 + usize::from(grown.is_some())),
            Op::Resize { ino, .. } => (*ino, 1),
            Op::Fsync { ino } | Op::Lose { ino } => (*ino, 0),
        };
        match op {
            Op::Create { dir, ino, file, .. } => {
                let object = match file {
                    true => Object::File { durable: Content::new(Vec::new()), pending: Vec::new() },
                    false => Object::Dir { durable: Arc::default(), pending: Vec::new() },
                };
                self.objects.insert(*ino, object);
                self.defer(*dir, op);
            }
            Op::Link { dir, .. } | Op::Unlink { dir, .. } | Op::Rename { dir, .. } => self.defer(*dir, op),
            Op::Write { ino, at, sectors, grown } => {
                if let Some(Object::File { pending, .. }) = self.objects.get_mut(ino) {
                    pending.extend(grown.map(Change::Size));
                    pending.push(Change::Sectors { at: *at, bytes: sectors.clone() });
                }
            }
            Op::Resize { ino, len } => {
                if let Some(Object::File { pending, .. }) = self.objects.get_mut(ino) {
                    pending.push(Change::Size(*len));
                }
            }
            Op::Fsync { ino } => match self.objects.get_mut(ino) {
                Some(Object::File { durable, pending }) => {
                    *durable = settle(durable, pending, |_| Take::Everything);
                    pending.clear();
                }
                Some(Object::Dir { durable, pending }) => {
                    *durable = enter(durable, pending, |_| true);
                    pending.clear();
                }
                None => {}
            },
            Op::Lose { ino } => {
                if let Some(Object::File { pending, .. }) = self.objects.get_mut(ino) {
                    pending.retain(|change| matches!(change, Change::Size(_)));
                }
            }
        }
    }

    fn defer(&mut self, dir: Ino, op: &Op) {
        if let Some(Object::Dir { pending, .. }) = self.objects.get_mut(&dir) {
            pending.push(op.clone());
        }
    }

    /// Returns every change that a crash may keep or lose now. Order is kept only where every file system
    /// keeps it: for operations on the same name of a directory, and for the lengths of one file. Objects
    /// that no entry can lead to are left out.
    pub(super) fn pending(&self) -> Vec<Unit> {
        let mut units = Vec::new();
        let mut dirs = vec![(ROOT, None)];
        // The names of each file, each with the unit without which the name does not exist.
        let mut files = BTreeMap::<Ino, Vec<Option<usize>>>::new();
        let mut next = 0;
        while let Some(&(ino, under)) = dirs.get(next) {
            next += 1;
            let Some(Object::Dir { durable, pending }) = self.objects.get(&ino) else { continue };
            let first = units.len();
            let settled = durable.values().map(|child| (*child, under));
            let made = pending.iter().enumerate().filter_map(|(i, op)| Some((named(op)?, Some(first + i))));
            for (child, under) in settled.chain(made) {
                match self.objects.get(&child) {
                    Some(Object::File { .. }) => files.entry(child).or_default().push(under),
                    _ => dirs.push((child, under)),
                }
            }
            for (i, op) in pending.iter().enumerate() {
                let shares = |earlier: &Op| names(earlier).iter().flatten().any(|n| names(op).contains(&Some(n)));
                let needs = (0..i).filter(|&j| shares(&pending[j])).map(|j| first + j).collect();
                units.push(Unit { ino, under: under.into_iter().collect(), needs, what: What::Name, newest: false });
            }
        }
        // After all directories, because each name of a file may be in a different directory.
        for (ino, under) in files {
            let Some(Object::File { durable, pending }) = self.objects.get(&ino) else { continue };
            let under: Vec<_> = under.into_iter().collect::<Option<_>>().unwrap_or_default();
            let mut last = None;
            for change in pending {
                let (needs, what) = match change {
                    Change::Size(len) => (last.replace(units.len()), What::Size { len: *len }),
                    Change::Sectors { at, bytes } => {
                        (None, What::Data { at: *at, sectors: bytes.len() / SECTOR, durable: durable.bytes.len() })
                    }
                };
                let (under, needs) = (under.clone(), needs.into_iter().collect());
                units.push(Unit { ino, under, needs, what, newest: false });
            }
        }
        let of_last = units.iter_mut().rev().filter(|unit| unit.ino == self.last.0);
        of_last.take(self.last.1).for_each(|unit| unit.newest = true);
        units
    }

    /// Returns the disk after a crash that keeps `takes` of `units`, which came from [`Disk::pending`].
    pub(super) fn crash(&self, units: &[Unit], takes: &[Take]) -> Image {
        let mut nodes = BTreeMap::new();
        let mut found = vec![ROOT];
        while let Some(ino) = found.pop() {
            if nodes.contains_key(&ino) {
                continue;
            }
            let first = units.iter().position(|unit| unit.ino == ino);
            let take = |i: usize| first.and_then(|first| takes.get(first + i)).copied().unwrap_or(Take::Nothing);
            let node = match self.objects.get(&ino) {
                Some(Object::File { durable, pending }) => Node::File(settle(durable, pending, take)),
                Some(Object::Dir { durable, pending }) => {
                    let entries = enter(durable, pending, |i| take(i) != Take::Nothing);
                    found.extend(entries.values());
                    Node::Dir(entries)
                }
                None => continue,
            };
            nodes.insert(ino, node);
        }
        Image { nodes }
    }
}

/// The object to which a change gives a name.
fn named(op: &Op) -> Option<Ino> {
    if let Op::Create { ino, .. } | Op::Link { ino, .. } = op { Some(*ino) } else { None }
}

pub(super) fn names(op: &Op) -> [Option<&OsString>; 2] {
    match op {
        Op::Create { name, .. } | Op::Link { name, .. } | Op::Unlink { name, .. } => [Some(name), None],
        Op::Rename { from, to, .. } => [Some(from), Some(to)],
        _ => [None, None],
    }
}

/// Returns the content of a file after the kept changes.
fn settle(durable: &Arc<Content>, pending: &[Change], take: impl Fn(usize) -> Take) -> Arc<Content> {
    if (0..pending.len()).all(|i| take(i) == Take::Nothing) {
        return durable.clone();
    }
    let mut blocks = durable.bytes.to_vec();
    let mut size = blocks.len();
    for (i, change) in pending.iter().enumerate() {
        match change {
            Change::Size(len) if take(i) != Take::Nothing => {
                size = *len;
                if let Some(freed) = blocks.get_mut(size..) {
                    freed.fill(0);
                }
            }
            Change::Size(_) => {}
            Change::Sectors { at, bytes } => {
                for (sector, new) in bytes.chunks(SECTOR).enumerate() {
                    if take(i).keeps(sector) {
                        let at = at + sector * SECTOR;
                        if blocks.len() < at + SECTOR {
                            blocks.resize(at + SECTOR, 0);
                        }
                        blocks[at..at + SECTOR].copy_from_slice(new);
                    }
                }
            }
        }
    }
    blocks.resize(size, 0);
    Content::new(blocks)
}

/// Returns the entries of a directory after the kept operations.
pub(super) fn enter(durable: &Arc<Entries>, pending: &[Op], take: impl Fn(usize) -> bool) -> Arc<Entries> {
    let mut entries = durable.clone();
    for op in pending.iter().enumerate().filter(|(i, _)| take(*i)).map(|(_, op)| op) {
        let entries = Arc::make_mut(&mut entries);
        match op {
            Op::Create { name, ino, .. } | Op::Link { name, ino, .. } => {
                entries.insert(name.clone(), *ino);
            }
            Op::Unlink { name, .. } => {
                entries.remove(name);
            }
            Op::Rename { from, to, exchange, .. } => {
                let moved = entries.remove(from);
                let replaced = moved.and_then(|moved| entries.insert(to.clone(), moved));
                if let (true, Some(replaced)) = (exchange, replaced) {
                    entries.insert(from.clone(), replaced);
                }
            }
            Op::Write { .. } | Op::Resize { .. } | Op::Fsync { .. } | Op::Lose { .. } => {}
        }
    }
    entries
}
