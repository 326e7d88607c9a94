//! System calls that fail on request.
//!
//! **Fault model.** One call, or every call from one call on, reports an error: either before it does
//! anything, or after it did all of its work (as when a server's answer is lost). Transfers can be short.
//! close(2) never fails, because fsync has already reported what close could report. The simulated file
//! system, not this model, covers the data that a failed fsync loses.

use crate::storage::local::sys::{Direct, Kind, Open, RawFd, Rename, Stat, Sys};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// A system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "named after the calls")]
pub enum Call {
    Open,
    Mkdir,
    Pwrite,
    Pread,
    Fsync,
    Fallocate,
    Ftruncate,
    Rename,
    Link,
    Clone,
    Protect,
    Unlink,
    Stat,
    Touch,
    List,
    Lock,
    Direct,
    Buffered,
}

/// How a call fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// The call does nothing and reports this error code.
    Refused(i32),
    /// The call does its work, but still reports this error code.
    DoneAndRefused(i32),
    /// A transfer ends after at most this many bytes; other calls are not affected.
    Short(usize),
}

/// A fault: a future call that fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The kind of call; any kind when `None`.
    pub call: Option<Call>,
    /// How many calls of that kind succeed first.
    pub after: u64,
    /// Every later call of that kind fails too.
    pub sticky: bool,
    /// How it fails.
    pub effect: Effect,
}

/// A call in the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Logged {
    /// The kind of call.
    pub call: Call,
    /// The path by which the descriptor was opened, with the name if the call takes one.
    pub path: PathBuf,
    /// The target of a rename, a link or a clone.
    pub to: Option<PathBuf>,
    /// True if the call reported no error.
    pub ok: bool,
}

/// Code that runs just before a call, as another process could run it.
struct Before(Call, Box<dyn FnOnce() + Send>);

impl std::fmt::Debug for Before {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Before({:?})", self.0)
    }
}

#[derive(Debug, Default)]
struct State {
    before: Option<Before>,
    faults: Vec<Fault>,
    hits: u64,
    log: Vec<Logged>,
    descriptors: BTreeMap<RawFd, PathBuf>,
    held: Vec<Call>,
}

/// A [`Sys`] that wraps another one, and adds faults and a log of its calls.
#[derive(Debug)]
pub struct Faulty {
    inner: Arc<dyn Sys>,
    syncing: bool,
    state: Mutex<State>,
    released: Condvar,
}

/// A guard: while it lives, calls of one kind wait.
#[must_use = "calls wait until it is dropped"]
#[derive(Debug)]
pub struct HeldCalls<'a>(&'a Faulty, Call);

impl Drop for HeldCalls<'_> {
    fn drop(&mut self) {
        self.0.state().held.retain(|held| *held != self.1);
        self.0.released.notify_all();
    }
}

impl Faulty {
    /// Wraps `inner`, without faults.
    pub fn new(inner: Arc<dyn Sys>) -> Arc<Self> {
        Arc::new(Self { inner, syncing: true, state: Mutex::default(), released: Condvar::new() })
    }

    /// Wraps `inner`, without faults and without real fsyncs. An fsync is logged and can fail, but otherwise
    /// returns `Ok` at once. For tests that make thousands of saves and no power cut.
    pub fn unsynced(inner: Arc<dyn Sys>) -> Arc<Self> {
        Arc::new(Self { inner, syncing: false, state: Mutex::default(), released: Condvar::new() })
    }

    /// Adds a fault; `after` counts from now.
    pub fn fail(&self, fault: Fault) {
        self.state().faults.push(fault);
    }

    /// Runs `other` just before the next call of this kind, as another process could do.
    pub fn interrupt(&self, call: Call, other: impl FnOnce() + Send + 'static) {
        self.state().before = Some(Before(call, Box::new(other)));
    }

    /// Removes the faults that have not occurred yet.
    pub fn heal(&self) {
        self.state().faults.clear();
    }

