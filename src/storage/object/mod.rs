//! Storage in an object store.

mod client;
mod errors;
mod file;
mod reading;
mod runtime;
