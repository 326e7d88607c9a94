//! What the thread that tells of saves needs: where the run log is, its first line, the present state.

use crate::device::DeviceReport;
use crate::id::Attempt;
use crate::settings::Settings;
use crate::staging::Stager;
use crate::storage::Storage;
use crate::telemetry::{Head, Root, Sample, Sinks, unix_micros};
use std::sync::Arc;
use std::time::SystemTime;

/// The body of the thread. `world`: how many ranks save together, if this one writes the log.
pub(super) fn body(
    stager: &Arc<Stager>,
    settings: &Settings,
    storage: &Arc<dyn Storage>,
    world: Option<u32>,
    device: &DeviceReport,
) -> impl FnOnce() + Send + use<> {
    let has_root = storage.directory().is_some();
    let store = if has_root { "directory" } else { storage.engine() };
    let report = stager.arena.report();
    let arena = (report.slabs as u64).saturating_mul(settings.chunk);
    let head = || Head {
        version: env!("CARGO_PKG_VERSION").into(),
        session: Attempt::new().to_string(),
        at: unix_micros(SystemTime::now()),
        host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        pid: std::process::id(),
        world: world.unwrap_or(1),
        device: device.to_string(),
        engine: storage.engine().into(),
        arena,
        pinned: report.pinned.is_ok(),
        part: 0,
        settings: Some(settings.clone()),
    };
    let logged = has_root && settings.run_log && world.is_some();
    let of = storage.clone();
    let log = logged.then(|| (Box::new(move || of.directory()) as Root, head()));
    let sinks = Sinks { log, store, engine: storage.engine() };
    let (stager, chunk) = (stager.clone(), settings.chunk);
    move || {
        let sample = || {
            let unfinished = stager.saves.unfinished();
            let free = (stager.arena.free() as u64).saturating_mul(chunk);
            Sample {
                arena,
                arena_used: arena.saturating_sub(free),
                unfinished: unfinished.len(),
                oldest: unfinished.iter().map(|ticket| ticket.began).min(),
            }
        };
        stager.telemetry.run(sinks, &stager.signal, sample);
    }
}
