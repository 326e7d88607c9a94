//! The pages in a real browser, Chromium, which `just pages` needs (`CHROMIUM` names another program).
//!
//! A frame of the width of a phone stands for its screen: media queries and layout follow the frame's width.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Measures the page in the frame, and writes the findings into the title.
const MEASURE: &str = r#"<!doctype html><title>none</title><iframe src="PAGE" style="width:WIDTHpx;height:900px;border:0"></iframe>
<script>onload = () => {
  const d = document.querySelector("iframe").contentDocument, root = d.documentElement;
  const shown = e => e.offsetParent !== null && e.getClientRects().length > 0;
  const all = [...d.querySelectorAll("td, th, dt, dd, p, h1, h2, b, code, .card, section, svg")].filter(shown);
  const thin = all.filter(e => e.matches("td, th, dt, dd") && e.textContent.trim().length > 3 && e.getBoundingClientRect().width < 30);
  const cut = all.filter(e => e.getBoundingClientRect().right > root.clientWidth + 1);
  const letters = [...d.querySelectorAll("svg")].filter(e => e.getClientRects().length).map(e => 30 * e.getBoundingClientRect().width / e.viewBox.baseVal.width);
  const name = e => e.tagName + ":" + e.textContent.trim().slice(0, 30);
  document.title = JSON.stringify({ scroll: root.scrollWidth, client: root.clientWidth, thin: thin.map(name), cut: cut.map(name),
    letters: Math.min(99, ...letters), charts: letters.length, body: getComputedStyle(d.body).backgroundColor });
}</script>"#;

/// Loads `page` in a frame.
fn measured(page: &Path, width: u32, dark: bool) -> serde_json::Value {
    let folder = tempfile::tempdir().unwrap();
    fs::copy(page, folder.path().join("page.html")).unwrap();
    let frame = folder.path().join("frame.html");
    fs::write(&frame, MEASURE.replace("PAGE", "page.html").replace("WIDTH", &width.to_string())).unwrap();
    let program = std::env::var("CHROMIUM").unwrap_or_else(|_| "chromium".into());
    let scheme =
        if dark { "--blink-settings=preferredColorScheme=0" } else { "--blink-settings=preferredColorScheme=1" };
    let child = Command::new(program)
        .args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--allow-file-access-from-files",
            "--window-size=1400,1000",
        ])
        .args([scheme, "--virtual-time-budget=4000", "--dump-dom"])
        .arg(format!("--user-data-dir={}", folder.path().join("profile").display()))
        .arg(&frame)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let child = child.expect("chromium is installed");
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let title = text.split("<title>").nth(1).and_then(|rest| rest.split("</title>").next()).unwrap_or_default();
    let title = title.replace("&quot;", "\"").replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">");
    serde_json::from_str(&title).unwrap_or_else(|error| panic!("{error}: {text:.2000}"))
}

fn fits(page: &Path) {
    let phone = measured(page, 390, false);
    assert!(phone["scroll"].as_u64() <= phone["client"].as_u64(), "it scrolls sideways: {phone}");
    for nothing in ["thin", "cut"] {
        assert_eq!(phone[nothing], serde_json::json!([]), "{phone}");
    }
    assert!(phone["letters"].as_f64().unwrap() > 10.0 && phone["charts"].as_u64().unwrap() >= 2, "{phone}");
    let (wide, dark) = (measured(page, 1280, false), measured(page, 1280, true));
    assert!(wide["scroll"].as_u64() <= wide["client"].as_u64() && wide["cut"] == serde_json::json!([]), "{wide}");
    assert_ne!(wide["body"], dark["body"], "both colour schemes");
}

fn ashore(at: &Path, arguments: &[&str]) -> String {
    let began = Instant::now();
    let output = Command::new(env!("CARGO_BIN_EXE_ashore")).args(arguments).current_dir(at).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(began.elapsed() < Duration::from_secs(300));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
#[ignore = "needs chromium: just pages"]
fn the_page_of_a_run_fits_a_phone_and_a_screen_in_both_colour_schemes() {
    let at = tempfile::tempdir().unwrap();
    ashore(at.path(), &["demo", "--dir", "run", "--steps", "40", "--device", "host"]);
    let said = ashore(at.path(), &["report", "run", "--output", "page.html"]);
    assert!(said.trim_end().ends_with("page.html") && said.contains("Checkpointing costs"), "{said}");
    fits(&at.path().join("page.html"));
}

#[test]
#[ignore = "needs chromium: just pages"]
fn the_page_of_a_benchmark_fits_a_phone_and_a_screen_in_both_colour_schemes() {
    let at = tempfile::tempdir().unwrap();
    ashore(
        at.path(),
        &["bench", "save", "--scale", "0.001", "--rounds", "9", "--arena", "4MiB", "--report", "page.html"],
    );
    fits(&at.path().join("page.html"));
}

#[test]
fn a_directory_without_a_log_is_an_error_that_says_so() {
    let at = tempfile::tempdir().unwrap();
    let output =
        Command::new(env!("CARGO_BIN_EXE_ashore")).args(["report", "."]).current_dir(at.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("no log of a run"), "{output:?}");
}
