//! A file system in the memory of this process, mounted through FUSE, which fails, stalls or lies on request.

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    LockOwner, MountOption, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty,
    ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, Request, SessionACL, TimeOrNow, WriteFlags,
};
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

/// What happens to a call of the file system.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// The call does nothing, and its error is this number.
    Fails(i32),
    /// The call is answered after this time.
    Stalls(Duration),
    /// The call does nothing and succeeds.
    Lies,
}

/// Which calls a fault strikes: those of one kind, from the `first` on, one of them or all.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    pub call: &'static str,
    pub first: usize,
    pub once: bool,
    pub fault: Fault,
}

/// A mounted file system, until it is dropped.
pub struct Faulty {
    disk: Arc<Mutex<Disk>>,
    point: PathBuf,
    session: Option<BackgroundSession>,
    _directory: tempfile::TempDir,
}

impl Faulty {
    /// Mounts an empty file system without faults.
    pub fn mount() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let point = directory.path().join("mounted");
        std::fs::create_dir(&point).unwrap();
        let disk = Arc::new(Mutex::new(Disk::new()));
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("ashore-faulty".into()), MountOption::RW];
        config.acl = SessionACL::Owner;
        // A call that stalls delays no other.
        config.n_threads = Some(4);
        let session = fuser::spawn_mount(Mount(disk.clone()), &point, &config).unwrap();
        Self { disk, point, session: Some(session), _directory: directory }
    }

    pub fn path(&self) -> &Path {
        &self.point
    }

    fn disk(&self) -> MutexGuard<'_, Disk> {
        self.disk.lock().unwrap()
    }

    /// Sets the only fault that there is from now on, or none; counts calls anew.
    pub fn fault(&self, rule: Option<Rule>) {
        let mut disk = self.disk();
        (disk.rule, disk.calls, disk.struck) = (rule, 0, 0);
    }

    /// How many calls the fault has struck.
    pub fn struck(&self) -> usize {
        self.disk().struck
    }

    /// Lists entries in the order of their names, or in the reverse order.
    pub fn reverse(&self, reverse: bool) {
        self.disk().reverse = reverse;
    }

    /// Flips the lowest bit of the byte at `offset` of a file in the answer to the next call that reads it,
    /// as memory or a cable does. The kernel keeps what it has read, also for files that are opened again.
    pub fn misread_once(&self, offset: u64) {
        let mut disk = self.disk();
        (disk.misread, disk.keep_cache) = (Some(offset), true);
    }

    /// Takes from every file what no fsync has made durable, as a power loss does. Names stay.
    pub fn cut_power(&self) {
        for node in self.disk().nodes.values_mut() {
            node.bytes.clone_from(&node.durable);
        }
    }
}

impl Drop for Faulty {
    fn drop(&mut self) {
        self.fault(None);
        if let Some(session) = self.session.take() {
            // A test that failed may still have files open there.
            let ended = session.umount_and_join();
            assert!(ended.is_ok() || std::thread::panicking(), "{ended:?}");
        }
    }
}

#[derive(Default)]
struct Node {
    directory: bool,
    entries: BTreeMap<OsString, u64>,
    bytes: Vec<u8>,
    durable: Vec<u8>,
    mode: u32,
    changed: Option<SystemTime>,
    opened: u64,
}

struct Disk {
    nodes: BTreeMap<u64, Node>,
    next: u64,
    rule: Option<Rule>,
    calls: usize,
    struck: usize,
    reverse: bool,
    misread: Option<u64>,
    keep_cache: bool,
}

type Answer<T> = Result<T, Errno>;

impl Disk {
    fn new() -> Self {
        let root = Node { directory: true, mode: 0o755, ..Node::default() };
        let nodes = BTreeMap::from([(1, root)]);
        let (rule, misread, reverse, keep_cache) = (None, None, false, false);
        Self { nodes, next: 2, rule, calls: 0, struck: 0, reverse, misread, keep_cache }
    }