    /// Makes calls of one kind wait, as on slow storage.
    pub fn hold(&self, call: Call) -> HeldCalls<'_> {
        self.state().held.push(call);
        HeldCalls(self, call)
    }

    /// Returns how many calls a fault has hit.
    pub fn hits(&self) -> u64 {
        self.state().hits
    }

    /// Returns the calls so far.
    pub fn log(&self) -> Vec<Logged> {
        self.state().log.clone()
    }

    /// Empties the log, which grows with every call.
    pub fn forget_log(&self) {
        self.state().log.clear();
    }

    /// Returns the paths of open descriptors.
    pub fn open_descriptors(&self) -> Vec<PathBuf> {
        self.state().descriptors.values().cloned().collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, dir: Option<RawFd>, name: &Path) -> PathBuf {
        let base = dir.and_then(|fd| self.state().descriptors.get(&fd).cloned()).unwrap_or_default();
        if name == Path::new(".") || name.as_os_str().is_empty() { base } else { base.join(name) }
    }

    fn meet(&self, call: Call) -> Option<Effect> {
        let before = self.state().before.take_if(|before| before.0 == call);
        if let Some(Before(_, other)) = before {
            other();
        }
        let mut state = self.state();
        let mut met = None;
        state.faults.retain_mut(|fault| {
            if fault.call.is_some_and(|only| only != call) {
                return true;
            }
            if fault.after > 0 {
                fault.after -= 1;
                return true;
            }
            met = Some(fault.effect);
            fault.sticky
        });
        state.hits += u64::from(met.is_some());
        met
    }

    /// Makes a call on `path`, unless a fault prevents it. `work` receives the maximum number of bytes to
    /// transfer.
    fn call<T>(
        &self,
        call: Call,
        path: PathBuf,
        to: Option<PathBuf>,
        mut work: impl FnMut(usize) -> io::Result<T>,
        undo: impl FnOnce(T),
    ) -> io::Result<T> {
        drop(
            self.released
                .wait_while(self.state(), |state| state.held.contains(&call))
                .unwrap_or_else(PoisonError::into_inner),
        );
        let result = match self.meet(call) {
            None => work(usize::MAX),
            Some(Effect::Short(limit)) => work(limit),
            Some(Effect::Refused(code)) => Err(io::Error::from_raw_os_error(code)),
            Some(Effect::DoneAndRefused(code)) => work(usize::MAX).and_then(|done| {
                undo(done);
                Err(io::Error::from_raw_os_error(code))
            }),
        };
        self.state().log.push(Logged { call, path, to, ok: result.is_ok() });
        result
    }

    fn on<T>(&self, call: Call, fd: RawFd, name: &Path, mut work: impl FnMut() -> io::Result<T>) -> io::Result<T> {
        self.call(call, self.path(Some(fd), name), None, |_| work(), drop)
    }
}

const ITSELF: &str = "";

impl Sys for Faulty {
    fn open(&self, dir: Option<RawFd>, path: &Path, how: Open, follow: bool) -> io::Result<RawFd> {
        let full = self.path(dir, path);
        let opened = |_| self.inner.open(dir, path, how, follow);
        let fd = self.call(Call::Open, full.clone(), None, opened, |fd| self.inner.close(fd))?;
        self.state().descriptors.insert(fd, full);
        Ok(fd)
    }

    fn close(&self, fd: RawFd) {
        self.state().descriptors.remove(&fd);
        self.inner.close(fd);
    }

    fn mkdir(&self, dir: Option<RawFd>, path: &Path) -> io::Result<()> {
        self.call(Call::Mkdir, self.path(dir, path), None, |_| self.inner.mkdir(dir, path), drop)
    }

