//! The real program, run as a user runs it.

use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

fn ashore(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ashore"));
    command.args(args).arg("--dir").arg(dir).stdin(Stdio::null());
    command
}

fn run(dir: &Path, args: &[&str]) -> Output {
    ashore(dir, args).output().unwrap()
}

/// A demo small enough for a debug build: a state of 36 chunks through an arena of four.
fn demo(dir: &Path, steps: u64, every: u64) -> Command {
    let (steps, every) = (steps.to_string(), every.to_string());
    let small = ["--model", "tiny", "--chunk", "4KiB", "--arena", "16KiB", "--json"];
    ashore(dir, &[&["demo", "--steps", &steps, "--every", &every][..], &small].concat())
}

/// Returns the only JSON value on the stdout of a program that ended with `status` and without messages.
fn json(output: &Output, status: i32) -> Value {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), &*stderr), (Some(status), ""), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Returns the only line that says why a program ended with `status`.
fn complaint(output: &Output, status: i32) -> String {
    let stderr = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(status), "{output:?}");
    assert!(output.stdout.is_empty() && stderr.starts_with("ashore: ") && stderr.lines().count() == 1, "{output:?}");
    stderr
}

fn steps(list: &Value) -> Vec<u64> {
    list.as_array().unwrap().iter().map(|row| row["step"].as_u64().unwrap()).collect()
}

#[test]
fn a_demo_proves_what_it_restored() {
    let dir = tempfile::tempdir().unwrap();
    let report = json(&demo(dir.path(), 25, 10).output().unwrap(), 0);
    for key in [
        "step_ms_without",
        "step_ms_with",
        "overhead_fraction",
        "blocked_ms_p50",
        "blocked_ms_p99",
        "durable_bytes_per_second",
        "disk_limit_bytes_per_second",
    ] {
        assert!(report[key].is_f64(), "{key}: {report}");
    }
    assert!(report["bytes"].as_u64().unwrap() >= 8 * report["chunk"].as_u64().unwrap(), "{report}");
    assert!(report["bytes"].as_u64() > report["arena"].as_u64(), "{report}");
    for (key, expected) in [("steps", 25), ("saves", 3), ("restored_step", 25), ("trained_steps", 25)] {
        assert_eq!(report[key], expected, "{key}: {report}");
    }
    assert_eq!((&report["verified"], &report["resumed_from"]), (&Value::Bool(true), &Value::Null));

    let listed = json(&run(dir.path(), &["ls", "--json"]), 0);
    assert_eq!(steps(&listed), [20, 25], "two are kept");
    let left = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    assert_eq!(left.filter(|name| name.starts_with('.') && name != ".runs").collect::<Vec<_>>(), [""; 0]);
}

#[test]
fn a_demo_draws_one_save_beside_its_steps() {
    let dir = tempfile::tempdir().unwrap();
    let picture = dir.path().join("save.svg");
    json(&demo(&dir.path().join("run"), 25, 10).arg("--picture").arg(&picture).output().unwrap(), 0);
    let text = std::fs::read_to_string(&picture).unwrap();
    let drawn = roxmltree::Document::parse(&text).unwrap();
    let texts: Vec<_> = drawn.descendants().filter_map(|node| node.text()).map(str::trim).collect();
    for lane in ["training", "copy to the arena", "write to disk", "commit", "blocked by save and fence"] {
        assert!(texts.contains(&lane), "{lane}: {texts:?}");
    }
}

#[test]
fn a_killed_demo_resumes_and_ends_as_if_nothing_had_happened() {
    let dir = tempfile::tempdir().unwrap();
    let mut endless = demo(dir.path(), 1_000_000, 5).stdout(Stdio::null()).spawn().unwrap();
    while !dir.path().join("step-00000010").exists() && endless.try_wait().unwrap().is_none() {
        std::thread::yield_now();
    }
    endless.kill().unwrap();
    endless.wait().unwrap();

    let resumed = json(&demo(dir.path(), 30, 5).output().unwrap(), 0);
    assert!(resumed["resumed_from"].as_u64().unwrap() >= 10, "{resumed}");
    assert_eq!((&resumed["verified"], &resumed["restored_step"]), (&Value::Bool(true), &resumed["steps"]));
    let clean = tempfile::tempdir().unwrap();
    let whole = json(&demo(clean.path(), resumed["steps"].as_u64().unwrap(), 5).output().unwrap(), 0);
    assert_eq!(whole["resumed_from"], Value::Null);
    assert_eq!(whole["final_loss_bits"], resumed["final_loss_bits"], "{whole} {resumed}");
}

