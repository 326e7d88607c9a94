//! A directory for measurements, and the end of measuring when the program is interrupted.

use ashore::{Error, ErrorKind, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A directory that is deleted on drop.
pub struct Place(PathBuf);

impl Place {
    /// Makes a directory in `parent` for the verb `what`.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn new(parent: &Path, what: &str) -> Result<Self> {
        let path = parent.join(format!("ashore-{what}-{}", std::process::id()));
        std::fs::create_dir_all(&path)
            .map_err(|e| Error::io("cannot create a directory to measure in", e).with_path(&path))?;
        Ok(Self(path))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Tells whether SIGINT, SIGTERM or SIGHUP has arrived since [`Interrupt::watch`]. A second signal ends the
/// program at once.
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Takes the signals over.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn watch() -> Result<Self> {
        let seen = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            // The order matters: the first signal must not find the flag that it sets already set.
            flag::register_conditional_default(signal, seen.clone())
                .and_then(|_| flag::register(signal, seen.clone()))
                .map_err(|e| Error::io("cannot watch for interrupts", e))?;
        }
        Ok(Self(seen))
    }

    /// # Errors
    /// `Cancelled` after a signal.
    pub fn check(&self) -> Result<()> {
        if self.0.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::Cancelled, "interrupted: what was written has been deleted"));
        }
        Ok(())
    }
}
