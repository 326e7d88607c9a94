//! The program on URLs.

use crate::roots::{executor, on_azure, on_s3, state};
use crate::servers::{azurite, given, moto, prefix};
use ashore::storage::Storage;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Duration;

/// The program, told where the servers are as its users tell it.
pub fn program(arguments: &[&str]) -> Command {
    let built = std::env::current_exe().unwrap();
    let program: PathBuf = built.ancestors().nth(2).unwrap().join("ashore");
    let mut command = Command::new(program);
    command.args(arguments);
    command.env("AWS_ENDPOINT_URL", moto()).env("AWS_ALLOW_HTTP", "true").env("AWS_REGION", "us-east-1");
    command
        .env("AWS_ACCESS_KEY_ID", given("ASHORE_TEST_KEY"))
        .env("AWS_SECRET_ACCESS_KEY", given("ASHORE_TEST_SECRET"));
    command.env("AZURE_STORAGE_ACCOUNT_NAME", given("ASHORE_TEST_ACCOUNT")).env("AZURE_STORAGE_ENDPOINT", azurite());
    command.env("AZURE_STORAGE_ACCOUNT_KEY", given("ASHORE_TEST_ACCOUNT_KEY")).env("AZURE_ALLOW_HTTP", "true");
    command
}

fn ashore(arguments: &[&str]) -> Output {
    program(arguments).output().unwrap()
}

pub fn said(arguments: &[&str]) -> String {
    let output = ashore(arguments);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{arguments:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

fn three_steps(storage: Arc<dyn Storage>) {
    let executor = executor(storage).build().unwrap();
    for step in [1, 2, 3] {
        executor.save(step, state(step)).unwrap().wait(Duration::from_secs(60)).unwrap();
    }
    executor.shutdown(Duration::from_secs(60)).unwrap();
}

fn every_verb(root: &str) {
    let listed = said(&["ls", root]);
    for step in ["1", "2", "3"] {
        assert!(listed.lines().any(|line| line.split_whitespace().any(|word| word == step)), "{listed}");
    }
    let step = format!("{root}/step-00000003");
    assert!(said(&["inspect", &step]).contains("weights"));
    said(&["verify", root]);
    said(&["verify", &step]);
    let target = tempfile::tempdir().unwrap();
    let whole = target.path().join("whole");
    said(&["convert", &step, "--to", "hf", whole.to_str().unwrap()]);
    assert!(std::fs::read_dir(&whole).unwrap().count() > 0);
    said(&["prune", root, "--keep-last", "1", "--yes"]);
    let listed = said(&["ls", root, "--json"]);
    assert!(listed.contains("\"step\":3") && !listed.contains("\"step\":2"), "{listed}");
    said(&["verify", root]);
    let near = target.path().join("near");
    let (near, far) = (near.to_str().unwrap(), format!("{root}-copy"));
    said(&["copy", root, near]);
    said(&["copy", near, &far]);
    said(&["verify", &far]);
    let listed = said(&["ls", root, near, &far, "--json"]);
    assert!(listed.contains("\"step\":3,\"fork\":false"), "{listed}");
    refused(&["convert", &step, "--to", "ranks", "2", &format!("{root}/other")], "ashore copy");
    for verb in [&["demo"][..], &["bench", "save"]] {
        refused(&[verb, &["--dir", root]].concat(), "measures disks");
    }
}

/// The program says in one line why it does not, and what to do instead.
fn refused(arguments: &[&str], why: &str) {
    let output = ashore(arguments);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && text.contains(why) && text.lines().count() <= 2, "{arguments:?}: {text}");
}

#[test]
fn every_verb_takes_the_url_of_a_root_on_s3() {
    let prefix = prefix("program");
    three_steps(on_s3(&moto(), &prefix));
    every_verb(&format!("s3://bucket/{prefix}"));
}

#[test]
fn every_verb_takes_the_url_of_a_root_on_azure() {
    let prefix = prefix("program");
    three_steps(on_azure(&azurite(), &prefix));
    every_verb(&format!("az://bucket/{prefix}"));
}

#[test]
fn a_url_with_a_mistake_is_an_error_of_one_line_and_not_a_directory_of_that_name() {
    for url in ["s4://bucket/run", "s3:/bucket/run", "s3://"] {
        let output = ashore(&["ls", url]);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && text.contains(url.trim_end_matches('/')), "{url}: {text}");
        assert!(!std::path::Path::new(url).exists(), "{url} was made here");
    }
}
