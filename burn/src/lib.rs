#![doc = include_str!("../../docs/burn.md")]

mod dtype;
#[cfg(feature = "learner")]
mod epochs;
mod record;
mod training;

#[cfg(feature = "learner")]
pub use epochs::Epochs;
pub use record::{Record, put, record};
pub use training::Training;

/// The engine, in the version that this crate was built with.
pub use ashore;

/// An error that the caller caused.
fn invalid(message: impl Into<String>) -> ashore::Error {
    ashore::Error::new(ashore::ErrorKind::Invalid, message)
}
