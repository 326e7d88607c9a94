//! The names in a root: steps, names that this library cleans up, and reserved names.
//!
//! ```text
//! step-00000100                    a step
//! .step-00000100.<attempt>.tmp     an attempt, or what an overwrite displaced
//! .step-00000100.<attempt>.claimed an attempt of several ranks, which no veto reaches any more
//! .step-00000100.<attempt>.owner   its owner record; locked while the owner lives
//! .trash-<attempt>                 being deleted; any process may finish
//! .ranks/session-00000003/         a session of several ranks: its record, and notes of its ranks
//! .marks.json                      marks of steps
//! latest                           the hint
//! ```

use crate::id::Attempt;
use crate::storage::name::is_component;

/// The name of the hint before its rename.
pub(super) const LATEST_NEW: &str = ".latest.new";
/// The marks of steps.
pub(super) const MARKS: &str = ".marks.json";
/// The name of the marks before the rename.
pub(super) const MARKS_NEW: &str = ".marks.json.new";
const TEMP: &str = ".tmp";
const CLAIMED: &str = ".claimed";
const OWNER: &str = ".owner";
const TRASH: &str = ".trash-";
/// The directory of sessions.
pub(super) const RANKS: &str = ".ranks";
const SESSION: &str = "session-";

pub(super) fn temp(step: &str, attempt: Attempt) -> String {
    format!(".{step}.{attempt}{TEMP}")
}

/// The name of an attempt of several ranks once rank 0 has claimed it.
pub(super) fn claimed(step: &str, attempt: Attempt) -> String {
    format!(".{step}.{attempt}{CLAIMED}")
}

/// The directory of a session in [`RANKS`].
pub(super) fn session(generation: u64) -> String {
    format!("{SESSION}{generation:08}")
}

/// Parses the generation from the name of a session's directory.
pub(super) fn parse_session(name: &str) -> Option<u64> {
    let generation = name.strip_prefix(SESSION)?.parse().ok()?;
    (session(generation) == name).then_some(generation)
}

pub(super) fn owner(step: &str, attempt: Attempt) -> String {
    format!(".{step}.{attempt}{OWNER}")
}

pub(super) fn trash(attempt: Attempt) -> String {
    format!("{TRASH}{attempt}")
}

pub(super) fn is_trash(name: &str) -> bool {
    name.starts_with(TRASH)
}

/// Parses step and attempt from the name of an attempt's directory, claimed or not.
pub(super) fn parse_temp(name: &str) -> Option<(&str, Attempt)> {
    parse(name.strip_suffix(TEMP).or_else(|| name.strip_suffix(CLAIMED))?)
}

/// Parses step and attempt from the name of an owner record.
pub(super) fn parse_owner(name: &str) -> Option<(&str, Attempt)> {
    parse(name.strip_suffix(OWNER)?)
}

fn parse(name: &str) -> Option<(&str, Attempt)> {
    let (step, attempt) = name.strip_prefix('.')?.rsplit_once('.')?;
    is_component(step).then_some((step, Attempt::parse(attempt)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_attempts_are_told_apart_and_foreign_ones_are_left_alone() {
        let attempt = Attempt::new();
        for step in ["step-00000100", "a.b", "7"] {
            assert_eq!(parse_temp(&temp(step, attempt)), Some((step, attempt)));
            assert_eq!(parse_temp(&claimed(step, attempt)), Some((step, attempt)));
            assert_eq!(parse_owner(&owner(step, attempt)), Some((step, attempt)));
            assert_eq!(parse_owner(&temp(step, attempt)), None);
        }
        assert!(is_trash(&trash(attempt)));
        assert_eq!(parse_session(&session(7)), Some(7));
        for name in ["session-7", "session-", "session-+0000007", "session-00000007.tmp"] {
            assert_eq!(parse_session(name), None, "{name}");
        }
        for name in [".tmp", ".a.tmp", "..tmp", ".step-1.123.tmp", ".vimrc", "x.owner", ".owner"] {
            assert_eq!(parse_temp(name).or(parse_owner(name)), None, "{name}");
        }
    }
}
