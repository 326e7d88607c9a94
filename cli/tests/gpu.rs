//! The real program on the simulated driver, which checks the calls but says nothing about time.
//!
//! The program finds this driver like a real one: a separate folder on the loader's path contains it under
//! its usual name.

use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// A work folder, and a folder in which the loader finds a driver.
struct Place {
    dir: tempfile::TempDir,
    driver: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let (dir, driver) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::os::unix::fs::symlink(fakecuda::library(), driver.path().join("libcuda.so.1")).unwrap();
        Self { dir, driver }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn ashore(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ashore"));
        command.args(args).arg("--dir").arg(self.path()).stdin(Stdio::null());
        command.env("LD_LIBRARY_PATH", self.driver.path()).env_remove("ASHORE_REQUIRE_GPU");
        command.env("FAKECUDA_DEVICES", "1");
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.ashore(args).output().unwrap()
    }
}

/// Returns the only JSON value on the stdout of a program that succeeded without messages.
fn json(output: &Output) -> Value {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), &*stderr), (Some(0), ""), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Returns the only line that says why a program failed.
fn complaint(output: &Output) -> String {
    let stderr = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(output.stdout.is_empty() && stderr.starts_with("ashore: ") && stderr.lines().count() == 1, "{output:?}");
    stderr
}

/// Checks that every figure made of times is absent.
fn no_times(report: &Value) {
    assert_eq!(report["simulated"], true, "{report}");
    let timed = [
        "_ms",
        "_us",
        "_seconds",
        "_per_second",
        "_per_gb",
        "fraction",
        "ratio",
        "speedup",
        "overhead",
        "verdict",
        "_chunks",
        "left_at_fence",
    ];
    for (key, value) in report.as_object().unwrap() {
        let is_time = timed.iter().any(|part| key.contains(part));
        assert!(!is_time || value.is_null() || key.ends_with("_wanted") || key == "late_chunks", "{key}={value}");
    }
}

/// Arguments of a demo small enough for a debug build.
fn demo(steps: &str) -> Vec<&str> {
    let small = ["--model", "tiny", "--chunk", "4KiB", "--arena", "16KiB", "--every", "5", "--json"];
    [&["demo", "--device", "cuda:0", "--steps", steps][..], &small].concat()
}

#[test]
fn a_demo_on_cuda_proves_what_it_restored() {
    let place = Place::new();
    let report = json(&place.run(&demo("12")));
    no_times(&report);
    for proof in ["verified", "bytes_equal", "curve_continues", "recomputed", "undisturbed"] {
        assert_eq!(report[proof], true, "{proof}: {report}");
    }
    assert_eq!((&report["saves"], &report["restored_step"]), (&3.into(), &12.into()), "{report}");
    assert!(report["device"].as_str().unwrap().contains("simulated"), "{report}");

    // The demo continues from there, and a demo on the host has the same losses.
    let resumed = json(&place.run(&demo("12")));
    assert_eq!((&resumed["resumed_from"], &resumed["verified"]), (&12.into(), &true.into()), "{resumed}");
    let host = Place::new();
    let whole = json(&host.run(&["demo", "--device", "host", "--steps", "24", "--model", "tiny", "--json"]));
    assert_eq!(whole["final_loss_bits"], resumed["final_loss_bits"]);
    assert_eq!(whole["recomputed"], Value::Null);
}

#[test]
fn a_demo_on_cuda_that_is_left_the_choice_takes_the_gpu_of_its_rank() {
    let place = Place::new();
    let mut command = place.ashore(&["demo", "--steps", "5", "--model", "tiny", "--json"]);
    let report = json(&command.env("FAKECUDA_DEVICES", "2").env("LOCAL_RANK", "3").output().unwrap());
    let device = report["device"].as_str().unwrap();
    assert!(device.starts_with("cuda:1 ") && device.contains("LOCAL_RANK=3"), "{device}");
    assert_eq!(report["verified"], true, "{report}");
}

#[test]
fn tune_saves_from_the_gpu_and_measures_its_bus() {
    let place = Place::new();
    let like = ["tune", "--device", "cuda:0", "--bytes", "1MiB", "--tensors", "5", "--for", "0s"];
    let report = json(&place.run(&[&like[..], &["--json"]].concat()));
    assert_eq!((&report["simulated"], &report["state"]["saved_bytes"]), (&true.into(), &(1 << 20).into()), "{report}");
    assert!(report["measured"]["bus"]["long_bytes_per_second"].as_f64().is_some_and(|rate| rate > 0.0), "{report}");
    let text = String::from_utf8(place.run(&like).stdout).unwrap();
    assert!(text.contains("mean nothing") && text.contains("to pinned memory"), "{text}");
    assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 0, "nothing is left behind");
}

