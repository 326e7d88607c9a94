//! Checks the source where the compiler does not: floors, lengths, notes on `unsafe`, paths in the
//! documentation.
//!
//! Each rule is a function from text to complaints, so that the tests at the end can show that it complains.

#[path = "tidy/words.rs"]
mod plain_words;
#[path = "tidy/reading.rs"]
mod reading;
#[path = "tidy/shown.rs"]
mod shown;

use reading::{code, is_word, without_tests, words};
use shown::{shown, test_names};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Imports go down only, or sideways where the floor allows it. `lib.rs`, `testing` and tests may import
/// anything; nothing else imports `testing`.
const FLOORS: [&[&str]; 6] = [
    &[
        "call_thread",
        "completion",
        "digest",
        "error",
        "fork",
        "guard",
        "id",
        "mutant",
        "outcome",
        "own_threads",
        "settings",
        "state",
        "sync",
        "telemetry",
        "thread",
        "ticket",
        "tries",
        "wire",
    ],
    &["delta", "format", "memory", "plan"],
    &["device", "ranks", "storage"],
    &["commit", "staging", "writer"],
    &["catalog", "chain", "checkpoint", "executor", "internal", "restore", "save", "scope", "tiers"],
    &["adapters", "compat", "sigterm"],
];

/// On these floors modules do not import their neighbours.
const APART: [usize; 2] = [2, 3];

/// The only files of the library with unsafe code. Each opens with its safety argument.
const ISLANDS: &[&str] = &[
    "src/adapters/cudarc.rs",
    "src/device/copy_queue.rs",
    "src/device/cuda/auto.rs",
    "src/device/cuda/driver/batch.rs",
    "src/device/cuda/driver/context.rs",
    "src/device/cuda/driver/functions.rs",
    "src/device/cuda/driver/library.rs",
    "src/device/cuda/driver/owned.rs",
    "src/device/cuda/driver/proof.rs",
    "src/device/cuda/fences.rs",
    "src/device/cuda/gpu.rs",
    "src/device/cuda/kernels.rs",
    "src/device/cuda/copy_streams.rs",
    "src/device/cuda/late_copy.rs",
    "src/device/cuda/loaded.rs",
    "src/device/cuda/upload.rs",
    "src/device/cuda/mod.rs",
    "src/device/cuda/queue.rs",
    "src/device/cuda/table.rs",
    "src/device/cuda/self_test.rs",
    "src/device/cuda/waits.rs",
    "src/device/host.rs",
    "src/device/load_queue.rs",
    "src/executor/builder.rs",
    "src/executor/scope.rs",
    "src/fork.rs",
    "src/memory/arena.rs",
    "src/memory/mapping.rs",
    "src/memory/slab.rs",
    "src/restore/device.rs",
    "src/restore/strided.rs",
    "src/sigterm/handler.rs",
    "src/staging/capture.rs",
    "src/staging/enqueue.rs",
    "src/state/host.rs",
    "src/state/promised.rs",
    "src/state/source.rs",
    "src/state/strided.rs",
    "src/storage/local/linux.rs",
    "src/storage/local/uring.rs",
    "src/testing/late.rs",
    "src/thread/priority.rs",
    "src/thread/signals.rs",
];

/// The only files that may make things durable: the one that decides to, and below it the seam of system
/// calls.
const DURABLE: [&str; 4] = [
    "src/storage/local/durable.rs",
    "src/storage/local/linux.rs",
    "src/storage/local/sys.rs",
    "src/storage/local/uring.rs",
];

/// Names that say nothing about what is in a module.
const EMPTY_NAMES: [&str; 10] =
    ["common", "helper", "helpers", "manager", "misc", "service", "types", "util", "utils", "utilities"];

const LINES_MAX: usize = 600;
const EXAMPLE_LINES_MAX: usize = 60;

#[test]
fn imports_go_down_only() {
    let lib = Tree::read().text("src/lib.rs");
    no_complaints("src", "rs", |path, text| floors(path, text, &lib));
}