#[test]
fn a_finished_demo_trains_on_to_the_next_multiple_and_will_not_mix_models() {
    let dir = tempfile::tempdir().unwrap();
    json(&demo(dir.path(), 10, 10).output().unwrap(), 0);
    let second = json(&demo(dir.path(), 10, 10).output().unwrap(), 0);
    assert_eq!((&second["resumed_from"], &second["steps"]), (&10.into(), &20.into()), "{second}");
    let other = complaint(&run(dir.path(), &["demo", "--arena", "16KiB"]), 1);
    assert!(other.contains("choose another --dir"), "{other}");
}

#[test]
fn people_get_a_report_in_words() {
    let dir = tempfile::tempdir().unwrap();
    let output = run(dir.path(), &["demo", "--steps", "20", "--model", "tiny", "--arena", "16KiB"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{text}");
    for said in ["\ncost ", "\nstall ", "the disk's limit", "\n[x] restored bytes identical", "\nverified\n"] {
        assert!(text.contains(said), "{said}: {text}");
    }
    assert_eq!(text.matches("\n[x] ").count(), 3, "{text}");
    let short = |line: &str| line.chars().count() <= 80 || line.contains("directory");
    assert!(text.lines().all(short), "{text}");
    assert!(!text.contains("-0.") && !text.contains("durable up to step 0"), "{text}");
    assert!(!text.contains('\u{1b}'), "{text}");
}

#[test]
fn verify_names_the_file_the_tensor_and_the_range_of_a_flipped_byte() {
    let dir = tempfile::tempdir().unwrap();
    json(&demo(dir.path(), 10, 5).output().unwrap(), 0);
    assert_eq!(json(&run(dir.path(), &["verify", "--json"]), 0)["valid"], true);

    let inspected = json(&run(dir.path(), &["inspect", "10", "--json"]), 0);
    let tensors = inspected["tensors"].as_array().unwrap();
    let tensor = tensors.iter().find(|tensor| tensor["name"] == "adamw.first.hidden.0.weight").unwrap();
    let slice = &tensor["slices"][0];
    let (offset, length) = (slice["offset"].as_u64().unwrap(), slice["length"].as_u64().unwrap());
    let file = Path::new(inspected["path"].as_str().unwrap()).join(slice["file"].as_str().unwrap());
    let mut bytes = fs::read(&file).unwrap();
    bytes[offset as usize + 17] ^= 0x10;
    fs::write(&file, &bytes).unwrap();

    let found = json(&run(dir.path(), &["verify", "10", "--json"]), 3);
    let damage = &found["damage"][0];
    assert_eq!((&damage["step"], &damage["file"], &damage["tensor"]), (&10.into(), &slice["file"], &tensor["name"]));
    let (from, to) = (damage["range"][0].as_u64().unwrap(), damage["range"][1].as_u64().unwrap());
    assert!(from >= offset && to <= offset + length && (from..to).contains(&(offset + 17)), "{found}");

    let text = String::from_utf8(run(dir.path(), &["verify"]).stdout).unwrap();
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(text.contains("tensor adamw.first.hidden.0.weight"), "{text}");
    assert!(text.contains("step 5: sound") && text.contains("step 10: DAMAGED"), "{text}");
    assert_eq!(json(&run(dir.path(), &["verify", "5", "--json"]), 0)["valid"], true);
}

#[test]
fn a_step_whose_manifest_or_shard_is_cut_is_listed_as_damaged() {
    let dir = tempfile::tempdir().unwrap();
    json(&demo(dir.path(), 10, 5).output().unwrap(), 0);
    for (step, file) in [("step-00000005", "manifest.json"), ("step-00000010", "model.safetensors")] {
        let path = dir.path().join(step).join(file);
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() - 9]).unwrap();
    }
    let listed = json(&run(dir.path(), &["ls", "--json"]), 0);
    assert_eq!(steps(&listed), [5, 10]);
    assert!(listed.as_array().unwrap().iter().all(|row| row["complete"] == false && row["bytes"] != 0), "{listed}");
    let found = json(&run(dir.path(), &["verify", "--json"]), 3);
    let files: Vec<&Value> = found["damage"].as_array().unwrap().iter().map(|damage| &damage["file"]).collect();
    assert_eq!(files, ["manifest.json", "model.safetensors"], "{found}");
    let one = dir.path().join("step-00000010");
    assert_eq!(run(dir.path(), &["verify", one.to_str().unwrap()]).status.code(), Some(3));
}

