//! Opens the store that a URL names.

use super::client::Store;
use crate::error::{Error, Result};
use crate::storage::url::Url;
use std::sync::Arc;

/// Opens the store of `url`, with credentials and settings from the environment.
///
/// # Errors
/// `Invalid` when this build does not include this kind of store, or a setting of the environment cannot be
/// used.
pub(super) fn connect(url: &Url) -> Result<Arc<dyn Store>> {
    #[cfg(not(all(feature = "s3", feature = "gcs", feature = "azure")))]
    let absent = |feature: &str| {
        let why = format!("this build has no such store: build `ashore` with the feature `{feature}`");
        Err(Error::invalid(why).with_path(url.to_string()))
    };
    match &*url.scheme {
        #[cfg(feature = "s3")]
        "s3" => s3::connect(url),
        #[cfg(feature = "gcs")]
        "gs" => gcs::connect(url),
        #[cfg(feature = "azure")]
        "az" => azure::connect(url),
        #[cfg(not(feature = "s3"))]
        "s3" => absent("s3"),
        #[cfg(not(feature = "gcs"))]
        "gs" => absent("gcs"),
        #[cfg(not(feature = "azure"))]
        "az" => absent("azure"),
        _ => Err(Error::invalid("no store has this scheme: use s3, gs or az").with_path(url.to_string())),
    }
}

#[cfg(any(feature = "s3", feature = "gcs", feature = "azure"))]
mod settings {
    use crate::error::{Error, ErrorKind};
    use crate::storage::url::Url;
    use object_store::{BackoffConfig, ClientOptions, RetryConfig};
    use std::time::Duration;

    /// A store that does not accept a connection, or is silent, for this long counts as not answering.
    const CONNECT: Duration = Duration::from_secs(5);
    const SILENCE: Duration = Duration::from_secs(30);

    /// Each request has a deadline of our own, which depends on its length.
    pub(super) fn client(plain: bool) -> ClientOptions {
        let options = ClientOptions::new().with_timeout_disabled().with_connect_timeout(CONNECT);
        options.with_read_timeout(SILENCE).with_allow_http(plain)
    }

    /// True if a setting of the environment is switched on.
    #[cfg(any(feature = "s3", feature = "azure"))]
    pub(super) fn is_on(value: Option<String>) -> bool {
        value.is_some_and(|value| matches!(&*value.to_ascii_lowercase(), "true" | "1"))
    }

    /// True if this endpoint has no TLS.
    pub(super) fn is_plain(endpoint: Option<String>) -> bool {
        endpoint.is_some_and(|endpoint| endpoint.starts_with("http://"))
    }

    /// Switches off the retries of the crate. `client` repeats requests, with a new signature, so each answer
    /// belongs to one request.
    pub(super) fn retry() -> RetryConfig {
        let backoff = BackoffConfig::default();
        RetryConfig { backoff, max_retries: 0, retry_timeout: Duration::from_secs(10) }
    }

    pub(super) fn unusable(url: &Url, error: &object_store::Error) -> Error {
        let why = "the store of a URL cannot be opened: a setting of the environment is missing or wrong";
        let error = super::super::errors::error("open the store", &url.to_string(), "", error, false);
        Error::new(ErrorKind::Invalid, why).with_path(url.to_string()).with_source(error)
    }
}

#[cfg(feature = "s3")]
mod s3 {
    use super::super::uploads::Connector;
    use super::settings::{client, is_on, is_plain, retry, unusable};
    use super::{Arc, Result, Store, Url};
    use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey, Checksum};

    pub(super) fn connect(url: &Url) -> Result<Arc<dyn Store>> {
        let builder = AmazonS3Builder::from_env().with_bucket_name(&url.bucket);
        let plain = is_plain(builder.get_config_value(&AmazonS3ConfigKey::Endpoint));
        let unsigned = is_on(builder.get_config_value(&AmazonS3ConfigKey::UnsignedPayload));
        let mut builder = builder
            .with_client_options(client(plain))
            .with_allow_http(plain)
            .with_retry(retry())
            .with_http_connector(Connector);
        if !plain || unsigned {
            // TLS protects the body in transit, and the checksum protects it inside the store. Without TLS
            // the signature covers a SHA-256 of the body, at three times the CPU time, unless the user
            // disables that.
            builder = builder.with_unsigned_payload(true).with_checksum_algorithm(Checksum::CRC64NVME);
        }
        Ok(Arc::new(builder.build().map_err(|error| unusable(url, &error))?))
    }
}

#[cfg(feature = "gcs")]
mod gcs {
    use super::super::uploads::Connector;
    use super::settings::{client, is_plain, retry, unusable};
    use super::{Arc, Result, Store, Url};
    use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};

    pub(super) fn connect(url: &Url) -> Result<Arc<dyn Store>> {
        let builder = GoogleCloudStorageBuilder::from_env().with_bucket_name(&url.bucket);
        let plain = is_plain(builder.get_config_value(&GoogleConfigKey::BaseUrl));
        let builder = builder.with_client_options(client(plain)).with_retry(retry()).with_http_connector(Connector);
        Ok(Arc::new(builder.build().map_err(|error| unusable(url, &error))?))
    }
}

#[cfg(feature = "azure")]
mod azure {
    use super::super::uploads::Connector;
    use super::settings::{client, is_on, is_plain, retry, unusable};
    use super::{Arc, Result, Store, Url};
    use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};

    pub(super) fn connect(url: &Url) -> Result<Arc<dyn Store>> {
        let builder = MicrosoftAzureBuilder::from_env().with_container_name(&url.bucket);
        let plain = is_plain(builder.get_config_value(&AzureConfigKey::Endpoint))
            || is_on(builder.get_config_value(&AzureConfigKey::UseEmulator));
        let builder = builder
            .with_client_options(client(plain))
            .with_allow_http(plain)
            .with_retry(retry())
            .with_http_connector(Connector);
        Ok(Arc::new(builder.build().map_err(|error| unusable(url, &error))?))
    }
}