#[test]
fn files_are_short_and_ascii() {
    for kind in ["rs", "py", "sh", "toml", "cu"] {
        no_complaints("", kind, |_, text| ascii(text).chain(length(text, LINES_MAX)).collect());
    }
}

#[test]
fn unsafe_code_stays_on_its_islands_and_says_why_it_is_sound() {
    no_complaints("", "rs", safety_notes);
    no_complaints("src", "rs", islands);
}

#[test]
fn one_file_decides_what_is_fsynced() {
    no_complaints("src", "rs", fsync);
}

#[test]
fn one_file_catches_panics() {
    no_complaints("src", "rs", panics);
}

#[test]
fn tests_say_on_stderr_what_they_leave_out() {
    no_complaints("", "rs", left_out);
}

#[test]
fn modules_are_named_for_what_they_hold() {
    no_complaints("", "rs", names);
}

#[test]
fn comments_and_documents_use_plain_words() {
    for kind in ["rs", "md", "py", "sh", "toml", "cu", "h", "html", "css"] {
        no_complaints("", kind, plain_words::plain);
    }
}

#[test]
fn comments_fit_a_screen() {
    no_complaints("", "rs", |_, text| plain_words::columns(text));
}

#[test]
fn examples_are_numbered_and_short() {
    no_complaints("examples", "rs", |path, text| numbered(path).chain(length(text, EXAMPLE_LINES_MAX)).collect());
}

#[test]
fn features_are_explained() {
    no_complaints("", "toml", |_, text| features(text));
}

#[test]
fn documentation_names_files_that_exist() {
    let tree = Tree::read();
    no_complaints("", "md", |path, text| paths(path, text, |wanted| tree.root.join(wanted).exists()));
}

#[test]
fn features_name_the_tests_that_show_them() {
    let tree = Tree::read();
    let sources = tree.files.iter().filter(|file| file.ends_with(".rs")).map(|file| tree.text(file));
    let tests: BTreeSet<String> = sources.flat_map(|text| test_names(&text)).collect();
    let pages = ["docs/features.md", "docs/faults.md", "docs/security.md"];
    let complaints: Vec<_> =
        pages.iter().flat_map(|page| shown(&tree.text(page), |name| tests.contains(name))).collect();
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

/// The files of the repository, without what builds leave behind.
struct Tree {
    root: PathBuf,
    files: Vec<String>,
}

impl Tree {
    fn read() -> Self {
        let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
        let (mut files, mut folders) = (Vec::new(), vec![root.clone()]);
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
                let (path, name) = (entry.path(), entry.file_name());
                let left_behind = ["target", "corpus", "artifacts", "gpu-kit", "proptest-regressions"];
                if name.to_string_lossy().starts_with('.') || left_behind.iter().any(|l| name == *l) {
                    continue;
                } else if entry.file_type().unwrap().is_dir() {
                    folders.push(path);
                } else {
                    files.push(path.strip_prefix(&root).unwrap().to_str().unwrap().to_owned());
                }
            }
        }
        files.sort();
        Self { root, files }
    }

    fn text(&self, path: &str) -> String {
        std::fs::read_to_string(self.root.join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
    }
}

