//! Probes whether a store respects conditions, before the first change of a root depends on them.
//!
//! The probe shows that the store respects a condition. No probe can show that a store decides correctly
//! between two concurrent requests; `docs/stores.md` demands that.

use super::client::{Answered, Client, Condition, FIRST_PAUSE, LONGEST_PAUSE, varied};
use crate::error::{Error, ErrorKind, Result};
use bytes::Bytes;
use object_store::UpdateVersion;
use std::time::Instant;
use uuid::Uuid;

/// How often a put is sent that the store refuses although its condition holds.
const TRIES: usize = 10;

/// Probes the store, once for a client and all clients derived from it.
///
/// # Errors
/// `Invalid` when the store does not respect conditions; errors of the store.
pub(super) fn conditions(client: &Client) -> Result<()> {
    if client.is_probed() {
        return Ok(());
    }
    let key = format!(".probe-{}", Uuid::new_v4());
    let probed = probe(client, &key);
    if let Err(error) = client.delete("delete the probe", vec![client.key(&key)], client.deadline()) {
        tracing::warn!(error = format_args!("{error:#}"), "a probe of an object store is left");
    }
    probed?;
    client.set_probed();
    Ok(())
}

/// Puts `text` on a condition, and repeats the request until the store accepts or refuses it.
fn put(
    client: &Client,
    key: &str,
    text: &'static str,
    condition: Condition,
    deadline: Instant,
) -> std::result::Result<(), Answered> {
    let mut pause = FIRST_PAUSE;
    loop {
        let put = client.put_if(key, Bytes::from_static(text.as_bytes()), condition.clone(), deadline);
        let Err(answered) = put else { return Ok(()) };
        let hopeless = answered.error.kind() == ErrorKind::Invalid;
        let ended = answered.refused || answered.certain || answered.unsent || hopeless;
        let pausing = varied(pause);
        if ended || Instant::now() + pausing >= deadline {
            return Err(answered);
        }
        std::thread::sleep(pausing);
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

fn probe(client: &Client, key: &str) -> Result<()> {
    let deadline = client.deadline();
    let put = |text, condition| put(client, key, text, condition, deadline);
    let content = || -> Result<_> {
        let there = client.get("read the probe", key, 64, deadline)?;
        Ok(there.map(|(bytes, meta)| (bytes, meta.e_tag, meta.version)))
    };
    let deaf = |what: &str| {
        let why = "the store ignores conditions of puts, so two jobs could publish over each other: use another store";
        Err(Error::invalid(format!("{why} ignored={what:?}")).with_path(client.name()))
    };
    // S3 also refuses a condition because of a concurrent request (409). Then nothing has changed.
    let insist = |text: &'static str, condition: Condition| -> Result<_> {
        let mut tries = 1;
        loop {
            let (answer, there) = (put(text, condition.clone()), content()?);
            let done = there.as_ref().is_some_and(|(bytes, ..)| bytes == text);
            if done || tries == TRIES || !answer.as_ref().is_err_and(|answered| answered.refused) {
                return Ok((answer, there));
            }
            std::thread::sleep(varied(FIRST_PAUSE));
            tries += 1;
        }
    };
    // The stored object decides, whatever the answers were.
    let (first, there) = insist("1", Condition::Absent)?;
    let Some((bytes, e_tag, version)) = there else {
        let lost = || Error::new(ErrorKind::Unavailable, "the store lost a probe").with_path(client.name());
        return Err(first.err().map_or_else(lost, |answered| answered.error));
    };
    if e_tag.is_none() && version.is_none() {
        return deaf("the store tells no versions of objects");
    }
    if bytes != "1" {
        return deaf("a put of one object changed another");
    }
    let again = put("2", Condition::Absent);
    if content()?.is_none_or(|(bytes, ..)| bytes != "1") {
        return deaf("put if absent");
    }
    let stale = UpdateVersion { e_tag, version };
    let (update, there) = insist("3", Condition::Is(stale.clone()))?;
    if there.is_none_or(|(bytes, ..)| bytes != "3") {
        return match update.err().or(again.err()) {
            Some(answered) => Err(answered.error),
            None => deaf("a put of a version that is there"),
        };
    }
    let _ = put("4", Condition::Is(stale));
    if content()?.is_none_or(|(bytes, ..)| bytes != "3") {
        return deaf("put if unchanged");
    }
    Ok(())
}
