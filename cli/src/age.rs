//! Ages, in the form that users write and read.

use std::time::Duration;

const UNITS: [(u64, &str, &str); 5] =
    [(7 * 86_400, "w", "weeks"), (86_400, "d", "d"), (3600, "h", "h"), (60, "m", "min"), (1, "s", "s")];

/// Parses `2w`, `7d`, `36h`, `90m`, `0s`.
pub fn parse(text: &str) -> Result<Duration, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = UNITS.iter().find(|(_, short, _)| *short == unit.trim());
    let seconds = unit.and_then(|(seconds, ..)| number.parse::<u64>().ok()?.checked_mul(*seconds));
    seconds
        .map(Duration::from_secs)
        .ok_or_else(|| "an age is a whole number followed by s, m, h, d or w, such as 36h".to_owned())
}

/// Shows an age in the largest unit with a value of at least two: `36 h`.
pub fn shown(age: Duration) -> String {
    let seconds = age.as_secs();
    let unit = UNITS.iter().find(|(unit, ..)| seconds >= 2 * unit);
    unit.map_or_else(|| format!("{seconds} s"), |(unit, _, name)| format!("{} {name}", seconds / unit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_read_as_they_are_written() {
        for (text, seconds) in [("0s", 0), ("90m", 5400), ("36h", 129_600), ("7d", 604_800), ("2 w", 1_209_600)] {
            assert_eq!(parse(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for text in ["", "5", "h", "-1h", "1.5h", "3 parsecs", "99999999999999999999s", "9999999999999999999w"] {
            assert!(parse(text).is_err(), "{text}");
        }
        let shown = [0, 1, 119, 120, 7200, 129_600, 172_800, 1_209_600].map(|s| shown(Duration::from_secs(s)));
        assert_eq!(shown, ["0 s", "1 s", "119 s", "2 min", "2 h", "36 h", "2 d", "2 weeks"]);
    }
}
