//! The integration tests: one binary, folders by stage, one behaviour per file.

mod fence;
mod format;
mod rig;
mod saves;
mod saving;
mod state;