/// Runs a benchmark small enough for a debug build. With a lag copies are late, so that a missing wait is
/// detected.
fn bench(place: &Place, what: &str, lag: &str, more: &[&str]) -> Value {
    let small = ["--device", "cuda:0", "--rounds", "2", "--arena", "256KiB", "--chunk", "16KiB", "--json"];
    let mut command = place.ashore(&[&["bench", what][..], &small, more].concat());
    let report = json(&command.env("FAKECUDA_LAG_US", lag).env("FAKECUDA_JITTER_US", lag).output().unwrap());
    assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 0, "nothing is left behind");
    no_times(&report);
    report
}

#[test]
fn bench_on_cuda_saves_what_was_there_and_gives_no_times() {
    let place = Place::new();
    for (workload, scale, lag, more) in [
        ("large", "0.0005", "20", &["--every", "1"][..]),
        ("large", "0.0005", "20", &["--every", "2", "--graph", "--scratch", "64KiB", "--no-limit"]),
        ("w1", "0.01", "0", &["--every", "10", "--graph"]),
        ("w3", "0.00002", "0", &["--every", "5", "--scratch", "1MiB"]),
    ] {
        let sizes = ["--workload", workload, "--scale", scale, "--step-ms", "1"];
        let report = bench(&place, "staging", lag, &[&sizes, more].concat());
        assert_eq!(report["saves"], report["saves_equal"], "{report}");
        // One block to warm up, one of each pair, and one save per sample beside the bus.
        let (every, pairs) = (report["every"].as_u64().unwrap(), report["pairs"].as_u64().unwrap());
        assert_eq!(report["saves"], 3 * (20 / every) + 2 * pairs, "{report}");
        assert_eq!(report["graph"], more.contains(&"--graph"));
        assert_eq!(report["scratch_slots"].is_u64(), more.contains(&"--scratch"), "{report}");
    }
    let report = bench(&place, "limits", "0", &["--scale", "0.0005"]);
    assert!(report["d2h_bytes_per_second"].is_null() && report["bus_bytes"].is_u64(), "{report}");
}

#[test]
fn bench_on_cuda_saves_in_every_way_and_names_no_winner_on_a_simulated_driver() {
    let place = Place::new();
    for (workload, scale) in [("w1", "0.01"), ("w3", "0.00002")] {
        let sizes = ["--workload", workload, "--scale", scale, "--step-ms", "1", "--ways"];
        let report = bench(&place, "staging", "0", &sizes);
        // Six ways, alone and with computation, in the two rounds that count and the three before.
        assert_eq!((&report["saves"], &report["saves_equal"]), (&60.into(), &60.into()), "{report}");
        assert_eq!((&report["gather_refused"], &report["batch_refused"]), (&Value::Null, &Value::Null));
        assert!(report["computing_batched_speedup"].is_null() && report.get("both_fraction_of_limit").is_some());
    }
    let said = complaint(&place.run(&["bench", "staging", "--device", "host", "--ways"]));
    assert!(said.contains("--ways"), "{said}");
}

#[test]
fn a_cuda_driver_that_is_not_there_is_named_and_auto_says_why_it_is_the_host() {
    // The file with the driver's name is not a driver.
    let mut place = Place::new();
    place.driver = tempfile::tempdir().unwrap();
    for name in ["libcuda.so.1", "libcuda.so"] {
        std::fs::write(place.driver.path().join(name), "no library").unwrap();
    }
    for args in [&demo("5")[..], &["bench", "staging", "--device", "cuda:0"]] {
        let said = complaint(&place.run(args));
        assert!(said.contains("CUDA driver") && said.contains("device cuda:0"), "{said}");
    }
    let report = json(&place.run(&["demo", "--steps", "5", "--model", "tiny", "--json"]));
    let device = report["device"].as_str().unwrap();
    assert!(device.starts_with("host (auto: ") && device.contains("CUDA driver"), "{device}");
    assert!(report["step_ms_with"].is_f64() && report["simulated"] == false, "{report}");
    let mut required = place.ashore(&["demo", "--steps", "5", "--model", "tiny"]);
    let said = complaint(&required.env("ASHORE_REQUIRE_GPU", "1").output().unwrap());
    assert!(said.contains("ASHORE_REQUIRE_GPU"), "{said}");
}

#[test]
fn a_simulated_cuda_driver_is_no_gpu_where_one_is_required_and_its_errors_are_named() {
    let place = Place::new();
    let said = complaint(&place.ashore(&demo("5")).env("ASHORE_REQUIRE_GPU", "1").output().unwrap());
    assert!(said.contains("simulated") && said.contains("device cuda:0"), "{said}");
    let said = complaint(&place.run(&["demo", "--device", "cuda:3"]));
    assert!(said.contains("device cuda:3"), "{said}");
    for fault in
        ["cuModuleLoadData:0:218", "cuStreamCreate:1:2", "cuLaunchKernel:40:719", "cuLaunchKernel:40:700:async"]
    {
        let mut faulty = place.ashore(&demo("50"));
        let output = faulty.env("FAKECUDA_FAULT", fault).output().unwrap();
        // The first error is printed last: threads may have reported others before.
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(1) && stderr.contains("ashore: "), "{fault}: {output:?}");
        assert!(stderr.contains("cu") && !stderr.contains("panicked"), "{fault}: {stderr}");
    }
}
