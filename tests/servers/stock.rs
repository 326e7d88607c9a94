//! What lies in a store, read by programs that know nothing of ashore.

use crate::roots::{executor, numbers, on_s3, state};
use crate::servers::{given, moto, prefix, s3};
use object_store::{ObjectStoreExt, path::Path};
use std::process::Command;
use std::time::Duration;

const SCRIPTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/checks/stores");

fn output(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{command:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

#[test]
fn a_step_that_boto3_downloads_is_read_by_safetensors_and_torch() {
    let prefix = prefix("stock");
    let executor = executor(on_s3(&moto(), &prefix)).build().unwrap();
    let saved = executor.save(7, state(7)).unwrap();
    let attempt = saved.attempt().to_string();
    saved.wait(Duration::from_secs(60)).unwrap();
    executor.shutdown(Duration::from_secs(60)).unwrap();
    let root = crate::run(async {
        s3(&moto(), "bucket").get(&Path::from(format!("{prefix}/ashore.json"))).await.unwrap().bytes().await.unwrap()
    });
    assert!(String::from_utf8_lossy(&root).contains(&attempt), "the root does not name the attempt: {root:?}");

    let target = tempfile::tempdir().unwrap();
    let mut download = Command::new(given("ASHORE_TEST_BOTO"));
    download
        .arg(format!("{SCRIPTS}/download.py"))
        .args([&moto(), "bucket", &format!("{prefix}/step-")])
        .arg(target.path());
    download
        .env("AWS_ACCESS_KEY_ID", given("ASHORE_TEST_KEY"))
        .env("AWS_SECRET_ACCESS_KEY", given("ASHORE_TEST_SECRET"));
    let files = output(&mut download);
    let manifest = files.lines().find(|file| file.ends_with("/manifest.json")).expect("a manifest");
    let directory = manifest.trim_end_matches("/manifest.json");
    assert!(directory.ends_with(&attempt), "the directory is of another attempt: {directory}");
    let numbers = numbers(7);
    let (first, last) = (numbers[0].to_string(), numbers[numbers.len() - 1].to_string());
    let mut read = Command::new(given("ASHORE_TEST_STOCK"));
    read.arg(format!("{SCRIPTS}/read.py")).arg(directory).args(["weights", &first, &last, &numbers.len().to_string()]);
    output(&mut read);
    // The same directory is a step of ashore's on a disk.
    assert_eq!(ashore::Checkpoint::open(directory).unwrap().read_as::<u64>("weights").unwrap(), numbers);
}
