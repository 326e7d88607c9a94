//! A coordinator in a directory that all ranks see.

use super::board::{Board, Life, OnBoard};
use super::{Coordinator, Hello, Member, Round, Session};
use crate::error::{Error, ErrorKind, Result};
use crate::fork;
use crate::fork::ForkGuard;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{ErrorKind as Io, Read, Write};
use std::ops::ControlFlow;
use std::os::fd::{AsRawFd, IntoRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// The coordinator of ranks that see one directory: no network and no server.
///
/// Messages are files of at most 4 KiB below `<root>/.ranks/`, written under another name and renamed. A
/// waiting rank looks for files after 1 ms, 2 ms and so on, and then every 50 ms. The death of a rank on the
/// host of rank 0 is noticed at once, because the kernel releases the lock on its greeting. A dead rank on
/// another host is missing at the deadline.
///
/// The directory must show a file to all hosts soon after it was created: ext4, xfs, Lustre and CephFS do.
/// NFS clients cache names for up to a minute: mount the file system with `lookupcache=none,actimeo=0`, or
/// use another coordinator. Use it for at most about 1,000 ranks, because rank 0 lists a name for each.
///
/// ```
/// use ashore::ranks::{Coordinator, Hello, Member, Phase, Round, Session, SharedDirectory};
/// use std::ops::ControlFlow;
/// use std::time::{Duration, Instant};
/// use uuid::Uuid;
///
/// let root = tempfile::tempdir()?;
/// let deadline = Instant::now() + Duration::from_secs(60);
/// let session = Session { id: Uuid::new_v4(), generation: 1 };
/// std::thread::scope(|scope| {
///     for rank in 0..2 {
///         let root = root.path();
///         scope.spawn(move || -> ashore::Result<()> {
///             let member = Member { rank, world: 2, local_rank: rank };
///             let ranks = SharedDirectory::new(root, member)?;
///             let hello = Hello {
///                 member, nonce: Uuid::new_v4(), token: "run-7".into(), host: "localhost".into(), pid: std::process::id(),
///             };
///             let session = ranks.meet(&hello, &mut |_| Ok(session), deadline)?;
///             let round = Round { session: session.id, save: 0, phase: Phase::Agree };
///             let mut sum = 0;
///             ranks.gather(round, &[rank as u8 + 1], &mut |_, message| {
///                 sum += message[0];
///                 ControlFlow::Continue(())
///             }, deadline)?;
///             let told = ranks.tell(round, (rank == 0).then_some(&[sum][..]), deadline)?;
///             assert_eq!(told, [3]);
///             Ok(())
///         });
///     }
/// });
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct SharedDirectory(OnBoard<Directory>);

impl SharedDirectory {
    /// Creates the coordinator of one rank. `root` is the directory of the steps, or another directory if the
    /// steps lie in an object store. All ranks pass the same directory.
    ///
    /// # Errors
    /// `Invalid` if the rank is not below the number of ranks, or `root` is a URL. Errors of the directory
    /// are found when the ranks meet.
    pub fn new(root: impl AsRef<Path>, member: Member) -> Result<Self> {
        let root = root.as_ref();
        if root.to_str().is_some_and(|root| root.contains("://")) {
            let why = "ranks cannot meet in an object store: give `SharedDirectory` a directory that all of them see, \
                which need not be the root, or use `Etcd`, `Mpi` or `Callback`";
            return Err(Error::invalid(why).with_path(root));
        }
        let directory = root.join(".ranks");
        Ok(Self(OnBoard::new(Directory { directory }, member)?))
    }
}

super::board::delegate!(SharedDirectory);

#[derive(Debug)]
struct Directory {
    directory: PathBuf,
}

/// A greeting whose lock says that its process lives.
#[derive(Debug)]
struct Held {
    /// None once this is being dropped.
    file: Option<File>,
    guard: ForkGuard,
}

impl Drop for Held {
    fn drop(&mut self) {
        let Some(file) = self.file.take() else { return };
        if self.guard.is_ours() {
            fork::unregister(file.as_raw_fd());
        } else {
            // The handler of the fork has closed the child's copy.
            let _ = file.into_raw_fd();
        }
    }
}

impl Directory {
    fn path(&self, key: &str) -> PathBuf {
        self.directory.join(key)
    }

    /// Writes a file under another name, and renames it.
    fn write(&self, key: &str, bytes: &[u8], before: impl Fn(&File) -> Result<()>) -> Result<File> {
        let path = self.path(key);
        let folder = path.parent().unwrap_or(&self.directory);
        let new = folder.join(format!(".new-{}", Uuid::new_v4()));
        let create = || OpenOptions::new().write(true).create_new(true).open(&new);
        let mut file = match create() {
            Err(e) if e.kind() == Io::NotFound => fs::create_dir_all(folder).and_then(|()| create()),
            opened => opened,
        }
        .map_err(|e| at("cannot create a message of this rank", e, &new))?;
        let written = before(&file).and_then(|()| {
            let moved = file.write_all(bytes).and_then(|()| fs::rename(&new, &path));
            moved.map_err(|e| at("cannot write a message of this rank", e, &path))
        });
        if let Err(error) = written {
            fork::unregister(file.as_raw_fd());
            let _ = fs::remove_file(&new);
            return Err(error);
        }
        Ok(file)
    }

    fn open(&self, key: &str) -> Result<Option<File>> {
        let path = self.path(key);
        // A file that another program made can be a link, or a pipe, which must not block this thread.
        let opened = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(&path);
        let file = match opened {
            Ok(file) => file,
            Err(e) if is_gone(&e) => return Ok(None),
            Err(e) if e.raw_os_error() == Some(libc::ELOOP) => return Ok(None),
            Err(e) => return Err(at("cannot open a message of a rank", e, &path)),
        };
        Ok(file.metadata().is_ok_and(|metadata| metadata.is_file()).then_some(file))
    }

    fn names(&self, folder: &str) -> Result<Vec<String>> {
        let path = self.path(folder);
        let entries = match fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(e) if is_gone(&e) => return Ok(Vec::new()),
            Err(e) => return Err(at("cannot list the messages of the ranks", e, &path)),
        };
        let mut names = Vec::new();
        for entry in entries {
            match entry {
                // A message that is being written has a hidden name.
                Ok(entry) => names.extend(entry.file_name().into_string().ok().filter(|name| !name.starts_with('.'))),
                Err(e) if is_gone(&e) => break,
                Err(e) => return Err(at("cannot list the messages of the ranks", e, &path)),
            }
        }
        Ok(names)
    }
}

