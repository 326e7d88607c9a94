use super::*;
use roxmltree::{Document, Node};

const HOSTILE: &str = "</title><script>alert('1 & \"2\"')</script>\u{1}";

fn empty() -> Report<'static> {
    Report {
        title: "ashore bench save",
        command: "ashore bench save".to_owned(),
        machine: "2 cores".to_owned(),
        verdict: "undecided: no pairs".to_owned(),
        figures: Vec::new(),
        saves: Vec::new(),
        ratios: Vec::new(),
        noise: Vec::new(),
    }
}

/// Makes a save whose phases overlap like those of a real one; `slow` stretches it.
fn save(label: String, slow: f64) -> Timeline {
    let (staged, durable, bytes) = (0.61 * slow, 1.18 * slow, 536_870_912_u64);
    let phase = |name, from, to| Phase { name, from, to };
    let part = |at: f64, from: f64, to: f64| (bytes as f64 * ((at - from) / (to - from)).clamp(0.0, 1.0)) as u64;
    let samples = (0..=500).map(|i| f64::from(i) / 500.0 * durable);
    Timeline {
        label,
        phases: vec![
            phase("save call", 0.0, 0.000_41),
            phase("staging", 0.000_41, staged),
            phase("writing", 0.004, durable - 0.02),
            phase("commit", durable - 0.02, durable),
        ],
        samples: samples
            .map(|at| Sample { at, staged: part(at, 0.0, staged), written: part(at, 0.01, durable - 0.02) })
            .collect(),
        bytes,
    }
}

/// Makes rounds that vary, but not randomly.
fn many(rounds: u32) -> Report<'static> {
    let scatter = |i: u32| f64::from(i.wrapping_mul(0x9e37_79b1) >> 16) / 65536.0;
    let around = |middle: f64, i: u32| middle + 0.09 * (scatter(i) + scatter(i + 991) + scatter(i + 7777) - 1.5);
    let figure = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    Report {
        title: "ashore bench save \u{b7} large",
        command: format!("ashore bench save --bytes 512MiB --rounds {rounds} --report report.html"),
        machine: "2 cores, 23 GiB, Linux 6.18, ext4, direct".to_owned(),
        verdict: "0.97 of the limit (0.95 to 0.99), decided".to_owned(),
        figures: vec![
            figure("Durable", "0.46 GB/s"),
            figure("Disk limit", "0.47 GB/s"),
            figure("Save call, median", "0.41 ms"),
            figure("Save call, longest", "0.52 ms"),
        ],
        saves: (0..rounds).map(|i| save(format!("round {}", i + 1), 0.8 + 0.4 * scatter(i))).collect(),
        ratios: (0..rounds).map(|i| around(0.97, i)).collect(),
        noise: (0..rounds).map(|i| around(1.0, i + 500)).collect(),
    }
}

fn charts(page: &str) -> Vec<Document<'_>> {
    let parts = page.split("<svg").skip(1).filter_map(|part| part.split_once("</svg>"));
    let whole = parts.map(|(inside, _)| {
        let from = inside.as_ptr() as usize - page.as_ptr() as usize - "<svg".len();
        &page[from..from + "<svg".len() + inside.len() + "</svg>".len()]
    });
    whole.map(|svg| Document::parse(svg).expect("a chart is well-formed")).collect()
}

fn tags<'a, 'd>(chart: &'a Document<'d>, name: &'static str) -> impl Iterator<Item = Node<'a, 'd>> {
    chart.descendants().filter(move |node| node.has_tag_name(name))
}

/// Checks that all numbers of every chart are valid, and all shapes are inside it.
fn check(page: &str) {
    for chart in charts(page) {
        let size = |name| chart.root_element().attribute(name).unwrap().parse::<f64>().unwrap();
        let (width, height) = (size("width"), size("height"));
        for node in chart.descendants() {
            for (names, most) in [(["x", "x1", "x2", "cx"], width), (["y", "y1", "y2", "cy"], height)] {
                for value in names.into_iter().filter_map(|name| node.attribute(name)) {
                    assert!((0.0..=most).contains(&value.parse::<f64>().unwrap()), "{value} of {most}");
                }
            }
        }
        for text in tags(&chart, "text") {
            let at: f64 = text.attribute("x").unwrap().parse().unwrap();
            let long = text.text().unwrap().trim().chars().count() as f64 * 14.0;
            let (from, to) = match text.attribute("text-anchor") {
                Some("end") => (at - long, at),
                Some("middle") => (at - long / 2.0, at + long / 2.0),
                _ => (at, at + long),
            };
            assert!(from >= 0.0 && to <= width, "{:?} from {from} to {to}", text.text());
        }
    }
}

#[test]
fn hostile_strings_stay_text() {
    let mut report = many(3);
    report.title = HOSTILE;
    report.command = HOSTILE.to_owned();
    report.machine = HOSTILE.to_owned();
    report.verdict = HOSTILE.to_owned();
    report.figures = vec![(HOSTILE.to_owned(), HOSTILE.to_owned())];
    report.saves[0].label = HOSTILE.to_owned();
    report.saves[1].phases.push(Phase { name: "<script>", from: 0.0, to: 0.1 });
    let page = report.html();
    assert!(!page.contains("<script"));
    assert_eq!(page.matches("&lt;/title&gt;&lt;script&gt;alert").count(), 7);
    check(&page);
}

