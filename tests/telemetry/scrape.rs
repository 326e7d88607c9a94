//! Reads the text that Prometheus scrapes, and checks its rules as `promtool check metrics` does.

use std::collections::{BTreeMap, BTreeSet};

/// Metrics by name, without the suffixes of histograms: the type, and the label sets with their values.
pub type Scrape = BTreeMap<String, (String, Vec<(String, f64)>)>;

/// Parses a scrape.
///
/// # Errors
/// The first line that breaks a rule of the text format, or a name without a help text or a type.
pub fn parse(text: &str) -> Result<Scrape, String> {
    let (mut helped, mut scrape) = (BTreeSet::new(), Scrape::new());
    for line in text.lines().filter(|line| !line.is_empty()) {
        let wrong = |why: &str| Err(format!("{why}: {line}"));
        if let Some(help) = line.strip_prefix("# HELP ") {
            let Some((name, what)) = help.split_once(' ') else { return wrong("no help") };
            if what.trim().is_empty() || !helped.insert(name.to_owned()) {
                return wrong("empty or second help");
            }
        } else if let Some(of_type) = line.strip_prefix("# TYPE ") {
            let Some((name, kind)) = of_type.split_once(' ') else { return wrong("no type") };
            let known = ["counter", "gauge", "histogram"].contains(&kind);
            if !known || scrape.insert(name.to_owned(), (kind.to_owned(), Vec::new())).is_some() {
                return wrong("unknown or second type");
            }
        } else {
            let (series, value) = line.rsplit_once(' ').ok_or("no value")?;
            let (sample, labels) = series.split_once('{').unwrap_or((series, ""));
            let Ok(value) = value.parse::<f64>() else { return wrong("no number") };
            let base = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| sample.strip_suffix(suffix));
            let name = base.filter(|base| scrape.contains_key(*base)).unwrap_or(sample);
            let Some((kind, samples)) = scrape.get_mut(name) else { return wrong("no type before the sample") };
            let good = sample.chars().all(|c| c == '_' || c == ':' || c.is_ascii_alphanumeric());
            if !good || (kind == "counter") != name.ends_with("_total") || !helped.contains(name) {
                return wrong("bad name, a counter without _total, or no help");
            }
            samples.push((format!("{sample}{{{labels}"), value));
        }
    }
    Ok(scrape)
}

#[test]
fn a_scrape_without_help_or_with_a_counter_of_another_name_is_refused() {
    let good = "# HELP a_total What.\n# TYPE a_total counter\na_total{x=\"y\"} 1\n";
    assert_eq!(parse(good).unwrap()["a_total"].1, [("a_total{x=\"y\"}".to_owned(), 1.0)]);
    for bad in [
        "# TYPE a_total counter\na_total 1\n",
        "# HELP a What.\n# TYPE a counter\na 1\n",
        "# HELP a_total What.\n# TYPE a_total summary\na_total 1\n",
        "a 1\n",
        "# HELP a What.\n# TYPE a gauge\na one\n",
    ] {
        assert!(parse(bad).is_err(), "{bad}");
    }
}