/// Runs a rule over every file with this extension in a folder.
fn no_complaints(folder: &str, extension: &str, rule: impl Fn(&str, &str) -> Vec<String>) {
    let tree = Tree::read();
    let chosen = tree
        .files
        .iter()
        .filter(|f| Path::new(f).starts_with(folder) && Path::new(f).extension().is_some_and(|e| e == extension));
    let complaints: Vec<_> =
        chosen.flat_map(|f| rule(f, &tree.text(f)).into_iter().map(move |c| format!("{f}: {c}"))).collect();
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

// The rules.

fn floors(path: &str, text: &str, lib: &str) -> Vec<String> {
    let module: Vec<&str> = path["src/".len()..].trim_end_matches(".rs").trim_end_matches("/mod").split('/').collect();
    let from = module[0];
    if ["lib", "testing"].contains(&from) || module.ends_with(&["tests"]) {
        return Vec::new();
    }
    let Some(floor) = floor_of(from) else { return vec![format!("module {from} has no floor")] };
    let exported = exports(&code(lib));
    let mut complaints = Vec::new();
    for (line, name, sure) in imports(&without_tests(&code(text)), module.len()) {
        let name = exported.get(&name).cloned().unwrap_or(name);
        let complaint = match floor_of(&name) {
            Some(to) if to > floor => format!("{from} (floor {floor}) imports {name} (floor {to})"),
            Some(to) if to == floor && APART.contains(&to) && name != from => {
                format!("{from} imports its neighbour {name}")
            }
            None if name == "testing" => format!("{from} imports testing"),
            None if sure && name.starts_with(|c: char| c.is_ascii_lowercase()) => format!("module {name} has no floor"),
            _ => continue,
        };
        complaints.push(format!("{complaint} line={line}"));
    }
    complaints
}

fn floor_of(module: &str) -> Option<usize> {
    FLOORS.iter().position(|floor| floor.contains(&module))
}

/// Item to module, for what the crate's root exports.
fn exports(lib: &str) -> BTreeMap<String, String> {
    let uses = lib.split(';').filter_map(|statement| statement.split_once("use ")).map(|(_, used)| used.trim());
    let mut exported = BTreeMap::new();
    for (module, items) in uses.filter_map(|used| used.split_once("::")) {
        for item in items.split(|c: char| !is_word(c)).filter(|i| !i.is_empty()) {
            exported.insert(item.to_owned(), module.to_owned());
        }
    }
    exported
}

/// The names directly below the crate's root: line, name, and whether the path surely starts at the root
/// (`super` may start in a module inside the file). `depth` is the number of modules that the file is below
/// the root.
fn imports(code: &str, depth: usize) -> Vec<(usize, String, bool)> {
    let mut found = Vec::new();
    for (at, start) in words(code, "crate").map(|at| (at, at)).chain(words(code, "super").map(|at| (at, at))) {
        let mut rest = &code[start..];
        let sure = rest.starts_with("crate");
        if !sure {
            if code[..start].ends_with("super::") {
                continue;
            }
            let ups = std::iter::successors(Some(rest), |r| r.strip_prefix("super::")).count() - 1;
            if ups < depth {
                continue;
            }
            rest = &rest["super::".len() * (ups - 1)..];
        }
        let Some(rest) = rest["crate".len()..].strip_prefix("::") else { continue };
        let line = code[..at].matches('\n').count() + 1;
        found.extend(first_names(rest).into_iter().map(|name| (line, name, sure)));
    }
    found
}

/// The first name of a path, or of each path in a group.
fn first_names(rest: &str) -> Vec<String> {
    let word = |s: &str| s.trim_start().chars().take_while(|&c| is_word(c)).collect::<String>();
    let Some(group) = rest.strip_prefix('{') else { return vec![word(rest)] };
    let (mut names, mut depth, mut fresh) = (Vec::new(), 0, true);
    for (i, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' => fresh = depth == 0,
            c if is_word(c) && fresh => {
                names.push(word(&group[i..]));
                fresh = false;
            }
            _ => {}
        }
    }
    names
}

fn length(text: &str, max: usize) -> impl Iterator<Item = String> {
    let lines = text.lines().count();
    (lines > max).then(|| format!("{lines} lines, more than {max}")).into_iter()
}

fn ascii(text: &str) -> impl Iterator<Item = String> {
    let odd = text.lines().enumerate().filter(|(_, line)| !line.is_ascii());
    odd.map(|(i, line)| format!("not ascii line={} text={line:?}", i + 1))
}

fn safety_notes(_: &str, text: &str) -> Vec<String> {
    let (code, lines): (_, Vec<&str>) = (code(text), text.lines().map(str::trim).collect());
    let mut complaints = Vec::new();
    for (i, line) in code.lines().enumerate() {
        let Some(at) = words(line, "unsafe").next() else { continue };
        // A function pointer's type promises nothing and does nothing.
        let rest = line[at + "unsafe".len()..].trim_start();
        if rest.starts_with("fn(") || rest.starts_with("extern") && rest.contains("fn(") {
            continue;
        }
        // The trait states the requirements on the caller.
        if line.trim_start().starts_with("unsafe fn") && implements_a_trait(&code, i) {
            continue;
        }
        let noted = |line: &str| line.contains("SAFETY:") || line.contains("# Safety");
        let mut above = lines[..i].iter().rev().take_while(|l| {
            let apart = l.starts_with("//") || l.starts_with("#[");
            apart || !(l.is_empty() || l.ends_with([';', '{', '}', ',']))
        });
        if !noted(lines[i]) && !above.any(|l| noted(l)) {
            complaints.push(format!("unsafe without a safety note line={}", i + 1));
        }
    }
    complaints
}

