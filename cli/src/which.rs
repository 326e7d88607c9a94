//! Which checkpoint an argument means: `STEP`, `PATH`, or `DIR STEP`.

use crate::{Common, words};
use ashore::id::parse_step_name;
use ashore::internal::format::entries::MANIFEST;
use ashore::internal::storage::is_url;
use ashore::{Catalog, Checkpoint, Error, ErrorKind, Result};
use std::path::{Path, PathBuf};

/// Names a checkpoint: all digits are a step of `--dir`, anything else is a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Which {
    Step(u64),
    Path(PathBuf),
    /// A step of a directory.
    In(PathBuf, u64),
}

impl std::str::FromStr for Which {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(step(text).map_or_else(|| Self::Path(text.into()), Self::Step))
    }
}

/// What a [`Which`] resolves to.
pub enum Meant {
    One(Box<Checkpoint>),
    /// A directory of checkpoints.
    Directory(PathBuf),
}

impl Which {
    /// Parses `[STEP|PATH]` or `DIR STEP`.
    ///
    /// # Errors
    /// `Invalid` for anything else.
    pub fn of(arguments: &[String]) -> Result<Option<Self>> {
        match arguments {
            [] => Ok(None),
            [one] => Ok(Some(one.parse().unwrap_or_else(|never| match never {}))),
            [dir, number] => {
                let number = step(number).or_else(|| parse_step_name(number)).ok_or_else(|| {
                    let what = format!("after a directory comes the number of a step, not {number:?}");
                    Error::new(ErrorKind::Invalid, what)
                })?;
                Ok(Some(Self::In(dir.into(), number)))
            }
            _ => Err(Error::new(ErrorKind::Invalid, "give a step, a path, or a directory and a step")),
        }
    }

    /// Opens the checkpoint, or finds the directory of checkpoints.
    pub fn find(which: Option<&Self>, common: &Common) -> Result<Meant> {
        let one = |checkpoint| Ok(Meant::One(Box::new(checkpoint)));
        match which {
            None => Ok(Meant::Directory(common.root())),
            Some(Self::Step(step)) => one(common.catalog(&common.root())?.checkpoint(*step)?),
            Some(Self::In(dir, step)) => one(common.catalog(&common.root_at(Some(dir))?)?.checkpoint(*step)?),
            Some(Self::Path(path)) if is_checkpoint(path) => one(Checkpoint::open(path)?),
            Some(Self::Path(path)) => Ok(Meant::Directory(common.root_at(Some(path))?)),
        }
    }

    /// Finds the catalog and the number of a single step, even if the step cannot be opened.
    ///
    /// # Errors
    /// `Invalid` when no step is named.
    pub fn step(which: Option<&Self>, common: &Common) -> Result<(Catalog, u64)> {
        let none = || Error::new(ErrorKind::Invalid, "name the step: STEP, the path of a step, or DIR STEP");
        match which {
            Some(Self::Step(step)) => Ok((common.catalog(&common.root())?, *step)),
            Some(Self::In(dir, step)) => Ok((common.catalog(&common.root_at(Some(dir))?)?, *step)),
            Some(Self::Path(path)) => {
                let found = if is_url(path) { Ok(path.clone()) } else { path.canonicalize() };
                let path = found.map_err(|e| Error::io("cannot find the step", e).with_path(path))?;
                let name = path.file_name().and_then(|name| name.to_str());
                let (Some(step), Some(root)) = (name.and_then(parse_step_name), path.parent()) else {
                    return Err(none().with_path(path));
                };
                Ok((common.catalog(root)?, step))
            }
            None => Err(none()),
        }
    }
}

fn step(text: &str) -> Option<u64> {
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

/// Returns the step in the name of a directory.
pub fn step_of(dir: &Path) -> Option<u64> {
    dir.file_name().and_then(|name| name.to_str()).and_then(parse_step_name)
}

/// True for a directory with a manifest or the name of a step.
pub fn is_checkpoint(path: &Path) -> bool {
    step_of(path).is_some() || path.join(MANIFEST).symlink_metadata().is_ok()
}

/// Opens the newest checkpoint of a directory. If that fails, it opens no older checkpoint.
pub fn newest(common: &Common, root: &Path) -> Result<Checkpoint> {
    let catalog = common.catalog(root)?;
    let (entries, problems) = catalog.survey()?;
    let whole = entries.last().map(|entry| entry.step);
    if let Some(newer) = problems.last().filter(|problem| Some(problem.step) > whole) {
        let (step, what) = (newer.step, words::message(newer.error.message()));
        let older = whole.map_or_else(String::new, |step| format!("; step {step} is the newest that is complete"));
        let what = format!("the newest step, {step}, cannot be shown: {what}{older}");
        return Err(Error::new(newer.error.kind(), what).with_path(&newer.path));
    }
    let none = || Error::new(ErrorKind::NotFound, "there is no checkpoint").with_path(root);
    whole.map_or_else(|| Err(none()), |step| catalog.checkpoint(step))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_a_step_and_all_else_a_path() {
        for (text, which) in [
            ("120", Which::Step(120)),
            ("00000120", Which::Step(120)),
            ("./120", Which::Path("./120".into())),
            ("+7", Which::Path("+7".into())),
            ("s3://bucket/runs/step-7", Which::Path("s3://bucket/runs/step-7".into())),
            ("runs/step-00000120", Which::Path("runs/step-00000120".into())),
            ("99999999999999999999999", Which::Path("99999999999999999999999".into())),
        ] {
            assert_eq!(text.parse(), Ok(which), "{text}");
        }
    }

    #[test]
    fn a_directory_and_a_step_are_a_step_of_the_directory() {
        let of = |arguments: &[&str]| Which::of(&arguments.iter().map(|a| (*a).to_owned()).collect::<Vec<_>>());
        assert_eq!(of(&["runs/a", "120"]).unwrap(), Some(Which::In("runs/a".into(), 120)));
        assert_eq!(of(&["runs/a", "step-00000120"]).unwrap(), Some(Which::In("runs/a".into(), 120)));
        assert_eq!(of(&[]).unwrap(), None);
        assert!(of(&["runs/a", "newest"]).is_err() && of(&["a", "1", "2"]).is_err());
    }
}