impl Board for Directory {
    type Held = Held;

    fn check_token(&self, token: &str) -> Result<()> {
        super::launcher::checked_token(token)
    }

    fn put(&self, key: &str, bytes: &[u8], _until: Instant) -> Result<()> {
        self.write(key, bytes, |_| Ok(())).map(drop)
    }

    fn announce(&self, key: &str, bytes: &[u8], _until: Instant) -> Result<Held> {
        let guard = ForkGuard::new();
        let file = self.write(key, bytes, |file| {
            // A forked child would keep the lock.
            if !fork::register(file.as_raw_fd()) {
                return Err(Error::new(ErrorKind::Busy, "too many locks of this process"));
            }
            let no_locks = "the directory of the ranks needs locks of files, flock(2)";
            file.try_lock().map_err(|e| at(no_locks, e.into(), &self.directory).with_kind(ErrorKind::Invalid))
        })?;
        Ok(Held { file: Some(file), guard })
    }

    fn read(&self, key: &str, longest: usize, _until: Instant) -> Result<Option<Vec<u8>>> {
        let Some(file) = self.open(key)? else { return Ok(None) };
        let mut bytes = Vec::new();
        match file.take(longest as u64 + 1).read_to_end(&mut bytes) {
            Ok(_) => Ok(Some(bytes)),
            Err(e) if is_gone(&e) => Ok(None),
            Err(e) => Err(at("cannot read a message of a rank", e, &self.path(key))),
        }
    }

    fn list(&self, folder: &str, _until: Instant) -> Result<Vec<String>> {
        self.names(folder)
    }

    fn remove(&self, key: &str, _until: Instant) {
        if let Err(error) = fs::remove_file(self.path(key)) {
            tracing::debug!(key, %error, "a message of the ranks cannot be removed");
        }
    }

    fn remove_others(&self, session: &str, _until: Instant) {
        for name in self.names("").unwrap_or_default() {
            if name.starts_with("messages-") && name != session {
                let _ = fs::remove_dir_all(self.path(&name));
            } else if name.starts_with("meeting-") {
                self.remove_old(&name);
            }
        }
    }

    fn life(&self, key: &str, nearby: bool, _until: Instant) -> Life {
        match self.open(key) {
            // The process removed its greeting when it left.
            Ok(None) => Life::Dead,
            // A host without locks across hosts reports that the locks of another host are free.
            Ok(Some(file)) if nearby => match file.try_lock_shared() {
                Ok(()) => Life::Dead,
                Err(TryLockError::WouldBlock) => Life::Alive,
                Err(TryLockError::Error(_)) => Life::Unknown,
            },
            _ => Life::Unknown,
        }
    }

    fn hint(&self) -> &'static str {
        "missing ranks have not started, hang, have ended, or see another directory"
    }

    fn now(&self) -> Instant {
        Instant::now()
    }

    fn wait(&self, _prefix: &str, turn: u32, until: Instant) {
        let pause = Duration::from_millis((1 << turn.min(6)).min(50));
        std::thread::sleep(pause.min(until.saturating_duration_since(Instant::now())));
    }
}

impl Directory {
    /// Removes a meeting that began more than a day ago, which belongs to a run with another token.
    fn remove_old(&self, folder: &str) {
        let path = self.path(folder);
        let a_day = Duration::from_secs(24 * 3600);
        let is_old = |modified: std::time::SystemTime| modified.elapsed().is_ok_and(|age| age > a_day);
        if fs::metadata(&path).and_then(|metadata| metadata.modified()).is_ok_and(is_old) {
            let _ = fs::remove_dir_all(&path);
        }
    }
}

fn is_gone(error: &std::io::Error) -> bool {
    error.kind() == Io::NotFound || error.raw_os_error() == Some(libc::ESTALE)
}

fn at(what: &str, error: std::io::Error, path: &Path) -> Error {
    Error::io(what, error).with_path(path)
}
