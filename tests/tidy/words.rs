//! Plain words, and comments that fit a screen.

/// Columns that a line of a comment has at most.
const COLUMNS: usize = 110;

/// Words that hide who does what, and what the glossary in ARCHITECTURE.md has replaced.
const BANNED: [&str; 18] = [
    "whoever",
    "nobody",
    "nobody's",
    "somebody",
    "somebody's",
    "comes home",
    "come home",
    "goes home",
    "go home",
    "sends home",
    "set aside",
    "sets aside",
    "copied aside",
    "let go",
    "lets go",
    "flights",
    "flying",
    "parked",
];

/// The files that name these words as words.
const EXEMPT: [&str; 2] = ["tests/tidy/words.rs", "docs/api.txt"];

pub fn plain(path: &str, text: &str) -> Vec<String> {
    let lines = text.lines().enumerate().filter(|_| !EXEMPT.contains(&path));
    let found = |line: &str| {
        let line = line.to_ascii_lowercase();
        let alone = |at: usize, word: &str| {
            let word_like = |c: char| c == '_' || c.is_ascii_alphanumeric();
            !line[..at].ends_with(word_like) && !line[at + word.len()..].starts_with(word_like)
        };
        BANNED.iter().find(|word| line.match_indices(**word).any(|(at, _)| alone(at, word))).copied()
    };
    lines.filter_map(|(i, line)| Some(format!("\"{}\" line={}", found(line)?, i + 1))).collect()
}

/// Tables, and code in documentation, may be as wide as they are.
pub fn columns(text: &str) -> Vec<String> {
    let mut fenced = false;
    let mut complaints = Vec::new();
    for (i, line) in text.lines().enumerate() {
        let Some(comment) = line.trim_start().strip_prefix("//") else {
            fenced = false;
            continue;
        };
        let comment = comment.trim_start_matches(['/', '!']).trim_start();
        if comment.starts_with("```") {
            fenced = !fenced;
        } else if !fenced && !comment.starts_with('|') && line.chars().count() > COLUMNS {
            complaints.push(format!("a comment of more than {COLUMNS} columns line={}", i + 1));
        }
    }
    complaints
}

#[test]
fn words_that_hide_who_does_what() {
    let count = |text| plain("src/save.rs", text).len();
    assert_eq!(count("// Whoever waits.\nlet nobody_else = 1;\n\"nobody's\"\n// slabs that\n// come home"), 3);
    assert_eq!(count("// The stager waits.\nlet aside_from = 1; // homecoming"), 0);
    assert_eq!(plain("tests/tidy/words.rs", "// nobody").len(), 0);
}

#[test]
fn comments_that_are_too_wide() {
    let wide = "x".repeat(COLUMNS);
    assert_eq!(
        columns(&format!("// {wide}\n/// | {wide} |\n/// ```\n/// {wide}\n/// ```\n    //! {wide}\n{wide}")).len(),
        2
    );
}
