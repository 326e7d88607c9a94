//! Metrics: what the example's scrape has, and that the dashboard and the alerts name only that.

use super::scrape::{Scrape, parse};
use super::{LONG, executor, save, state};
use ashore::Catalog;
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use std::collections::BTreeSet;
use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The names of `docs/observability.md`.
const NAMES: [&str; 24] = [
    "ashore_saves_total",
    "ashore_failures_total",
    "ashore_retries_total",
    "ashore_staged_bytes_total",
    "ashore_written_bytes_total",
    "ashore_restored_bytes_total",
    "ashore_pruned_steps_total",
    "ashore_pruned_bytes_total",
    "ashore_verify_damage_total",
    "ashore_save_stall_seconds",
    "ashore_stage_duration_seconds",
    "ashore_write_duration_seconds",
    "ashore_commit_duration_seconds",
    "ashore_time_to_durable_seconds",
    "ashore_restore_duration_seconds",
    "ashore_arena_bytes",
    "ashore_arena_used_bytes",
    "ashore_queue_saves",
    "ashore_last_durable_step",
    "ashore_last_durable_timestamp_seconds",
    "ashore_oldest_undurable_timestamp_seconds",
    "ashore_retained_steps",
    "ashore_retained_bytes",
    "ashore_build_info",
];

pub fn recorder() -> &'static PrometheusHandle {
    static RECORDER: OnceLock<PrometheusHandle> = OnceLock::new();
    RECORDER.get_or_init(|| {
        let builder = PrometheusBuilder::new().set_buckets(&[0.001, 0.01, 0.1, 1.0, 10.0, 100.0]).unwrap();
        builder.install_recorder().unwrap()
    })
}

/// Saves, restores, fails, deletes and finds damage, so that every metric has a value.
fn run() -> String {
    let handle = recorder();
    let root = tempfile::tempdir().unwrap();
    let executor = executor(root.path());
    (1..=5).for_each(|step| save(&executor, step));
    executor.save(5, state(10)).unwrap().wait(LONG).unwrap_err();
    executor.latest().unwrap().unwrap().read("weights").unwrap();
    executor.shutdown(LONG).unwrap();
    let checkpoint = Catalog::open(root.path()).unwrap().latest().unwrap().unwrap();
    let shard = checkpoint.path().join("model.safetensors");
    let mut bytes = std::fs::read(&shard).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&shard, bytes).unwrap();
    assert!(!Catalog::open(root.path()).unwrap().latest().unwrap().unwrap().verify().unwrap().is_sound());
    handle.run_upkeep();
    handle.render()
}

fn rendered() -> &'static str {
    static TEXT: OnceLock<String> = OnceLock::new();
    TEXT.get_or_init(run)
}

fn value(scrape: &Scrape, series: &str) -> f64 {
    let all = scrape.values().flat_map(|(_, samples)| samples);
    let found = all.clone().find(|(name, _)| name.trim_end_matches('{') == series);
    found.unwrap_or_else(|| panic!("no {series} in {scrape:?}")).1
}

#[test]
fn the_scrape_has_every_metric_of_the_page_and_no_other() {
    let scrape = parse(rendered()).unwrap();
    let found: BTreeSet<&str> = scrape.keys().map(String::as_str).collect();
    assert_eq!(found, BTreeSet::from(NAMES));
    for (name, (_, samples)) in &scrape {
        assert!(!samples.is_empty(), "{name} has no sample");
    }
    let page = include_str!("../../docs/observability.md");
    NAMES.iter().for_each(|name| assert!(page.contains(&format!("`{name}`")), "the page lacks {name}"));
}

#[test]
fn metrics_say_what_the_saves_did() {
    let scrape = parse(rendered()).unwrap();
    let value = |series: &str| value(&scrape, series);
    assert!(value("ashore_saves_total{outcome=\"durable\"}") >= 5.0);
    assert!(value("ashore_failures_total{kind=\"conflict\"}") >= 1.0);
    assert!(value("ashore_pruned_steps_total") >= 3.0 && value("ashore_pruned_bytes_total") >= 60_000.0);
    assert!(value("ashore_written_bytes_total{store=\"directory\"}") > 100_000.0);
    assert!(value("ashore_restored_bytes_total") >= 20_000.0);
    assert!(value("ashore_verify_damage_total") >= 1.0);
    assert!(value("ashore_time_to_durable_seconds_count") >= 5.0);
    assert_eq!(value("ashore_last_durable_step"), 5.0);
    assert_eq!(value("ashore_arena_bytes"), 65_536.0);
    assert_eq!((value("ashore_arena_used_bytes"), value("ashore_queue_saves")), (0.0, 0.0));
    assert_eq!(value("ashore_retained_steps"), 2.0);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
    let last = value("ashore_last_durable_timestamp_seconds");
    assert!(last <= now && last > now - 600.0, "{last} {now}");
}

