//! Pages whose tables name the tests that show what they say.

use super::reading::{code, is_word};

/// The names of the tests in a file.
pub fn test_names(text: &str) -> Vec<String> {
    let code = code(text);
    let marks = code.match_indices("#[test]").map(|(at, mark)| &code[at + mark.len()..]);
    // A property's test is in a macro, but has its mark and its name.
    marks.filter_map(|rest| Some(rest.split_once("fn ")?.1.chars().take_while(|&c| is_word(c)).collect())).collect()
}

/// Whether every feature that a table claims names tests, every fault a test or a reason, and every named
/// test exists.
pub fn shown(text: &str, exists: impl Fn(&str) -> bool) -> Vec<String> {
    let mut complaints = Vec::new();
    for (i, line) in text.lines().enumerate() {
        let plain = |b: u8| b == b'_' || b.is_ascii_lowercase() || b.is_ascii_digit();
        let spans = line.split('`').skip(1).step_by(2);
        let tests: Vec<_> = spans.filter(|span| span.contains('_') && span.bytes().all(plain)).collect();
        let cells: Vec<_> = line.split('|').map(str::trim).collect();
        let claimed = cells.len() > 4 && (cells[3].starts_with("yes") || cells[3].starts_with("partly"));
        if claimed && tests.is_empty() {
            complaints.push(format!("a feature without a test line={}", i + 1));
        }
        let fault = cells.len() == 7 && is_fault(cells[1]);
        let answered = ["`just ", "open", "not here"].iter().any(|word| line.contains(word));
        if fault && tests.is_empty() && !answered {
            complaints.push(format!("a fault without a test or a reason line={}", i + 1));
        }
        complaints
            .extend(tests.iter().filter(|name| !exists(name)).map(|name| format!("no test {name} line={}", i + 1)));
    }
    complaints
}

/// The identity of a fault: a letter and a number.
fn is_fault(cell: &str) -> bool {
    let number = cell.strip_prefix(|c: char| c.is_ascii_uppercase());
    number.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
}

#[test]
fn features_that_nothing_shows() {
    let count = |text: &str| shown(text, |name| name == "it_works").len();
    assert_eq!(count("| 1 | a thing | yes | `it_works` | no |\n| 2 | another | no | | yes |"), 0);
    assert_eq!(count("| 1 | a thing | yes | | no |\n| 2 | another | partly: a bit | | yes |"), 2);
    assert_eq!(count("| 1 | a thing | yes | `it_fails` | no |\nor `it_fails`, see `Catalog` and `src/id.rs`"), 2);
    let fault = |shown: &str| count(&format!("| L1 | a disk lies | a word | {shown} | a report |"));
    assert_eq!((fault("nothing"), fault("`just kill`"), fault("open: no server"), fault("`it_works`")), (1, 0, 0, 0));
    assert_eq!(test_names("#[test]\nfn a() {}\nfn b() {}\n#[test]\n#[ignore]\nfn c() {}"), ["a", "c"]);
}