/// A job that was requeued to another node used to leave its full-size unfinished save in the directory
/// forever: no command showed it, and none could delete it.
#[test]
fn what_a_host_that_is_gone_left_is_shown_and_goes_when_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    json(&demo(dir.path(), 10, 5).output().unwrap(), 0);
    let attempt = ".step-00000015.67e55044-10b1-426f-9247-bb680e5fe0c8";
    let (temp, owner) = (dir.path().join(format!("{attempt}.tmp")), dir.path().join(format!("{attempt}.owner")));
    fs::create_dir(&temp).unwrap();
    fs::write(temp.join("model.safetensors"), [0; 5000]).unwrap();
    fs::write(&owner, r#"{"host":"node-7","boot_id":"another","pid":4711,"start_time":1}"#).unwrap();

    let listed = run(dir.path(), &["ls", "--json"]);
    let (stdout, stderr) = (serde_json::from_slice(&listed.stdout).unwrap(), String::from_utf8(listed.stderr).unwrap());
    assert_eq!(steps(&stdout), [5, 10]);
    for said in [attempt, "5.0 kB, unchanged for", "host=node-7 pid=4711", "prune --abandoned"] {
        assert!(stderr.contains(said), "{said}: {stderr}");
    }
    let prune = |more: &[&str]| json(&run(dir.path(), &[&["prune", "--json"], more].concat()), 0);
    let kept = prune(&["--keep-last", "2", "--yes"]);
    assert_eq!((&kept["left"][0]["bytes"], &kept["left"][0]["state"]), (&5000.into(), &"undecided".into()), "{kept}");
    assert!(temp.exists() && kept["left"][0]["age_seconds"].is_u64(), "{kept}");
    let spared = prune(&["--abandoned", "--yes"]);
    assert_eq!((spared["swept"].as_array().unwrap().len(), temp.exists()), (0, true), "not a day old: {spared}");
    let would = prune(&["--abandoned", "--older-than", "0s"]);
    assert_eq!((would["swept"].as_array().unwrap().len(), temp.exists()), (1, true), "{would}");
    let gone = prune(&["--abandoned", "--older-than", "0s", "--yes"]);
    assert_eq!(gone["swept"][0]["name"], format!("{attempt}.tmp"));
    assert!(!temp.exists() && !owner.exists());
    assert_eq!((steps(&gone["removed"]), steps(&gone["kept"])), (vec![], vec![5, 10]), "no checkpoint was requested");
}

#[test]
fn prune_deletes_only_when_told_to() {
    let dir = tempfile::tempdir().unwrap();
    for goal in [10, 20] {
        json(&demo(dir.path(), 10, 5).output().unwrap(), 0);
        assert!(dir.path().join(format!("step-{goal:08}")).exists());
    }
    let listed = || steps(&json(&run(dir.path(), &["ls", "--json"]), 0));
    assert_eq!(listed(), [15, 20]);
    let planned = json(&run(dir.path(), &["prune", "--keep-last", "1", "--json"]), 0);
    assert_eq!((steps(&planned["removed"]), steps(&planned["kept"])), (vec![15], vec![20]));
    let spared = json(&run(dir.path(), &["prune", "--keep-last", "1", "--keep-every", "15", "--yes", "--json"]), 0);
    assert_eq!(steps(&spared["removed"]), [0; 0]);
    assert_eq!(listed(), [15, 20], "nothing was deleted");
    let text = run(dir.path(), &["prune", "--keep-last", "1", "--yes"]).stdout;
    assert!(String::from_utf8_lossy(&text).contains("deleted 1"));
    assert_eq!(listed(), [20]);
}