#[test]
fn a_page_needs_nothing_else() {
    let page = many(5).html();
    let own = page.replace("http://www.w3.org/2000/svg", "");
    assert!(!["http", "url(", "@import", "src=", "<script", "<link"].iter().any(|outside| own.contains(outside)));
}

#[test]
fn nothing_measured_is_a_page_too() {
    let page = empty().html();
    assert!(page.starts_with("<!DOCTYPE html>") && page.ends_with("</html>"));
    assert!(page.contains("undecided: no pairs") && !page.contains("<svg") && !page.contains("NaN"));
    let mut report = empty();
    report.saves = vec![Timeline { label: String::new(), phases: Vec::new(), samples: Vec::new(), bytes: 0 }];
    assert!(!report.html().contains("<svg"));
}

#[test]
fn the_cost_comes_first() {
    let page = many(1).html().replace(NBSP, " ");
    let lead = page.split("<p class=\"lead\">").nth(1).unwrap();
    assert!(
        lead.starts_with("A save blocks training for 410 \u{b5}s of the 944 ms until it is durable: 0.04 %."),
        "{lead}"
    );
}

#[test]
fn of_many_rounds_twelve_are_drawn_and_all_are_counted() {
    let report = many(200);
    let page = report.html();
    check(&page);
    let [phases, _, bytes, _, ratios, _] =
        charts(&page).try_into().unwrap_or_else(|_| panic!("three charts, each in two sizes"));
    let label = |rank: &str| tags(&phases, "text").filter(|t| t.text().unwrap().contains(rank)).count();
    assert_eq!(["slow \u{b7} ", "middle \u{b7} ", "fast \u{b7} "].map(label), [4, 4, 4]);
    assert_eq!(tags(&phases, "rect").count(), 12 * 4);
    assert_eq!(tags(&ratios, "circle").count(), 400);
    let points = tags(&bytes, "polyline").map(|line| line.attribute("points").unwrap().matches(',').count());
    assert!(points.into_iter().all(|n| n <= 242));
    assert!(page.len() < 500_000, "{}", page.len());
    assert!(page.contains("12 of 200 saves"));
    let mut report = report;
    report.saves.iter_mut().for_each(|save| save.label = "w".repeat(300));
    check(&report.html());
}

#[test]
fn what_no_clock_measures_is_left_out() {
    let mut report = many(2);
    let wrong = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1.0, 1e300];
    report.ratios.extend(wrong);
    report.noise.extend(wrong);
    report.saves[0].phases.extend(wrong.map(|at| Phase { name: "commit", from: at, to: at }));
    report.saves[1].phases.extend(wrong.map(|at| Phase { name: "commit", from: 0.0, to: at }));
    report.saves[1].samples.extend(wrong.map(|at| Sample { at, staged: u64::MAX, written: 0 }));
    let page = report.html();
    check(&page);
    assert!(page.contains("Omitted, not valid ratios: 10.") && !page.contains("NaN") && !page.contains("inf "));
}

#[test]
fn extremes_are_drawn() {
    for (ratios, slow) in [(vec![0.97; 200], 1e-7), (vec![0.0, 900.0], 1e6), (vec![1.0], 0.1)] {
        let mut report = many(2);
        report.saves = vec![save("x".repeat(300), slow)];
        report.saves[0].samples.push(Sample { at: 0.0, staged: u64::MAX, written: u64::MAX });
        report.noise.clear();
        report.ratios = ratios;
        check(&report.html());
    }
}

#[test]
fn a_file_that_cannot_be_written_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("report.html");
    many(2).write(&path).unwrap();
    assert!(std::fs::read_to_string(&path).unwrap().ends_with("</html>"));
    let wrong = dir.path().join("none/report.html");
    let error = many(2).write(&wrong).unwrap_err();
    assert_eq!((error.kind(), error.path()), (ashore::ErrorKind::NotFound, Some(wrong.as_path())));
}

#[test]
fn numbers_have_three_digits_and_a_unit() {
    let times = [0.0, 4.1e-7, 0.000_41, 0.0419, 0.9996, 1.184, 61.26, 912.4].map(|t| time(t).replace(NBSP, " "));
    assert_eq!(
        times,
        ["0.00 \u{b5}s", "0.41 \u{b5}s", "410 \u{b5}s", "41.9 ms", "1.00 s", "1.18 s", "61.3 s", "912 s"]
    );
    assert_eq!(
        [0.0, 0.000_01, 0.0041, 0.974].map(|p| percent(p).replace(NBSP, " ")),
        ["0.00 %", "below 0.01 %", "0.41 %", "97.4 %"]
    );
}

#[test]
fn an_undecided_comparison_shows_its_interval_and_no_percentage() {
    let mut report = many(3);
    report.ratios = vec![0.8, 1.2, 1.7];
    report.noise = vec![1.0];
    let page = report.html().replace(NBSP, " ");
    assert!(page.contains("undecided</dd>") && page.contains("3 pairs are too few; they were 80 to 170 %"), "{page}");
    assert!(page.contains("too rarely compared with itself") && !page.contains("the limit \u{f7} the limit"));
    report.ratios = vec![0.97; 40];
    let page = report.html().replace(NBSP, " ");
    assert!(page.contains("97.0 %</dd>") && page.contains("of it; middle half 97.0 to 97.0 %"), "{page}");
}

#[test]
fn the_headline_has_the_longest_wait_too() {
    let mut report = many(9);
    report.saves[4].phases[0].to = 0.0049;
    let page = report.html().replace(NBSP, " ");
    assert!(page.contains("The longest of 9 blocked it for 4.90 ms."), "{page}");
}
