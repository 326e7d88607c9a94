//! The exported functions, by topic.

mod copy;
mod device;
mod event;
mod graph;
mod memory;
mod module;
mod pointer;
mod stream;
