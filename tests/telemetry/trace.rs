//! The trace of an executor, read as JSON. `just trace` opens traces in Perfetto's engine, too.

use super::{LONG, executor, save, state};
use ashore::ranks::{Member, SharedDirectory};
use ashore::{Builder, CheckpointExecutor, HostTensor, StateDict};
use serde_json::Value;
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

const CHUNK: usize = 1 << 20;

fn traced(root: &Path, trace: &Path) -> Builder {
    let builder = CheckpointExecutor::builder(root).arena(8 * CHUNK as u64).chunk(CHUNK as u64).keep_last(2);
    // Saves of one state would share its file from the third on.
    builder.links(false).trace(trace.to_str().unwrap())
}

/// Saves some chunks: 5 of tensors and a header.
fn save_chunks(executor: &CheckpointExecutor, step: u64) {
    let save = executor.save(step, state(5 * CHUNK)).unwrap();
    executor.fence().unwrap();
    save.wait(LONG).unwrap();
}

/// The events of a trace that has been closed, which is one array of whole lines.
fn events(trace: &Path) -> Vec<Value> {
    let text = fs::read_to_string(trace).unwrap();
    assert!(text.starts_with("[\n{") && text.ends_with("}\n]\n"), "{text:.200}");
    let whole: Vec<Value> = serde_json::from_str(&text).unwrap();
    assert_eq!(whole.len(), text.lines().count() - 2, "one event a line");
    whole
}

fn number(event: &Value, field: &str) -> u64 {
    event[field].as_u64().unwrap_or_else(|| panic!("{field} of {event}"))
}

/// Begin and end of each save, by step.
fn saves(events: &[Value]) -> HashMap<u64, (u64, u64)> {
    let ends = |ph: &str| -> HashMap<u64, u64> {
        let of = events.iter().filter(|event| event["ph"] == ph);
        of.map(|event| (number(&event["args"], "step"), number(event, "ts"))).collect()
    };
    let (begun, ended) = (ends("b"), ends("e"));
    begun.iter().map(|(step, begin)| (*step, (*begin, ended[step]))).collect()
}

fn slices<'a>(events: &'a [Value], name: &str, step: u64) -> Vec<&'a Value> {
    let of = |event: &&Value| event["ph"] == "X" && event["name"] == name && event["args"]["step"] == step;
    events.iter().filter(of).collect()
}

/// Checks what viewers rely on: every slice of a save lies in it, slices of one thread are apart or nested,
/// and each flow has both ends.
fn hold_together(events: &[Value]) {
    let saves = saves(events);
    let mut rows: HashMap<(u64, u64), Vec<(u64, u64)>> = HashMap::new();
    for event in events.iter().filter(|event| event["ph"] == "X") {
        let (begin, end) = (number(event, "ts"), number(event, "ts") + number(event, "dur"));
        let (from, to) = saves[&number(&event["args"], "step")];
        let in_program = ["save", "fence"].contains(&event["name"].as_str().unwrap());
        assert!(from <= begin && (end <= to || in_program), "{event} of {from} to {to}");
        rows.entry((number(event, "pid"), number(event, "tid"))).or_default().push((begin, end));
    }
    for (row, slices) in &mut rows {
        slices.sort_by_key(|(begin, end)| (*begin, std::cmp::Reverse(*end)));
        let mut open: Vec<u64> = Vec::new();
        for (begin, end) in slices {
            while open.last().is_some_and(|last| last <= begin) {
                open.pop();
            }
            assert!(open.last().is_none_or(|last| *end <= *last), "{row:?}: {begin} to {end} in {open:?}");
            open.push(*end);
        }
    }
    let flows = |ph: &str| -> Vec<u64> {
        let mut ids: Vec<_> = events.iter().filter(|event| event["ph"] == ph).map(|e| number(e, "id")).collect();
        ids.sort_unstable();
        ids
    };
    assert_eq!(flows("s"), flows("f"));
    for event in events {
        let id2 = event["ph"] == "b" || event["ph"] == "e";
        assert_eq!(event["id2"]["local"].is_string(), id2, "a plain id is one of all processes: {event}");
    }
}

#[test]
fn each_save_is_in_the_trace_with_its_copies_and_writes_inside_it() {
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("trace.json");
    let executor = traced(&folder.path().join("root"), &trace).build().unwrap();
    (1..=5).for_each(|step| save_chunks(&executor, step));
    executor.shutdown(LONG).unwrap();
    let events = events(&trace);
    hold_together(&events);
    assert_eq!(saves(&events).len(), 5);
    for step in 1..=5 {
        for (name, count) in [("save", 1), ("stage", 1), ("copy", 6), ("write", 6), ("seal", 1), ("commit", 1)] {
            assert_eq!(slices(&events, name, step).len(), count, "{name} of step {step}");
        }
        let bytes = |name| slices(&events, name, step).iter().map(|e| number(&e["args"], "bytes")).sum::<u64>();
        assert!(bytes("copy") > 5 * CHUNK as u64 && bytes("copy") == bytes("write"));
    }
    assert!(events.iter().filter(|event| event["ph"] == "s").count() >= 5, "copies of a MiB have a length");
    let names: Vec<_> = events.iter().filter(|e| e["name"] == "process_name").map(|e| &e["args"]["name"]).collect();
    for name in ["saves", "training", "copies", "disk", "commit"] {
        assert!(names.iter().any(|known| **known == format!("rank 0: {name}")), "{names:?}");
    }
    let arena = |event: &&Value| event["ph"] == "C" && event["name"] == "arena";
    assert!(events.iter().filter(arena).any(|event| number(&event["args"], "used") >= CHUNK as u64));
}

