//! The C interface of `ashore`.
//!
//! `include/ashore.h` is generated from this crate; its comments are those of the items here, and
//! `docs/c.md` is the page for users. Every function runs its body in `failure::run`, which turns an error
//! into a status and a panic into `ASHORE_INTERNAL`.
//!
//! # Safety argument
//! The program's pointers are used as the header says: a text ends with a zero byte, an array holds as many
//! elements as are stated, a result has space for its type, and null is refused where something is needed.
//! They are read within the call alone, except for the memory of tensors, for which the program promises what
//! `RawHost`, `RawDevice` and `DeviceTarget` require. Handles are never followed: they are names in a table
//! (`handles.rs`). A callback is called through a function that cannot unwind (`callbacks.rs`).
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
