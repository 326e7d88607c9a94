use super::facts::{Facts, gather};
use super::page::Page;
use super::words::{date, thousands, time};
use ashore::internal::run_log::{Ended, Head, Run, SaveLine};

const MINUTE: u64 = 60_000_000;

/// A save every minute, durable after 9 s, for which training waits 12 ms.
fn save(step: u64) -> SaveLine {
    SaveLine {
        step,
        at: MINUTE * (step + 1),
        end: Ended::Durable,
        bytes: 13_900_000_000,
        staged_bytes: 13_900_000_000,
        written_bytes: 13_900_000_000,
        chunks: 1700,
        call: 2000,
        fence: 10_000,
        fence_at: 200_000,
        stage_at: 2100,
        staged: 4_000_000,
        write_at: 50_000,
        written: 8_700_000,
        ended: 9_000_000,
        digest: 2_000_000,
        write: 25_000_000,
        ..SaveLine::default()
    }
}

fn run(saves: Vec<SaveLine>) -> Run {
    let head =
        Head { session: "a".into(), at: MINUTE, arena: 1 << 30, world: 1, device: "host".into(), ..Head::default() };
    Run { head: Some(head), saves, ..Run::default() }
}

fn page(facts: &Facts) -> String {
    Page { name: "runs/a".into(), now: facts.to + 10_000_000, facts }.html().replace('\u{a0}', " ")
}

fn verdict(facts: &Facts) -> String {
    Page { name: String::new(), now: facts.to, facts }.verdict().replace('\u{a0}', " ")
}

#[test]
fn the_verdict_has_the_cost_and_how_often_a_save_would_be_affordable() {
    let facts = gather(vec![run((1..=100).map(save).collect())]);
    // 100 saves of 12 ms in 100 minutes and the 9 s of the last.
    assert!((facts.cost().unwrap() - 1.2 / 6009.0).abs() < 1e-9, "{facts:?}");
    assert_eq!(
        verdict(&facts),
        "Checkpointing costs 0.02 % of the run\u{2019}s time, with a save every 60.0 s. Saving every 9.00 s is as often as the disk allows."
    );
    // From the call of a save until the next one is durable.
    assert_eq!(facts.worst, 69.0);
    assert_eq!(verdict(&gather(vec![run(vec![])])), "No step became durable: 0 saves ended otherwise.");
    let one = gather(vec![run(vec![save(1)])]);
    assert_eq!(verdict(&one), "Training waited 12.0 ms for a save that was durable after 9.00 s.");
}

#[test]
fn a_run_that_ended_in_order_was_killed_or_goes_on_says_so() {
    let saves: Vec<_> = (1..=100).map(save).collect();
    let mut closed = run(saves.clone());
    closed.closed = Some(MINUTE * 102);
    assert!(page(&gather(vec![closed])).contains("The run has ended in order. Its newest durable step is 100"));
    let facts = gather(vec![run(saves)]);
    assert!(page(&facts).contains("If this machine dies now, 19.0 s of training are lost: step 100"));
    let later = Page { name: String::new(), now: facts.to + 100 * MINUTE, facts: &facts }.html();
    assert!(later.contains("was killed, or hangs"), "{later}");
}

#[test]
fn warnings_name_the_setting_that_helps() {
    let mut saves: Vec<_> = (1..=100).map(save).collect();
    (saves[3].arena, saves[3].fence) = (40_000, 50_000);
    (saves[7].queue, saves[7].call) = (900_000, 901_000);
    (saves[9].end, saves[9].kind, saves[9].why) = (Ended::Failed, "nospace".into(), "<script>the disk is full".into());
    let facts = gather(vec![run(saves)]);
    let page = page(&facts);
    for said in [
        "1 save failed (step 10)",
        "ASHORE_KEEP_LAST",
        "1 save waited for the arena, for up to 40.0 ms (step 4)",
        "ASHORE_ARENA=2147483648 (2 GiB)",
        "1 save waited for earlier saves in the call (step 8)",
        "earlier saves, in the call",
        "&lt;script&gt;the disk is full",
    ] {
        assert!(page.contains(said), "{said}");
    }
    assert!(!page.contains("<script"));
    assert!(gather(vec![run((1..=9).map(save).collect())]).warnings().is_empty());
}

#[test]
fn sessions_of_one_run_are_joined_and_killed_ones_are_counted() {
    let mut second = run((11..=20).map(save).collect());
    second.head.as_mut().unwrap().session = "b".into();
    second.head.as_mut().unwrap().at = MINUTE * 11;
    second.closed = Some(MINUTE * 22);
    let facts = gather(vec![run((1..=9).map(save).collect()), second]);
    assert_eq!((facts.sessions, facts.unclosed, facts.closed, facts.saves.len()), (2, 1, true, 19));
}

#[test]
fn ten_thousand_saves_fit_in_a_page_of_a_megabyte_and_outliers_stay_visible() {
    let mut saves: Vec<_> = (1..=10_000).map(save).collect();
    for (i, save) in saves.iter_mut().enumerate() {
        save.fence = 1000 + (i as u64).wrapping_mul(0x9e37_79b1) % 20_000;
    }
    saves[5000].fence = 3_000_000;
    let facts = gather(vec![run(saves)]);
    let page = page(&facts);
    assert!(page.len() < 1_000_000, "{}", page.len());
    assert!(page.contains("3.00 s") && page.contains("5,001"), "the outlier is listed");
    let own = page.replace("http://www.w3.org/2000/svg", "");
    assert!(
        !["http", "url(", "@import", "src=", "<script", "<link", "NaN"].iter().any(|outside| own.contains(outside))
    );
    for svg in page.split("<svg").skip(1) {
        roxmltree::Document::parse(&format!("<svg{}</svg>", svg.split_once("</svg>").unwrap().0)).unwrap();
    }
}

#[test]
fn numbers_and_dates_are_written_for_people() {
    let times = [0.0000123, 0.0123, 12.0, 150.0, 7500.0, 200_000.0].map(|t| time(t).replace('\u{a0}', " "));
    assert_eq!(times, ["12.3 \u{b5}s", "12.3 ms", "12.0 s", "2.50 min", "2.08 h", "2.31 d"]);
    assert_eq!([0, 999, 1000, 1_234_567].map(thousands), ["0", "999", "1,000", "1,234,567"]);
    let dates = [0, 951_782_400, 1_764_381_234, 4_107_542_399].map(|s: u64| date(s * 1_000_000).replace('\u{a0}', " "));
    assert_eq!(dates, ["1970-01-01 00:00 UTC", "2000-02-29 00:00 UTC", "2025-11-29 01:53 UTC", "2100-02-28 23:59 UTC"]);
}