/// Changes one bit of the last byte of a step's weights. The step stays complete, but its bytes are not those
/// that were written.
fn flip(root: &Path, step: &str) {
    let file = root.join(step).join("model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&file, bytes).unwrap();
}

/// `prune` used to delete the sound step and keep the damaged one, because a step with a flipped byte is
/// complete.
#[test]
fn prune_keeps_the_last_sound_step() {
    let dir = tempfile::tempdir().unwrap();
    json(&demo(dir.path(), 10, 5).output().unwrap(), 0);
    flip(dir.path(), "step-00000010");
    let output = run(dir.path(), &["prune", "--keep-last", "1", "--yes", "--json"]);
    let pruned: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((steps(&pruned["removed"]), steps(&pruned["kept"])), (vec![], vec![5, 10]));
    assert_eq!(steps(&pruned["doubtful"]), [10]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("kept, but does not count: "), "{output:?}");
    let gone = json(&run(dir.path(), &["prune", "--damaged", "--yes", "--json"]), 0);
    assert_eq!((steps(&gone["damaged"]), steps(&gone["kept"])), (vec![10], vec![5]));
    let last = run(dir.path(), &["prune", "--after", "5", "--yes", "--json"]);
    assert_eq!(steps(&json(&last, 0)["kept"]), [5]);
}

/// A directory may be given after the command.
#[test]
fn verbs_take_the_directory_behind_them() {
    let dir = tempfile::tempdir().unwrap();
    json(&demo(&dir.path().join("a"), 10, 5).output().unwrap(), 0);
    let program = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ashore"));
        json(&command.args(args).args(["a", "--json"]).current_dir(dir.path()).output().unwrap(), 0)
    };
    assert_eq!(steps(&program(&["ls"])), [5, 10]);
    assert_eq!(steps(&program(&["verify"])["checkpoints"]), [5, 10]);
    assert_eq!(program(&["inspect"])["step"], 10);
    assert_eq!(steps(&program(&["prune", "--keep-last", "1", "--yes"])["removed"]), [5]);
    let small = ["--model", "tiny", "--arena", "16KiB", "--every", "5", "--steps", "10"];
    assert_eq!(program(&[&["demo"][..], &small].concat())["resumed_from"], 10);
    let save = ["bench", "save", "--ranks", "2", "--scale", "0.001", "--rounds", "1", "--no-limit", "--arena", "1MiB"];
    assert_eq!(program(&save)["ranks"], 2);
    let twice = complaint(&run(dir.path(), &["ls", "a"]), 1);
    assert!(twice.contains("give the directory once"), "{twice}");
    for verb in ["ls", "inspect", "verify", "prune"] {
        let help = Command::new(env!("CARGO_BIN_EXE_ashore")).args([verb, "--help"]).output().unwrap();
        let help = String::from_utf8(help.stdout).unwrap();
        assert!(!help.contains("--device") && !help.contains("--arena") && help.contains("--dir"), "{verb}: {help}");
    }
}

/// With a root that is not UTF-8, `inspect --json` used to panic, and `prune --yes --json` deleted and then
/// reported a failure.
#[test]
fn a_root_that_is_not_utf8_is_a_root() {
    use std::os::unix::ffi::OsStrExt;
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join(std::ffi::OsStr::from_bytes(b"r\xff"));
    assert_eq!(json(&demo(&root, 10, 5).output().unwrap(), 0)["verified"], true);
    assert_eq!(steps(&json(&run(&root, &["ls", "--json"]), 0)), [5, 10]);
    assert_eq!(json(&run(&root, &["verify", "--json"]), 0)["valid"], true);
    assert!(json(&run(&root, &["inspect", "--json"]), 0)["path"].as_str().unwrap().contains('\u{fffd}'));
    let pruned = json(&run(&root, &["prune", "--keep-last", "1", "--yes", "--json"]), 0);
    assert_eq!((steps(&pruned["removed"]), steps(&pruned["kept"])), (vec![5], vec![10]));
    assert!(!root.join("step-00000005").exists());
}

/// A prune that could not delete one step used to end without reporting those that it had deleted.
#[test]
fn a_prune_that_fails_half_way_says_what_it_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let executor = ashore::CheckpointExecutor::builder(dir.path()).arena(1 << 20).chunk(64 << 10).build().unwrap();
    for step in [5, 10, 15] {
        let mut state = ashore::StateDict::new();
        state.tensor("weights", vec![step as f32; 4]).unwrap();
        executor.save(step, state).unwrap().wait(std::time::Duration::from_secs(60)).unwrap();
    }
    executor.shutdown(std::time::Duration::from_secs(60)).unwrap();
    fs::create_dir(dir.path().join("step-00000005/mine")).unwrap();
    let trash = dir.path().join(".trash-00000000-0000-4000-8000-000000000000");
    fs::create_dir_all(trash.join("mine")).unwrap();
    let output = run(dir.path(), &["prune", "--keep-last", "1", "--yes", "--json"]);
    let pruned: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (output.status.code(), steps(&pruned["removed"]), steps(&pruned["failed"])),
        (Some(1), vec![10], vec![5])
    );
    assert!(!dir.path().join("step-00000010").exists());
    assert!(pruned["left"][0]["name"].as_str().unwrap().starts_with(".trash-"), "{pruned}");
}

