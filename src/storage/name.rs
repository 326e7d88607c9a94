//! Rules for the names of steps and their files, in every back end.

use crate::error::{Error, Result};

/// The hint; never a step.
pub(super) const LATEST: &str = "latest";

/// Returns true for a name that cannot lead out of its directory.
pub(super) fn is_component(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && !name.contains(['/', '\\', '\0'])
}

/// Refuses step names that leave the root, are hidden, or are reserved.
pub(super) fn check_step(name: &str) -> Result<()> {
    if is_component(name) && !name.starts_with('.') && name != LATEST {
        return Ok(());
    }
    Err(Error::invalid(format!("a step's name is one path component, not hidden and not `{LATEST}` name={name:?}")))
}

/// Refuses, as corrupt, a file name that would leave its step.
pub(super) fn check_file(name: &str) -> Result<()> {
    if is_component(name) { Ok(()) } else { Err(Error::corrupt(format!("not a plain file name name={name:?}"))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_names_are_refused() {
        for name in ["", ".", "..", "../x", "/x", "a/b", "a\\b", ".hidden", "a\0", LATEST] {
            assert!(check_step(name).is_err(), "{name}");
        }
        assert!(check_step("step-1").is_ok());
        assert!(check_file(".hidden").is_ok() && check_file("../x").is_err());
    }
}
