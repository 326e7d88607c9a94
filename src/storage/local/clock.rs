//! The clock of the file system, the only one that file times can be compared with.

use super::dir::Dir;
use super::sys::uninterrupted;
use std::cell::OnceCell;
use std::io;
use std::time::Duration;

/// The time of the file system, read on first use by touching the root: a server returns its own time.
pub(super) struct Clock<'a> {
    root: &'a Dir,
    now: OnceCell<Option<Duration>>,
}

impl<'a> Clock<'a> {
    pub(super) fn of(root: &'a Dir) -> Self {
        Self { root, now: OnceCell::new() }
    }

    /// The time since a file was `modified`; None if the clock cannot be read, such as without write
    /// permission.
    pub(super) fn age(&self, modified: Duration) -> Option<Duration> {
        let now = self.now.get_or_init(|| {
            let now = self.read().inspect_err(|error| {
                tracing::debug!(path = %self.root.path().display(), error = format_args!("{error:#}"), "the clock of the file system cannot be read");
            });
            now.ok()
        });
        now.map(|now| now.saturating_sub(modified))
    }

    fn read(&self) -> io::Result<Duration> {
        let fd = self.root.fd();
        uninterrupted(|| fd.sys().touch(fd.raw()))?;
        Ok(self.root.stat()?.modified)
    }
}