/// Whether the line is in an `impl` of a trait.
fn implements_a_trait(code: &str, line: usize) -> bool {
    let lines: Vec<&str> = code.lines().collect();
    let indent = |l: &str| l.len() - l.trim_start().len();
    let mut above = lines[..line].iter().rev().filter(|l| !l.trim().is_empty());
    let block = above.find(|l| indent(l) < indent(lines[line]));
    block.is_some_and(|l| words(l, "impl").next().is_some() && words(l, "for").next().is_some())
}

fn islands(path: &str, text: &str) -> Vec<String> {
    let mut complaints = Vec::new();
    let code = without_tests(&code(text));
    // A trait may declare what its implementations must be careful with.
    let declared = |at: usize| code[at..].find(['{', ';']).is_some_and(|end| code[at + end..].starts_with(';'));
    if !path.ends_with("/tests.rs") && words(&code, "unsafe").any(|at| !declared(at)) {
        if !ISLANDS.contains(&path) {
            complaints.push("unsafe code outside the islands".into());
        }
        let opening = text.lines().take_while(|line| line.starts_with("//!"));
        if !opening.into_iter().any(|line| line.starts_with("//! # Safety argument")) {
            complaints.push("an island must open with `# Safety argument`".into());
        }
    }
    complaints
}

fn fsync(path: &str, text: &str) -> Vec<String> {
    if DURABLE.contains(&path) || path.starts_with("src/testing/") {
        return Vec::new();
    }
    let code = without_tests(&code(text));
    let calls = ["fsync", "fdatasync", "sync_all", "sync_data", "syncfs", "sync_file_range"].into_iter();
    let calls = calls.flat_map(|call| words(&code, call).map(move |at| (call, at)));
    let calls = calls.filter(|&(_, at)| !code[..at].ends_with("fn "));
    calls.map(|(call, at)| format!("{call} line={}", code[..at].matches('\n').count() + 1)).collect()
}

fn panics(path: &str, text: &str) -> Vec<String> {
    // The ranks of the simulation die by panics.
    let simulated = path.starts_with("src/commit/several/simulation/");
    if path == "src/guard.rs" || path.starts_with("src/testing/") || simulated {
        return Vec::new();
    }
    let code = without_tests(&code(text));
    words(&code, "catch_unwind")
        .map(|at| format!("catches a panic line={}", code[..at].matches('\n').count() + 1))
        .collect()
}

/// The test runner swallows what passing tests print, but not what they write to stderr themselves.
fn left_out(_: &str, text: &str) -> Vec<String> {
    let code = code(text);
    let swallowed = text.lines().zip(code.lines()).enumerate().filter(|(_, (line, code))| {
        line.contains("\"left out: ")
            && ["println", "eprintln", "print"].iter().any(|p| words(code, p).next().is_some())
    });
    swallowed.map(|(i, _)| format!("cargo hides this: write it to stderr line={}", i + 1)).collect()
}

fn names(path: &str, text: &str) -> Vec<String> {
    let path = path.trim_end_matches(".rs").split('/').map(str::to_owned);
    let code = code(text);
    let inline = words(&code, "mod").filter_map(|at| code[at..].split_whitespace().nth(1));
    let inline = inline.map(|name| name.trim_end_matches(';').to_owned()).collect::<Vec<_>>();
    path.chain(inline).filter(|n| EMPTY_NAMES.contains(&n.as_str())).map(|n| format!("a module named {n}")).collect()
}