/// `promtool`, from `ASHORE_PROMTOOL` or the path.
fn promtool(arguments: &[&str], input: &str) -> (bool, String) {
    let program = std::env::var("ASHORE_PROMTOOL").unwrap_or_else(|_| "promtool".into());
    let child = Command::new(program)
        .args(arguments)
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/prometheus"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = child.expect("promtool is installed");
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while child.try_wait().unwrap().is_none() {
        assert!(Instant::now() < deadline, "promtool does not end");
        std::thread::sleep(Duration::from_millis(10));
    }
    let output = child.wait_with_output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

#[test]
#[ignore = "needs promtool: just pages"]
fn promtool_accepts_the_scrape_and_refuses_one_without_help() {
    let (accepted, said) = promtool(&["check", "metrics"], rendered());
    assert!(accepted && said.trim().is_empty(), "{said}");
    let without: Vec<&str> = rendered().lines().filter(|line| !line.starts_with("# HELP")).collect();
    let (accepted, said) = promtool(&["check", "metrics"], &(without.join("\n") + "\n"));
    assert!(!accepted && said.contains("help"), "{said}");
}

#[test]
#[ignore = "needs promtool: just pages"]
fn the_alerts_fire_when_nothing_becomes_durable_and_when_saves_fail() {
    let (passed, said) = promtool(&["test", "rules", "alerts_test.yml"], "");
    assert!(passed, "{said}");
}

/// The names in a query that begin as ours do.
fn named(query: &str) -> BTreeSet<String> {
    let words = query.split(|c: char| c != '_' && !c.is_ascii_alphanumeric());
    words.filter(|word| word.starts_with("ashore_")).map(str::to_owned).collect()
}

/// The queries of the dashboard.
fn queries(of: &serde_json::Value, found: &mut Vec<String>) {
    match of {
        serde_json::Value::Object(fields) => {
            found.extend(fields.get("expr").and_then(|expr| expr.as_str()).map(str::to_owned));
            fields.values().for_each(|value| queries(value, found));
        }
        serde_json::Value::Array(values) => values.iter().for_each(|value| queries(value, found)),
        _ => {}
    }
}

#[test]
fn every_query_of_the_dashboard_and_the_alerts_names_only_metrics_that_are_there() {
    let dashboard = serde_json::from_str(include_str!("../../docs/prometheus/dashboard.json")).unwrap();
    let mut all = Vec::new();
    queries(&dashboard, &mut all);
    assert!(all.len() >= 8, "{all:?}");
    let alerts = include_str!("../../docs/prometheus/alerts.yml");
    let of_alerts = alerts.lines().filter_map(|line| line.trim().strip_prefix("expr: ")).map(str::to_owned);
    all.extend(of_alerts);
    let samples: BTreeSet<&str> = rendered()
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split([' ', '{']).next())
        .collect();
    let mut used = BTreeSet::new();
    for query in &all {
        assert!(!named(query).is_empty(), "{query}");
        used.extend(named(query));
    }
    let unknown: Vec<_> = used.iter().filter(|name| !samples.contains(name.as_str())).collect();
    assert!(unknown.is_empty(), "{unknown:?}");
    // And the reverse: each metric is on the dashboard or in an alert.
    let shown = |name: &&str| used.iter().any(|used| used.starts_with(*name));
    let left: Vec<_> = NAMES.iter().filter(|name| !shown(name)).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
#[ignore = "needs promtool: just pages"]
fn every_query_of_the_dashboard_parses() {
    let dashboard = serde_json::from_str(include_str!("../../docs/prometheus/dashboard.json")).unwrap();
    let mut all = Vec::new();
    queries(&dashboard, &mut all);
    let records = all.iter().enumerate().map(|(i, query)| {
        format!(
            "      - record: q{i}\n        expr: {}\n",
            serde_json::to_string(&query.replace("$__rate_interval", "5m")).unwrap()
        )
    });
    let rules = format!("groups:\n  - name: dashboard\n    rules:\n{}", records.collect::<String>());
    let file = tempfile::Builder::new().suffix(".yml").tempfile().unwrap();
    std::fs::write(file.path(), &rules).unwrap();
    let check = |path: &std::path::Path| promtool(&["check", "rules", path.to_str().unwrap()], "");
    let (passed, said) = check(file.path());
    assert!(passed, "{said}");
    std::fs::write(file.path(), rules.replace("rate(", "rate((")).unwrap();
    assert!(!check(file.path()).0, "a query that does not parse is refused");
}