#[test]
fn a_failed_save_is_in_the_trace_with_its_reason() {
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("trace.json");
    let executor = traced(&folder.path().join("root"), &trace).build().unwrap();
    save_chunks(&executor, 1);
    executor.save(1, state(100)).unwrap().wait(LONG).unwrap_err();
    executor.shutdown(LONG).unwrap();
    let ends: Vec<_> = events(&trace).into_iter().filter(|event| event["ph"] == "e").collect();
    assert_eq!((&ends[0]["args"]["end"], &ends[1]["args"]["end"]), (&"durable".into(), &"failed".into()));
    assert!(ends[1]["args"]["why"].as_str().is_some_and(|why| !why.is_empty()), "{ends:?}");
}

#[test]
fn nothing_is_traced_unless_it_is_asked_for_and_a_trace_that_cannot_be_written_fails_no_save() {
    let folder = tempfile::tempdir().unwrap();
    let off = executor(&folder.path().join("off"));
    save(&off, 1);
    off.shutdown(LONG).unwrap();
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    let nowhere = traced(&folder.path().join("on"), &folder.path().join("missing/trace.json")).build().unwrap();
    (1..=3).for_each(|step| save_chunks(&nowhere, step));
    nowhere.shutdown(LONG).unwrap();
    assert!(!folder.path().join("missing").exists());
}

#[test]
fn executors_of_one_name_write_one_file_each_and_replace_none() {
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("trace.json");
    fs::write(&trace, "of an earlier run").unwrap();
    let [one, two] = ["one", "two"].map(|root| traced(&folder.path().join(root), &trace).build().unwrap());
    for step in 1..=3 {
        save_chunks(&one, step);
        save_chunks(&two, step);
    }
    one.shutdown(LONG).unwrap();
    two.shutdown(LONG).unwrap();
    assert_eq!(fs::read_to_string(&trace).unwrap(), "of an earlier run");
    let files = ["trace-2.json", "trace-3.json"].map(|name| events(&folder.path().join(name)));
    files.iter().for_each(|events| assert_eq!(saves(events).len(), 3));
    // Joined, as `docs/observability.md` says, they still are what viewers rely on.
    files.iter().for_each(|events| hold_together(events));
    let ids = |events: &[Value]| -> Vec<String> {
        let begun = events.iter().filter(|event| event["ph"] == "b");
        begun.map(|event| event["id2"]["local"].to_string()).collect()
    };
    assert!(ids(&files[0]).iter().all(|id| !ids(&files[1]).contains(id)));
}

#[test]
fn each_rank_writes_a_file_of_its_own_with_rows_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let (root, trace) = (folder.path().join("root"), folder.path().join("trace.json"));
    fs::create_dir(&root).unwrap();
    let train = |rank: u32| {
        let coordinator = Arc::new(SharedDirectory::new(&root, Member { rank, world: 2, local_rank: rank }).unwrap());
        let executor = traced(&root, &trace).ranks(coordinator).run("run").build().unwrap();
        let mut state = StateDict::new();
        let row = HostTensor::new(Arc::new(vec![rank as f32; 300_000]), [1, 300_000]);
        state.tensor_box("weights", [2, 300_000], [rank as usize, 0], row).unwrap();
        executor.save(1, state).unwrap().wait(LONG).unwrap();
        executor.shutdown(LONG).unwrap();
    };
    std::thread::scope(|scope| [0, 1].map(|rank| scope.spawn(move || train(rank))).map(|rank| rank.join().unwrap()));
    let of_rank = |rank: u32| events(&folder.path().join(format!("trace-rank{rank}.json")));
    let mut all = Vec::new();
    for rank in [0, 1] {
        let events = of_rank(rank);
        hold_together(&events);
        let names = events.iter().filter(|event| event["name"] == "process_name");
        names.for_each(|event| {
            assert!(event["args"]["name"].as_str().unwrap().starts_with(&format!("rank {rank}: ")), "{event}");
        });
        all.push(events.iter().map(|event| number(event, "pid")).collect::<Vec<_>>());
    }
    assert!(all[0].iter().all(|pid| !all[1].contains(pid)), "rows of two ranks are apart when files are joined");
    // Joined by the command of the documentation.
    let page = include_str!("../../docs/observability.md");
    let command = page.lines().find_map(|line| line.trim().strip_prefix('`')?.strip_suffix("`."));
    let command = command.filter(|command| command.contains("trace-rank*.json")).unwrap();
    assert!(Command::new("sh").args(["-c", command]).current_dir(folder.path()).status().unwrap().success());
    let joined: Vec<Value> =
        serde_json::from_str(&fs::read_to_string(folder.path().join("all.json")).unwrap()).unwrap();
    assert_eq!(joined.len(), all.iter().map(Vec::len).sum::<usize>());
    assert_eq!(joined, [of_rank(0), of_rank(1)].concat());
}

