//! The integration tests: one binary, folders by stage, one behaviour per file.

mod catalog;
mod compat;
mod coordinators;
mod crash;
// Neither loads a library.
#[cfg(not(any(loom, miri)))]
mod cuda;
mod fence;
mod fixtures;
mod format;
// The runtimes that they use are built for neither.
#[cfg(not(any(loom, miri)))]
mod loops;
mod ranks;
mod restore;
mod saves;
mod sigterm;
mod state;
mod storage;
#[cfg(not(any(loom, miri)))]
mod tokio;