/// `inspect` used to show the step before the newest, without a message, when the newest was damaged.
#[test]
fn inspect_shows_no_older_step_instead() {
    let dir = tempfile::tempdir().unwrap();
    json(&demo(dir.path(), 10, 5).output().unwrap(), 0);
    fs::write(dir.path().join("step-00000010/manifest.json"), "").unwrap();
    let said = complaint(&run(dir.path(), &["inspect"]), 3);
    assert!(said.contains("the newest step, 10, cannot be shown") && said.contains("step 5 is the newest"), "{said}");
    assert_eq!(json(&run(dir.path(), &["inspect", "5", "--json"]), 0)["step"], 5);
}

/// A damaged newest step used to cause a loop: the run resumed before it, reached it again and died because
/// "the step exists".
#[test]
fn a_demo_gets_past_a_damaged_newest_step() {
    for damage in ["manifest.json", "model.safetensors"] {
        let dir = tempfile::tempdir().unwrap();
        json(&demo(dir.path(), 20, 10).output().unwrap(), 0);
        fs::write(dir.path().join("step-00000020").join(damage), "").unwrap();
        let output = demo(dir.path(), 20, 10).output().unwrap();
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert!(String::from_utf8_lossy(&output.stderr).contains("step 20 is skipped"), "{output:?}");
        assert_eq!((&report["resumed_from"], &report["verified"]), (&10.into(), &Value::Bool(true)));
        assert_eq!(json(&run(dir.path(), &["verify", "20", "--json"]), 0)["valid"], true);
    }
}

#[test]
fn inspect_shows_a_checkpoint_by_step_or_path() {
    let dir = tempfile::tempdir().unwrap();
    json(&demo(dir.path(), 5, 5).output().unwrap(), 0);
    let by_step = json(&run(dir.path(), &["inspect", "5", "--json"]), 0);
    assert_eq!(json(&run(dir.path(), &["inspect", "--json"]), 0), by_step, "the newest when none is named");
    let by_path = json(&run(dir.path(), &["inspect", by_step["path"].as_str().unwrap(), "--json"]), 0);
    assert_eq!(by_step, by_path);
    assert_eq!(by_step["tensors"].as_array().unwrap().len(), 21);
    assert_eq!(by_step["metadata"]["model"]["context"], 12);
    let text = String::from_utf8(run(dir.path(), &["inspect", "5"]).stdout).unwrap();
    for said in ["model.safetensors", "parameters.embedding", "F32", " 48 ", "rng = "] {
        assert!(text.contains(said), "{said}: {text}");
    }
}