/// Runs the ignored test `name` in a process of its own, with `folder` in its environment.
fn process(name: &str, folder: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", name, "--test-threads", "1"]).env("ASHORE_TEST_ROOT", folder);
    command.stdout(Stdio::null());
    command
}

/// Not a test: the process that is killed. The environment alone says that it traces.
#[test]
#[ignore = "runs until it is killed, in another process"]
fn saves_until_it_is_killed() {
    let Some(folder) = std::env::var_os("ASHORE_TEST_ROOT").map(PathBuf::from) else { return };
    let executor = executor(&folder.join("root"));
    let deadline = Instant::now() + LONG;
    (1..).take_while(|_| Instant::now() < deadline).for_each(|step| save(&executor, step));
}

#[test]
fn a_killed_process_leaves_an_array_of_whole_lines_without_its_end() {
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("trace.json");
    let mut child =
        process("trace::saves_until_it_is_killed", folder.path()).env("ASHORE_TRACE", &trace).spawn().unwrap();
    let deadline = Instant::now() + LONG;
    let lines = || fs::read_to_string(&trace).map_or(0, |text| text.lines().count());
    while lines() < 500 {
        assert!(Instant::now() < deadline, "it does not trace");
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let text = fs::read_to_string(&trace).unwrap();
    let mut lines: Vec<_> = text.lines().collect();
    assert_eq!(lines.remove(0), "[");
    if !text.ends_with('\n') {
        lines.pop();
    }
    let whole = lines.iter().map(|line| serde_json::from_str(line.strip_suffix(',').unwrap()).unwrap());
    let mut whole: Vec<Value> = whole.collect();
    // The last save has not ended.
    let ended = |step: &Value| {
        lines.iter().any(|line| line.contains("\"ph\":\"e\"") && line.contains(&format!("\"step\":{step},")))
    };
    whole.retain(|event| event["args"]["step"].is_null() || ended(&event["args"]["step"]));
    assert!(saves(&whole).len() > 5);
}

/// Not a test: the process that forks.
#[test]
#[ignore = "is run in a process of its own"]
#[expect(unsafe_code, reason = "fork, and _exit in the child")]
fn forks_between_saves() {
    let Some(folder) = std::env::var_os("ASHORE_TEST_ROOT").map(PathBuf::from) else { return };
    let trace = folder.join("trace.json");
    let parent = traced(&folder.join("parent"), &trace).build().unwrap();
    save_chunks(&parent, 1);
    // SAFETY: no other thread of this process holds a lock that the child takes, and the child ends with
    // _exit.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let own = traced(&folder.join("child"), &trace).build().unwrap();
        save_chunks(&own, 1);
        own.shutdown(LONG).unwrap();
        drop(own);
        drop(parent);
        // SAFETY: ends the child without running anything of the parent's.
        unsafe { libc::_exit(0) };
    }
    let (mut status, deadline) = (0, Instant::now() + LONG);
    // SAFETY: looks for our own child.
    while unsafe { libc::waitpid(child, &mut status, libc::WNOHANG) } == 0 {
        if Instant::now() >= deadline {
            // SAFETY: ends our own child.
            unsafe { libc::kill(child, libc::SIGKILL) };
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(status, 0);
    save_chunks(&parent, 2);
    parent.shutdown(LONG).unwrap();
}

#[test]
fn a_forked_child_writes_nothing_into_the_file_of_its_parent() {
    let folder = tempfile::tempdir().unwrap();
    let status = process("trace::forks_between_saves", folder.path()).status().unwrap();
    assert!(status.success());
    let (parent, child) = (folder.path().join("trace.json"), folder.path().join("trace-2.json"));
    assert_eq!((saves(&events(&parent)).len(), saves(&events(&child)).len()), (2, 1));
    let labels = |trace: &Path| -> Vec<String> {
        let named = events(trace).into_iter().filter(|event| event["name"] == "process_labels");
        let mut all: Vec<_> = named.map(|event| event["args"]["labels"].to_string()).collect();
        all.dedup();
        all
    };
    assert_eq!((labels(&parent).len(), labels(&child).len()), (1, 1));
    assert_ne!(labels(&parent), labels(&child));
}
