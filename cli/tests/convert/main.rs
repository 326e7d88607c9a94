//! `ashore convert`, run as a user runs it: on steps of one rank and of several, killed and run again.

mod fixtures;
mod killing;
mod one_rank;

use ashore::{Checkpoint, CheckpointExecutor, Dtype, HostTensor, StateDict};
use fixtures::{
    Expected, MINUTE, assert_equal, assert_plain, convert, expected, files, hidden, json, made, refused, save,
};
use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

#[test]
fn a_step_of_any_number_of_ranks_becomes_a_model_of_whole_tensors() {
    for world in [1, 3] {
        let root = tempfile::tempdir().unwrap();
        let step = save(root.path(), world);
        let output = root.path().join("out/model");
        let report = json(&convert(&["--to", "hf", "--json", "--shard-size", "1MB"], &step, &output).output().unwrap());
        assert_eq!(
            (&report["step"], &report["kept"], &report["already_complete"]),
            (&7.into(), &0.into(), &false.into())
        );
        assert!(report["files"].as_array().unwrap().len() >= 3, "{report}");
        let checkpoint = assert_equal(&output, &expected());
        assert_plain(&output, &expected());
        assert_eq!((checkpoint.world(), checkpoint.value::<u32>("epoch").unwrap()), (1, 3));
        assert_eq!(checkpoint.metadata::<String>("run").unwrap(), "a");
        // Values of single ranks have no place beside whole tensors, and that is said.
        assert_eq!(report["left_out"].as_array().unwrap().len(), if world == 1 { 0 } else { 3 }, "{report}");
        assert_eq!(hidden(output.parent().unwrap()), [""; 0]);
        let names: Vec<_> = files(&output).into_keys().filter(|name| name.ends_with(".table")).collect();
        assert_eq!(names, ["tensors.table"]);
    }
}

#[test]
fn a_small_model_is_one_file_and_a_prefix_chooses_tensors() {
    let root = tempfile::tempdir().unwrap();
    save(root.path(), 3);
    let output = root.path().join("model");
    // The newest step of the directory.
    let arguments = ["--to", "hf", "--prefix", "optimizer.", "--strip"];
    let text = convert(&arguments, root.path(), &output).output().unwrap();
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(text.starts_with("step 7 converted: 1 file, 1 tensor"), "{text}");
    let all = expected();
    let (name, tensor) = all.iter().find(|(name, _)| name.starts_with("optimizer.")).unwrap();
    let one = [(name["optimizer.".len()..].to_owned(), tensor.clone())].into();
    assert_equal(&output, &one);
    assert_plain(&output, &one);
    let names: Vec<_> = files(&output).into_keys().collect();
    assert_eq!(names, ["manifest.json", "model.safetensors", "tensors.table"]);
}

#[test]
fn a_step_is_split_for_another_number_of_ranks_and_back() {
    let root = tempfile::tempdir().unwrap();
    let step = save(root.path(), 3);
    for (ranks, seeds) in [(1_u32, 1), (2, 2), (5, 3)] {
        let output = root.path().join(format!("for-{ranks}"));
        let number = ranks.to_string();
        let arguments = ["--to", "ranks", &number, "--json", "--arena", "4MiB"];
        let report = json(&convert(&arguments, &step, &output).output().unwrap());
        let checkpoint = assert_equal(&output, &expected());
        assert_eq!((checkpoint.world(), checkpoint.value::<u32>("epoch").unwrap()), (ranks, 3));
        let rows: Vec<usize> = checkpoint.boxes("model.long").unwrap().iter().map(|slice| slice[0].len()).collect();
        assert_eq!(rows.len(), ranks as usize);
        assert!(rows[..rows.len() - 1].iter().all(|rows| *rows == 1003_usize.div_ceil(ranks as usize)), "{rows:?}");
        for rank in 0..seeds {
            assert_eq!(checkpoint.rank_value::<u32>(rank, "seed").unwrap(), 100 + rank);
        }
        assert_eq!(report["left_out"].as_array().unwrap().len() as u32, 3 - seeds, "{report}");
        // And back, from the split one.
        let whole = root.path().join(format!("whole-{ranks}"));
        json(&convert(&["--to", "hf", "--json", "--arena", "4MiB"], &output, &whole).output().unwrap());
        assert_equal(&whole, &expected());
        assert_plain(&whole, &expected());
    }
}

