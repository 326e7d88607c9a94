//! Wrong settings and hostile buckets: errors that name the store and say what to do, and never a panic.

use crate::proxy::{Fault, Proxy, Rule};
use crate::roots::{executor, on_s3, over, state};
use crate::servers::{self, moto, prefix, s3s};
use ashore::storage::Storage;
use ashore::{Catalog, Error, ErrorKind};
use object_store::ObjectStoreExt;
use object_store::aws::AmazonS3;
use object_store::path::Path;
use std::sync::Arc;
use std::time::Duration;

fn refused(storage: Arc<dyn Storage>) -> Error {
    let built = executor(storage).save_timeout(Duration::from_secs(5)).build();
    let error =
        built.and_then(|executor| executor.save(1, state(1)).and_then(|save| save.wait(Duration::from_secs(60))));
    error.map(drop).unwrap_err()
}

/// The error is of this kind and says these words; all of them name the root.
fn says(error: &Error, kind: ErrorKind, words: &[&str]) {
    let text = format!("{error:#}");
    assert_eq!(error.kind(), kind, "{text}");
    for word in words {
        assert!(text.contains(word), "it does not say {word:?}: {text}");
    }
    assert!(error.path().is_some_and(|path| path.to_string_lossy().contains("://")), "it names no store: {text}");
}

#[test]
fn a_bucket_that_is_not_there() {
    let error = refused(over(servers::s3(&moto(), "no-such-bucket"), "run"));
    says(&error, ErrorKind::Invalid, &["bucket"]);
    let listed = Catalog::over(over(servers::s3(&moto(), "no-such-bucket"), "run")).list().unwrap_err();
    says(&listed, ErrorKind::Invalid, &["bucket"]);
}

#[test]
fn a_secret_that_is_wrong() {
    let client = servers::s3_builder(&s3s(), "bucket").with_secret_access_key("another").build().unwrap();
    says(&refused(over(client, "run")), ErrorKind::Invalid, &["credentials", "SignatureDoesNotMatch"]);
}

/// What an executor says when its store always answers so.
fn when_the_store_says(status: u16, code: &'static str) -> Error {
    let proxy = Proxy::before(&moto());
    proxy.fault("", "", Fault::Status(status, code), usize::MAX);
    refused(on_s3(&proxy.url(), &prefix("refused")))
}

#[test]
fn a_permission_that_is_missing() {
    says(&when_the_store_says(403, "AccessDenied"), ErrorKind::Invalid, &["AccessDenied", "policy"]);
}

#[test]
fn a_clock_that_is_off() {
    says(&when_the_store_says(403, "RequestTimeTooSkewed"), ErrorKind::Invalid, &["clock"]);
}

#[test]
fn a_bucket_in_another_region() {
    says(&when_the_store_says(301, "PermanentRedirect"), ErrorKind::Invalid, &["region", "AWS_REGION"]);
}

#[test]
fn a_quota_that_is_full() {
    says(&when_the_store_says(403, "QuotaExceeded"), ErrorKind::NoSpace, &["quota"]);
}

#[test]
fn a_token_that_has_expired_once_is_renewed_and_one_that_stays_expired_is_said() {
    let (proxy, prefix) = (Proxy::before(&moto()), prefix("expired"));
    let executor = executor(on_s3(&proxy.url(), &prefix)).build().unwrap();
    proxy.fault("PUT", "", Fault::Status(400, "ExpiredToken"), 1);
    executor.save(1, state(1)).unwrap().wait(Duration::from_secs(60)).unwrap();
    drop(executor);
    says(&when_the_store_says(400, "ExpiredToken"), ErrorKind::Unavailable, &["credentials", "expired"]);
}

#[test]
fn a_store_without_conditions_is_refused_before_anything_is_written() {
    // The proxy says yes to every put, as a store that does not hear conditions does.
    let proxy = Proxy::before(&moto());
    proxy.deaf(true);
    let error = refused(on_s3(&proxy.url(), &prefix("deaf")));
    says(&error, ErrorKind::Invalid, &["condition"]);
}

/// S3 answers a conditional put with 409 when another request was in its way. Executors could not be built
/// then.
#[test]
fn a_probe_that_the_store_refuses_for_another_requests_sake_is_sent_again() {
    let proxy = Proxy::before(&moto());
    for skip in [0, 1] {
        let fault = Fault::Status(409, "ConditionalRequestConflict");
        // The first put of a probe, and the third, which changes what the first has made.
        proxy.rule(Rule { method: "PUT", path: "/.probe-".into(), fault, skip: 2 * skip, times: 2 });
        executor(on_s3(&proxy.url(), &prefix("probed"))).build().unwrap();
        proxy.calm();
    }
}

#[test]
fn an_empty_prefix_has_no_steps() {
    let catalog = Catalog::over(on_s3(&moto(), &prefix("empty")));
    assert!(catalog.list().unwrap().is_empty() && catalog.latest().unwrap().is_none());
    assert_eq!(catalog.checkpoint(7).unwrap_err().kind(), ErrorKind::NotFound);
}

