//! Maps a path of another system to a step and a directory of this engine.

use crate::error::{Error, Result};
use crate::executor::CheckpointExecutor;
use crate::id::parse_step_name;
use std::path::{Path, PathBuf, absolute};

/// Returns the step that a path in the root of `executor` names, and its directory. A name that is not a
/// step's belongs to a checkpoint beside the steps; its step is the number at its end, or 0.
///
/// # Errors
/// `Invalid`: the path has no name, or is not in the root.
pub(crate) fn checkpoint_path(executor: &CheckpointExecutor, path: &Path) -> Result<(u64, PathBuf)> {
    let refuse = |why: &str| Error::invalid(why).with_path(path);
    let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
        return Err(refuse("the path of a checkpoint must end in a UTF-8 name, such as step-100"));
    };
    let number = || name.rsplit(|c: char| !c.is_ascii_digit()).next().and_then(|digits| digits.parse().ok());
    let step = parse_step_name(name).or_else(number).unwrap_or(0);
    let checkpoint_path = executor.storage().describe(name);
    let same = |a: &Path, b: &Path| a == b || matches!((absolute(a), absolute(b)), (Ok(a), Ok(b)) if a == b);
    let canonical = |a: &Path, b: &Path| matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b);
    match (path.parent().filter(|parent| !parent.as_os_str().is_empty()), checkpoint_path.parent()) {
        (Some(parent), Some(root)) if !same(parent, root) && !canonical(parent, root) => {
            Err(refuse(&format!("a checkpoint must be in the root of its executor root={root:?}")))
        }
        _ => Ok((step, checkpoint_path)),
    }
}
