#![doc = include_str!("../../docs/candle.md")]

mod adamw;
#[cfg(feature = "cuda")]
mod cuda;
mod dtype;
mod fenced;
mod tensor;
mod vars;

pub use adamw::AdamW;
pub use fenced::Fenced;
pub use tensor::{CandleTensor, read_tensor};
pub use vars::{Unmatched, Vars};

/// The engine, in the version that this crate was built with.
pub use ashore;

use ashore::{Error, ErrorKind};

/// An error that the caller caused.
fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Invalid, message)
}

/// An error that candle returned while `what` was attempted.
fn from_candle(what: impl std::fmt::Display, error: candle_core::Error) -> Error {
    invalid(what.to_string()).with_source(error)
}
