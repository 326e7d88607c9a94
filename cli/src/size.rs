//! Sizes, in the form that users write and read.

/// The units of sizes that are shown.
pub const UNITS: [&str; 7] = ["B", "kB", "MB", "GB", "TB", "PB", "EB"];

/// Parses `256MiB`, `1.5GiB`, `64K` (powers of 1024), `100MB` (powers of 1000), `4096` or `4096B`; case does
/// not matter.
pub fn parse(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit: f64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kib" => 1024.0,
        "m" | "mib" => 1024.0 * 1024.0,
        "g" | "gib" => 1024.0 * 1024.0 * 1024.0,
        "t" | "tib" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        _ => return Err("a size is a number followed by a unit, such as 256MiB".to_owned()),
    };
    let number: f64 = number.parse().map_err(|_| "a size must begin with a number, such as 256MiB".to_owned())?;
    let bytes = number * unit;
    if bytes >= 1.0 && bytes < (1_u64 << 53) as f64 {
        Ok(bytes.round() as u64)
    } else {
        Err("a size must be at least one byte and below 8 PiB".to_owned())
    }
}

/// Shows a size in the unit that leaves one to three digits before the point: `35.0 MB`.
pub fn shown(bytes: u64) -> String {
    let mut scaled = bytes as f64;
    let mut unit = "B";
    for next in UNITS.into_iter().skip(1) {
        if scaled < 999.95 {
            break;
        }
        scaled /= 1000.0;
        unit = next;
    }
    if unit == "B" { format!("{bytes} B") } else { format!("{scaled:.1} {unit}") }
}

/// Shows a size that was set, not measured, in binary units if it is a whole number of them: `8 MiB`.
pub fn exact(bytes: u64) -> String {
    let units = [(1_u64 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match units.iter().find(|(unit, _)| bytes > 0 && bytes.is_multiple_of(*unit)) {
        Some((unit, name)) => format!("{} {name}", bytes / unit),
        None => format!("{bytes} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_they_are_written() {
        for (text, bytes) in [
            ("256MiB", 256 << 20),
            ("256 mib", 256 << 20),
            ("1.5G", 3 << 29),
            ("64k", 65_536),
            ("100MB", 100_000_000),
            ("4096", 4096),
            ("7b", 7),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        for text in ["", "MiB", "-1", "1.2.3M", "5 parsecs", "0", "99999999999TiB", "nan", "inf"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_shown_in_a_unit_that_fits() {
        assert_eq!([shown(0), shown(999), shown(1000), shown(35_044_344)], ["0 B", "999 B", "1.0 kB", "35.0 MB"]);
        assert_eq!(shown(999_999), "1.0 MB");
        assert_eq!([exact(8 << 20), exact(4096), exact(5000)], ["8 MiB", "4 KiB", "5000 B"]);
    }
}
