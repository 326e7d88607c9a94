//! Reads shared files back: one after each save, at half the speed of the medium.

use crate::digest::Digest;
use crate::error::Result;
use crate::memory::AlignedBuffer;
use crate::sync::{Mutex, lock};
use crate::writer::OlderFile;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// The number of bytes per read.
const PIECE: usize = 8 << 20;
/// The longest pause between reads. A shutdown waits at most for one pause and one read.
const LONGEST_PAUSE: Duration = Duration::from_millis(200);

/// The shared file that is read back, and the progress of that.
#[derive(Debug, Default)]
pub(super) struct Scrub {
    state: Mutex<State>,
    closed: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    /// The shared files of the last durable step.
    files: Vec<Arc<OlderFile>>,
    /// The number of the next file to read.
    next: usize,
    /// The file that is being read, the offset, and the digest of the bytes before that offset.
    open: Option<(Arc<OlderFile>, u64, Digest)>,
    /// Whether a save has become durable since the last file was chosen.
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

    /// Ends the present run and all later ones, and closes the files.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
        let mut state = lock(&self.state);
        (state.files, state.open) = (Vec::new(), None);
    }

    /// Reads on from the last position. Returns when a whole file has been read, when `stop` returns true, or
    /// after [`Scrub::close`]. The next call continues. A file whose bytes differ from what was written is
    /// not shared any more.
    ///
    /// # Errors
    /// When the file cannot be read. The file is not shared any more then.
    pub fn run(&self, stop: impl Fn() -> bool) -> Result<()> {
        let Some((file, mut at, mut digest)) = self.take() else { return Ok(()) };
        let len = file.reading.len();
        let mut piece = AlignedBuffer::new(PIECE);
        while at < len {
            let began = Instant::now();
            let now = &mut piece[..PIECE.min((len - at) as usize)];
            file.reading.drop_cached();
            // A file that cannot be read is not shared any more, either: that costs one write.
            file.reading.read_at(at, now).inspect_err(|_| file.damaged.store(true, Ordering::Release))?;
            digest = digest.then(Digest::of(now), now.len() as u64);
            at += now.len() as u64;
            // This check comes after a piece: saves without a pause between them must not stop the progress.
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

    /// Returns the file to read, if one is due.
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
