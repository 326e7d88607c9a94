//! The C interface of `ashore`.
//!
//! `include/ashore.h` is generated from this crate, and its comments are those of the items here. `docs/c.md`
//! is the page for users. Every function runs its body in `failure::run`, which turns an error into a status
//! and a panic into `ASHORE_INTERNAL`.
//!
//! # Safety argument
//! The library uses the program's pointers as the header says: a text ends with a zero byte, an array has the
//! stated number of elements, a result has space for its type, and null is refused if something is needed.
//! The library reads the pointers only within the call, except for the memory of tensors, for which the
//! program promises what `RawHost`, `RawDevice` and `DeviceTarget` require. Handles are never dereferenced:
//! they are numbers of a table (`handles.rs`). The library calls callbacks through a function that cannot
//! unwind (`callbacks.rs`).
#![expect(non_camel_case_types, reason = "the names are those of the header")]

// In the order of the header.
mod version;

mod status;

mod failure;

mod handles;

mod tensor;

mod ranks;

mod executor;

mod save;

mod tiers;

mod checkpoint;

mod log;

// Not in the header.
mod callbacks;
mod given;

#[cfg(test)]
mod tests;
