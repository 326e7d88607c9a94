//! The running system: its state, the effects of calls, and the log of these effects.

use super::disk::{Op, SECTOR};
use super::fault::{Call, Fault};
use super::image::{Entries, Image, Ino, Node, ROOT};
use crate::storage::local::sys::{Kind, Open, RawFd, Rename, Stat};
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io;
use std::path::{Component, Path};
use std::sync::Arc;
use std::time::Duration;

#[derive(Debug)]
enum Body {
    File(Arc<Vec<u8>>),
    Dir(Arc<Entries>),
}

#[derive(Debug)]
struct Inode {
    body: Body,
    links: u64,
    locked_by: Option<RawFd>,
    lost: u64,
    /// No process may open the file for writing. This lasts until the machine loses power.
    protected: bool,
}

impl Inode {
    fn new(body: Body, links: u64) -> Self {
        Self { body, links, locked_by: None, lost: 0, protected: false }
    }
}

#[derive(Debug)]
pub(super) struct Descriptor {
    pub(super) ino: Ino,
    writable: bool,
    direct: bool,
    lost_seen: u64,
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) base: Image,
    pub(super) log: Vec<Op>,
    pub(super) faults: Vec<Fault>,
    pub(super) calls: u64,
    pub(super) calls_left: Option<u64>,
    pub(super) clones: bool,
    pub(super) descriptors: BTreeMap<RawFd, Descriptor>,
    inodes: BTreeMap<Ino, Inode>,
    next_ino: Ino,
    next_fd: RawFd,
}

impl State {
    pub(super) fn new(image: &Image) -> Self {
        let mut names = BTreeMap::<Ino, u64>::new();
        for node in image.nodes.values() {
            let Node::Dir(entries) = node else { continue };
            entries.values().for_each(|ino| *names.entry(*ino).or_default() += 1);
        }
        let inode = |(ino, node): (&Ino, &Node)| match node {
            Node::File(content) => {
                (*ino, Inode::new(Body::File(content.bytes.clone()), names.get(ino).copied().unwrap_or(0)))
            }
            Node::Dir(entries) => (*ino, Inode::new(Body::Dir(entries.clone()), 2)),
        };
        Self {
            base: image.clone(),
            log: Vec::new(),
            faults: Vec::new(),
            calls: 0,
            calls_left: None,
            clones: false,
            descriptors: BTreeMap::new(),
            inodes: image.nodes.iter().map(inode).collect(),
            next_ino: image.nodes.keys().next_back().map_or(ROOT, |last| *last) + 1,
            next_fd: 1000,
        }
    }

    pub(super) fn restart(&mut self) {
        self.descriptors.clear();
        self.inodes.values_mut().for_each(|inode| inode.locked_by = None);
        self.faults.clear();
        self.calls_left = None;
    }

    /// Counts a call; dead processes make no calls.
    pub(super) fn enter(&mut self) -> io::Result<()> {
        match &mut self.calls_left {
            Some(0) => return Err(error(libc::EOWNERDEAD)),
            Some(left) => *left -= 1,
            None => {}
        }
        self.calls += 1;
        Ok(())
    }

    /// If a call of this kind has a fault, returns the error, and whether the call does its work first.
    pub(super) fn fault(&mut self, call: Call) -> Option<(io::Error, bool)> {
        let mut hit = None;
        self.faults.retain_mut(|fault| {
            if fault.call.is_some_and(|only| only != call) {
                return true;
            }
            if fault.after > 0 {
                fault.after -= 1;
                return true;
            }
            hit = Some((error(fault.errno), fault.done));
            fault.sticky
        });
        hit
    }

    pub(super) fn descriptor(&self, fd: RawFd) -> io::Result<&Descriptor> {
        self.descriptors.get(&fd).ok_or_else(|| error(libc::EBADF))
    }

    fn inode(&mut self, ino: Ino) -> io::Result<&mut Inode> {
        self.inodes.get_mut(&ino).ok_or_else(|| error(libc::EIO))
    }

    pub(super) fn entries(&self, ino: Ino) -> io::Result<&Arc<Entries>> {
        match self.inodes.get(&ino).map(|inode| &inode.body) {
            Some(Body::Dir(entries)) => Ok(entries),
            Some(Body::File(_)) => Err(error(libc::ENOTDIR)),
            None => Err(error(libc::EIO)),
        }
    }

    fn entries_mut(&mut self, ino: Ino) -> io::Result<&mut Entries> {
        match &mut self.inode(ino)?.body {
            Body::Dir(entries) => Ok(Arc::make_mut(entries)),
            Body::File(_) => Err(error(libc::ENOTDIR)),
        }
    }

