//! The runtime that runs every request to an object store, one for each process.
//!
//! A thread that calls the storage hands a future to the runtime and sleeps until a channel returns the
//! result. If bytes go to memory that the thread borrows, it polls the future itself, in the context of this
//! runtime. So a program may call from inside a runtime of its own, or without one. **Fork.** The threads of
//! the runtime do not exist in a forked child. A call there would never return, so it is refused. **End.**
//! The runtime lives as long as the process.

use crate::error::{Error, ErrorKind, Result};
use crate::fork::ForkGuard;
use crossbeam_channel::{RecvTimeoutError, bounded};
use std::future::Future;
use std::pin::pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, Wake};
use std::thread::{self, Thread};
use std::time::Instant;
use tokio::runtime::{Builder, Runtime};
use tokio::task::AbortHandle;

/// Requests wait for the network, not for a processor, so two threads encrypt and copy for all requests.
const THREADS: usize = 2;

struct Ours {
    runtime: Runtime,
    origin: ForkGuard,
}

fn ours() -> Result<&'static Ours> {
    static OURS: OnceLock<Result<Ours>> = OnceLock::new();
    let made = OURS.get_or_init(|| {
        let runtime = Builder::new_multi_thread()
            .worker_threads(THREADS)
            .thread_name("ashore-store")
            .enable_all()
            .build()
            .map_err(|e| Error::new(ErrorKind::Busy, "cannot start the threads of object stores").with_source(e))?;
        Ok(Ours { runtime, origin: ForkGuard::new() })
    });
    let ours = made.as_ref().map_err(Error::clone)?;
    ours.origin.check(
        "an object store cannot be used in a forked child: its threads are the parent's; fork before \
        the first use, or start the child by spawn",
    )?;
    Ok(ours)
}

/// Starts `work` on the runtime and returns at once.
///
/// # Errors
/// `Invalid` in a forked child; `Busy` if the system has no more threads.
pub(super) fn start(work: impl Future<Output = ()> + Send + 'static) -> Result<AbortHandle> {
    Ok(ours()?.runtime.spawn(work).abort_handle())
}

/// Polls `work` on this thread, in the context of the runtime, until it ends. For work that fills memory that
/// the caller borrows. At the deadline it drops `work` and returns None.
///
/// # Errors
/// `Invalid` in a forked child; `Busy` if the system has no more threads.
pub(super) fn run_here<T>(deadline: Instant, work: impl Future<Output = T>) -> Result<Option<T>> {
    let _context = ours()?.runtime.enter();
    // The calling task of the program may have used up the budget of polls of its own runtime.
    let mut work = pin!(tokio::task::unconstrained(work));
    let waker = Arc::new(Unpark(thread::current())).into();
    let mut context = Context::from_waker(&waker);
    loop {
        if let Poll::Ready(result) = work.as_mut().poll(&mut context) {
            return Ok(Some(result));
        }
        let now = Instant::now();
        if now >= deadline {
            return Ok(None);
        }
        thread::park_timeout(deadline - now);
    }
}

/// Wakes a thread that polls.
struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.0.unpark();
    }
}

/// Runs `work` on the runtime, and blocks this thread until it ends. At the deadline it drops `work` and
/// returns None. Requests that were already sent may still arrive.
///
/// # Errors
/// Those of [`start`]; `Internal` when `work` panicked.
pub(super) fn run<T: Send + 'static>(
    deadline: Instant,
    work: impl Future<Output = T> + Send + 'static,
) -> Result<Option<T>> {
    let (done, ended) = bounded(1);
    let handle = start(async move {
        let _ = done.send(work.await);
    })?;
    match ended.recv_deadline(deadline) {
        Ok(result) => Ok(Some(result)),
        Err(RecvTimeoutError::Timeout) => {
            handle.abort();
            Ok(None)
        }
        Err(RecvTimeoutError::Disconnected) => Err(Error::internal("a request to an object store panicked")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(30)
    }

    #[test]
    fn a_call_from_inside_the_programs_runtime_returns() {
        let theirs = Builder::new_current_thread().build().unwrap();
        let seen = theirs.block_on(async { run(soon(), async { 7 }) });
        assert_eq!(seen.unwrap(), Some(7));
    }

    #[test]
    fn work_that_borrows_is_polled_here_from_inside_a_runtime_whose_task_may_poll_no_more() {
        let theirs = Builder::new_current_thread().enable_all().build().unwrap();
        let mut filled = [0_u32; 3];
        theirs.block_on(async {
            let work = async {
                for _ in 0..1000 {
                    tokio::time::sleep(Duration::ZERO).await;
                    tokio::task::consume_budget().await;
                }
                for number in &mut filled {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                    *number = 7;
                }
            };
            assert_eq!(run_here(soon(), work).unwrap(), Some(()));
        });
        assert_eq!(filled, [7; 3]);
        let never = std::future::pending::<()>();
        assert_eq!(run_here(Instant::now() + Duration::from_millis(20), never).unwrap(), None);
    }

    #[test]
    fn a_request_that_does_not_end_is_dropped_at_the_deadline() {
        struct Dropped(std::sync::mpsc::Sender<()>);
        impl Drop for Dropped {
            fn drop(&mut self) {
                self.0.send(()).unwrap();
            }
        }
        let (send, dropped) = std::sync::mpsc::channel();
        let kept = Dropped(send);
        let work = async move {
            let _kept = kept;
            std::future::pending::<()>().await;
        };
        assert_eq!(run(Instant::now() + Duration::from_millis(20), work).unwrap(), None);
        dropped.recv_timeout(Duration::from_secs(30)).unwrap();
    }

    #[test]
    fn a_request_that_panics_is_an_error() {
        let error = run(soon(), async { panic!("in a store") }).map(drop::<Option<()>>).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Internal);
    }
}