fn numbered(path: &str) -> impl Iterator<Item = String> {
    let number = Path::new(path).file_name().and_then(|n| n.to_str()).and_then(|n| n.split_once('_')).map(|(n, _)| n);
    let good = number.is_some_and(|n| n == "from" || (n.len() == 2 && n.bytes().all(|b| b.is_ascii_digit())));
    (!good).then(|| "an example is named NN_what_it_shows.rs, or from_system.rs".to_owned()).into_iter()
}

fn features(text: &str) -> Vec<String> {
    let (mut inside, mut explained, mut complaints) = (false, false, Vec::new());
    for line in text.lines().map(str::trim) {
        if line.starts_with('[') {
            inside = line == "[features]";
        } else if let (true, false, Some((name, _))) = (inside, explained, line.split_once('='))
            && name.trim() != "default"
        {
            complaints.push(format!("feature {} has no comment above it", name.trim()));
        }
        explained = line.starts_with('#');
    }
    complaints
}

/// Paths in links and in code spans, checked where they plainly belong to this repository.
fn paths(path: &str, text: &str, exists: impl Fn(&Path) -> bool) -> Vec<String> {
    let folder = Path::new(path).parent().unwrap_or(Path::new(""));
    let mut complaints = Vec::new();
    let mut fenced = false;
    for (i, line) in text.lines().enumerate() {
        fenced ^= line.trim_start().starts_with("```");
        if fenced {
            continue;
        }
        let links = line.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        let links =
            links.filter(|l| !l.contains("://") && !l.starts_with('#')).map(|l| l.split('#').next().unwrap_or(l));
        let spans = line.split('`').skip(1).step_by(2).filter(|s| is_path(s));
        for wanted in links.chain(spans) {
            let plain = Path::new(wanted.trim_end_matches('/'));
            if ![folder.join(plain), plain.to_owned(), Path::new("src").join(plain)].iter().any(|p| exists(p)) {
                complaints.push(format!("names {wanted}, which does not exist line={}", i + 1));
            }
        }
    }
    complaints
}

fn is_path(span: &str) -> bool {
    let tops = ["src", "tests", "docs", "cli", "examples", "benches", "fuzz", "kernels", "fakecuda", ".ci"];
    let plain = span.chars().all(|c| c.is_ascii_alphanumeric() || "./_-".contains(c));
    let source = [".rs", ".py", ".sh", ".cu"].iter().any(|e| span.ends_with(e)) && !span.starts_with('.');
    let below = span.split_once('/').is_some_and(|(top, _)| tops.contains(&top));
    plain && (source || below || span.ends_with(".md"))
}

/// Each rule complains about its target, and about nothing near it.
mod rules_can_fail {
    use super::*;

    fn floor(path: &str, text: &str) -> usize {
        floors(path, text, "mod error;\npub use error::{Error, Result};\npub use executor::CheckpointExecutor;").len()
    }

    #[test]
    fn imports_that_go_up() {
        assert_eq!(floor("src/staging/fence.rs", "use crate::{error::Error, plan::{self, Chunk}, device};"), 0);
        assert_eq!(floor("src/staging/fence.rs", "use crate::{device, writer::{Pool, Task}};"), 1);
        assert_eq!(floor("src/staging/fence.rs", "fn f() { super::super::executor::go() }"), 1);
        assert_eq!(floor("src/staging/fence.rs", "use super::gather; use super::super::plan;"), 0);
        assert_eq!(floor("src/staging/mod.rs", "use super::{plan, commit};"), 1);
        assert_eq!(floor("src/plan/mod.rs", "fn f() -> crate::Result<crate::CheckpointExecutor> {}"), 1);
        assert_eq!(floor("src/device/host.rs", "use crate::storage::Storage;"), 1);
        assert_eq!(floor("src/save.rs", "use crate::executor; use crate::testing::LateDevice;"), 1);
        assert_eq!(floor("src/plan/mod.rs", "#[cfg(test)]\nmod tests {\n    use crate::executor;\n}\n"), 0);
        assert_eq!(floor("src/plan/mod.rs", "#[cfg(test)]\nmod tests {\n}\nuse crate::executor;"), 1);
        assert_eq!(floor("src/plan/mod.rs", "// use crate::executor;\nconst A: &str = \"crate::executor\";"), 0);
        assert_eq!(floor("src/plan/mod.rs", "use crate::novelty::X;"), 1);
        assert_eq!(floor("src/novelty.rs", ""), 1);
        assert_eq!(floor("src/staging/tests.rs", "use crate::testing::LateDevice;"), 0);
    }

