//! Maps a path of another system to what this engine saves there: a step of the root, a checkpoint beside the
//! steps, or a directory outside of the root.

use crate::error::{Error, Result};
use crate::executor::CheckpointExecutor;
use crate::id::parse_step_name;
use crate::save::SaveOptions;
use crate::storage::StepPlace;
use std::path::{Path, PathBuf, absolute};

/// A path of another system.
#[derive(Clone, Debug)]
pub(crate) struct CheckpointPath {
    /// The step: the number at the end of the name, or 0.
    pub step: u64,
    /// The directory of the checkpoint.
    pub path: PathBuf,
    /// Its name in the root of the executor; None outside of the root.
    name: Option<String>,
}

impl CheckpointPath {
    /// Finds what a save by `executor` to `path` writes.
    ///
    /// # Errors
    /// `Invalid`: the path has no name, or several ranks save and the path is outside of their root.
    pub fn of(executor: &CheckpointExecutor, path: &Path) -> Result<Self> {
        let plain = match StepPlace::of(path)? {
            StepPlace::Directory(plain) => plain,
            StepPlace::Store(..) => path.to_owned(),
        };
        let path = plain.as_path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
            let why = "the path of a checkpoint must end in a UTF-8 name, such as step-100";
            return Err(Error::invalid(why).with_path(path));
        };
        let number = || name.rsplit(|c: char| !c.is_ascii_digit()).next().and_then(|digits| digits.parse().ok());
        let step = parse_step_name(name).or_else(number).unwrap_or(0);
        let in_root = executor.storage().describe(name);
        let same = |a: &Path, b: &Path| a == b || matches!((absolute(a), absolute(b)), (Ok(a), Ok(b)) if a == b);
        let canonical = |a: &Path, b: &Path| matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b);
        Ok(match (path.parent().filter(|parent| !parent.as_os_str().is_empty()), in_root.parent()) {
            (Some(parent), Some(root)) if !same(parent, root) && !canonical(parent, root) => {
                if executor.member().is_some() {
                    let why =
                        format!("a checkpoint of several ranks must be in the root of its executor root={root:?}");
                    return Err(Error::invalid(why).with_path(path));
                }
                Self { step, path: path.to_owned(), name: None }
            }
            _ => Self { step, path: in_root, name: Some(name.to_owned()) },
        })
    }

    /// Returns `options` for a save to this path.
    pub fn options(&self, options: SaveOptions) -> SaveOptions {
        match &self.name {
            Some(name) => options.name(name),
            None => options.directory(&self.path),
        }
    }
}
