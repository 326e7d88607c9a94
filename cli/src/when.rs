//! Dates and spans of time, in the form that users read.

use jiff::Timestamp;
use jiff::tz::TimeZone;
use std::time::{Duration, SystemTime};

/// Shows a time in the time zone of this machine: `27 Nov 14:02`, and with the year if it is not the current
/// year.
pub fn shown(time: SystemTime) -> String {
    in_zone(time, SystemTime::now(), &TimeZone::system())
}

/// Shows the time of day: `14:02:31`.
pub fn clock(time: SystemTime) -> String {
    Timestamp::try_from(time)
        .map_or_else(|_| "?".to_owned(), |time| time.to_zoned(TimeZone::system()).strftime("%H:%M:%S").to_string())
}

fn in_zone(time: SystemTime, now: SystemTime, zone: &TimeZone) -> String {
    let (Ok(time), Ok(now)) = (Timestamp::try_from(time), Timestamp::try_from(now)) else { return "?".to_owned() };
    let (time, now) = (time.to_zoned(zone.clone()), now.to_zoned(zone.clone()));
    let form = if time.year() == now.year() { "%d %b %H:%M" } else { "%d %b %Y" };
    time.strftime(form).to_string()
}

/// Shows a span of time with two digits: `340 ms`, `9.1 s`, `12 min`.
pub fn span(seconds: f64) -> String {
    match seconds {
        _ if seconds < 0.9995 => format!("{:.0} ms", seconds * 1e3),
        _ if seconds < 9.95 => format!("{seconds:.1} s"),
        _ if seconds < 120.0 => format!("{seconds:.0} s"),
        _ => crate::age::shown(Duration::from_secs_f64(seconds.min(1e12))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_shown_with_what_people_need() {
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let shown = |time, now| in_zone(at(time), at(now), &TimeZone::UTC);
        assert_eq!(shown(1_795_788_120, 1_795_900_000), "27 Nov 14:02");
        assert_eq!(shown(1_700_000_000, 1_795_900_000), "14 Nov 2023");
        assert_eq!([0.34, 9.1, 64.2, 720.0].map(span), ["340 ms", "9.1 s", "64 s", "12 min"]);
    }
}