#[test]
fn ranks_without_a_tensor_keep_their_values() {
    let root = tempfile::tempdir().unwrap();
    let step = save(root.path(), 3);
    let output = root.path().join("out");
    let arguments = ["--to", "ranks", "3", "--json", "--prefix", "model.BOOL.scalar"];
    let report = json(&convert(&arguments, &step, &output).output().unwrap());
    assert_eq!((&report["left_out"], report["files"].as_array().unwrap().len()), (&serde_json::json!([]), 1));
    let checkpoint = Checkpoint::open(&output).unwrap();
    assert!(checkpoint.verify().unwrap().is_sound());
    for rank in 0..3 {
        assert_eq!(checkpoint.rank_value::<u32>(rank, "seed").unwrap(), 100 + rank);
    }
    // And on to others.
    let second = root.path().join("second");
    let report = json(&convert(&["--to", "ranks", "2", "--json"], &output, &second).output().unwrap());
    assert_eq!(report["left_out"], serde_json::json!([{"rank": 2, "value": "seed"}]));
    assert_eq!(Checkpoint::open(&second).unwrap().rank_value::<u32>(1, "seed").unwrap(), 101);
}

/// A tensor of one rank is larger than the arena many times over, and so is the state.
#[test]
fn the_arena_bounds_the_memory_whatever_the_tensors() {
    let root = tempfile::tempdir().unwrap();
    let executor = CheckpointExecutor::builder(root.path()).arena(4 << 20).chunk(1 << 20).alone().build().unwrap();
    let mut state = StateDict::new();
    let large: Vec<u64> = (0..12 << 20).collect();
    state.tensor("large", HostTensor::new(large.clone(), [3, 4 << 20])).unwrap();
    state.tensor("small", vec![1.5_f32; 3]).unwrap();
    executor.save(1, state).unwrap().wait(MINUTE).unwrap();
    executor.shutdown(MINUTE).unwrap();
    let output = root.path().join("model");
    let mut child =
        convert(&["--to", "hf", "--arena", "4MiB"], root.path(), &output).stdout(Stdio::null()).spawn().unwrap();
    let mut peak = 0;
    while child.try_wait().unwrap().is_none() {
        // Empty once the program has ended.
        let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"));
        peak = peak.max(line.map_or(0, |kib| kib.parse().unwrap()));
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(child.wait().unwrap().success());
    // The program itself takes some.
    assert!((1..40 << 10).contains(&peak), "{peak} KiB");
    assert_eq!(Checkpoint::open(&output).unwrap().read_as::<u64>("large").unwrap(), large);
}

#[test]
fn an_output_is_refused_unless_it_is_this_conversion_and_sound() {
    let root = tempfile::tempdir().unwrap();
    let step = save(root.path(), 1);
    let output = root.path().join("model");
    let to = |arguments: &[&str], output: &Path| convert(arguments, &step, output).output().unwrap();
    json(&to(&["--to", "hf", "--json"], &output));
    let before = files(&output);
    assert_eq!(json(&to(&["--to", "hf", "--json"], &output))["already_complete"], true);
    let text = String::from_utf8(to(&["--to", "hf"], &output).stdout).unwrap();
    assert!(text.starts_with("step 7 is converted already: 1 file,"), "{text}");
    for other in [&["--to", "ranks", "2"][..], &["--to", "hf", "--shard-size", "1MB"]] {
        let text = refused(&to(other, &output), 1);
        assert!(text.contains("not this conversion") && text.contains("with other options"), "{text}");
    }
    assert!(files(&output) == before);
    let shard = output.join("model.safetensors");
    let mut bytes = fs::read(&shard).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    fs::write(&shard, bytes).unwrap();
    let text = refused(&to(&["--to", "hf"], &output), 3);
    assert!(text.contains("model.safetensors") && text.contains("delete it and run again"), "{text}");

    let foreign = root.path().join("foreign");
    fs::create_dir(&foreign).unwrap();
    assert!(refused(&to(&["--to", "hf"], &foreign), 1).contains("no checkpoint"));
    assert!(refused(&to(&["--to", "hf"], &step.join("model")), 1).contains("cannot lie in the checkpoint"));
    assert!(refused(&to(&["--to", "ranks"], &root.path().join("r")), 1).contains("--to ranks N OUT"));
    assert!(refused(&to(&["--to", "hf", "--prefix", "none"], &root.path().join("r")), 1).contains("no tensor"));
    assert!(!root.path().join("r").exists());
    assert_eq!(hidden(root.path()), [""; 0]);
}

#[test]
fn a_damaged_checkpoint_is_not_converted_and_tensor_and_file_are_named() {
    let root = tempfile::tempdir().unwrap();
    let step = save(root.path(), 3);
    let checkpoint = Checkpoint::open(&step).unwrap();
    let entries = checkpoint.contents().unwrap();
    let long = entries.tensors.iter().find(|tensor| tensor.name == "model.long").unwrap();
    let file = &entries.files[long.slices[1].file].name;
    let mut bytes = fs::read(step.join(file)).unwrap();
    bytes[long.slices[1].offset as usize + 100_000] ^= 1;
    fs::write(step.join(file), bytes).unwrap();
    let output = root.path().join("model");
    let text = refused(&convert(&["--to", "hf"], &step, &output).output().unwrap(), 3);
    assert!(text.contains("model.long") && text.contains(file.as_str()), "{text}");
    assert!(!output.exists());
}

#[test]
fn tensors_of_two_names_are_kept_or_copied() {
    let root = tempfile::tempdir().unwrap();
    let tensor = (Dtype::F32, vec![2, 3], (0..24_u8).collect::<Vec<u8>>());
    let step = made(root.path(), &[2, 3], Some(&tensor.2), true);
    let both: Expected = [("embed".into(), tensor.clone()), ("head".into(), tensor.clone())].into();
    let embed: Expected = [("embed".into(), tensor.clone())].into();
    for to in [&["--to", "hf"][..], &["--to", "ranks", "2"]] {
        let (kept, copied) = (root.path().join(format!("keep-{}", to[1])), root.path().join(format!("copy-{}", to[1])));
        let report = json(&convert(&[to, &["--json"]].concat(), &step, &kept).output().unwrap());
        assert_eq!(report["aliases"], serde_json::json!(["head"]));
        assert_equal(&kept, &both);
        let report = json(&convert(&[to, &["--json", "--aliases", "copy"]].concat(), &step, &copied).output().unwrap());
        assert_eq!(report["aliases"], serde_json::json!([]));
        assert_equal(&copied, &both);
        if to == ["--to", "hf"] {
            assert_plain(&kept, &embed);
            assert_plain(&copied, &both);
        }
    }
    // Where only the other name is chosen, it has the bytes itself.
    let head = root.path().join("head");
    json(&convert(&["--to", "hf", "--json", "--prefix", "head"], &step, &head).output().unwrap());
    assert_plain(&head, &[("head".into(), tensor)].into());
}

/// 8 TiB, all of them a hole.
#[test]
fn too_little_space_is_found_before_anything_is_written() {
    let root = tempfile::tempdir().unwrap();
    let step = made(root.path(), &[1 << 20, 1 << 21], None, false);
    for to in [&["--to", "hf"][..], &["--to", "ranks", "64"]] {
        let text = refused(&convert(to, &step, &root.path().join("deep/model")).output().unwrap(), 1);
        assert!(text.contains("not enough space") && text.contains("needed 8.8 TB"), "{text}");
    }
    assert_eq!((hidden(root.path()).len(), root.path().join("deep").exists()), (0, false));
}

#[test]
fn steps_of_every_version_are_converted() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/all/format/golden");
    let root = tempfile::tempdir().unwrap();
    let mut converted = 0;
    for version in fs::read_dir(golden).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()) {
        let steps = fs::read_dir(version).unwrap().map(|entry| entry.unwrap().path());
        for step in steps.filter(|path| path.join("manifest.json").exists()) {
            let before = Checkpoint::open(&step).unwrap();
            let content = |checkpoint: &Checkpoint| -> Expected {
                let tensors = checkpoint.tensors().unwrap();
                tensors
                    .map(|t| (t.name.into(), (t.dtype, t.shape.to_vec(), checkpoint.read(t.name).unwrap())))
                    .collect()
            };
            for to in [&["--to", "hf", "--aliases", "copy"][..], &["--to", "ranks", "3"]] {
                let output = root.path().join(format!("{converted}"));
                json(&convert(&[to, &["--json"]].concat(), &step, &output).output().unwrap());
                let after = assert_equal(&output, &content(&before));
                let mut values = before.manifest().values.clone();
                if let (1, "hf", Ok(own)) = (before.world(), to[1], before.rank_value(0, "rng")) {
                    values.insert("rng".to_owned(), own);
                }
                assert_eq!(after.manifest().values, values);
                assert_eq!(after.manifest().metadata, before.manifest().metadata);
                converted += 1;
            }
        }
    }
    assert!(converted >= 4, "{converted}");
}
