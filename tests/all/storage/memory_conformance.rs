//! The storage in host memory does what every storage must.

use ashore::storage::Memory;
use ashore::testing::conformance;
use std::sync::Arc;

#[test]
fn in_memory() {
    conformance::run(|| Arc::new(Memory::new()));
}