    #[test]
    fn unsafe_without_a_note() {
        let count = |text| safety_notes("", text).len();
        assert_eq!(count("// SAFETY: sound.\nunsafe impl Send for A {}"), 0);
        assert_eq!(count("// SAFETY: sound.\nlet a =\n    unsafe { f() };"), 0);
        assert_eq!(count("// SAFETY: sound.\nlet a = f();\nunsafe { f() };"), 1);
        assert_eq!(count("/// # Safety\n/// Do not.\n#[inline]\npub unsafe fn f() {}"), 0);
        assert_eq!(count("pub unsafe fn f() {}"), 1);
        assert_eq!(count("impl A for B {\n    fn f() {}\n\n    unsafe fn g() {}\n}"), 0);
        assert_eq!(count("impl B {\n    unsafe fn g() {}\n}"), 1);
        assert_eq!(count("#![deny(unsafe_code)]\n// unsafe\nlet unsafety = \"unsafe\";\ntype F = unsafe fn();"), 0);
        assert_eq!(count("type F = unsafe extern \"C\" fn();"), 0);
        assert_eq!(count("unsafe extern \"C\" fn f() {}"), 1);
        assert_eq!(islands("src/plan/mod.rs", "//! # Safety argument\nunsafe {}").len(), 1);
        assert_eq!(islands("src/plan/mod.rs", "trait A {\n    unsafe fn f();\n}").len(), 0);
        assert_eq!(islands("src/state/source.rs", "//! Sources.\nunsafe {}").len(), 1);
        assert_eq!(islands("src/state/source.rs", "//! # Safety argument\nunsafe {}").len(), 0);
    }

    #[test]
    fn fsync_elsewhere() {
        let text = "fn fsync(&self) { self.sys.fsync(fd) }\nlet f = rustix::fs::fdatasync;";
        assert_eq!(fsync("src/commit/mod.rs", text).len(), 2);
        assert_eq!(fsync("src/storage/local/durable.rs", text).len(), 0);
    }

    #[test]
    fn panics_caught_elsewhere() {
        let text = "fn f() { std::panic::catch_unwind(g) }";
        assert_eq!(panics("src/save.rs", text).len(), 1);
        assert_eq!(panics("src/guard.rs", text).len(), 0);
    }

    #[test]
    fn swallowed_notes() {
        assert_eq!(left_out("", "    println!(\"left out: {why}\");").len(), 1);
        assert_eq!(left_out("", "let _ = writeln!(std::io::stderr(), \"left out: {why}\");").len(), 0);
    }

    #[test]
    fn lengths_letters_and_names() {
        assert_eq!(length("a\nb\n", 1).count() + length("a\nb\n", 2).count(), 1);
        assert_eq!(ascii("a\u{2014}b\nc").count(), 1);
        assert_eq!(names("src/util/mod.rs", "mod helpers;\nmod tests {}\npub mod types {").len(), 3);
        assert_eq!(numbered("examples/01_save.rs").chain(numbered("examples/save_1.rs")).count(), 1);
        assert_eq!(features("[features]\ndefault = []\n# Why.\na = []\nb = []\n[other]\nc = 1").len(), 1);
    }

    #[test]
    fn paths_that_lead_nowhere() {
        let there = |wanted: &Path| ["src/plan/mod.rs", "docs/format.md"].iter().any(|p| Path::new(p) == wanted);
        let count = |text| paths("docs/durability.md", text, there).len();
        assert_eq!(count("see `src/plan/mod.rs`, `plan/mod.rs`, [it](format.md#x), [web](https://a/b.md), `a.b()`"), 0);
        assert_eq!(count("see `src/plan/gone.rs`\n[gone](gone.md)\n`gone.rs` `step-1/manifest.json`"), 3);
    }
}