/// A prefix that holds these objects, and its catalog.
fn holding(objects: &[(&str, Vec<u8>)]) -> (AmazonS3, Catalog) {
    let (client, prefix) = (servers::s3(&moto(), "bucket"), prefix("hostile"));
    for (key, bytes) in objects {
        let key = Path::parse(format!("{prefix}/{key}")).unwrap();
        crate::run(client.put(&key, bytes.clone().into())).unwrap();
    }
    let catalog = Catalog::over(on_s3(&moto(), &prefix));
    (client, catalog)
}

#[test]
fn a_root_object_of_anything_is_corrupt_or_empty_and_never_a_panic() {
    let deep = "[".repeat(100_000);
    let texts: [&[u8]; 10] = [
        b"",
        b"{}",
        b"null",
        b"\xff\xfe\x00",
        b"{\"format\":\"ashore-store\",\"version\":999}",
        b"{\"format\":\"ashore\",\"version\":1,\"steps\":[{\"step\":1,\"attempt\":\"../../other\"}]}",
        b"{\"format\":\"ashore\",\"version\":1,\"steps\":[{\"step\":18446744073709551616}]}",
        b"{\"format\":\"ashore\",\"version\":1,\"generation\":-1,\"steps\":7}",
        deep.as_bytes(),
        &[b'7'; 5 << 20],
    ];
    for text in texts {
        let (_, catalog) = holding(&[("ashore.json", text.to_vec())]);
        let shown = String::from_utf8_lossy(&text[..text.len().min(60)]).into_owned();
        let error = catalog.list().map(drop).expect_err(&shown);
        assert!([ErrorKind::Corrupt, ErrorKind::Invalid].contains(&error.kind()), "{shown}: {error:#}");
        says(&error, error.kind(), &["ashore.json"]);
    }
}

#[test]
fn objects_that_no_root_names_are_no_steps() {
    let junk = vec![7; 100];
    let (_, catalog) = holding(&[
        ("step-1/manifest.json", junk.clone()),
        ("step-2/1-00000000-0000-0000-0000-000000000000/manifest.json", junk.clone()),
        ("step-18446744073709551616/x", junk.clone()),
        ("\u{1f6a2}/step-3", junk.clone()),
        ("step-4", junk),
    ]);
    assert!(catalog.list().unwrap().is_empty() && catalog.latest().unwrap().is_none());
}

#[test]
fn a_bucket_with_other_things_in_it_takes_steps_and_keeps_the_other_things() {
    let junk = vec![7; 100];
    let (client, prefix) = (servers::s3(&moto(), "bucket"), prefix("shared"));
    let others = ["notes.txt", "step-1/notes.txt", "step-1/0-x/notes.txt", ".probe-x"];
    let at = |key: &str| Path::from(format!("{prefix}/{key}"));
    for key in others {
        crate::run(client.put(&at(key), junk.clone().into())).unwrap();
    }
    let executor = executor(on_s3(&moto(), &prefix)).build().unwrap();
    executor.save(1, state(1)).unwrap().wait(Duration::from_secs(60)).unwrap();
    executor.shutdown(Duration::from_secs(60)).unwrap();
    for key in others {
        crate::run(client.head(&at(key))).unwrap();
    }
}

#[test]
fn addresses_with_a_mistake_say_what_an_address_looks_like() {
    let wrong = [
        "s4://bucket/run",
        "s3:/bucket/run",
        "s3://",
        "s3:///run",
        "az://",
        "gs://",
        "http://host/bucket",
        "s3://bucket/a/../b",
    ];
    for address in wrong {
        let error = ashore::storage::open(address).map(drop).expect_err(address);
        assert_eq!(error.kind(), ErrorKind::Invalid, "{address}: {error:#}");
        assert!(format!("{error:#}").contains(address.trim_end_matches('/')), "{address}: {error:#}");
    }
}

#[test]
fn an_object_that_is_gone_is_damage_and_one_of_a_step_that_was_pruned_is_not() {
    let prefix = prefix("gone");
    let executor = executor(on_s3(&moto(), &prefix)).build().unwrap();
    for step in [1, 2, 3] {
        executor.save(step, state(step)).unwrap().wait(Duration::from_secs(60)).unwrap();
    }
    executor.shutdown(Duration::from_secs(60)).unwrap();
    let reader = Catalog::over(on_s3(&moto(), &prefix));
    let (first, second) = (reader.checkpoint(1).unwrap(), reader.checkpoint(2).unwrap());
    let pruner = Catalog::over(on_s3(&moto(), &prefix));
    pruner.delete(1, ashore::PruneOptions::default()).unwrap().complete().unwrap();
    let error = first.read("weights").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error:#}");
    assert!(format!("{error:#}").contains("pruned"), "{error:#}");

    let client = servers::s3(&moto(), "bucket");
    crate::run(async {
        use object_store::ObjectStore;
        let below = Path::from(format!("{prefix}/step-00000002"));
        let found = client.list_with_delimiter(Some(&below)).await.unwrap();
        let attempt = found.common_prefixes.first().unwrap().clone();
        let files = client.list_with_delimiter(Some(&attempt)).await.unwrap().objects;
        let shard = files.iter().max_by_key(|object| object.size).unwrap();
        client.delete(&shard.location).await.unwrap();
    });
    let error = second.read("weights").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error:#}");
    says(&error, ErrorKind::Corrupt, &["step-00000002"]);
    // The other steps are what they were.
    assert_eq!(reader.checkpoint(3).unwrap().read_as::<u64>("weights").unwrap(), crate::roots::numbers(3));
}
