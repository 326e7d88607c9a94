//! Opens the storage that a path or a URL names.

use super::Storage;
use super::local::Local;
use super::url::{Place, Url};
use crate::error::Result;
use crate::settings::Settings;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Opens the root at `root`: a path, or a URL such as `s3://bucket/prefix`, `gs://bucket/prefix`,
/// `az://container/prefix` or `file:///directory`. A missing directory is created.
///
/// Credentials of stores come from the environment, a web identity, a container or the machine's metadata.
///
/// ```
/// use ashore::Catalog;
/// # let root = tempfile::tempdir().unwrap();
/// let url = format!("file://{}/runs/a", root.path().display());
/// assert!(Catalog::over(ashore::storage::open(&url)?).latest()?.is_none());
/// assert!(ashore::storage::open("s4://bucket/runs/a").is_err());
/// # Ok::<(), ashore::Error>(())
/// ```
///
/// # Errors
/// `Invalid` for a URL that cannot be used, or for a kind of store that this build does not include; errors
/// of the file system.
pub fn open(root: impl AsRef<Path>) -> Result<Arc<dyn Storage>> {
    open_with(root.as_ref(), &Settings::default())
}

/// Opens the root at `root` for reading. As [`open`], but creates nothing.
///
/// # Errors
/// `NotFound` when there is no such directory, or nothing was ever saved under the URL; else as [`open`].
pub fn at(root: impl AsRef<Path>) -> Result<Arc<dyn Storage>> {
    match Place::of(root.as_ref())? {
        Place::Directory(path) => Ok(Arc::new(Local::at(path)?)),
        Place::Store(url) => existing(&url),
    }
}

/// Opens the root at `root` with those settings that apply to directories.
pub(crate) fn open_with(root: &Path, settings: &Settings) -> Result<Arc<dyn Storage>> {
    match Place::of(root)? {
        Place::Directory(path) => {
            let local = Local::open_with(path, settings.engine)?;
            Ok(Arc::new(local.direct(settings.direct).locks(settings.locks)))
        }
        Place::Store(url) => store(&url),
    }
}

/// The identity of the root at `root`. Two names of one directory or URL have the same identity, as far as
/// links can be resolved.
///
/// # Errors
/// `Invalid` for a URL that cannot be used.
pub(crate) fn identity(root: &Path) -> Result<PathBuf> {
    let path = match Place::of(root)? {
        Place::Directory(path) => std::path::absolute(&path).unwrap_or(path),
        Place::Store(url) => return Ok(url.to_string().into()),
    };
    // The directory itself may not exist yet.
    let resolved = path.ancestors().find_map(|above| {
        let rest = path.strip_prefix(above).ok()?;
        above.canonicalize().ok().map(|above| above.components().chain(rest.components()).collect())
    });
    Ok(resolved.unwrap_or(path))
}

#[cfg(feature = "object-store")]
fn store(url: &Url) -> Result<Arc<dyn Storage>> {
    Ok(Arc::new(super::ObjectStore::open(&url.to_string())?))
}

#[cfg(feature = "object-store")]
fn existing(url: &Url) -> Result<Arc<dyn Storage>> {
    let store = super::ObjectStore::open(&url.to_string())?;
    if store.exists()? {
        return Ok(Arc::new(store));
    }
    let why = "no step was ever saved under this URL: check bucket and prefix";
    Err(crate::Error::new(crate::ErrorKind::NotFound, why).with_path(url.to_string()))
}

#[cfg(not(feature = "object-store"))]
fn store(url: &Url) -> Result<Arc<dyn Storage>> {
    let feature = match &*url.scheme {
        "gs" => "gcs",
        "az" => "azure",
        _ => "s3",
    };
    let why = format!("this build has no object stores: build `ashore` with the feature `{feature}`");
    Err(crate::Error::invalid(why).with_path(url.to_string()))
}

#[cfg(not(feature = "object-store"))]
use store as existing;
