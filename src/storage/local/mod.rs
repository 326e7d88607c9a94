//! Storage in a directory of a local or mounted file system.

pub mod sys;
