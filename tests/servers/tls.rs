//! A store behind TLS, whose certificate a private authority has signed.

use crate::program::program;
use crate::proxy::{Fault, Proxy};
use crate::roots::{executor, numbers, over, state};
use crate::servers::{given, moto, prefix, s3_builder};
use ashore::{Catalog, CheckpointExecutor, ErrorKind, HostTensor, StateDict};
use object_store::{Certificate, ClientOptions};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;

const LONG: Duration = Duration::from_secs(120);

/// TLS before a server of HTTP, by `checks/stores/tls.py`, until it is dropped.
struct Front {
    process: Child,
    url: String,
    directory: TempDir,
}

impl Front {
    /// `certificate` is `valid`, `expired` or `misnamed`.
    fn before(url: &str, certificate: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("checks/stores/tls.py");
        let mut command = Command::new(given("ASHORE_TEST_BOTO"));
        command.arg(script).arg(url.trim_start_matches("http://")).arg(directory.path()).arg(certificate);
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut url = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut url).unwrap();
        assert!(url.starts_with("https://"), "it does not start: {url:?}");
        Self { process, url: url.trim_end().to_owned(), directory }
    }

    fn ca(&self) -> PathBuf {
        self.directory.path().join("ca.pem")
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        // It ends with its input.
        drop(self.process.stdin.take());
        let _ = self.process.wait();
    }
}

/// Runs the program with this endpoint and this file of trusted authorities; returns what it says, or its
/// errors.
fn told(arguments: &[&str], endpoint: &str, ca: &Path) -> Result<String, String> {
    let mut command = program(arguments);
    command.env("AWS_ENDPOINT_URL", endpoint).env_remove("AWS_ALLOW_HTTP");
    command.env_remove("SSL_CERT_DIR").env("SSL_CERT_FILE", ca);
    let output = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

#[test]
fn what_is_sent_through_tls_has_an_unsigned_body_with_a_checksum_that_the_store_judges() {
    let (proxy, prefix, root) = (Proxy::before(&moto()), prefix("tls"), tempfile::tempdir().unwrap());
    let front = Front::before(&proxy.url(), "valid");
    let executor = CheckpointExecutor::builder(root.path()).alone().build().unwrap();
    let data: Vec<u64> = (0..3 << 19).collect();
    let mut state = StateDict::new();
    // Two parts.
    state.tensor("weights", HostTensor::new(Arc::new(data.clone()), [data.len()])).unwrap();
    executor.save(1, state).unwrap().wait(LONG).unwrap();
    executor.shutdown(LONG).unwrap();
    proxy.fault("PUT", "partNumber=2", Fault::FlippedRequest, 1);
    let url = format!("s3://bucket/{prefix}");
    told(&["copy", root.path().to_str().unwrap(), &url], &front.url, &front.ca()).unwrap();
    let seen = proxy.seen();
    let puts: Vec<_> = seen.iter().filter(|seen| seen.method == "PUT").collect();
    assert!(puts.iter().all(|put| put.payload == "UNSIGNED-PAYLOAD" && put.checked), "{puts:#?}");
    let parts: Vec<_> = puts.iter().filter(|put| put.path.contains("partNumber=2")).map(|put| put.status).collect();
    assert_eq!(parts, [400, 200], "the part whose bytes changed is sent again");
    told(&["verify", &url], &front.url, &front.ca()).unwrap();
    let found = Catalog::over(crate::roots::on_s3(&moto(), &prefix)).checkpoint(1).unwrap();
    assert_eq!(found.read_as::<u64>("weights").unwrap(), data);
}

#[test]
fn a_certificate_that_cannot_be_trusted_is_refused_at_once_and_the_error_says_what_to_set() {
    let prefix = prefix("tls");
    let fronts = ["valid", "expired", "misnamed"].map(|certificate| Front::before(&moto(), certificate));
    let [valid, expired, misnamed] = &fronts;
    let plain = moto().replace("http://", "https://");
    let absent = valid.directory.path().join("absent.pem");
    let cases = [
        (&valid.url, &expired.ca(), vec!["SSL_CERT_FILE", &valid.url]),
        (&expired.url, &expired.ca(), vec!["clock", "certificate expired", &expired.url]),
        (&misnamed.url, &misnamed.ca(), vec!["AWS_ENDPOINT_URL", "elsewhere.example", &misnamed.url]),
        (&plain, &valid.ca(), vec!["http://", "TLS", &plain]),
        (&valid.url, &absent, vec!["SSL_CERT_FILE"]),
    ];
    for (endpoint, ca, words) in cases {
        let url = format!("s3://bucket/{prefix}");
        let error = told(&["ls", &url], endpoint, ca).unwrap_err();
        for word in words.into_iter().chain([&*url]) {
            assert!(error.contains(word), "it does not say {word:?}: {error}");
        }
    }
}

/// A storage of the program's own store, which trusts these authorities besides those of the machine.
fn trusting(endpoint: &str, prefix: &str, authorities: &[PathBuf]) -> Arc<dyn ashore::storage::Storage> {
    let read = |path| Certificate::from_pem(&std::fs::read(path).unwrap()).unwrap();
    let options = authorities.iter().map(read).fold(ClientOptions::new(), ClientOptions::with_root_certificate);
    over(s3_builder(endpoint, "bucket").with_client_options(options).build().unwrap(), prefix)
}

#[test]
fn a_program_gives_its_authority_with_the_store_that_it_opens() {
    let (front, prefix) = (Front::before(&moto(), "valid"), prefix("tls"));
    let storage = trusting(&front.url, &prefix, &[front.ca()]);
    let saving = executor(storage.clone()).build().unwrap();
    saving.save(1, state(1)).unwrap().wait(LONG).unwrap();
    saving.shutdown(LONG).unwrap();
    assert_eq!(Catalog::over(storage).checkpoint(1).unwrap().read_as::<u64>("weights").unwrap(), numbers(1));
    let error = executor(trusting(&front.url, &prefix, &[])).build().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error:#}");
}
