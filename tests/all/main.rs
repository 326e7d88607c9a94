//! The integration tests: one binary, folders by stage, one behaviour per file.

mod alone;
mod catalog;
mod compat;
mod crash;
// Neither loads a library.
#[cfg(not(any(loom, miri)))]
mod cuda;
mod fence;
mod format;
mod heard;
// The runtimes that they use are built for neither.
#[cfg(not(any(loom, miri)))]
mod loops;
mod made;
mod restore;
mod rig;
mod saves;
mod saving;
mod sigterm;
mod state;
mod storage;
#[cfg(not(any(loom, miri)))]
mod tokio;
