//! The file of a trace: an array in Chrome's JSON, with one event per line.
//!
//! **Whole lines.** Many lines are written at a time, and each of them whole. A killed process leaves an
//! array without its end, at most cut within its last line. Viewers open such a file.
//! **One writer.** The file is always newly created, under another name if its own is taken. So no two
//! executors, ranks or processes write to one file.
//! **Errors.** After an error, tracing stops. The error is reported once.

use super::budget::Budget;
use super::event::{Arguments, Event, Local, Row};
use super::{BegunSave, EndedSave, Span, Thread, Work};
use crate::telemetry::{SaveLine, unix_nanos};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

/// The maximum number of bytes of lines that wait to be written.
const BUFFER_MAX: usize = 64 << 10;
/// The maximum number of bytes of a span of a chunk: with an end of a flow and a reading of the arena, and
/// without.
const SPAN_BYTES: [u64; 2] = [400, 200];
/// The maximum number of files of one name, including those of earlier processes.
const FILES_MAX: u32 = 99;
/// The size of the range of flow numbers of a rank.
const FLOWS: u64 = 1 << 32;

/// The number of the next flow in this process. It is shared, because files of several executors can be
/// joined.
static FLOW: AtomicU64 = AtomicU64::new(0);

/// The path of the trace of an executor.
#[derive(Clone, Debug)]
pub(crate) struct TracePath {
    pub path: PathBuf,
    pub rank: u32,
    pub world: u32,
}

/// The open trace of one executor. See the module.
pub(crate) struct TraceFile {
    at: TracePath,
    clock: Clock,
    /// None before the first event, and after an error.
    file: Option<File>,
    buffer: Vec<u8>,
    budget: Budget,
    /// The rows and threads whose names were written.
    named: HashSet<(u64, Option<u64>)>,
    /// The saves whose begin was written and whose end was not.
    open: BTreeSet<u64>,
    /// Whether tracing has stopped.
    over: bool,
}

/// Converts a moment to the time since 1970.
struct Clock {
    at: Instant,
    nanos: u64,
}

impl Clock {
    fn micros(&self, moment: Instant) -> u64 {
        let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let later = nanos(moment.saturating_duration_since(self.at));
        let earlier = nanos(self.at.saturating_duration_since(moment));
        self.nanos.saturating_add(later).saturating_sub(earlier) / 1000
    }
}

impl TraceFile {
    pub fn new(at: TracePath) -> Self {
        Self::within(at, Budget::default())
    }

    fn within(at: TracePath, budget: Budget) -> Self {
        let clock = Clock { at: Instant::now(), nanos: unix_nanos(SystemTime::now()) };
        Self {
            at,
            clock,
            file: None,
            buffer: Vec::new(),
            budget,
            named: HashSet::new(),
            open: BTreeSet::new(),
            over: false,
        }
    }

    /// Whether tracing has stopped: the file is full, or cannot be written.
    pub fn is_over(&self) -> bool {
        self.over
    }

    /// Writes the begin of a save.
    pub fn begun(&mut self, save: &BegunSave) {
        let ts = self.clock.micros(save.at);
        if self.save_event("b", save, ts, Arguments { step: Some(save.step), ..Arguments::default() }, false) {
            self.open.insert(save.id);
        }
        self.arena(ts, save.arena);
    }

