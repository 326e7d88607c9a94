//! The run log: a file of the root that gets one line for each save, off the path of saves.
//!
//! **Whole lines.** Each line is one write(2) to a file opened with O_APPEND. After a short write, the next
//! entry starts on a new line.
//! **Durability.** The log is never fsynced. A crash of the machine may lose its last lines; a killed process
//! loses none.
//! **Size.** A file ends at [`FILE_MAX`]. The oldest files of a root are deleted when there are more than
//! [`FILES_MAX`], or more than [`BYTES_MAX`] in all.

use super::line::{Closed, DIRECTORY, EXTENSION, Entry, Head, SaveLine, runs};
use super::unix_micros;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// The size at which a log continues in another file: about 15,000 saves.
const FILE_MAX: u64 = 4 << 20;
/// The maximum number of files of a root.
const FILES_MAX: usize = 256;
/// The maximum number of bytes of all files of a root, checked before another file is begun.
const BYTES_MAX: u64 = 64 << 20;

/// Returns the present path of the root, which may be renamed.
pub(crate) type Root = Box<dyn Fn() -> Option<PathBuf> + Send>;

/// The run log of one executor. See the module.
pub(super) struct RunLog {
    root: Root,
    head: Head,
    /// The file and its length. None before the first save, and after an error.
    file: Option<(File, u64)>,
    /// Whether the last write was cut.
    cut: bool,
    /// Whether a warning was logged.
    warned: bool,
}

impl RunLog {
    /// Makes a log in `root`. No file is created before the first save has ended.
    pub fn new(root: Root, head: Head) -> Self {
        Self { root, head, file: None, cut: false, warned: false }
    }

    pub fn save(&mut self, line: &SaveLine) {
        self.write(&Entry::Save(Box::new(line.clone())));
    }

    /// Writes the last line of an executor that ends in order.
    pub fn close(mut self) {
        if self.file.is_some() {
            self.write(&Entry::Closed(Closed { at: unix_micros(SystemTime::now()) }));
        }
    }

    fn write(&mut self, entry: &Entry) {
        if let Err(error) = self.try_write(entry) {
            // The next line begins another file, because this one may be gone. A file that received half of a
            // line receives the next line, too.
            if !self.cut {
                self.file = None;
            }
            if !self.warned {
                tracing::warn!(%error, "the run log cannot be written");
                self.warned = true;
            }
        }
    }

    fn try_write(&mut self, entry: &Entry) -> io::Result<()> {
        if self.file.as_ref().is_none_or(|(_, length)| *length >= FILE_MAX) {
            self.file = Some((self.begin()?, 0));
        }
        let Some((file, length)) = &mut self.file else { return Ok(()) };
        *length += append(file, entry, &mut self.cut)?;
        Ok(())
    }

    /// Begins a file, after deleting the oldest files if there are too many.
    fn begin(&mut self) -> io::Result<File> {
        let root = (self.root)().ok_or(io::ErrorKind::NotFound)?;
        let directory = root.join(DIRECTORY);
        match std::fs::create_dir(&directory) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => made?,
        }
        make_way(&root);
        let head = self.head.clone();
        let path = directory.join(format!("{:016}-{}-{:04}.{EXTENSION}", head.at, head.session, head.part));
        // This comes before the open: a file whose first line fails stays, and the next file needs another
        // name.
        self.head.part += 1;
        let flags = rustix::fs::OFlags::NOFOLLOW.bits().cast_signed();
        let file = OpenOptions::new().append(true).create_new(true).custom_flags(flags).open(path)?;
        self.cut = false;
        append(&file, &Entry::Run(Box::new(head)), &mut self.cut)?;
        Ok(file)
    }
}

/// Deletes the oldest logs of a root while there are too many.
fn make_way(root: &Path) {
    let logs = runs(root).unwrap_or_default();
    let length = |path: &PathBuf| path.symlink_metadata().map_or(0, |metadata| metadata.len());
    let sizes: Vec<u64> = logs.iter().map(length).collect();
    let (mut left, mut bytes) = (logs.len(), sizes.iter().sum::<u64>());
    for (path, size) in logs.iter().zip(sizes) {
        if left < FILES_MAX && bytes < BYTES_MAX {
            return;
        }
        _ = std::fs::remove_file(path);
        (left, bytes) = (left - 1, bytes - size);
    }
}

/// Writes a line in one call, and returns its length. `cut`: the line before it has no end.
fn append(mut file: &File, entry: &Entry, cut: &mut bool) -> io::Result<u64> {
    let mut line = if *cut { b"\n".to_vec() } else { Vec::new() };
    serde_json::to_writer(&mut line, entry)?;
    line.push(b'\n');
    let written = loop {
        match file.write(&line) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            written => break written?,
        }
    };
    *cut = written < line.len();
    if *cut { Err(io::ErrorKind::WriteZero.into()) } else { Ok(line.len() as u64) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_whose_first_line_failed_ends_no_log() {
        let root = tempfile::tempdir().unwrap();
        let head = Head {
            version: String::new(),
            session: "s".into(),
            at: 1,
            host: String::new(),
            pid: 1,
            world: 1,
            device: String::new(),
            engine: String::new(),
            arena: 0,
            pinned: false,
            part: 0,
            settings: None,
        };
        let place = root.path().to_owned();
        let mut log = RunLog::new(Box::new(move || Some(place.clone())), head);
        std::fs::create_dir(root.path().join(DIRECTORY)).unwrap();
        std::fs::write(root.path().join(DIRECTORY).join(format!("{:016}-s-0000.{EXTENSION}", 1)), "").unwrap();
        let entry = Entry::Closed(Closed { at: 2 });
        log.try_write(&entry).unwrap_err();
        log.try_write(&entry).unwrap();
        let logs = runs(root.path()).unwrap();
        let lines = |path: &PathBuf| std::fs::read_to_string(path).unwrap().lines().count();
        assert_eq!(logs.iter().map(lines).collect::<Vec<_>>(), [0, 2]);
    }
}