#[test]
fn bench_compares_with_the_limit_and_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    for (what, figure) in [
        ("limits", "write_limit_bytes_per_second"),
        ("staging", "fraction_of_copy"),
        ("write", "fraction_of_limit"),
        ("restore", "fraction_of_limit"),
        ("save", "fraction_of_limit"),
    ] {
        let small = ["bench", what, "--scale", "0.0001", "--rounds", "2", "--arena", "64KiB", "--json"];
        let report = json(&run(dir.path(), &small), 0);
        assert!(report[figure].as_f64().unwrap() > 0.0, "{report}");
        assert!(report["bytes"].as_u64().unwrap() > 0, "{report}");
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn bench_saves_by_several_processes_beside_as_many_plain_ones() {
    let dir = tempfile::tempdir().unwrap();
    for (workload, tensors) in [("large", 16), ("adam-1b", 438)] {
        let small = ["bench", "save", "--ranks", "3", "--workload", workload, "--scale", "0.004", "--rounds", "2"];
        let report = json(&run(dir.path(), &[&small[..], &["--arena", "4MiB", "--json"]].concat()), 0);
        let count = |name: &str| report[name].as_u64().unwrap_or_else(|| panic!("{name}: {report}"));
        assert_eq!((count("ranks"), count("tensors"), count("rounds")), (3, tensors, 2));
        assert_eq!(count("files"), 6, "a shard and its table by each: {report}");
        assert!(count("bytes") >= 4 << 20 && count("arena_bytes") == 12 << 20, "{report}");
        let measured = ["durable_seconds", "durable_bytes_per_second", "limit_bytes_per_second", "fraction_of_limit"];
        for name in measured.into_iter().chain(["cpu_seconds_per_gb", "commit_tail_ms", "limit_tail_ms", "told_ms"]) {
            assert!(report[name].as_f64().is_some_and(|figure| figure > 0.0), "{name}: {report}");
        }
        let whole = report["durable_seconds"].as_f64().unwrap() * 1e3;
        assert!(report["commit_tail_ms"].as_f64().unwrap() < whole, "{report}");
    }
    let text = run(dir.path(), &["bench", "save", "--ranks", "1", "--scale", "0.0001", "--rounds", "1", "--no-limit"]);
    assert!(text.status.success() && String::from_utf8_lossy(&text.stdout).contains("commit tail"), "{text:?}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn wrong_usage_ends_with_2() {
    let dir = tempfile::tempdir().unwrap();
    for args in [
        &["frobnicate"][..],
        &["demo", "--steps", "0"],
        &["demo", "--every", "x"],
        &["ls", "--arena", "5 parsecs"],
        &["ls", "--device", "gpu"],
        &["prune"],
        &["prune", "--keep-last", "0"],
        &["prune", "--abandoned", "--older-than", "a while"],
        &["prune", "--keep-last", "1", "--older-than", "1d"],
        &["prune", "--keep-every", "5"],
        &["prune", "--keep-last", "1", "--damaged"],
        &["prune", "--keep-last", "1", "--keep-best", "2"],
        &["verify", "--device", "host"],
        &["prune", "--keep-last", "1", "--yes", "--dry-run"],
        &["inspect", "1", "2", "3"],
        &["bench", "save", "--ranks", "0"],
        &["bench", "save", "--ranks", "2", "--report", "page.html"],
    ] {
        let output = run(dir.path(), args);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {output:?}");
        assert!(output.stdout.is_empty() && !output.stderr.is_empty(), "{args:?}: {output:?}");
    }
}

#[test]
fn failures_end_with_1_and_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("missing");
    for (at, args, said) in [
        (&*missing, &["ls"][..], "missing"),
        (&missing, &["verify"], "missing"),
        (dir.path(), &["verify"], "nothing to verify"),
        (dir.path(), &["inspect", "7"], "step 7"),
        (dir.path(), &["verify", "./7"], "./7"),
        (dir.path(), &["demo", "--device", "cuda:99"], "device cuda:99"),
        (dir.path(), &["bench", "save", "--device", "cuda:0"], "device cuda:0"),
        (dir.path(), &["bench", "staging", "--device", "host", "--graph"], "--graph"),
        (dir.path(), &["bench", "restore", "--ranks", "2"], "--ranks"),
        // Of ranks that fail, the error is told as one, with the rank.
        (dir.path(), &["bench", "save", "--ranks", "2", "--arena", "5000"], "rank 0"),
        (dir.path(), &["demo", "--arena", "5000"], "arena 5000"),
    ] {
        let line = complaint(&run(at, args), 1);
        assert!(line.contains(said), "{args:?}: {line}");
    }
    assert!(!missing.exists(), "reading creates nothing");
}

#[test]
fn a_reader_that_went_away_is_no_error() {
    let dir = tempfile::tempdir().unwrap();
    json(&demo(dir.path(), 5, 5).output().unwrap(), 0);
    let mut child =
        ashore(dir.path(), &["inspect", "5"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stderr.len()), (Some(0), 0), "{output:?}");
}

#[test]
fn a_training_program_saves_by_a_writer_process() {
    use ashore::compat::torch::{AsyncCheckpointExecutor, ExecuteOptions, ProcessExecutor};
    let (dir, minute) = (tempfile::tempdir().unwrap(), std::time::Duration::from_secs(60));
    let mut settings = ashore::Settings::default();
    (settings.arena, settings.chunk) = (16 << 20, 1 << 20);
    let executor = ProcessExecutor::builder(dir.path()).settings(settings).program(env!("CARGO_BIN_EXE_ashore"));
    let executor = executor.build().unwrap();
    let mut state = ashore::StateDict::new();
    state.tensor("weights", vec![0.5_f32; 1_000_000]).unwrap();
    let future = executor.execute_save(state.into(), ExecuteOptions::new().checkpoint_id("step-1")).unwrap();
    future.result(minute).unwrap().unwrap();
    assert_eq!(executor.executor().checkpoint(1).unwrap().read_as::<f32>("weights").unwrap(), [0.5; 1_000_000]);
    executor.close(minute).unwrap();
}