    /// Writes a save that has ended, whose line in the run log is `line`.
    pub fn ended(&mut self, mut save: EndedSave, line: &SaveLine) {
        if !self.open.contains(&save.begun.id) {
            self.begun(&save.begun);
        }
        let (began, ended) = (self.clock.micros(save.begun.at), self.clock.micros(save.at));
        save.spans.sort_by_key(|span| (span.begin, std::cmp::Reverse(span.end)));
        apart(&mut save.spans);
        let threads: HashMap<u32, &str> = save.threads.iter().map(|thread| (thread.id, &*thread.name)).collect();
        let (shown, of_chunks): (Vec<&Span>, Vec<&Span>) =
            save.spans.iter().partition(|span| span.work.is_always_shown());
        for span in shown {
            self.span(span, &threads, save.begun.step);
        }
        let size = |span: &&Span| SPAN_BYTES[usize::from(!(span.work.is_copy() || span.work == Work::Write))];
        let most = of_chunks.iter().map(size).sum();
        let room = !of_chunks.is_empty() && self.budget.fits(most, false);
        let chunks = if room { self.budget.chunks(ended.saturating_sub(began), most) } else { None };
        if let Some(chunks) = chunks {
            let before = self.budget.used;
            self.chunks(&of_chunks, &threads, save.begun.step);
            self.budget.spent(chunks, self.budget.used - before);
        }
        let lost = save.lost + line.lost + if chunks.is_none() { of_chunks.len() as u64 } else { 0 };
        let end = serde_json::to_value(line.end).unwrap_or_default();
        let arguments = Arguments {
            step: Some(save.begun.step),
            bytes: Some(line.bytes),
            end: end.as_str(),
            why: Some(&*line.why).filter(|why| !why.is_empty()),
            lost: (lost > 0).then_some(lost),
            ..Arguments::default()
        };
        self.arena(ended, save.begun.arena);
        if self.open.remove(&save.begun.id) {
            self.save_event("e", &save.begun, ended, arguments, true);
        }
    }

    /// Writes the work of a thread for a save that has ended meanwhile.
    pub fn late(&mut self, span: &Span, thread: &Thread, step: u64) {
        if span.work.is_always_shown() {
            self.span(span, &HashMap::from([(thread.id, &*thread.name)]), step);
        }
    }

    /// Writes the buffered lines.
    pub fn flush(&mut self) {
        if self.buffer.is_empty() {
            return;
        }
        let written = self.file.as_mut().map_or(Ok(()), |file| file.write_all(&self.buffer));
        self.buffer.clear();
        if let Err(error) = written {
            // Lines after half of a line cannot be read.
            self.file = None;
            self.fail(&error);
        }
    }

    /// Ends the array and the file.
    pub fn close(mut self) {
        if self.file.is_none() {
            return;
        }
        let ts = Some(self.clock.micros(Instant::now()));
        let pid = Row::Saves.pid(self.at.rank);
        let last = Event { ph: "i", name: "closed", ts, pid, tid: Some(0), s: Some("p"), ..Event::default() };
        if self.push(&last, "\n]\n", true) {
            self.flush();
        }
    }

    /// Writes the spans of chunks, flows from each copy to the write of the same chunk, and the arena.
    fn chunks(&mut self, spans: &[&Span], threads: &HashMap<u32, &str>, step: u64) {
        // Viewers find the slice at the end of a flow by its time, and find no slice of length zero.
        let chunk = |span: &Span| span.number.filter(|_| self.micros_of(span).1 > 0);
        let writes = spans.iter().filter(|span| span.work == Work::Write);
        let written: HashSet<usize> = writes.filter_map(|span| chunk(span)).collect();
        let ends: Vec<_> = spans.iter().map(|span| chunk(span).filter(|chunk| written.contains(chunk))).collect();
        let mut flows: HashMap<usize, Vec<u64>> = HashMap::new();
        for (span, chunk) in spans.iter().zip(ends) {
            self.span(span, threads, step);
            let Some(chunk) = chunk else { continue };
            if span.work.is_copy() {
                let flow = u64::from(self.at.rank) * FLOWS + FLOW.fetch_add(1, Ordering::Relaxed) % FLOWS;
                self.flow("s", span, flow);
                flows.entry(chunk).or_default().push(flow);
            } else if span.work == Work::Write {
                for flow in flows.remove(&chunk).unwrap_or_default() {
                    self.flow("f", span, flow);
                }
            }
        }
        for span in spans {
            if span.work.is_copy() || span.work == Work::Write {
                self.arena(self.clock.micros(span.end), span.arena);
            }
        }
    }

