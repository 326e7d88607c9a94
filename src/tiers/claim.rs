//! Claims: each tier belongs to one executor of this process.
//!
//! A second take-over would end the promotions of the first executor. Where a program's own storage lies is
//! not known: the same object is refused, and for different objects the sessions of the tier decide.

use super::Root;
use crate::error::{Error, Result};
use crate::storage;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// The claimed places, each with the process that claimed it: a child process inherits the list, but no
/// executor.
static CLAIMED: Mutex<Vec<(u32, Place)>> = Mutex::new(Vec::new());

/// The identity of a tier, by which it differs from others.
#[derive(Clone, Debug, PartialEq)]
enum Place {
    /// A tier at a path or a URL.
    Named(PathBuf),
    /// The address of a program's own storage, which the tier keeps alive as long as its claim.
    Object(usize),
}

/// The claim of one executor on a tier; dropping it ends the claim.
#[derive(Debug)]
pub(super) struct Claim(u32, Place);

impl Claim {
    /// Claims the tier at `root`.
    ///
    /// # Errors
    /// `Invalid` if another executor of this process has it, or `root` is a URL that cannot be used.
    pub fn of(root: &Root) -> Result<Self> {
        let place = match root {
            Root::At(root) => Place::Named(storage::identity(Path::new(root))?),
            Root::Over(storage) => Place::Object(Arc::as_ptr(storage).addr()),
        };
        let claim = (std::process::id(), place);
        let mut claimed = CLAIMED.lock().unwrap_or_else(PoisonError::into_inner);
        if claimed.contains(&claim) {
            let why = "another executor of this process has the tier, and only one executor may have it: shut that one \
                       down first, or give each its own tier by `Builder::tier`; ASHORE_TIER serves one executor";
            return Err(Error::invalid(why).with_path(root.place()));
        }
        claimed.push(claim.clone());
        Ok(Self(claim.0, claim.1))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut claimed = CLAIMED.lock().unwrap_or_else(PoisonError::into_inner);
        claimed.retain(|(process, place)| (*process, place) != (self.0, &self.1));
    }
}
