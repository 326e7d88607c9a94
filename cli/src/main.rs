//! The `ashore` program.
fn main() {}
