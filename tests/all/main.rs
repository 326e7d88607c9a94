//! The integration tests: one binary, one behaviour a file.

mod format;
mod saving;
