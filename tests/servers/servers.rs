//! The servers of `checks/stores/run.py`, by the environment, and clients of theirs.

use object_store::aws::{AmazonS3, AmazonS3Builder, Checksum};
use object_store::azure::{MicrosoftAzure, MicrosoftAzureBuilder};
use object_store::{BackoffConfig, ClientOptions, RetryConfig};
use std::time::Duration;

/// A variable of the environment that `just stores` sets.
pub fn given(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: `just stores` runs these tests"))
}

pub fn moto() -> String {
    given("ASHORE_TEST_MOTO")
}

pub fn s3s() -> String {
    given("ASHORE_TEST_S3S")
}

pub fn azurite() -> String {
    given("ASHORE_TEST_AZURITE")
}

/// A prefix that no other test has.
pub fn prefix(name: &str) -> String {
    format!("{name}-{}", uuid::Uuid::new_v4().simple())
}

/// A client of S3 at this URL.
pub fn s3(url: &str, bucket: &str) -> AmazonS3 {
    s3_builder(url, bucket).build().unwrap()
}

pub fn s3_builder(url: &str, bucket: &str) -> AmazonS3Builder {
    AmazonS3Builder::new()
        .with_endpoint(url)
        .with_allow_http(true)
        .with_bucket_name(bucket)
        .with_region("us-east-1")
        .with_access_key_id(given("ASHORE_TEST_KEY"))
        .with_secret_access_key(given("ASHORE_TEST_SECRET"))
        .with_checksum_algorithm(Checksum::CRC64NVME)
        .with_client_options(ClientOptions::new().with_allow_http(true).with_timeout(Duration::from_secs(5)))
        .with_retry(few())
}

/// A client of Azure at this URL.
pub fn azure(url: &str, container: &str) -> MicrosoftAzure {
    MicrosoftAzureBuilder::new()
        .with_endpoint(url.to_owned())
        .with_allow_http(true)
        .with_account(given("ASHORE_TEST_ACCOUNT"))
        .with_access_key(given("ASHORE_TEST_ACCOUNT_KEY"))
        .with_container_name(container)
        .with_use_emulator(false)
        .with_client_options(ClientOptions::new().with_allow_http(true).with_timeout(Duration::from_secs(5)))
        .with_retry(few())
        .build()
        .unwrap()
}

fn few() -> RetryConfig {
    let backoff =
        BackoffConfig { init_backoff: Duration::from_millis(10), max_backoff: Duration::from_millis(100), base: 2. };
    RetryConfig { backoff, max_retries: 2, retry_timeout: Duration::from_secs(20) }
}
