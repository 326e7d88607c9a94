//! Counts the files of an attempt: begun, unfinished, lost.

use crate::mutant::{self, Mutant};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// The files of an attempt that were begun and not finished.
#[derive(Debug, Default)]
pub(super) struct Progress {
    files: AtomicUsize,
    unfinished: AtomicUsize,
    lost: AtomicBool,
}

impl Progress {
    pub(super) fn begin_file(&self) {
        self.files.fetch_add(1, Ordering::AcqRel);
        self.unfinished.fetch_add(1, Ordering::AcqRel);
    }

    pub(super) fn end_file(&self) {
        self.unfinished.fetch_sub(1, Ordering::AcqRel);
    }

    /// Marks the attempt as lost: after a failed write or fsync the content of a file is unknown, and the
    /// attempt can only be abandoned.
    pub(super) fn lose(&self) {
        self.lost.store(true, Ordering::Release);
    }

    /// The reason why the attempt cannot be published; None if it can.
    pub(super) fn obstacle(&self) -> Option<&'static str> {
        if self.files.load(Ordering::Acquire) == 0 && !self.lost.load(Ordering::Acquire) {
            return Some("the attempt has no files");
        }
        self.fault()
    }

    /// The reason why the files of this process are not whole. None if they are whole, or if there are no
    /// files.
    pub(super) fn fault(&self) -> Option<&'static str> {
        if self.lost.load(Ordering::Acquire) {
            Some("the attempt is lost: an earlier call on it failed")
        } else if self.unfinished.load(Ordering::Acquire) > 0 && !mutant::on(Mutant::PublishFirst) {
            Some("the attempt has files that were not sealed")
        } else {
            None
        }
    }
}