    fn span(&mut self, span: &Span, threads: &HashMap<u32, &str>, step: u64) {
        let row = Row::of(span.work);
        let (pid, tid) = self.place(span);
        let name = match row {
            Row::Device(_) => "copy stream",
            _ => threads.get(&span.thread).copied().unwrap_or("thread"),
        };
        self.name(row, tid, name);
        let (ts, dur) = self.micros_of(span);
        let error_us = match span.work {
            Work::DeviceCopy { error, .. } => Some(error.as_secs_f64() * 1e6),
            _ => None,
        };
        let (chunk, file) = if span.work == Work::Seal { (None, span.number) } else { (span.number, None) };
        let bytes = Some(span.bytes).filter(|bytes| *bytes > 0);
        let arguments = Arguments { step: Some(step), chunk, file, bytes, error_us, ..Arguments::default() };
        let event = Event {
            ph: "X",
            name: span.work.name(),
            ts: Some(ts),
            dur: Some(dur),
            pid,
            tid: Some(tid),
            args: Some(arguments),
            ..Event::default()
        };
        self.push(&event, ",\n", false);
    }

    /// Returns the begin and the length of a span.
    fn micros_of(&self, span: &Span) -> (u64, u64) {
        let begin = self.clock.micros(span.begin);
        (begin, self.clock.micros(span.end).saturating_sub(begin))
    }

    /// Returns the process and the thread of a span.
    fn place(&self, span: &Span) -> (u64, u64) {
        let row = Row::of(span.work);
        let tid = if matches!(row, Row::Device(_)) { 1 } else { u64::from(span.thread) };
        (row.pid(self.at.rank), tid)
    }

    /// Writes an end of a flow, inside the slice of `span`.
    fn flow(&mut self, ph: &'static str, span: &Span, flow: u64) {
        let (pid, tid) = self.place(span);
        let ts = Some(self.micros_of(span).0);
        let bp = (ph == "f").then_some("e");
        let (cat, id, tid) = (Some("chunk"), Some(flow), Some(tid));
        self.push(&Event { ph, name: "chunk", cat, ts, pid, tid, id, bp, ..Event::default() }, ",\n", false);
    }

    fn arena(&mut self, ts: u64, used: u64) {
        let pid = Row::Saves.pid(self.at.rank);
        let args = Some(Arguments { used: Some(used), ..Arguments::default() });
        self.push(&Event { ph: "C", name: "arena", ts: Some(ts), pid, args, ..Event::default() }, ",\n", false);
    }

    fn save_event(
        &mut self,
        ph: &'static str,
        save: &BegunSave,
        ts: u64,
        arguments: Arguments<'_>,
        reserved: bool,
    ) -> bool {
        let pid = Row::Saves.pid(self.at.rank);
        self.name(Row::Saves, 0, "saves");
        let id2 = Some(Local { local: format!("{:#x}", save.id) });
        let (name, cat, tid) = (format!("save {}", save.step), Some("save"), Some(0));
        let args = Some(arguments);
        let event = Event { ph, name: &name, cat, ts: Some(ts), pid, tid, id2, args, ..Event::default() };
        self.push(&event, ",\n", reserved)
    }

    /// Writes the names of a row and of a thread in it, unless they were written before.
    fn name(&mut self, row: Row, tid: u64, thread: &str) {
        let (rank, pid) = (self.at.rank, row.pid(self.at.rank));
        if self.named.insert((pid, None)) {
            let name = row.name(rank);
            let label = format!("process {}", std::process::id());
            for (what, args) in [
                ("process_name", Arguments { name: Some(&name), ..Arguments::default() }),
                ("process_labels", Arguments { labels: Some(&label), ..Arguments::default() }),
                ("process_sort_index", Arguments { sort_index: Some(pid), ..Arguments::default() }),
            ] {
                self.push(&Event { ph: "M", name: what, pid, args: Some(args), ..Event::default() }, ",\n", false);
            }
        }
        if self.named.insert((pid, Some(tid))) {
            let args = Some(Arguments { name: Some(thread), ..Arguments::default() });
            let event = Event { ph: "M", name: "thread_name", pid, tid: Some(tid), args, ..Event::default() };
            self.push(&event, ",\n", false);
        }
    }

