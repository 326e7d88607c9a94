//! Numbers, times and dates, in the form that people read.

/// Between a number and its unit, which must stay on one line.
pub const NBSP: char = '\u{a0}';

/// A time with up to three digits, in the unit that fits.
pub fn time(seconds: f64) -> String {
    let (scaled, unit) = match seconds {
        s if s < 999.5e-6 => (s * 1e6, "\u{b5}s"),
        s if s < 0.9995 => (s * 1e3, "ms"),
        s if s < 119.5 => (s, "s"),
        s if s < 119.5 * 60.0 => (s / 60.0, "min"),
        s if s < 47.95 * 3600.0 => (s / 3600.0, "h"),
        s => (s / 86_400.0, "d"),
    };
    let digits = [9.995, 99.95].iter().filter(|bound| scaled < **bound).count();
    format!("{scaled:.digits$}{NBSP}{unit}")
}

/// A power of ten of seconds, for an axis.
pub fn power(seconds: f64) -> String {
    let (scaled, unit) = match seconds {
        s if s < 0.9e-3 => (s * 1e6, "\u{b5}s"),
        s if s < 0.9 => (s * 1e3, "ms"),
        s => (s, "s"),
    };
    format!("{} {unit}", (scaled * 10.0).round() / 10.0)
}

pub fn percent(share: f64) -> String {
    match share * 100.0 {
        p if p > 0.0 && p < 0.01 => format!("below 0.01{NBSP}%"),
        p if p < 1.0 => format!("{p:.2}{NBSP}%"),
        p => format!("{p:.1}{NBSP}%"),
    }
}

/// A moment in UTC: `2026-11-27 14:02`.
pub fn date(micros: u64) -> String {
    let (days, second) = (micros / 86_400_000_000, micros / 1_000_000 % 86_400);
    // Days are counted from 1 March of the year 0, so that a leap day is the last of its year.
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_of_year = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month_of_year + 2) / 5 + 1;
    let month = if month_of_year < 10 { month_of_year + 3 } else { month_of_year - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year}-{month:02}-{day:02} {:02}:{:02}{NBSP}UTC", second / 3600, second / 60 % 60)
}

pub fn capital(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or(String::new(), |first| first.to_uppercase().chain(letters).collect())
}

pub fn saves(count: usize) -> String {
    if count == 1 { "1 save".to_owned() } else { format!("{} saves", thousands(count as u64)) }
}

/// A number with a comma after each third digit.
pub fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}
