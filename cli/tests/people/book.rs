//! The commands of the book: every `console` block of `docs/book/` is run, and prints what the page shows.
//!
//! `$ ashore ...` is a command without a shell, `? 3` its exit status if that is not 0, and the rest its
//! output. `...` alone on a line is any lines, and `[..]` within one is any text. The blocks of a page share
//! a directory.

use crate::run::{Run, masked};
use std::fs;
use std::path::Path;

/// A command, where it stands, its status and what it prints.
struct Command {
    line: usize,
    words: Vec<String>,
    status: i32,
    shown: Vec<String>,
}

/// Returns the commands of a page.
fn commands(page: &str) -> Vec<Command> {
    let (mut commands, mut console): (Vec<Command>, _) = (Vec::new(), false);
    for (number, line) in page.lines().enumerate() {
        if line.starts_with("```") {
            console = line == "```console";
            continue;
        }
        if !console {
            continue;
        }
        if let Some(command) = line.strip_prefix("$ ") {
            let shell = command.find(['|', '>', '<', '$', '&', ';', '\'', '"', '\\']);
            assert_eq!(shell, None, "no shell runs line {}: {line}", number + 1);
            let mut words = command.split_whitespace().map(str::to_owned);
            assert_eq!(words.next().as_deref(), Some("ashore"), "line {}: {line}", number + 1);
            commands.push(Command { line: number + 1, words: words.collect(), status: 0, shown: Vec::new() });
            continue;
        }
        let command = commands.last_mut().unwrap_or_else(|| panic!("line {}: output before a command", number + 1));
        match line.strip_prefix("? ") {
            Some(status) => command.status = status.parse().unwrap(),
            None => command.shown.push(line.to_owned()),
        }
    }
    commands
}

/// True when the lines are what is shown.
fn fits(shown: &[String], lines: &[&str]) -> bool {
    match (shown, lines) {
        ([any, rest @ ..], _) if any == "..." => (0..=lines.len()).any(|skip| fits(rest, &lines[skip..])),
        ([one, rest @ ..], [line, lines @ ..]) => line_fits(one, line) && fits(rest, lines),
        ([], lines) => lines.is_empty(),
        _ => false,
    }
}

fn line_fits(shown: &str, line: &str) -> bool {
    match shown.split_once("[..]") {
        None => shown == line,
        Some((before, after)) => line.strip_prefix(before).is_some_and(|rest| {
            let ends = rest.char_indices().map(|(at, _)| at).chain([rest.len()]);
            ends.into_iter().any(|at| line_fits(after, &rest[at..]))
        }),
    }
}

#[test]
fn the_commands_of_the_book_print_what_it_shows() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/book");
    let (mut ran, mut faults) = (0, Vec::new());
    for page in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        if page.extension().is_none_or(|extension| extension != "md") {
            continue;
        }
        let run = Run::new([]);
        for command in commands(&fs::read_to_string(&page).unwrap()) {
            let words: Vec<&str> = command.words.iter().map(String::as_str).collect();
            let output = run.ashore(&words, 80);
            let text = String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap();
            let text = masked(&text);
            let lines: Vec<_> = text.trim_end().lines().collect();
            if output.status.code() != Some(command.status) || !fits(&command.shown, &lines) {
                let (place, words) = (page.display(), words.join(" "));
                faults.push(format!("{place}:{}: ashore {words} ({}):\n{text}", command.line, output.status));
            }
            ran += 1;
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    assert!(ran >= 10, "{ran} commands");
}

#[test]
fn output_that_a_page_does_not_show_is_noticed() {
    let shown = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
    assert!(fits(&shown("a\n...\nb [..] d"), &["a", "x", "y", "b c d"]));
    assert!(fits(&shown("...\nb"), &["b"]));
    assert!(!fits(&shown("a\n...\nb"), &["a", "b", "c"]));
    assert!(!fits(&shown("a [..] b"), &["a b"]));
    assert!(!fits(&shown("a"), &[]));
    let page = "```console\n$ ashore ls --json\n? 1\nno\n```\n```sh\n$ other\n```\n";
    let found = commands(page);
    assert_eq!((found.len(), found[0].status, &*found[0].shown), (1, 1, &["no".to_owned()][..]));
    assert!(std::panic::catch_unwind(|| commands("```console\n$ ashore ls | head\n```")).is_err());
}
