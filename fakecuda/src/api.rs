//! The exported functions, by what they are about.

mod copy;
mod device;
mod event;
mod graph;
mod memory;
mod module;
mod pointer;
mod stream;
