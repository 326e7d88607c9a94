//! Runs the program in a directory of steps, and compares what it prints.

use ashore::chain::Publisher;
use ashore::internal::format::entries::MANIFEST;
use ashore::internal::format::seal;
use ashore::{CheckpointExecutor, HostTensor, StateDict};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

const MINUTE: Duration = Duration::from_secs(60);

/// A run: a directory `run` in a directory of its own, so that paths are the same in every test.
pub struct Run(tempfile::TempDir);

impl Run {
    /// Saves these steps.
    pub fn new(steps: impl IntoIterator<Item = u64>) -> Self {
        let run = Self(tempfile::tempdir().unwrap());
        run.save(steps);
        run
    }

    /// Saves further steps.
    pub fn save(&self, steps: impl IntoIterator<Item = u64>) {
        let executor = CheckpointExecutor::builder(self.root()).arena(4 << 20).chunk(1 << 20).build().unwrap();
        for step in steps {
            executor.save(step, state(step)).unwrap().wait(MINUTE).unwrap();
        }
        executor.shutdown(MINUTE).unwrap();
    }

    /// Saves these steps from one state.
    pub fn save_alike(&self, steps: impl IntoIterator<Item = u64>) {
        let executor = CheckpointExecutor::builder(self.root()).arena(4 << 20).chunk(1 << 20).build().unwrap();
        for step in steps {
            executor.save(step, state(1)).unwrap().wait(MINUTE).unwrap();
        }
        executor.shutdown(MINUTE).unwrap();
    }

    /// Saves a step of so many tensors, whose table has several pages.
    pub fn save_many(&self, step: u64, tensors: u64) {
        let executor = CheckpointExecutor::builder(self.root()).arena(4 << 20).chunk(1 << 20).build().unwrap();
        let mut state = StateDict::new();
        for number in 0..tensors {
            state.tensor(format!("a-tensor-with-a-long-name.{number:05}"), vec![number; 2]).unwrap();
        }
        executor.save(step, state).unwrap().wait(MINUTE).unwrap();
        executor.shutdown(MINUTE).unwrap();
    }

    /// Publishes as many further versions, in `chain` beside the run.
    pub fn publish(&self, versions: usize) {
        let publisher = Publisher::open(self.0.path().join("chain")).unwrap().arena(4 << 20).build().unwrap();
        // Large enough that deltas stay below half of a full.
        let mut weights = vec![1.0_f32; 400_000];
        for version in 0..versions {
            weights[version] += 0.5;
            let mut state = StateDict::new();
            state.tensor("weights", weights.clone()).unwrap();
            publisher.publish(state).unwrap().wait(MINUTE).unwrap();
        }
    }

    pub fn root(&self) -> PathBuf {
        self.0.path().join("run")
    }

    pub fn step(&self, step: u64) -> PathBuf {
        self.root().join(format!("step-{step:08}"))
    }

    /// The only shard of a step.
    pub fn shard(&self, step: u64) -> PathBuf {
        self.step(step).join("model.safetensors")
    }

    /// Makes the step `to` share the shard of `from`, as a save that did not change its tensors does. Both
    /// must have been saved from the same state: then the tables differ in the origin of the shard alone.
    pub fn share(&self, from: u64, to: u64) {
        fs::remove_file(self.shard(to)).unwrap();
        fs::hard_link(self.shard(from), self.shard(to)).unwrap();
        fs::copy(self.step(from).join("tensors.table"), self.step(to).join("tensors.table")).unwrap();
        let [theirs, ours] = [from, to].map(|step| fs::read_to_string(self.step(step).join(MANIFEST)).unwrap());
        let tables = |text: &str| text.find("\"tables\":").unwrap()..text.rfind(",\"digest\":").unwrap();
        let mut text = ours.clone();
        text.replace_range(tables(&ours), &theirs[tables(&theirs)]);
        let end = text.rfind(",\"digest\":").unwrap();
        let sealed = seal::seal(text.as_bytes()[..end].to_vec());
        fs::write(self.step(to).join(MANIFEST), sealed).unwrap();
    }

    /// Changes the bytes of a file.
    pub fn change(&self, file: &Path, change: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = fs::read(file).unwrap();
        change(&mut bytes);
        fs::write(file, bytes).unwrap();
    }

    /// Where the bytes of a tensor begin in the shard of a step.
    pub fn offset(&self, step: u64, tensor: &str) -> usize {
        let inspected = self.json(&["inspect", "run", &step.to_string(), "--json"], 0);
        let tensors = inspected["tensors"].as_array().unwrap();
        let found = tensors.iter().find(|one| one["name"] == tensor).unwrap();
        found["slices"][0]["offset"].as_u64().unwrap() as usize
    }

