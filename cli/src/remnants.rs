//! The remains of interrupted saves.

use crate::{age, out, size};
use ashore::storage::{Remnant, State};
use serde::Serialize;

/// A remnant as JSON.
#[derive(Serialize)]
pub struct Row {
    name: String,
    /// `dead`, `undecided` or `stuck`.
    state: &'static str,
    why: String,
    bytes: u64,
    age_seconds: Option<u64>,
}

impl From<Remnant> for Row {
    fn from(remnant: Remnant) -> Self {
        let state = match remnant.state {
            State::Dead => "dead",
            State::Undecided => "undecided",
            State::Live => "live",
            _ => "stuck",
        };
        let age_seconds = remnant.age.map(|age| age.as_secs());
        Self { name: remnant.name, state, why: remnant.why, bytes: remnant.bytes, age_seconds }
    }
}

impl Row {
    /// Formats the remnant as one line.
    pub fn shown(&self) -> String {
        let age =
            self.age_seconds.map(|age| format!(", unchanged for {}", age::shown(std::time::Duration::from_secs(age))));
        let (name, why) = (out::printable(&self.name), out::printable(&self.why));
        format!("{name}  {}{}: {why}", size::shown(self.bytes), age.unwrap_or_default())
    }
}

/// Selects the remnants whose owners are not known to be alive.
pub fn not_alive(remnants: Vec<Remnant>) -> Vec<Row> {
    remnants.into_iter().filter(|remnant| remnant.state != State::Live).map(Row::from).collect()
}

/// Advice for attempts whose owners may or may not be alive.
pub const ADVICE: &str = "if their hosts are gone, delete them with: ashore prune --abandoned --older-than AGE --yes";
