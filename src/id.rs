//! Attempts, and the conversion of step numbers to directory names and back.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use std::borrow::Cow;
use std::fmt;
use uuid::Uuid;

/// Identity of one try to write a step. Two tries never share an identity, in any process, so bytes of
/// different tries never mix.
///
/// ```
/// use ashore::Attempt;
/// let attempt = Attempt::new();
/// assert_eq!(Attempt::parse(&attempt.to_string()), Some(attempt));
/// assert_eq!(Attempt::parse("step-1"), None);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(transparent)]
pub struct Attempt(Uuid);

impl Attempt {
    /// A new, random attempt.
    pub fn new() -> Self {
        Self(Uuid::new_v4())
    }

    /// Creates a given attempt, for programs that compare two checkpoints byte by byte.
    pub fn from_uuid(uuid: Uuid) -> Self {
        Self(uuid)
    }

    /// The bits of its UUID. The first hex digit has the highest bits.
    pub(crate) fn to_u128(self) -> u128 {
        self.0.as_u128()
    }

    /// The attempt with these bits.
    pub(crate) fn from_u128(bits: u128) -> Self {
        Self(Uuid::from_u128(bits))
    }

    /// Parses only the hyphenated lower-case form that [`fmt::Display`] writes.
    pub fn parse(text: &str) -> Option<Self> {
        let attempt = Self(Uuid::try_parse(text).ok()?);
        (attempt.to_string() == text).then_some(attempt)
    }
}

impl<'de> Deserialize<'de> for Attempt {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<'de, str>::deserialize(deserializer)?;
        Self::parse(&text).ok_or_else(|| D::Error::custom("an attempt is a hyphenated lower-case uuid"))
    }
}

/// Generates attempts without a system call for each. It counts up from a random start, so the attempts are
/// as unique as random ones.
#[derive(Debug)]
pub(crate) struct Attempts(u128);

impl Attempts {
    pub fn new() -> Self {
        Self(Uuid::new_v4().as_u128())
    }

    pub fn next(&mut self) -> Attempt {
        self.0 = self.0.wrapping_add(1);
        Attempt(uuid::Builder::from_random_bytes(self.0.to_be_bytes()).into_uuid())
    }
}

impl Default for Attempt {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0.as_hyphenated(), f)
    }
}

impl fmt::Debug for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The directory name of a step: `step-00000100`. Steps sort by number, never by name.
pub fn step_name(step: u64) -> String {
    format!("step-{step:08}")
}

/// Parses the step of a directory name: `step-N`, `step_N`, `checkpoint-N`, `ckpt-N`, `iter_N` or `N`, with
/// or without leading zeros.
pub fn parse_step_name(name: &str) -> Option<u64> {
    let digits = ["step-", "step_", "checkpoint-", "ckpt-", "iter_"]
        .iter()
        .find_map(|prefix| name.strip_prefix(prefix))
        .unwrap_or(name);
    let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    if plain { digits.parse().ok() } else { None }
}

/// The end of the name of a full version that stands beside a delta of the same number.
const FULL: &str = ".full";

/// The directory name of a version of a chain: `v-00000042`; with `beside`, the name of a full beside a
/// delta.
pub fn version_name(number: u64, beside: bool) -> String {
    format!("v-{number:08}{}", if beside { FULL } else { "" })
}

/// Parses the number of a version from the name of its directory, and whether it is a full beside a delta.
pub fn parse_version_name(name: &str) -> Option<(u64, bool)> {
    let (version, beside) = name.strip_suffix(FULL).map_or((name, false), |version| (version, true));
    let number = version.strip_prefix("v-")?.parse().ok()?;
    (version_name(number, beside) == name).then_some((number, beside))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_names_round_trip_and_are_not_those_of_steps() {
        for (number, beside) in [(0, false), (42, false), (42, true), (u64::MAX, true)] {
            let name = version_name(number, beside);
            assert_eq!(parse_version_name(&name), Some((number, beside)));
            assert_eq!(parse_step_name(&name), None);
        }
        for name in ["v-42", "v-", "v-00000042.", "v-00000042.full.full", "v-+0000042", "step-00000042"] {
            assert_eq!(parse_version_name(name), None, "{name}");
        }
    }

    #[test]
    fn step_names_round_trip_and_foreign_names_are_refused() {
        for step in [0, 1, 100, 99_999_999, 100_000_000, u64::MAX] {
            assert_eq!(parse_step_name(&step_name(step)), Some(step));
        }
        for name in ["ckpt-7", "7", "0007", "step_7", "step-7", "checkpoint-7", "iter_0000007"] {
            assert_eq!(parse_step_name(name), Some(7), "{name}");
        }
        for name in ["", "step-", "step-+7", "step-7a", ".step-7", "latest", "-7", "step-18446744073709551616"] {
            assert_eq!(parse_step_name(name), None, "{name}");
        }
    }
}
