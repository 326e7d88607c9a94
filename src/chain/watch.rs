//! Waits for the next version. Polling is the rule and inotify is a hint, because network file systems and
//! object stores have no events.

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Timespec, inotify};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

/// Watches a directory for renames into it, where the system can.
#[derive(Debug)]
pub(super) struct Watch(Option<OwnedFd>);

impl Watch {
    /// Watches `root`; None: there is no directory to watch.
    pub fn new(root: Option<&Path>) -> Self {
        let watch = |root: &Path| {
            let watch = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC)?;
            inotify::add_watch(&watch, root, inotify::WatchFlags::MOVED_TO)?;
            rustix::io::Result::Ok(watch)
        };
        Self(root.and_then(|root| watch(root).ok()))
    }

    /// Waits until something may have happened, and no longer than `timeout`.
    pub fn wait(&self, timeout: Duration) {
        let Some(watch) = &self.0 else { return std::thread::sleep(timeout) };
        let limit = Timespec { tv_sec: timeout.as_secs().min(3600) as i64, tv_nsec: timeout.subsec_nanos().into() };
        let mut fds = [PollFd::new(watch, PollFlags::IN)];
        match poll(&mut fds, Some(&limit)) {
            Ok(0) => {}
            Ok(_) => {
                // The content of the events is not used: the directory is listed again.
                let mut events = [0; 4096];
                while rustix::io::read(watch, &mut events[..]).is_ok_and(|read| read > 0) {}
            }
            Err(_) => std::thread::sleep(timeout.min(Duration::from_millis(10))),
        }
    }
}
