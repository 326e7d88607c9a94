//! Spans and events of `tracing`: what `docs/observability.md` says of them is what a subscriber gets.

use super::{LONG, executor, save, state};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// By name of a span, or message of an event: the level, and the fields that it had.
static SEEN: Mutex<BTreeMap<String, (String, BTreeSet<String>)>> = Mutex::new(BTreeMap::new());

struct Recorder(AtomicU64);

struct Fields {
    message: Option<String>,
    names: BTreeSet<String>,
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if field.name() == "message" {
            self.message = Some(format!("{value:?}"));
        } else {
            self.names.insert(field.name().to_owned());
        }
    }
}

fn seen(metadata: &Metadata<'_>, record: impl FnOnce(&mut Fields)) {
    if !metadata.target().starts_with("ashore") {
        return;
    }
    let mut fields = Fields { message: None, names: BTreeSet::new() };
    record(&mut fields);
    let name = fields.message.unwrap_or_else(|| metadata.name().to_owned());
    SEEN.lock().unwrap().insert(name, (metadata.level().to_string().to_lowercase(), fields.names));
}

impl Subscriber for Recorder {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, span: &Attributes<'_>) -> Id {
        seen(span.metadata(), |fields| span.record(fields));
        Id::from_u64(self.0.fetch_add(1, Ordering::Relaxed) + 1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, event: &Event<'_>) {
        seen(event.metadata(), |fields| event.record(fields));
    }
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

/// The rows of the page's table of spans and events: kind, name, level, fields.
fn rows() -> Vec<[String; 4]> {
    let page = include_str!("../../docs/observability.md");
    let table = page.split("## Spans and events").nth(1).expect("the section");
    let rows = table.lines().filter(|line| line.starts_with("| span") || line.starts_with("| event"));
    let cells = |row: &str| -> Vec<String> {
        row.trim_matches('|').split('|').map(|cell| cell.trim().replace('`', "")).collect()
    };
    rows.map(|row| <[String; 4]>::try_from(cells(row)[..4].to_vec()).unwrap()).collect()
}

#[test]
fn a_subscriber_gets_the_spans_and_events_of_the_page_with_their_fields() {
    tracing::subscriber::set_global_default(Recorder(AtomicU64::new(0))).unwrap();
    let root = tempfile::tempdir().unwrap();
    let executor = executor(root.path());
    save(&executor, 1);
    executor.save(1, state(10)).unwrap().wait(LONG).unwrap_err();
    executor.shutdown(LONG).unwrap();
    let seen = SEEN.lock().unwrap();
    let rows = rows();
    assert!(rows.len() >= 5, "{rows:?}");
    for [kind, name, level, fields] in rows {
        let (found, names) = seen.get(&name).unwrap_or_else(|| panic!("no {kind} {name:?} in {seen:?}"));
        let wanted: BTreeSet<String> = fields.split(", ").map(str::to_owned).collect();
        assert_eq!((found, names), (&level, &wanted), "{name}");
    }
}
