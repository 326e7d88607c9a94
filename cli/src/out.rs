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

/// Returns the columns of the screen: `COLUMNS`, or those of the terminal, or 80.
pub fn width() -> usize {
    let set = std::env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok());
    let terminal = || comfy_table::Table::new().width().map(usize::from);
    set.or_else(terminal).unwrap_or(80).clamp(40, 400)
}

/// Wraps text at the width of the screen. The first line begins with `lead`, later lines with as many spaces.
/// Ends with a newline.
pub fn wrapped(lead: &str, text: &str) -> String {
    wrapped_at(width(), lead, text)
}

/// Wraps text like [`wrapped`], at this width.
pub fn wrapped_at(width: usize, lead: &str, text: &str) -> String {
    let indent = lead.chars().count();
    let (mut out, mut used, mut fresh) = (lead.to_owned(), indent, true);
    for word in text.split(' ') {
        let length = word.chars().count();
        if !fresh && used + 1 + length > width {
            out = out.trim_end().to_owned() + "\n" + &" ".repeat(indent);
            (used, fresh) = (indent, true);
        }
        if !fresh {
            out.push(' ');
            used += 1;
        }
        out += word;
        (used, fresh) = (used + length, false);
    }
    out.trim_end().to_owned() + "\n"
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

/// Returns the nearest-rank quantile; for the median of an even count, the mean of the middle two; 0 of no
/// numbers.
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
    fn text_is_wrapped_behind_its_lead() {
        assert_eq!(wrapped_at(20, "step 5: ", "one two three four"), "step 5: one two\n        three four\n");
        assert_eq!(wrapped_at(10, "a: ", "a-long-word-of-a-path b"), "a: a-long-word-of-a-path\n   b\n");
        assert_eq!(wrapped_at(80, "", ""), "\n");
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        assert_eq!(printable("a\u{1b}[31m\nb\u{e9}"), "a\\u{1b}[31m\\nb\u{e9}");
    }
}
