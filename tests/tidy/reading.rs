//! Parses enough of Rust to tell code from comments and literals.

pub fn is_word(c: char) -> bool {
    c == '_' || c.is_ascii_alphanumeric()
}

/// The offsets of a word in the text, as a word.
pub fn words<'t>(text: &'t str, word: &'t str) -> impl Iterator<Item = usize> + use<'t> {
    text.match_indices(word)
        .map(|(at, _)| at)
        .filter(move |&at| !text[..at].ends_with(is_word) && !text[at + word.len()..].starts_with(is_word))
}

/// The source with comments and literals blanked, line by line as it was.
pub fn code(source: &str) -> String {
    let s: Vec<char> = source.chars().collect();
    let find = |from: usize, end: &[char]| {
        let at = s[from.min(s.len())..].windows(end.len()).position(|w| w == end);
        at.map_or(s.len(), |at| from + at + end.len())
    };
    let (mut out, mut i) = (String::with_capacity(source.len()), 0);
    while i < s.len() {
        let fresh = i == 0 || !is_word(s[i - 1]) || "bc".contains(s[i - 1]) && (i == 1 || !is_word(s[i - 2]));
        let end = match s[i..] {
            ['/', '/', ..] => find(i, &['\n']) - 1,
            ['/', '*', ..] => end_of_comment(&s, i),
            ['"', ..] => end_of_string(&s, i, '"'),
            ['\'', '\\', ..] | ['\'', _, '\'', ..] => end_of_string(&s, i, '\''),
            ['r', '"' | '#', ..] if fresh => {
                let hashes = s[i + 1..].iter().take_while(|&&c| c == '#').count();
                let close: Vec<char> = std::iter::once('"').chain(std::iter::repeat_n('#', hashes)).collect();
                if s.get(i + 1 + hashes) == Some(&'"') { find(i + 2 + hashes, &close) } else { i }
            }
            _ => i,
        };
        if end == i {
            out.push(s[i]);
            i += 1;
        }
        out.extend(s[i.min(end)..end].iter().map(|&c| if c == '\n' { c } else { ' ' }));
        i = i.max(end);
    }
    out
}

fn end_of_comment(s: &[char], start: usize) -> usize {
    let (mut depth, mut i) = (0, start);
    while i < s.len() {
        match s[i..] {
            ['/', '*', ..] => (depth, i) = (depth + 1, i + 2),
            ['*', '/', ..] => (depth, i) = (depth - 1, i + 2),
            _ => i += 1,
        }
        if depth == 0 {
            break;
        }
    }
    i
}

fn end_of_string(s: &[char], start: usize, quote: char) -> usize {
    let mut i = start + 1;
    while i < s.len() && s[i] != quote {
        i += if s[i] == '\\' { 2 } else { 1 };
    }
    (i + 1).min(s.len())
}

/// Code with its test modules blanked.
pub fn without_tests(code: &str) -> String {
    let lines: Vec<&str> = code.lines().collect();
    let (mut out, mut inside) = (String::new(), false);
    for (i, line) in lines.iter().enumerate() {
        let for_tests =
            line.starts_with("#[cfg(") && words(line, "test").next().is_some() && !line.contains("not(test");
        inside |=
            for_tests && lines[i + 1..].iter().find(|l| !l.starts_with("#[")).is_some_and(|l| l.starts_with("mod "));
        out.push_str(if inside { "" } else { line });
        out.push('\n');
        inside &= *line != "}" && !(line.starts_with("mod ") && line.ends_with(';'));
    }
    out
}

#[test]
fn comments_and_literals_are_not_code() {
    assert_eq!(code("a // b\n'c' 'd \"e\\\"f\" g"), "a     \n    'd        g");
    assert_eq!(code("br#\"x\"y\"# z /* /* */ */ r#type"), "b         z             r#type");
}
