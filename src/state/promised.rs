//! A tensor that another component still stages. It is planned at `save`, and read once it is delivered.
//!
//! # Safety argument
//! [`Promised`] forwards to the source that fulfilled it, and owns that source for the rest of its life. So
//! the promises of that source hold for it. Before the delivery it is not ready, and passes no pointer.
#![expect(unsafe_code, reason = "a source that forwards to another; argument above")]

use super::dtype::Layout;
use super::source::{MemoryLocation, Source};
use crate::error::{Error, ErrorKind, Result};
use crate::sync::{Mutex, lock};
use std::ops::Range;
use std::sync::{Arc, OnceLock};
use std::task::{Poll, Waker};

/// Creates a promise to deliver a tensor of `layout`, and the source to save in its place.
///
/// ```
/// use ashore::{CheckpointExecutor, Dtype, Layout, StateDict, promise};
/// # let dir = tempfile::tempdir().unwrap();
/// let executor = CheckpointExecutor::builder(dir.path()).arena(16 << 20).chunk(1 << 20).build()?;
/// let (promise, promised) = promise(Layout::new(Dtype::F32, [4]));
/// let mut state = StateDict::new();
/// state.tensor("weights", promised)?;
/// let save = executor.save(1, state)?; // waits for the tensor, until the save deadline
/// promise.fulfil(vec![0.5_f32; 4])?;
/// save.wait(std::time::Duration::from_secs(60))?;
/// # Ok::<(), ashore::Error>(())
/// ```
pub fn promise(layout: Layout) -> (Promise, Promised) {
    let shared = Arc::new(Inner { layout, came: OnceLock::new(), waker: Mutex::new(None) });
    (Promise(Some(shared.clone())), Promised(shared))
}

/// The delivering end of a [`promise`]. Dropping it breaks the promise and fails the save.
#[derive(Debug)]
#[must_use = "a promise that is dropped fails the save"]
pub struct Promise(Option<Arc<Inner>>);

/// The source of a [promised](promise) tensor. Later saves wait for a save that waits for this tensor.
#[derive(Debug)]
pub struct Promised(Arc<Inner>);

struct Inner {
    layout: Layout,
    came: OnceLock<Result<Box<dyn Source>>>,
    waker: Mutex<Option<Waker>>,
}

impl Inner {
    fn come(&self, what: Result<Box<dyn Source>>) {
        if self.came.set(what).is_err() {
            return;
        }
        // The waker is woken, cloned and dropped without the lock, because it may poll at once.
        let waker = lock(&self.waker).take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {:?} came={}", self.layout.dtype, &self.layout.shape[..], self.came.get().is_some())
    }
}

impl Promise {
    /// Delivers the tensor.
    ///
    /// # Errors
    /// `Invalid` for another dtype, shape or length than promised, for elements that are not packed, or for
    /// memory that the program may write while the source exists. The save fails with the same error.
    pub fn fulfil(mut self, source: impl Source + 'static) -> Result<()> {
        let Some(inner) = self.0.take() else { return Ok(()) };
        let (layout, location) = (source.layout(), source.location());
        let sound = layout == inner.layout && layout.bytes().is_ok_and(|bytes| bytes == location.bytes());
        let what = match location {
            _ if sound && source.strides().is_some() => "a staged tensor must be packed".to_owned(),
            MemoryLocation::Host { writable: false, .. } if sound => {
                inner.come(Ok(Box::new(source)));
                return Ok(());
            }
            _ if sound => "a staged tensor must not be writable while it is held".to_owned(),
            _ => format!(
                "a staged tensor is not what was promised promised={inner:?} dtype={} shape={:?} bytes={}",
                layout.dtype,
                &layout.shape[..],
                location.bytes()
            ),
        };
        let error = Error::invalid(what);
        inner.come(Err(error.clone()));
        Err(error)
    }

    /// Breaks the promise: the save fails with `why`.
    pub fn fail(mut self, why: Error) {
        if let Some(inner) = self.0.take() {
            inner.come(Err(why));
        }
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        if let Some(inner) = self.0.take() {
            inner.come(Err(Error::new(ErrorKind::Cancelled, "a promised tensor was dropped before its delivery")));
        }
    }
}

// SAFETY: the module's safety argument.
unsafe impl Source for Promised {
    fn layout(&self) -> Layout {
        self.0.layout.clone()
    }

    fn location(&self) -> MemoryLocation {
        MemoryLocation::Host { bytes: self.0.layout.bytes().unwrap_or(u64::MAX), writable: false }
    }

    fn read(&self, copy: &mut dyn FnMut(*const u8)) {
        if let Some(Ok(source)) = self.0.came.get() {
            source.read(copy);
        }
    }

    fn poll_ready(&self, bytes: Range<u64>, waker: &Waker) -> Poll<Result<()>> {
        if self.0.came.get().is_none() {
            // The waker is stored before the second check, so that a delivery in between finds it.
            let waker = Some(waker.clone());
            let before = std::mem::replace(&mut *lock(&self.0.waker), waker);
            drop(before);
        }
        match self.0.came.get() {
            None => Poll::Pending,
            Some(Ok(source)) => source.poll_ready(bytes, waker),
            Some(Err(error)) => Poll::Ready(Err(error.clone())),
        }
    }
}
