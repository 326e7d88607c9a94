//! Reads 4 bytes back during a save, as `loss.item()` does, on a separate stream.

use crate::gpu::{Gpu, Pinned, Stream, allocate};
use ashore::{Error, ErrorKind, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const PAUSE: Duration = Duration::from_micros(500);

/// When a read was requested, and how many seconds it took.
pub type Reading = (Instant, f64);

/// Reads repeatedly while `during` runs.
///
/// # Errors
/// Those of `during`, and `Device`.
pub fn watch<R>(gpu: &Arc<Gpu>, during: impl FnOnce() -> Result<R>) -> Result<(R, Vec<Reading>)> {
    /// Ends the thread even if `during` panics.
    struct End<'a>(&'a AtomicBool);
    impl Drop for End<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| read(gpu, &over));
        let end = End(&over);
        let result = during();
        drop(end);
        let readings = reader.join().map_err(|_| Error::new(ErrorKind::Internal, "the reader panicked"))?;
        Ok((result?, readings?))
    })
}

fn read(gpu: &Arc<Gpu>, over: &AtomicBool) -> Result<Vec<Reading>> {
    let (stream, mut readings) = (Stream::new(gpu)?, Vec::new());
    let (number, mut pinned) = (allocate(&stream, 4)?, Pinned::allocated(&stream, 4)?);
    stream.zero(&number)?;
    while !over.load(Ordering::Relaxed) {
        let began = Instant::now();
        pinned.fetch(0, &number)?;
        pinned.bytes()?;
        readings.push((began, began.elapsed().as_secs_f64()));
        std::thread::sleep(PAUSE);
    }
    Ok(readings)
}
