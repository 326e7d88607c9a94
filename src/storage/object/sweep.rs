//! Deletes attempts: an attempt that has ended, and the attempts of sessions that no longer own the root.
//!
//! No lock shows that an attempt is dead. But a session that is not the newest can publish nothing any more.
//! So the objects of its attempts are garbage if the root, read after the take-over, does not name them. Only
//! the process that made an attempt of the newest session deletes it.

use super::client::Client;
use super::session::{Begun, Inner};
use super::state::{directory, parse_directory};
use crate::error::Result;
use crate::format::entries::MANIFEST;
use crate::id::Attempt;
use crate::mutant::{self, Mutant};
use crate::storage::{Remnant, State, Sweep, Swept};
use object_store::ObjectMeta;
use object_store::path::Path as Key;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

/// The part of an attempt's prefix that holds the records of its uploads.
pub(super) const UPLOADS: &str = "uploads";

/// Maximum length of the record of an upload.
const MAX_RECORD: u64 = 4096;

/// Deletes everything under the prefix of an attempt: uploads first, then its manifest, so that the remains
/// after a crash are not a step.
pub(super) fn delete(client: &Client, directory: &str) -> Result<()> {
    let found = client.list("list the objects of an attempt", directory, client.deadline())?;
    let prefix = client.key(directory);
    let records: Vec<_> = found.iter().filter_map(|object| record(&prefix, object)).collect();
    // One deadline for all of them: other saves wait for a failed save to be cleaned up.
    let deadline = client.deadline();
    for (file, record) in records {
        if Instant::now() >= deadline {
            tracing::debug!(directory, "uploads are left to the bucket's rules: there was no time to abort them");
            break;
        }
        abort(client, directory, &file, &record, deadline);
    }
    let is_manifest = |object: &ObjectMeta| object.location.filename() == Some(MANIFEST);
    let (manifests, others): (Vec<_>, Vec<_>) = found.into_iter().partition(is_manifest);
    for some in [manifests, others] {
        let keys: Vec<Key> = some.into_iter().map(|object| object.location).collect();
        client.delete("delete an attempt", keys, client.deadline())?;
    }
    Ok(())
}

/// If an object is the record of an upload: the file that is uploaded, and the record's key below the
/// attempt.
fn record(prefix: &Key, object: &ObjectMeta) -> Option<(String, String)> {
    let parts: Vec<String> = object.location.prefix_match(prefix)?.map(|part| part.as_ref().to_owned()).collect();
    match &parts[..] {
        [uploads, file] if uploads == UPLOADS => Some((file.clone(), format!("{uploads}/{file}"))),
        _ => None,
    }
}

/// Aborts the upload of a file. Best effort: an upload that stays is not an object, and a rule of the bucket
/// deletes it.
fn abort(client: &Client, directory: &str, file: &str, record: &str, deadline: Instant) {
    let record = format!("{directory}/{record}");
    let aborted = client.get("read the record of an upload", &record, MAX_RECORD, deadline);
    let aborted = aborted.and_then(|found| {
        let Some(id) = found else { return Ok(()) };
        let Ok(id) = String::from_utf8(id.0.to_vec()) else { return Ok(()) };
        let key = format!("{directory}/{file}");
        client.call("abort an upload", &key, deadline, move |store, key: Key| {
            let id = id.clone();
            async move {
                match store.abort_multipart(&key, &id).await {
                    Err(object_store::Error::NotFound { .. }) => Ok(()),
                    answer => answer,
                }
            }
        })
    });
    if let Err(error) = aborted {
        tracing::debug!(error = format_args!("{error:#}"), "an upload is left to the bucket's rules");
    }
}

/// An attempt that a listing has found, or that this process has begun.
struct Found {
    generation: u64,
    attempt: Attempt,
    bytes: u64,
    /// Some if this process has begun the attempt; true if it still writes it.
    alive: Option<bool>,
}

/// Sweeps the root: see [`Storage::sweep`](crate::storage::Storage::sweep).
pub(super) fn sweep(inner: &Arc<Inner>, how: Sweep) -> Result<Swept> {
    let client = &inner.client;
    // The order matters. An attempt that this process has dropped by now is in the root that is read next, or
    // never will be. An attempt that is listed later and is not in that root was never in the root since the
    // take-over.
    let begun: Vec<(Begun, bool)> =
        inner.live.all().into_iter().map(|begun| (begun.clone(), begun.is_alive())).collect();
    let Some(root) = inner.root.read()? else { return Ok(Swept::default()) };
    let newest = inner.generation().map_or(root.generation, |ours| ours.min(root.generation));
    let mut found = BTreeMap::<String, Found>::new();
    for object in client.list("list the attempts", "", client.deadline())? {
        let Some(parts) = object.location.prefix_match(&client.key("")) else { continue };
        let parts: Vec<_> = parts.take(2).collect();
        let [name, last] = &parts[..] else { continue };
        let Some((generation, attempt)) = parse_directory(last.as_ref()) else { continue };
        let new = Found { generation, attempt, bytes: 0, alive: None };
        found.entry(directory(name.as_ref(), generation, attempt)).or_insert(new).bytes += object.size;
    }
    for (begun, alive) in begun {
        let (generation, attempt) = (begun.generation, begun.attempt);
        let new = Found { generation, attempt, bytes: 0, alive: None };
        let dir = directory(&begun.name, generation, attempt);
        found.entry(dir).or_insert(new).alive = Some(alive);
    }
    let mut swept = Swept::default();
    for (dir, Found { generation, attempt, bytes, alive }) in found {
        if root.names(&dir) {
            continue;
        }
        let (state, why) = match alive {
            Some(true) => (State::Live, "this process writes it"),
            Some(false) => (State::Dead, "this process has dropped it"),
            None if generation < newest => (State::Dead, "a newer session owns the root"),
            None if mutant::on(Mutant::StoreSweepsOwnGeneration) => (State::Dead, "nothing names it"),
            None => (State::Live, "its session owns the root"),
        };
        let mut remnant = Remnant { name: dir.clone(), state, why: why.into(), age: None, bytes };
        if state == State::Live {
            swept.left.push(remnant);
            continue;
        }
        if !how.dry_run {
            if let Err(error) = delete(client, &dir) {
                (remnant.state, remnant.why) = (State::Stuck, format!("{error:#}"));
                swept.left.push(remnant);
                continue;
            }
            inner.live.forget(attempt);
        }
        swept.removed.push(remnant);
    }
    Ok(swept)
}
