//! Reading back shared files: one after each save, at the pace of half the medium.

use crate::digest::Digest;
use crate::error::Result;
use crate::memory::AlignedBuffer;
use crate::sync::{Mutex, lock};
use crate::writer::OlderFile;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// The bytes of a read.
const PIECE: usize = 8 << 20;
/// A shutdown waits as long at most, and for a read.
const LONGEST_PAUSE: Duration = Duration::from_millis(200);

/// Which shared file is read back, and how far that is.
#[derive(Debug, Default)]
pub(super) struct Scrub {
    state: Mutex<State>,
    closed: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    /// The shared files of the last durable step.
    files: Vec<Arc<OlderFile>>,
    /// The number of the next one.
    next: usize,
    /// The file that is being read, the offset, and the digest of what comes before.
    open: Option<(Arc<OlderFile>, u64, Digest)>,
    /// A save has become durable since the last file was chosen.
    due: bool,
}

impl Scrub {
    /// Sets the shared files of a step that has become durable.
    pub fn offer(&self, files: Vec<Arc<OlderFile>>) {
        let mut state = lock(&self.state);
        // A file that is no longer shared is not read to its end.
        let stays = |open: &OlderFile| files.iter().any(|file| Arc::ptr_eq(&file.damaged, &open.damaged));
        state.open = state.open.take().filter(|(open, ..)| stays(open));
        (state.due, state.files) = (true, files);
    }

    /// Ends a run, and all later ones, and closes the files.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
        let mut state = lock(&self.state);
        (state.files, state.open) = (Vec::new(), None);
    }

    /// Reads on, and returns when a whole file has been read, when `stop` says so, or after
    /// [`Scrub::close`]; the next call goes on from there. A file that is not what was written is not shared
    /// any more.
    ///
    /// # Errors
    /// When the file cannot be read. It is not shared any more.
    pub fn run(&self, stop: impl Fn() -> bool) -> Result<()> {
        let Some((file, mut at, mut digest)) = self.take() else { return Ok(()) };
        let len = file.reading.len();
        let mut piece = AlignedBuffer::new(PIECE);
        while at < len {
            let began = Instant::now();
            let now = &mut piece[..PIECE.min((len - at) as usize)];
            file.reading.drop_cached();
            // What cannot be read is not shared any more, either: that costs one write.
            file.reading.read_at(at, now).inspect_err(|_| file.damaged.store(true, Ordering::Release))?;
            digest = digest.then(Digest::of(now), now.len() as u64);
            at += now.len() as u64;
            // After a piece: saves that come without a pause must not keep it from getting on.
            if self.closed.load(Ordering::Acquire) {
                return Ok(());
            }
            if at < len && stop() {
                lock(&self.state).open = Some((file, at, digest));
                return Ok(());
            }
            if at < len {
                std::thread::sleep(began.elapsed().min(LONGEST_PAUSE));
            }
        }
        if digest != file.filled.whole {
            file.damaged.store(true, Ordering::Release);
            let (step, _) = file.filled.origin.unwrap_or_default();
            let what = "a file that several steps share is damaged on the medium; the next save writes it anew, and \
                `ashore verify` names the steps that have it";
            tracing::error!(written_by = step, bytes = len, "{what}");
        }
        Ok(())
    }

    /// The file to read, if one is due.
    fn take(&self) -> Option<(Arc<OlderFile>, u64, Digest)> {
        let mut state = lock(&self.state);
        if let Some(open) = state.open.take() {
            return Some(open);
        }
        if !std::mem::take(&mut state.due) || state.files.is_empty() {
            return None;
        }
        let number = state.next % state.files.len();
        state.next = number + 1;
        Some((state.files[number].clone(), 0, Digest::EMPTY))
    }
}
