//! Output: data to stdout, progress to stderr.

use ashore::{Error, Result};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use std::io::{ErrorKind, Write};
use std::path::Path;
use std::time::Duration;

/// Writes text to stdout. A reader that closed the pipe (`ashore ls | head -1`) is not an error.
pub fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => written.map_err(|e| Error::io("cannot write to stdout", e)),
    }
}

/// Writes one JSON value to stdout, on one line.
pub fn json(value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string(value)
        .map_err(|e| Error::new(ashore::ErrorKind::Internal, "cannot write json").with_source(e))?;
    print(&(text + "\n"))
}

/// Writes one line to stderr. A failure is ignored: it could not be reported either.
pub fn complain(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "ashore: {}", printable(text));
}

/// Makes text from a file safe for a terminal.
pub fn printable(text: &str) -> String {
    let escape = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    text.chars().map(escape).collect()
}

/// Serializes a path for JSON, which only has UTF-8: other bytes are replaced.
pub fn path<S: serde::Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&path.display())
}

/// Converts a duration to milliseconds.
pub fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Returns the median, or 0 of no numbers.
pub fn median(numbers: impl IntoIterator<Item = f64>) -> f64 {
    quantile(numbers, 0.5)
}

/// Returns the nearest-rank quantile, but the mean of the middle two for an even median; 0 of no numbers.
pub fn quantile(numbers: impl IntoIterator<Item = f64>, q: f64) -> f64 {
    let mut sorted: Vec<f64> = numbers.into_iter().collect();
    sorted.sort_by(f64::total_cmp);
    let n = sorted.len();
    match n {
        0 => 0.0,
        _ if q == 0.5 && n.is_multiple_of(2) => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
        _ => sorted[((q * n as f64).ceil() as usize).clamp(1, n) - 1],
    }
}

/// Makes a progress bar on stderr: only on a terminal, and without colours.
pub fn progress(length: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(length), ProgressDrawTarget::stderr());
    let style =
        ProgressStyle::with_template("[{bar:32}] {pos}/{len}  {msg}").unwrap_or_else(|_| ProgressStyle::default_bar());
    bar.set_style(style.progress_chars("=> "));
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_numbers_of_the_sample() {
        assert_eq!(median([3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median([4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(quantile((1..=100).map(f64::from), 0.99), 99.0);
        assert_eq!(quantile([5.0], 0.99), 5.0);
        assert_eq!(median([]), 0.0);
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        assert_eq!(printable("a\u{1b}[31m\nb\u{e9}"), "a\\u{1b}[31m\\nb\u{e9}");
    }
}