    pub fn ashore(&self, args: &[&str], columns: usize) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ashore"));
        command.args(args).current_dir(self.0.path()).env("COLUMNS", columns.to_string()).env("TZ", "UTC");
        command.stdin(Stdio::null()).output().unwrap()
    }

    /// Returns the text that the program prints on wide lines.
    pub fn said(&self, args: &[&str]) -> String {
        String::from_utf8(self.ashore(args, 200).stdout).unwrap()
    }

    /// Returns the JSON that the program prints, which ends with `status`.
    pub fn json(&self, args: &[&str], status: i32) -> Value {
        let output = self.ashore(args, 80);
        assert_eq!(output.status.code(), Some(status), "{args:?}: {output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Compares what the program prints at 80 and at 200 columns with the files `name.80.txt` and
    /// `name.200.txt`. Both streams are in them, and the status.
    pub fn shows(&self, name: &str, args: &[&str]) {
        for columns in [80, 200] {
            self.shows_at(name, args, columns);
        }
    }

    /// As [`Run::shows`], at one width: for a command that prints something else when it is run again.
    pub fn shows_at(&self, name: &str, args: &[&str], columns: usize) {
        let output = self.ashore(args, columns);
        let (out, err) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
        let here = self.0.path().canonicalize().unwrap().display().to_string();
        let status = output.status.code().map_or_else(|| "killed".to_owned(), |code| code.to_string());
        let shown = format!("$ ashore {}\n{out}{err}exit {status}\n", args.join(" ")).replace(&here, "");
        let shown = masked(&shown);
        assert!(!shown.contains('\u{1b}'), "{shown}");
        let long = |line: &&str| line.chars().count() > columns && line.trim().contains(' ');
        assert_eq!(out.lines().find(long), None, "a line is longer than {columns} columns: {shown}");
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/people/shown/{name}.{columns}.txt"));
        if std::env::var_os("ASHORE_BLESS").is_some() {
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(&file, &shown).unwrap();
        }
        let expected = fs::read_to_string(&file).unwrap_or_default();
        assert!(shown == expected, "{} has another text than\n{shown}", file.display());
    }
}

/// What differs from run to run, and what is shown in its place: dates, times of day, identities, processes.
/// `9` is a digit, `A` an upper-case letter, `x` a lower-case letter or digit, all else itself.
const MASKS: [(&str, &str); 4] = [
    ("99 Axx 99:99", "01 Jan 00:00"),
    ("99:99:99", "00:00:00"),
    ("xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx", "00000000-0000-4000-8000-000000000000"),
    ("pid 9", "pid #"),
];

pub fn masked(text: &str) -> String {
    let fits = |pattern: &str, text: &[char]| {
        pattern.chars().count() <= text.len()
            && pattern.chars().zip(text).all(|(pattern, c)| match pattern {
                '9' => c.is_ascii_digit(),
                'A' => c.is_ascii_uppercase(),
                'x' => c.is_ascii_lowercase() || c.is_ascii_digit(),
                other => *c == other,
            })
    };
    let (text, mut out, mut at) = (text.chars().collect::<Vec<_>>(), String::new(), 0);
    while at < text.len() {
        let Some((pattern, mask)) = MASKS.iter().find(|(pattern, _)| fits(pattern, &text[at..])) else {
            out.push(text[at]);
            at += 1;
            continue;
        };
        out += mask;
        at += pattern.chars().count();
        while mask.ends_with('#') && text.get(at).is_some_and(char::is_ascii_digit) {
            at += 1;
        }
    }
    out
}

/// A state with weights, a counter and metadata that differ from step to step.
pub fn state(step: u64) -> StateDict<'static> {
    let weights: Vec<f32> = (0..64 * 100).map(|i| (i % 97) as f32 / 32.0 + step as f32).collect();
    let half: Vec<half::bf16> = (0..300).map(|i| half::bf16::from_f32(i as f32 / 8.0)).collect();
    let bytes: Vec<u8> = half.iter().flat_map(|one| one.to_le_bytes()).collect();
    let mut state = StateDict::new();
    state.tensor("layers.0.weight", HostTensor::new(std::sync::Arc::new(weights), [64, 100])).unwrap();
    state.tensor("layers.0.bias", bytes).unwrap();
    state.tensor("counts", vec![step as i64; 8]).unwrap();
    state.value("lr", &(1.0 / (step as f64))).unwrap();
    state.metadata("loss", &(10.0 / step as f64)).unwrap();
    state
}