    /// Adds a line, if there is room. `reserved`: the line may use the reserve.
    fn push(&mut self, event: &Event<'_>, end: &str, reserved: bool) -> bool {
        if self.over && !reserved {
            return false;
        }
        if self.file.is_none() && !self.begin() {
            return false;
        }
        let before = self.buffer.len();
        if let Err(error) = serde_json::to_writer(&mut self.buffer, event) {
            self.buffer.truncate(before);
            self.fail(&error.into());
            return false;
        }
        self.buffer.extend_from_slice(end.as_bytes());
        let length = (self.buffer.len() - before) as u64;
        if !self.budget.fits(length, reserved) {
            self.buffer.truncate(before);
            if !self.over {
                tracing::warn!(bytes = self.budget.used, "the trace is full: later saves are not in it");
            }
            self.over = true;
            return false;
        }
        self.budget.used += length;
        if self.buffer.len() >= BUFFER_MAX {
            self.flush();
        }
        true
    }

    /// Creates the file and begins the array.
    fn begin(&mut self) -> bool {
        if self.over {
            return false;
        }
        match create(&self.at) {
            Ok(file) => {
                self.file = Some(file);
                self.buffer.extend_from_slice(b"[\n");
                self.budget.used += 2;
                true
            }
            Err(error) => {
                self.fail(&error);
                false
            }
        }
    }

    fn fail(&mut self, error: &io::Error) {
        if !self.over {
            tracing::warn!(%error, path = %self.at.path.display(), "the trace cannot be written");
        }
        self.over = true;
    }
}

/// Separates copies of a device: copies that were timed only by their bounds may seem to overlap, but a
/// stream makes them one by one.
fn apart(spans: &mut [Span]) {
    let mut ends: HashMap<u32, Instant> = HashMap::new();
    for span in spans {
        let Work::DeviceCopy { ordinal, .. } = span.work else { continue };
        let last = ends.entry(ordinal).or_insert(span.begin);
        span.begin = span.begin.max(*last);
        span.end = span.end.max(span.begin);
        *last = span.end;
    }
}

/// Creates the file. `trace.json` becomes `trace-rank3.json` for one of several ranks, and `trace-2.json` if
/// that file exists already.
fn create(at: &TracePath) -> io::Result<File> {
    let flags = rustix::fs::OFlags::NOFOLLOW.bits().cast_signed();
    let taken = |error: &io::Error| error.kind() == io::ErrorKind::AlreadyExists;
    if at.path.is_dir() {
        return Err(io::Error::new(io::ErrorKind::IsADirectory, "a trace is a file, and this is a directory"));
    }
    for number in 1..=FILES_MAX {
        let path = named(&at.path, (at.world > 1).then_some(at.rank), number);
        match OpenOptions::new().append(true).create_new(true).custom_flags(flags).open(path) {
            Err(error) if taken(&error) => {}
            made => return made,
        }
    }
    Err(io::Error::new(io::ErrorKind::AlreadyExists, "there are 99 traces of this name: delete some"))
}

