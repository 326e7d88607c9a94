//! Replays a recorded run on the simulated file system, and decides which disks a power loss could leave.

use super::SimFs;
use super::admits::Tree;
use super::disk::{Disk, Op};
use super::image::Image;
use super::state::error;
use crate::storage::local::sys::{Open, RawFd, Sys};
use crate::testing::recorded::{Done, Record};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

/// The operations of a recorded run, each with the two positions in the disk's log between which it was made.
#[derive(Debug)]
pub struct Replay {
    log: Vec<(Op, u64, u64)>,
}

impl Replay {
    /// Replays the recorded calls below `mount` on an empty [`SimFs`]. Calls elsewhere are left out.
    ///
    /// # Errors
    /// The errors of the simulated calls: each call succeeded on the real file system.
    pub fn of(records: &[Record], mount: &Path) -> io::Result<Self> {
        let (fs, mut descriptors, mut spans) = (SimFs::new(), BTreeMap::new(), Vec::new());
        for record in records {
            redo(&fs, &mut descriptors, mount, record)
                .map_err(|e| io::Error::new(e.kind(), format!("{record:?}: {e}")))?;
            spans.resize(fs.position(), (record.began, record.ended));
        }
        let ops = fs.history().log.iter().cloned().collect::<Vec<_>>();
        Ok(Self { log: ops.into_iter().zip(spans).map(|(op, (began, ended))| (op, began, ended)).collect() })
    }

    /// Returns how many operations have changed the file system or made it durable.
    pub fn len(&self) -> usize {
        self.log.len()
    }

    /// True when nothing was recorded.
    pub fn is_empty(&self) -> bool {
        self.log.is_empty()
    }

    /// Returns why no power loss leaves `found`, or None if a power loss can leave it.
    ///
    /// The disk holds every write of its log up to a flush, and any subset of the writes up to the next
    /// flush, which ends at `flush`. So an operation may be on the disk if it began before `flush`. An fsync
    /// has made its data durable if it returned before `flush`, because it relies only on earlier flushes.
    /// With `early` an fsync counts as soon as it began. This is wrong on purpose: a check must then fail.
    pub fn refuses(&self, flush: u64, found: &Tree, early: bool) -> Option<String> {
        let mut disk = Disk::new(&Image::empty());
        for (op, began, ended) in &self.log {
            let counts = if matches!(op, Op::Fsync { .. }) && !early { *ended } else { *began };
            if counts < flush {
                disk.apply(op);
            }
        }
        disk.refuses(found)
    }
}

type Descriptors = BTreeMap<(u32, RawFd), RawFd>;

fn redo(fs: &SimFs, descriptors: &mut Descriptors, mount: &Path, record: &Record) -> io::Result<()> {
    let known = |descriptors: &Descriptors, fd: RawFd| descriptors.get(&(record.process, fd)).copied();
    // Where a path starts on the simulated file system. None for a path elsewhere.
    let place = |dir: Option<RawFd>, path: &Path| match dir {
        Some(dir) => known(descriptors, dir).map(|dir| (Some(dir), path.to_owned())),
        None => path.strip_prefix(mount).ok().map(|path| (None, PathBuf::from("/").join(path))),
    };
    match &record.done {
        Done::Open { dir, path, how, fd } => {
            let Some((dir, path)) = place(*dir, path) else { return Ok(()) };
            // Direct writes in the record need not be aligned in the memory of this process.
            let how = match how {
                Open::Create { .. } => Open::Create { direct: false },
                Open::Read { .. } => Open::Read { direct: false },
                other => *other,
            };
            let opened = fs.open(dir, &path, how, false)?;
            descriptors.insert((record.process, *fd), opened);
            Ok(())
        }
        Done::Mkdir { dir, path } => place(*dir, path).map_or(Ok(()), |(dir, path)| fs.mkdir(dir, &path)),
        Done::Close { fd } => {
            if let Some(fd) = descriptors.remove(&(record.process, *fd)) {
                fs.close(fd);
            }
            Ok(())
        }
        Done::Write { fd, bytes, offset } => known(descriptors, *fd).map_or(Ok(()), |fd| {
            let written = fs.pwrite(fd, bytes, *offset)?;
            if written == bytes.len() { Ok(()) } else { Err(error(libc::EIO)) }
        }),
        Done::Fsync { fd } => known(descriptors, *fd).map_or(Ok(()), |fd| fs.fsync(fd)),
        Done::Resize { fd, len, shrink } => known(descriptors, *fd).map_or(Ok(()), |fd| match shrink {
            true => fs.ftruncate(fd, *len),
            false => fs.fallocate(fd, *len),
        }),
        Done::Rename { dir, from, to, how } => {
            known(descriptors, *dir).map_or(Ok(()), |dir| fs.rename(dir, from, to, *how))
        }
        Done::Link { file, dir, name } => match (known(descriptors, *file), known(descriptors, *dir)) {
            (Some(file), Some(dir)) => fs.link(file, dir, name),
            _ => Ok(()),
        },
        Done::Clone { from, to } => match (known(descriptors, *from), known(descriptors, *to)) {
            (Some(from), Some(to)) => fs.clone_file(from, to),
            _ => Ok(()),
        },
        Done::Unlink { dir, name, kind } => known(descriptors, *dir).map_or(Ok(()), |dir| fs.unlink(dir, name, *kind)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::local::{Linux, Local};
    use crate::storage::{Storage, Sweep};
    use crate::testing::Recorded;
    use std::sync::Arc;

    #[test]
    fn a_recorded_run_leaves_what_its_replay_predicts_and_an_fsync_that_came_later_is_not_counted() {
        let (root, beside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (calls, disk) = (beside.path().join("calls"), beside.path().join("disk"));
        std::fs::write(&disk, "").unwrap();
        for session in 0..2 {
            let sys = Arc::new(Recorded::new(Arc::new(Linux), &calls, &disk).unwrap());
            let storage = Local::with_sys(sys, root.path().join("run")).unwrap();
            storage.sweep(Sweep::default()).unwrap();
            // Each session finds a different log of the disk, as after a flush.
            std::fs::write(&disk, vec![0; 10 * (session + 1)]).unwrap();
        }
        let records = Record::read(&calls).unwrap();
        let replay = Replay::of(&records, root.path()).unwrap();
        assert!(!replay.is_empty());
        let (all, none) = (Tree::read(root.path(), &[]).unwrap(), Tree::Dir(BTreeMap::new()));
        let refused = |flush, found| replay.refuses(flush, found, false).is_some();
        // Before anything began, only an empty disk can be found. After the first session, its directory is
        // durable.
        assert_eq!((refused(0, &all), refused(0, &none)), (true, false));
        assert_eq!((refused(1, &all), refused(1, &none)), (false, true));
        assert_eq!((refused(11, &all), refused(11, &none)), (false, true));
    }
}