    fn pwrite(&self, fd: RawFd, bytes: &[u8], offset: u64) -> io::Result<usize> {
        let write = |limit: usize| self.inner.pwrite(fd, &bytes[..bytes.len().min(limit)], offset);
        self.call(Call::Pwrite, self.path(Some(fd), Path::new(ITSELF)), None, write, drop)
    }

    fn pread(&self, fd: RawFd, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let len = buffer.len();
        let read = |limit: usize| self.inner.pread(fd, &mut buffer[..len.min(limit)], offset);
        self.call(Call::Pread, self.path(Some(fd), Path::new(ITSELF)), None, read, drop)
    }

    fn fsync(&self, fd: RawFd) -> io::Result<()> {
        self.on(Call::Fsync, fd, Path::new(ITSELF), || if self.syncing { self.inner.fsync(fd) } else { Ok(()) })
    }

    fn fallocate(&self, fd: RawFd, len: u64) -> io::Result<()> {
        self.on(Call::Fallocate, fd, Path::new(ITSELF), || self.inner.fallocate(fd, len))
    }

    fn ftruncate(&self, fd: RawFd, len: u64) -> io::Result<()> {
        self.on(Call::Ftruncate, fd, Path::new(ITSELF), || self.inner.ftruncate(fd, len))
    }

    fn rename(&self, dir: RawFd, from: &Path, to: &Path, how: Rename) -> io::Result<()> {
        let (source, target) = (self.path(Some(dir), from), self.path(Some(dir), to));
        self.call(Call::Rename, source, Some(target), |_| self.inner.rename(dir, from, to, how), drop)
    }

    fn link(&self, file: RawFd, dir: RawFd, name: &Path) -> io::Result<()> {
        let (source, target) = (self.path(Some(file), Path::new(ITSELF)), self.path(Some(dir), name));
        self.call(Call::Link, source, Some(target), |_| self.inner.link(file, dir, name), drop)
    }

    fn clone_file(&self, from: RawFd, to: RawFd) -> io::Result<()> {
        let (source, target) = [from, to].map(|fd| self.path(Some(fd), Path::new(ITSELF))).into();
        self.call(Call::Clone, source, Some(target), |_| self.inner.clone_file(from, to), drop)
    }

    fn protect(&self, fd: RawFd) -> io::Result<()> {
        self.on(Call::Protect, fd, Path::new(ITSELF), || self.inner.protect(fd))
    }

    fn unlink(&self, dir: RawFd, name: &Path, kind: Kind) -> io::Result<()> {
        self.on(Call::Unlink, dir, name, || self.inner.unlink(dir, name, kind))
    }

    fn stat(&self, fd: RawFd) -> io::Result<Stat> {
        self.on(Call::Stat, fd, Path::new(ITSELF), || self.inner.stat(fd))
    }

    fn stat_at(&self, dir: RawFd, name: &Path) -> io::Result<Stat> {
        self.on(Call::Stat, dir, name, || self.inner.stat_at(dir, name))
    }

    fn touch(&self, fd: RawFd) -> io::Result<()> {
        self.on(Call::Touch, fd, Path::new(ITSELF), || self.inner.touch(fd))
    }

    fn path_of(&self, dir: RawFd) -> Option<PathBuf> {
        self.inner.path_of(dir)
    }

    fn list(&self, dir: RawFd) -> io::Result<Vec<OsString>> {
        self.on(Call::List, dir, Path::new(ITSELF), || self.inner.list(dir))
    }

    fn try_lock(&self, fd: RawFd) -> io::Result<bool> {
        self.on(Call::Lock, fd, Path::new(ITSELF), || self.inner.try_lock(fd))
    }

    fn direct(&self, fd: RawFd) -> io::Result<Direct> {
        self.on(Call::Direct, fd, Path::new(ITSELF), || self.inner.direct(fd))
    }

    fn buffered(&self, fd: RawFd) -> io::Result<()> {
        self.on(Call::Buffered, fd, Path::new(ITSELF), || self.inner.buffered(fd))
    }
}