fn named(path: &Path, rank: Option<u32>, number: u32) -> PathBuf {
    let mut name = path.file_stem().unwrap_or_default().to_owned();
    if let Some(rank) = rank {
        name.push(format!("-rank{rank}"));
    }
    if number > 1 {
        name.push(format!("-{number}"));
    }
    if let Some(extension) = path.extension() {
        name.push(".");
        name.push(extension);
    }
    path.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use super::super::{SaveTrace, Span, Work};
    use super::*;
    use crate::telemetry::Ended;

    const MS: Duration = Duration::from_millis(1);

    /// A save of `chunks` chunks that began at `at` and took 4 ms for each.
    fn save(trace: &mut TraceFile, step: u64, at: Instant, chunks: usize) {
        let (spans, arena) = (SaveTrace::new(step), 0);
        let add = |work, from: u32, to: u32, number| {
            let (begin, end, bytes, thread) = (at + from * MS, at + to * MS, 1, 7);
            assert!(spans.add(Span { work, begin, end, number, bytes, thread, arena }).is_none());
        };
        add(Work::Call, 0, 1, None);
        for chunk in 0..chunks as u32 {
            add(Work::Copy, 4 * chunk + 1, 4 * chunk + 2, Some(chunk as usize));
            add(Work::Write, 4 * chunk + 2, 4 * chunk + 4, Some(chunk as usize));
        }
        trace.begun(&BegunSave { id: step, step, at, arena });
        let mut ended = spans.end(step, at, arena).unwrap();
        ended.at = at + 4 * chunks as u32 * MS;
        trace.ended(ended, &SaveLine { step, end: Ended::Durable, ..SaveLine::default() });
    }

    fn traced(folder: &Path, budget: Budget) -> TraceFile {
        TraceFile::within(TracePath { path: folder.join("trace.json"), rank: 0, world: 1 }, budget)
    }

    fn events(path: &Path) -> Vec<serde_json::Value> {
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    }

    #[test]
    fn a_full_trace_is_a_whole_array_within_its_limit_that_ends_every_save_it_began() {
        let folder = tempfile::tempdir().unwrap();
        let mut trace = traced(folder.path(), Budget::of(40_000, 20_000, 4000));
        let start = Instant::now();
        for step in 0..1000 {
            save(&mut trace, step, start + step as u32 * 100 * MS, 6);
        }
        assert!(trace.is_over());
        trace.close();
        let path = folder.path().join("trace.json");
        let length = std::fs::metadata(&path).unwrap().len();
        assert!((35_000..=40_000).contains(&length), "{length}");
        let events = events(&path);
        let count = |ph: &str| events.iter().filter(|event| event["ph"] == ph).count();
        assert!(count("b") > 20 && count("b") == count("e"), "{} {}", count("b"), count("e"));
        assert!(count("s") > 0 && count("s") == count("f"));
        let lost = events.iter().filter(|event| event["args"]["lost"] == 12).count();
        assert!(lost > 0 && lost < count("e"), "{lost} of {} saves have no chunks", count("e"));
        assert_eq!(events.last().unwrap()["name"], "closed");
    }

    #[test]
    fn copies_of_a_device_that_were_not_timed_do_not_overlap() {
        let (at, work) = (Instant::now(), Work::DeviceCopy { ordinal: 0, error: MS });
        let span = |from, to| {
            let (number, bytes, thread, arena) = (None, 0, 0, 0);
            Span { work, begin: at + from * MS, end: at + to * MS, number, bytes, thread, arena }
        };
        let mut spans = [span(0, 5), span(2, 7), span(3, 4), span(9, 10)];
        apart(&mut spans);
        let times = spans.map(|span| [span.begin, span.end].map(|end| (end - at).as_millis()));
        assert_eq!(times, [[0, 5], [5, 7], [7, 7], [9, 10]]);
    }

    #[test]
    fn files_are_named_by_rank_and_number() {
        let of = |path: &str, rank, number| named(Path::new(path), rank, number).display().to_string();
        assert_eq!(of("a/trace.json", None, 1), "a/trace.json");
        assert_eq!(of("a/trace.json", Some(3), 1), "a/trace-rank3.json");
        assert_eq!(of("/a/b.c/trace", Some(0), 12), "/a/b.c/trace-rank0-12");
    }
}
