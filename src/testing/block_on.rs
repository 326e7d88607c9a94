//! The smallest future executor: one future, one thread.

use crate::completion::{self, deadline_after};
use std::future::Future;
use std::time::Duration;

/// Runs `future` on this thread, which sleeps while it waits.
///
/// # Panics
/// After a hundred years.
pub fn block_on<F: Future>(future: F) -> F::Output {
    completion::block_on(future, deadline_after(Duration::MAX)).expect("a future that ends")
}
