//! Errors for people: `key=value` becomes words, and the step comes first.

use crate::{out, size};
use ashore::Error;
use std::error::Error as _;
use std::fmt::Write;

/// Formats an error and its causes in words:
/// `step 190: its digest does not fit (4.4 kB), in run/manifest.json`.
pub fn of(error: &Error) -> String {
    let mut text = String::new();
    if let Some(step) = error.step() {
        let _ = write!(text, "step {step}: ");
    }
    text += &message(error.message());
    match error.ranks() {
        [] => {}
        [rank] => drop(write!(text, ", on rank {rank}")),
        ranks => drop(write!(text, ", on ranks {}", listed(ranks))),
    }
    if let Some(path) = error.path() {
        let _ = write!(text, ", in {}", path.display());
    }
    let mut cause = error.source();
    while let Some(source) = cause {
        match source.downcast_ref::<Error>() {
            Some(inner) => {
                // The text names the path and the step only once.
                let _ = write!(text, ": {}", message(inner.message()));
            }
            None => drop(write!(text, ": {source}")),
        }
        cause = source.source();
    }
    out::printable(&text)
}

/// Formats a message in words: its variables, which end the message as `key=value`, are put in parentheses.
pub fn message(message: &str) -> String {
    let (mut words, mut details, mut after) = (Vec::new(), Vec::<String>::new(), false);
    for token in tokens(message) {
        match (token.split_once('='), details.last_mut()) {
            (Some((key, value)), _) if is_key(key) && !value.is_empty() => {
                details.push(detail(key, value));
                after = true;
                continue;
            }
            // This word is the unit of the number before it.
            (_, Some(last)) if after && size::UNITS.contains(&token) => *last += &format!(" {token}"),
            _ => words.push(token.to_owned()),
        }
        after = false;
    }
    let words = words.join(" ");
    if details.is_empty() { words } else { format!("{words} ({})", details.join(", ")) }
}

/// Formats a number with grouped digits: `5,000,000`.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Formats a count: `1 step`, `3 steps`.
pub fn counted(count: usize, what: &str) -> String {
    if count == 1 { format!("1 {what}") } else { format!("{count} {what}s") }
}

fn detail(key: &str, value: &str) -> String {
    let value = value.trim_matches('"');
    let name = key.replace('_', " ");
    match (key.strip_suffix("bytes"), value.parse::<u64>()) {
        (Some(""), Ok(bytes)) => size::shown(bytes),
        (Some(_), Ok(bytes)) => format!("{} {}", name.trim_end_matches("bytes").trim_end(), size::shown(bytes)),
        _ => format!("{name} {value}"),
    }
}

fn is_key(key: &str) -> bool {
    key.starts_with(|c: char| c.is_ascii_lowercase())
        && key.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
}

/// Splits at spaces outside quotes and brackets.
fn tokens(text: &str) -> Vec<&str> {
    let (mut tokens, mut start, mut depth, mut quoted, mut escaped) = (Vec::new(), 0, 0_usize, false, false);
    for (at, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            '[' | '(' | '{' if !quoted => depth += 1,
            ']' | ')' | '}' if !quoted => depth = depth.saturating_sub(1),
            ' ' if !quoted && depth == 0 => {
                tokens.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    tokens.push(&text[start..]);
    tokens
}

/// Formats a list: `1, 2, 3`.
pub fn listed(numbers: &[impl ToString]) -> String {
    numbers.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use ashore::ErrorKind;

    #[test]
    fn an_error_is_words() {
        let error = Error::new(ErrorKind::Corrupt, "a manifest is damaged: its digest does not fit bytes=4371")
            .with_step(190)
            .with_path("run/step-00000190/manifest.json");
        let said =
            "step 190: a manifest is damaged: its digest does not fit (4.4 kB), in run/step-00000190/manifest.json";
        assert_eq!(of(&error), said);
        let full = Error::io("cannot write a chunk chunk=3", std::io::Error::from_raw_os_error(28)).with_rank(2);
        assert_eq!(of(&full), "cannot write a chunk (chunk 3), on rank 2: No space left on device (os error 28)");
        let outer = Error::new(ErrorKind::Corrupt, "a file is missing").with_source(full);
        assert_eq!(of(&outer).matches('=').count(), 0);
    }

    #[test]
    fn values_with_spaces_stay_together() {
        assert_eq!(
            message("a tensor is wrong tensor=\"a b\" shape=[2, 3] expected_bytes=8000"),
            "a tensor is wrong (tensor a b, shape [2, 3], expected 8.0 kB)"
        );
        assert_eq!(message("use --keep-last=3 and x = y"), "use --keep-last=3 and x = y");
        assert_eq!(
            message("too little space needed=8.8 TB free=35.9 GB"),
            "too little space (needed 8.8 TB, free 35.9 GB)"
        );
        assert_eq!(message("no details"), "no details");
    }

    #[test]
    fn numbers_are_grouped() {
        assert_eq!([0, 999, 1000, 5_000_000].map(grouped), ["0", "999", "1,000", "5,000,000"]);
        assert_eq!([counted(1, "step"), counted(0, "step")], ["1 step", "0 steps"]);
    }
}