    fn node(&mut self, at: INodeNo) -> Answer<&mut Node> {
        self.nodes.get_mut(&at.0).ok_or(Errno::ESTALE)
    }

    fn child(&mut self, parent: INodeNo, name: &OsStr) -> Answer<u64> {
        self.node(parent)?.entries.get(name).copied().ok_or(Errno::ENOENT)
    }

    fn attributes(&mut self, at: u64) -> Answer<FileAttr> {
        let node = self.node(INodeNo(at))?;
        let changed = node.changed.unwrap_or(SystemTime::UNIX_EPOCH);
        let kind = if node.directory { FileType::Directory } else { FileType::RegularFile };
        Ok(FileAttr {
            ino: INodeNo(at),
            size: node.bytes.len() as u64,
            blocks: node.bytes.len().div_ceil(512) as u64,
            atime: changed,
            mtime: changed,
            ctime: changed,
            crtime: changed,
            kind,
            perm: node.mode as u16 & 0o7777,
            nlink: 1 + u32::from(node.directory),
            uid: rustix::process::getuid().as_raw(),
            gid: rustix::process::getgid().as_raw(),
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }

    fn create(&mut self, parent: INodeNo, name: &OsStr, mode: u32, directory: bool) -> Answer<u64> {
        if self.node(parent)?.entries.contains_key(name) {
            return Err(Errno::EEXIST);
        }
        let at = self.next;
        self.next += 1;
        let changed = Some(SystemTime::now());
        self.nodes.insert(at, Node { directory, mode, changed, ..Node::default() });
        self.enter(parent, name, at)?;
        Ok(at)
    }

    fn enter(&mut self, parent: INodeNo, name: &OsStr, at: u64) -> Answer<()> {
        let parent = self.node(parent)?;
        parent.entries.insert(name.to_owned(), at);
        parent.changed = Some(SystemTime::now());
        Ok(())
    }

    fn remove(&mut self, parent: INodeNo, name: &OsStr, directory: bool) -> Answer<()> {
        let at = self.child(parent, name)?;
        let node = self.node(INodeNo(at))?;
        if node.directory != directory {
            return Err(if directory { Errno::ENOTDIR } else { Errno::EISDIR });
        } else if !node.entries.is_empty() {
            return Err(Errno::ENOTEMPTY);
        }
        let parent = self.node(parent)?;
        parent.entries.remove(name);
        parent.changed = Some(SystemTime::now());
        self.forget(at);
        Ok(())
    }

    /// Drops a node without a name that is not open.
    fn forget(&mut self, at: u64) {
        let named = self.nodes.values().any(|node| node.entries.values().any(|&entry| entry == at));
        if !named && self.nodes.get(&at).is_some_and(|node| node.opened == 0) {
            self.nodes.remove(&at);
        }
    }

    fn rename(
        &mut self,
        (parent, name): (INodeNo, &OsStr),
        (to, new): (INodeNo, &OsStr),
        flags: RenameFlags,
    ) -> Answer<()> {
        let at = self.child(parent, name)?;
        let there = self.child(to, new).ok();
        match there {
            Some(_) if flags.contains(RenameFlags::RENAME_NOREPLACE) => return Err(Errno::EEXIST),
            None if flags.contains(RenameFlags::RENAME_EXCHANGE) => return Err(Errno::ENOENT),
            Some(other) if flags.contains(RenameFlags::RENAME_EXCHANGE) => {
                self.enter(parent, name, other)?;
                return self.enter(to, new, at);
            }
            Some(other) if !self.node(INodeNo(other))?.entries.is_empty() => return Err(Errno::ENOTEMPTY),
            _ => (),
        }
        self.node(parent)?.entries.remove(name);
        self.enter(to, new, at)?;
        if let Some(other) = there {
            self.forget(other);
        }
        Ok(())
    }
}

/// What the kernel calls.
struct Mount(Arc<Mutex<Disk>>);

/// The kernel keeps nothing, so that every call arrives here.
const TTL: Duration = Duration::ZERO;

impl Mount {
    /// Carries a call out, or what the fault makes of it; `lie` is the answer of a call that does nothing.
    fn call<T>(
        &self,
        call: &str,
        lie: impl FnOnce(&mut Disk) -> Answer<T>,
        work: impl FnOnce(&mut Disk) -> Answer<T>,
    ) -> Answer<T> {
        let mut disk = self.0.lock().unwrap();
        let mut fault = None;
        if let Some(rule) = disk.rule.filter(|rule| rule.call == call) {
            disk.calls += 1;
            if disk.calls == rule.first || disk.calls > rule.first && !rule.once {
                disk.struck += 1;
                fault = Some(rule.fault);
            }
        }
        match fault {
            Some(Fault::Fails(number)) => return Err(Errno::from_i32(number)),
            Some(Fault::Lies) => return lie(&mut disk),
            Some(Fault::Stalls(time)) => {
                drop(disk);
                std::thread::sleep(time);
                disk = self.0.lock().unwrap();
            }
            None => (),
        }
        work(&mut disk)
    }

    /// A call that answers nothing.
    fn empty(&self, call: &str, reply: ReplyEmpty, work: impl FnOnce(&mut Disk) -> Answer<()>) {
        match self.call(call, |_| Ok(()), work) {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(error),
        }
    }

    fn entry(&self, call: &str, reply: ReplyEntry, work: impl FnOnce(&mut Disk) -> Answer<u64>) {
        let found = self.call(
            call,
            |_| Err(Errno::EIO),
            |disk| {
                let at = work(disk)?;
                disk.attributes(at)
            },
        );
        match found {
            Ok(attributes) => reply.entry(&TTL, &attributes, Generation(0)),
            Err(error) => reply.error(error),
        }
    }
}

impl Filesystem for Mount {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.entry("lookup", reply, |disk| disk.child(parent, name));
    }

    fn getattr(&self, _: &Request, at: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.call("getattr", |_| Err(Errno::EIO), |disk| disk.attributes(at.0)) {
            Ok(attributes) => reply.attr(&TTL, &attributes),
            Err(error) => reply.error(error),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        at: INodeNo,
        mode: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let set = self.call(
            "setattr",
            |disk| disk.attributes(at.0),
            |disk| {
                let node = disk.node(at)?;
                node.mode = mode.unwrap_or(node.mode);
                if let Some(size) = size {
                    node.bytes.resize(size as usize, 0);
                }
                node.changed = Some(SystemTime::now());
                disk.attributes(at.0)
            },
        );
        match set {
            Ok(attributes) => reply.attr(&TTL, &attributes),
            Err(error) => reply.error(error),
        }
    }

    fn mkdir(&self, _: &Request, parent: INodeNo, name: &OsStr, mode: u32, _: u32, reply: ReplyEntry) {
        self.entry("mkdir", reply, |disk| disk.create(parent, name, mode, true));
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.empty("unlink", reply, |disk| disk.remove(parent, name, false));
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.empty("rmdir", reply, |disk| disk.remove(parent, name, true));
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        to: INodeNo,
        new: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        self.empty("rename", reply, |disk| disk.rename((parent, name), (to, new), flags));
    }

    fn create(&self, _: &Request, parent: INodeNo, name: &OsStr, mode: u32, _: u32, flags: i32, reply: ReplyCreate) {
        let made = self.call(
            "create",
            |_| Err(Errno::EIO),
            |disk| {
                let at = match disk.child(parent, name) {
                    Ok(at) if flags & libc::O_EXCL == 0 => at,
                    _ => disk.create(parent, name, mode, false)?,
                };
                disk.node(INodeNo(at))?.opened += 1;
                disk.attributes(at)
            },
        );
        match made {
            Ok(attributes) => reply.created(&TTL, &attributes, Generation(0), FileHandle(0), FopenFlags::empty()),
            Err(error) => reply.error(error),
        }
    }

    fn open(&self, _: &Request, at: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let opened = self.call(
            "open",
            |_| Err(Errno::EIO),
            |disk| {
                disk.node(at)?.opened += 1;
                Ok(if disk.keep_cache { FopenFlags::FOPEN_KEEP_CACHE } else { FopenFlags::empty() })
            },
        );
        match opened {
            Ok(flags) => reply.opened(FileHandle(0), flags),
            Err(error) => reply.error(error),
        }
    }

    fn release(
        &self,
        _: &Request,
        at: INodeNo,
        _: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.empty("release", reply, |disk| {
            let node = disk.node(at)?;
            node.opened = node.opened.saturating_sub(1);
            disk.forget(at.0);
            Ok(())
        });
    }

    fn read(
        &self,
        _: &Request,
        at: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let read = self.call(
            "read",
            |_| Ok(Vec::new()),
            |disk| {
                let bytes = &disk.node(at)?.bytes;
                let from = bytes.len().min(offset as usize);
                let mut bytes = bytes[from..bytes.len().min(from + size as usize)].to_vec();
                if let Some(wrong) = disk.misread.and_then(|at| bytes.get_mut(at.checked_sub(offset)? as usize)) {
                    *wrong ^= 1;
                    disk.misread = None;
                }
                Ok(bytes)
            },
        );
        match read {
            Ok(bytes) => reply.data(&bytes),
            Err(error) => reply.error(error),
        }
    }

    fn write(
        &self,
        _: &Request,
        at: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let written = self.call(
            "write",
            |_| Ok(data.len() as u32),
            |disk| {
                let node = disk.node(at)?;
                let end = offset as usize + data.len();
                if node.bytes.len() < end {
                    node.bytes.resize(end, 0);
                }
                node.bytes[offset as usize..end].copy_from_slice(data);
                node.changed = Some(SystemTime::now());
                Ok(data.len() as u32)
            },
        );
        match written {
            Ok(length) => reply.written(length),
            Err(error) => reply.error(error),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        self.empty("flush", reply, |_| Ok(()));
    }

    fn fsync(&self, _: &Request, at: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.empty("fsync", reply, |disk| {
            let node = disk.node(at)?;
            node.durable = node.bytes.clone();
            Ok(())
        });
    }

    fn fsyncdir(&self, _: &Request, at: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.empty("fsyncdir", reply, |disk| disk.node(at).map(|_| ()));
    }

    fn fallocate(
        &self,
        _: &Request,
        at: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        self.empty("fallocate", reply, |disk| {
            let node = disk.node(at)?;
            let end = (offset + length) as usize;
            if mode & libc::FALLOC_FL_KEEP_SIZE == 0 && node.bytes.len() < end {
                node.bytes.resize(end, 0);
            }
            Ok(())
        });
    }

    fn readdir(&self, _: &Request, at: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let listed = self.call(
            "readdir",
            |_| Ok(Vec::new()),
            |disk| {
                let reverse = disk.reverse;
                let entries = disk.node(at)?.entries.clone();
                let mut entries: Vec<_> = entries.into_iter().collect();
                if reverse {
                    entries.reverse();
                }
                let kind = |disk: &Disk, at: u64| disk.nodes.get(&at).is_some_and(|node| node.directory);
                Ok(entries.into_iter().map(|(name, at)| (at, kind(disk, at), name)).collect())
            },
        );
        let listed: Vec<(u64, bool, OsString)> = match listed {
            Ok(listed) => listed,
            Err(error) => return reply.error(error),
        };
        let dots = [(at.0, true, ".".into()), (at.0, true, "..".into())];
        for (index, (at, directory, name)) in dots.into_iter().chain(listed).enumerate().skip(offset as usize) {
            let kind = if directory { FileType::Directory } else { FileType::RegularFile };
            if reply.add(INodeNo(at), index as u64 + 1, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        reply.statfs(1 << 20, 1 << 19, 1 << 19, 1 << 20, 1 << 19, 4096, 255, 4096);
    }
}
