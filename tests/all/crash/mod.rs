//! The machine loses power at any moment: what is listed afterwards is whole, what was reported durable is
//! there.
//!
//! The code under test runs on a simulated file system below everything that decides about durability.
//! Expectations do not come from the code under test: the bytes follow from the number of the try, and the
//! programs log each acknowledgement.

mod adopting;
mod executor;
mod expected;
mod explore;
mod ranks;
mod storage;
