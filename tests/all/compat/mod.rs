//! Each face against the contract of its system, method by method.

mod graph;
mod identical;
