//! Steps that share a file.

use crate::words::listed;
use crate::{out, words};
use ashore::catalog::Sharing;
use ashore::internal::storage::is_url;
use ashore::{Catalog, Result};
use std::path::Path;

/// Returns the steps beside the step at `path` that share its file `file`.
///
/// # Errors
/// When the steps cannot be determined. The function has already printed the reason.
pub fn of(path: &Path, file: &str) -> Result<Vec<Sharing>> {
    let (Some(root), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
        return Ok(Vec::new());
    };
    if is_url(path) {
        return Ok(Vec::new());
    }
    // The path of a step in the working directory has an empty parent.
    let root = if root.as_os_str().is_empty() { Path::new(".") } else { root };
    let found = Catalog::open(root).and_then(|catalog| catalog.sharing(name, file));
    found.inspect_err(|error| {
        out::complain(&format!("cannot find the steps that share {}: {}", out::printable(file), words::of(error)));
    })
}

/// Formats steps: `step 10`, `steps 10 and 30`.
pub fn numbered(steps: &[u64]) -> String {
    match steps {
        [step] => format!("step {step}"),
        _ => format!("steps {}", listed(steps)),
    }
}
