//! Decides what the stager does next with a save, only from a `View` of the save.

use crate::mutant::{self, Mutant};

/// How many chunks are in flight at once. Few, because copy engines are first in, first out, and other
/// transfers wait behind these chunks.
const CHUNKS_IN_FLIGHT: usize = 2;

/// The state of a save, as the stager sees it.
#[derive(Clone, Copy, Debug)]
pub(super) struct View {
    pub failed: bool,
    /// The oldest chunk in flight, if its copies have ended.
    pub arrived: Option<Arrived>,
    /// All devices have told F.
    pub latched: bool,
    /// Nothing is queued from live memory any more.
    pub frozen: bool,
    /// The next chunk to be queued. `chunks` is the number of all chunks.
    pub next: usize,
    pub chunks: usize,
    pub in_flight: usize,
    /// Some part of a chunk in flight is copied from live memory.
    pub live_in_flight: bool,
    /// A fence waits until this many chunks are queued.
    pub needed: usize,
    /// A slab is free.
    pub slab: bool,
    /// All bytes of the next chunk can be read.
    pub ready: bool,
    /// The sources are not dropped yet.
    pub sources: bool,
    /// The end of a scope has requested the drop of the sources, and waits for it.
    pub release_requested: bool,
    /// Releases of other saves are deferred and have to be polled.
    pub deferred: bool,
}

/// A chunk whose copies have ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct Arrived {
    pub chunk: usize,
    /// The lowest F of the devices whose parts were copied from live memory, read after the copies had ended.
    pub first: Option<usize>,
}

/// The stager's next action.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Hand the oldest chunk over.
    HandOver,
    /// Copy parts of the oldest chunk again, from their slots, because the tensors may have been written
    /// during the copy.
    CopyAgain,
    /// Return the oldest chunk's slab, because the chunk would be copied again, but the save has failed.
    Discard,
    /// Drop the sources, because nothing more is queued from them.
    ReleaseSources,
    /// Queue the next chunk: all of it from slots, or some of it from live memory.
    Queue { live: bool },
    /// Stop, because all chunks are handed over, or the save has failed.
    End,
    /// Wait until F is told, while the device is alive, because the remaining chunks can come only from
    /// slots.
    AwaitF,
    /// Wait for copies in flight or deferred releases, which are polled.
    AwaitCopies,
    /// Wait for a slab, bytes or a failure, all of which notify the stager.
    AwaitNews,
}

/// The next action for `view`.
pub(super) fn next_action(view: &View) -> Action {
    if let Some(Arrived { chunk, first }) = view.arrived {
        let written = first.is_some_and(|first| first <= chunk) && !mutant::on(Mutant::Discard);
        return match (written, view.failed) {
            (true, true) => Action::Discard,
            (true, false) => Action::CopyAgain,
            (false, _) => Action::HandOver,
        };
    }
    if view.release_requested {
        return Action::ReleaseSources;
    }
    if view.failed || (view.next == view.chunks && view.in_flight == 0) {
        return Action::End;
    }
    if view.latched && view.sources && !view.live_in_flight {
        return Action::ReleaseSources;
    }
    let live = !view.latched;
    if live && view.frozen {
        return Action::AwaitF;
    }
    let window = view.in_flight < CHUNKS_IN_FLIGHT || view.next < view.needed;
    if view.next < view.chunks && window && view.slab && view.ready {
        return Action::Queue { live };
    }
    if view.in_flight == 0 && !view.deferred { Action::AwaitNews } else { Action::AwaitCopies }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    /// A save of four chunks that has just begun.
    const BEGUN: View = View {
        failed: false,
        arrived: None,
        latched: false,
        frozen: false,
        next: 0,
        chunks: 4,
        in_flight: 0,
        live_in_flight: false,
        needed: 0,
        slab: true,
        ready: true,
        sources: true,
        release_requested: false,
        deferred: false,
    };
    /// The window is full of chunks from live memory.
    const FULL: View = View { next: 2, in_flight: 2, live_in_flight: true, ..BEGUN };
    /// F is told, and the sources are dropped.
    const LATCHED: View = View { latched: true, sources: false, next: 2, ..BEGUN };

    const fn arrived(chunk: usize, first: Option<usize>) -> Option<Arrived> {
        Some(Arrived { chunk, first })
    }

    #[test]
    fn every_view_has_one_action() {
        use Action::*;
        let table = [
            // Chunks are queued in order, two in flight, as slabs and bytes become available.
            (BEGUN, Queue { live: true }),
            (View { next: 1, in_flight: 1, live_in_flight: true, ..BEGUN }, Queue { live: true }),
            (FULL, AwaitCopies),
            (View { slab: false, ..BEGUN }, AwaitNews),
            (View { ready: false, ..BEGUN }, AwaitNews),
            (View { slab: false, deferred: true, ..BEGUN }, AwaitCopies),
            (View { slab: false, in_flight: 1, live_in_flight: true, ..BEGUN }, AwaitCopies),
            // A fence that waits on the host lifts the window.
            (View { needed: 3, ..FULL }, Queue { live: true }),
            (View { needed: 2, ..FULL }, AwaitCopies),
            (View { needed: 3, slab: false, ..FULL }, AwaitCopies),
            // A chunk that has arrived goes first.
            (View { arrived: arrived(0, None), ..FULL }, HandOver),
            (View { arrived: arrived(0, None), failed: true, release_requested: true, ..FULL }, HandOver),
            // A chunk before F or from a slot is handed over. A copy from live memory of a chunk from F on is
            // made again, even if another device has not told F.
            (View { arrived: arrived(1, Some(2)), latched: true, ..FULL }, HandOver),
            (View { arrived: arrived(2, None), ..LATCHED }, HandOver),
            (View { arrived: arrived(2, Some(2)), ..FULL }, CopyAgain),
            (View { arrived: arrived(3, Some(2)), latched: true, ..FULL }, CopyAgain),
            (View { arrived: arrived(3, Some(2)), latched: true, failed: true, ..FULL }, Discard),
            // From F on chunks are read from slots, and the sources are dropped when no copy from them is in
            // flight.
            (View { latched: true, ..FULL }, AwaitCopies),
            (View { latched: true, in_flight: 1, ..FULL }, Queue { live: false }),
            (View { latched: true, live_in_flight: false, ..FULL }, ReleaseSources),
            (LATCHED, Queue { live: false }),
            (View { frozen: true, ..LATCHED }, Queue { live: false }),
            // The save is frozen and F is not told, so nothing can be queued.
            (View { frozen: true, ..BEGUN }, AwaitF),
            (View { frozen: true, ..FULL }, AwaitF),
            (View { frozen: true, release_requested: true, ..FULL }, ReleaseSources),
            // A request of a scope comes before the end.
            (View { next: 4, in_flight: 1, live_in_flight: true, ..BEGUN }, AwaitCopies),
            (View { next: 4, in_flight: 1, release_requested: true, ..BEGUN }, ReleaseSources),
            (View { next: 4, ..BEGUN }, End),
            (View { next: 4, ..LATCHED }, End),
            (View { next: 4, release_requested: true, ..BEGUN }, ReleaseSources),
            (View { failed: true, ..FULL }, End),
            (View { failed: true, release_requested: true, ..FULL }, ReleaseSources),
        ];
        for (view, action) in table {
            assert_eq!(next_action(&view), action, "{view:?}");
        }
    }
}
