//! The inputs of the telemetry thread: the path of the run log, its first line, and the present state.

use crate::device::DeviceReport;
use crate::id::Attempt;
use crate::ranks::{Member, launcher};
use crate::settings::Settings;
use crate::staging::Stager;
use crate::storage::Storage;
use crate::telemetry::{Head, Root, Sample, Sinks, TracePath, unix_micros};
use std::sync::Arc;
use std::time::SystemTime;

/// Returns the body of the telemetry thread. `member`: the position of this process among the ranks that save
/// together.
pub(super) fn body(
    stager: &Arc<Stager>,
    settings: &Settings,
    storage: &Arc<dyn Storage>,
    member: Option<Member>,
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
        world: member.map_or(1, |member| member.world),
        device: device.to_string(),
        engine: storage.engine().into(),
        arena,
        pinned: report.pinned.is_ok(),
        part: 0,
        settings: Some(settings.clone()),
    };
    let launched = launcher::detect().ok().flatten();
    let world = member.map_or(Some(1), |member| (member.rank == 0).then_some(member.world));
    let logged = has_root && settings.run_log && writes_log(world, launched);
    let Member { rank, world, .. } = member.or(launched).unwrap_or(Member::ALONE);
    let trace = settings.trace.as_ref().map(|path| TracePath {
        path: std::path::absolute(path).unwrap_or_else(|_| path.into()),
        rank,
        world,
    });
    let of = storage.clone();
    let log = logged.then(|| (Box::new(move || of.directory()) as Root, head()));
    let sinks = Sinks { log, store, engine: storage.engine(), trace };
    let (stager, chunk) = (stager.clone(), settings.chunk);
    if settings.trace.is_some() {
        // The reference is weak, because the stager owns the telemetry that keeps this function.
        let weak = Arc::downgrade(&stager);
        let probe = move || weak.upgrade().map_or(0, |stager| used(&stager, arena, chunk));
        stager.telemetry.trace(Box::new(probe));
    }
    move || {
        let sample = || {
            let unfinished = stager.saves.unfinished();
            Sample {
                arena,
                arena_used: used(&stager, arena, chunk),
                unfinished: unfinished.len(),
                oldest: unfinished.iter().map(|ticket| ticket.began).min(),
            }
        };
        stager.telemetry.run(sinks, &stager.signal, sample);
    }
}

/// Returns how many bytes of the arena hold chunks.
fn used(stager: &Stager, arena: u64, chunk: u64) -> u64 {
    arena.saturating_sub((stager.arena.free() as u64).saturating_mul(chunk))
}

/// Whether this process writes the run log. `world`: the number of ranks that save together, None on every
/// rank but rank 0. Ranks that each save alone may share one root: rank 0 of the launcher writes there.
fn writes_log(world: Option<u32>, launched: Option<Member>) -> bool {
    world.is_some_and(|world| world > 1 || launched.is_none_or(|member| member.rank == 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_rank_writes_the_log_whether_ranks_save_together_or_alone() {
        let rank = |rank| Some(Member { rank, world: 4, local_rank: rank });
        assert!(writes_log(Some(1), None) && writes_log(Some(1), rank(0)) && writes_log(Some(4), rank(0)));
        assert!(!writes_log(Some(1), rank(3)), "alone");
        assert!(!writes_log(None, rank(3)), "together");
    }
}