    fn file_mut(&mut self, ino: Ino) -> io::Result<&mut Vec<u8>> {
        match &mut self.inode(ino)?.body {
            Body::File(bytes) => Ok(Arc::make_mut(bytes)),
            Body::Dir(_) => Err(error(libc::EISDIR)),
        }
    }

    fn kind(&self, ino: Ino) -> Kind {
        match self.inodes.get(&ino).map(|inode| &inode.body) {
            Some(Body::Dir(_)) => Kind::Dir,
            Some(Body::File(_)) => Kind::File,
            None => Kind::Other,
        }
    }

    fn at(&self, dir: Option<RawFd>) -> io::Result<Ino> {
        dir.map_or(Ok(ROOT), |fd| self.descriptor(fd).map(|descriptor| descriptor.ino))
    }

    /// Returns the directory that contains the last component of `path`, and that component; `None` if `path`
    /// is the directory itself.
    pub(super) fn walk<'p>(&self, dir: Option<RawFd>, path: &'p Path) -> io::Result<(Ino, Option<&'p OsStr>)> {
        let mut at = self.at(dir)?;
        let mut last = None;
        for component in path.components() {
            match component {
                Component::RootDir => at = ROOT,
                Component::CurDir => {}
                Component::Normal(name) => {
                    if let Some(previous) = last.replace(name) {
                        at = self.lookup(at, previous)?;
                    }
                }
                Component::ParentDir | Component::Prefix(_) => return Err(error(libc::EOPNOTSUPP)),
            }
        }
        self.entries(at)?;
        Ok((at, last))
    }

    pub(super) fn lookup(&self, dir: Ino, name: &OsStr) -> io::Result<Ino> {
        self.entries(dir)?.get(name).copied().ok_or_else(|| error(libc::ENOENT))
    }

    fn create(&mut self, dir: Ino, name: &OsStr, file: bool) -> io::Result<Ino> {
        if self.entries(dir)?.contains_key(name) {
            return Err(error(libc::EEXIST));
        }
        if self.inode(dir)?.links == 0 {
            return Err(error(libc::ENOENT));
        }
        let ino = self.next_ino;
        self.next_ino += 1;
        let (body, links) = if file { (Body::File(Arc::default()), 1) } else { (Body::Dir(Arc::default()), 2) };
        self.inodes.insert(ino, Inode::new(body, links));
        self.entries_mut(dir)?.insert(name.to_owned(), ino);
        self.log.push(Op::Create { dir, name: name.to_owned(), ino, file });
        Ok(ino)
    }

    pub(super) fn open(&mut self, dir: Option<RawFd>, path: &Path, how: Open) -> io::Result<RawFd> {
        let (parent, name) = self.walk(dir, path)?;
        let (ino, writable, direct) = match (how, name) {
            (Open::Create { direct }, Some(name)) => (self.create(parent, name, true)?, true, direct),
            (Open::Create { .. }, None) => return Err(error(libc::EEXIST)),
            (Open::Update, Some(name)) => (self.lookup(parent, name)?, true, false),
            (Open::Update, None) => return Err(error(libc::EISDIR)),
            (Open::Read { direct }, Some(name)) => (self.lookup(parent, name)?, false, direct),
            (Open::Dir, Some(name)) => (self.lookup(parent, name)?, false, false),
            (Open::Dir | Open::Read { .. }, None) => (parent, false, false),
        };
        if how == Open::Dir {
            self.entries(ino)?;
        }
        let &mut Inode { lost: lost_seen, protected, .. } = self.inode(ino)?;
        if protected && how == Open::Update {
            return Err(error(libc::EACCES));
        }
        let fd = self.next_fd;
        self.next_fd += 1;
        self.descriptors.insert(fd, Descriptor { ino, writable, direct, lost_seen });
        Ok(fd)
    }

    pub(super) fn mkdir(&mut self, dir: Option<RawFd>, path: &Path) -> io::Result<()> {
        let (parent, name) = self.walk(dir, path)?;
        self.create(parent, name.ok_or_else(|| error(libc::EEXIST))?, false).map(drop)
    }

    pub(super) fn pwrite(&mut self, fd: RawFd, bytes: &[u8], offset: u64) -> io::Result<usize> {
        let &Descriptor { ino, writable, direct, .. } = self.descriptor(fd)?;
        if !writable {
            return Err(error(libc::EBADF));
        }
        check_direct(direct, bytes.as_ptr(), bytes.len(), offset)?;
        if bytes.is_empty() {
            return Ok(0);
        }
        let at = usize::try_from(offset).map_err(|_| error(libc::EFBIG))?;
        let end = at.checked_add(bytes.len()).ok_or_else(|| error(libc::EFBIG))?;
        let file = self.file_mut(ino)?;
        let grown = (end > file.len()).then_some(end);
        file.resize(file.len().max(end), 0);
        file[at..end].copy_from_slice(bytes);
        let first = at / SECTOR * SECTOR;
        let mut sectors = file[first..file.len().min(end.next_multiple_of(SECTOR))].to_vec();
        sectors.resize(sectors.len().next_multiple_of(SECTOR), 0);
        self.log.push(Op::Write { ino, at: first, sectors: sectors.into(), grown });
        Ok(bytes.len())
    }

    pub(super) fn pread(&mut self, fd: RawFd, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let &Descriptor { ino, direct, .. } = self.descriptor(fd)?;
        let Body::File(file) = &self.inode(ino)?.body else { return Err(error(libc::EISDIR)) };
        if offset >= file.len() as u64 {
            return Ok(0);
        }
        check_direct(direct, buffer.as_ptr(), buffer.len(), offset)?;
        let rest = usize::try_from(offset).ok().and_then(|at| file.get(at..)).unwrap_or_default();
        let len = rest.len().min(buffer.len());
        buffer[..len].copy_from_slice(&rest[..len]);
        Ok(len)
    }

    pub(super) fn buffered(&mut self, fd: RawFd) -> io::Result<()> {
        self.descriptors.get_mut(&fd).ok_or_else(|| error(libc::EBADF))?.direct = false;
        Ok(())
    }

    pub(super) fn fsync(&mut self, fd: RawFd, fault: Option<io::Error>) -> io::Result<()> {
        let ino = self.descriptor(fd)?.ino;
        if fault.is_some() {
            self.inode(ino)?.lost += 1;
            self.log.push(Op::Lose { ino });
        }
        let lost = self.inode(ino)?.lost;
        let descriptor = self.descriptors.get_mut(&fd).ok_or_else(|| error(libc::EBADF))?;
        if std::mem::replace(&mut descriptor.lost_seen, lost) != lost {
            return Err(fault.unwrap_or_else(|| error(libc::EIO)));
        }
        self.log.push(Op::Fsync { ino });
        Ok(())
    }

    pub(super) fn resize(&mut self, fd: RawFd, len: u64, shrink: bool) -> io::Result<()> {
        let &Descriptor { ino, writable, .. } = self.descriptor(fd)?;
        if !writable {
            return Err(error(if shrink { libc::EINVAL } else { libc::EBADF }));
        }
        let len = usize::try_from(len).map_err(|_| error(libc::EFBIG))?;
        let file = self.file_mut(ino)?;
        if len > file.len() || shrink {
            file.resize(len, 0);
            self.log.push(Op::Resize { ino, len });
        }
        Ok(())
    }

    pub(super) fn rename(&mut self, dir: RawFd, from: &OsStr, to: &OsStr, how: Rename) -> io::Result<()> {
        let dir = self.at(Some(dir))?;
        let moved = self.lookup(dir, from)?;
        let target = self.entries(dir)?.get(to).copied();
        match (how, target) {
            (Rename::NoReplace, Some(_)) => return Err(error(libc::EEXIST)),
            (Rename::Exchange, None) => return Err(error(libc::ENOENT)),
            (Rename::Plain, Some(target)) if target == moved => return Ok(()),
            (Rename::Plain, Some(target)) => match (self.kind(moved), self.kind(target)) {
                (Kind::Dir, Kind::Dir) if !self.entries(target)?.is_empty() => return Err(error(libc::ENOTEMPTY)),
                (Kind::Dir, Kind::Dir) => self.inode(target)?.links = 0,
                (Kind::File, Kind::File) => self.inode(target)?.links -= 1,
                (Kind::Dir, _) => return Err(error(libc::ENOTDIR)),
                (_, _) => return Err(error(libc::EISDIR)),
            },
            (_, _) => {}
        }
        let entries = self.entries_mut(dir)?;
        entries.remove(from);
        entries.insert(to.to_owned(), moved);
        if let (Rename::Exchange, Some(target)) = (how, target) {
            entries.insert(from.to_owned(), target);
        }
        let exchange = how == Rename::Exchange;
        self.log.push(Op::Rename { dir, from: from.to_owned(), to: to.to_owned(), exchange });
        Ok(())
    }

    pub(super) fn link(&mut self, file: RawFd, dir: RawFd, name: &OsStr) -> io::Result<()> {
        let (ino, dir) = (self.descriptor(file)?.ino, self.at(Some(dir))?);
        if self.kind(ino) != Kind::File {
            return Err(error(libc::EPERM));
        }
        if self.inode(ino)?.links == 0 || self.inode(dir)?.links == 0 {
            return Err(error(libc::ENOENT));
        }
        if self.entries(dir)?.contains_key(name) {
            return Err(error(libc::EEXIST));
        }
        self.inode(ino)?.links += 1;
        self.entries_mut(dir)?.insert(name.to_owned(), ino);
        self.log.push(Op::Link { dir, name: name.to_owned(), ino });
        Ok(())
    }

    /// On the disk a clone is a write like any other. Until an fsync of the new file, a crash may keep its
    /// length, its sectors, and the data written over them, in any subset.
    pub(super) fn clone_file(&mut self, from: RawFd, to: RawFd) -> io::Result<()> {
        let (source, &Descriptor { ino, writable, .. }) = (self.descriptor(from)?.ino, self.descriptor(to)?);
        let Body::File(bytes) = &self.inode(source)?.body else { return Err(error(libc::EISDIR)) };
        let bytes = bytes.clone();
        if !self.clones {
            return Err(error(libc::EOPNOTSUPP));
        }
        if !writable {
            return Err(error(libc::EBADF));
        }
        *self.file_mut(ino)? = bytes.to_vec();
        let mut sectors = bytes.to_vec();
        sectors.resize(bytes.len().next_multiple_of(SECTOR), 0);
        self.log.push(Op::Write { ino, at: 0, sectors: sectors.into(), grown: Some(bytes.len()) });
        Ok(())
    }

    pub(super) fn protect(&mut self, fd: RawFd) -> io::Result<()> {
        let ino = self.descriptor(fd)?.ino;
        self.inode(ino)?.protected = true;
        Ok(())
    }

    pub(super) fn unlink(&mut self, dir: RawFd, name: &OsStr, kind: Kind) -> io::Result<()> {
        let dir = self.at(Some(dir))?;
        let ino = self.lookup(dir, name)?;
        match (kind == Kind::Dir, self.kind(ino)) {
            (true, Kind::Dir) if !self.entries(ino)?.is_empty() => return Err(error(libc::ENOTEMPTY)),
            (true, Kind::Dir) | (false, Kind::File | Kind::Other) => {}
            (true, _) => return Err(error(libc::ENOTDIR)),
            (false, Kind::Dir) => return Err(error(libc::EISDIR)),
        }
        let inode = self.inode(ino)?;
        inode.links = if kind == Kind::Dir { 0 } else { inode.links - 1 };
        self.entries_mut(dir)?.remove(name);
        self.log.push(Op::Unlink { dir, name: name.to_owned() });
        Ok(())
    }

    pub(super) fn stat(&self, ino: Ino) -> io::Result<Stat> {
        let inode = self.inodes.get(&ino).ok_or_else(|| error(libc::EIO))?;
        let len = if let Body::File(bytes) = &inode.body { bytes.len() as u64 } else { 0 };
        // Time does not pass.
        Ok(Stat { kind: self.kind(ino), len, identity: (1, ino), links: inode.links, modified: Duration::ZERO })
    }

    pub(super) fn try_lock(&mut self, fd: RawFd) -> io::Result<bool> {
        let &Descriptor { ino, writable, .. } = self.descriptor(fd)?;
        // Like NFS, where an exclusive lock needs a descriptor that can write.
        if !writable {
            return Err(error(libc::EBADF));
        }
        let holder = self.inode(ino)?.locked_by.get_or_insert(fd);
        Ok(*holder == fd)
    }

    pub(super) fn close(&mut self, fd: RawFd) {
        let Some(Descriptor { ino, .. }) = self.descriptors.remove(&fd) else { return };
        if let Some(inode) = self.inodes.get_mut(&ino) {
            inode.locked_by = inode.locked_by.filter(|holder| *holder != fd);
        }
    }
}

pub(super) fn error(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

fn check_direct(direct: bool, address: *const u8, len: usize, offset: u64) -> io::Result<()> {
    let aligned =
        [address.addr(), len].iter().all(|n| n.is_multiple_of(SECTOR)) && offset.is_multiple_of(SECTOR as u64);
    if direct && !aligned { Err(error(libc::EINVAL)) } else { Ok(()) }
}
