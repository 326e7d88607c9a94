//! The storage back ends, and the local one when calls fail, owners die and names are hostile.

mod adopting;
mod failing_calls;
mod inherited_locks;
mod links_and_devices;
mod local_conformance;
mod locking;
mod memory_conformance;
mod ordering;
mod process_conformance;
mod resuming;
mod shared;
mod sweeping;
mod transfers;
