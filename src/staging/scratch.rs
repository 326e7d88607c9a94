//! Scratch: the device memory for captured tensors and late copies, and the fences that make late copies.
//!
//! **Locks.** A thread takes the turn of a save before all other locks. It holds the lock of the watched
//! saves while it reads the states of their late copies. It takes the lock of the free slots without any lock
//! but the turn.

use super::capture_pool::CapturePool;
use super::late_copy::{LateCopy, Planned, Slots};
use super::on_device::{OnDevice, at_save};
use super::pieces::Part;
use crate::device::{Dependency, Kernels, Pieces};
use crate::error::{Error, ErrorKind, Result};
use crate::mutant::{self, Mutant};
use crate::plan::{Plan, SegmentSource};
use crate::state::{DeviceStream, MemoryLocation, StateDict};
use crate::sync::{Mutex, lock};
use crate::ticket::Ticket;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// A chunk with more parts of tensors than this is gathered on the device, and copied as one.
const GATHERED_FROM_PIECES: usize = 8;
/// How often a fence that waits for slots checks for F of earlier saves.
const SLOT_POLL_INTERVAL: Duration = Duration::from_micros(200);

/// The memory of a device: a capture pool, slots for late copies, and the saves that may have slots.
#[derive(Debug)]
pub(crate) struct Scratch {
    kernels: Arc<dyn Kernels>,
    pool: Arc<CapturePool>,
    /// Addresses of the slots, and which of them are free.
    slots: Vec<u64>,
    free: Mutex<Vec<usize>>,
    /// Fences that were launched and still have slots, or kernels that may run.
    watched: Mutex<Vec<(Arc<Ticket>, Arc<LateCopy>)>>,
    /// How many saves, and chunks of them, there were so far.
    counted: Mutex<(u64, u64)>,
}

impl Scratch {
    pub fn new(kernels: Arc<dyn Kernels>) -> Self {
        let slots = kernels.slots().unwrap_or_default().to_vec();
        let (free, pool) = ((0..slots.len()).rev().collect(), CapturePool::new(kernels.capture_memory()));
        Self { kernels, pool, slots, free: Mutex::new(free), watched: Mutex::default(), counted: Mutex::default() }
    }

    /// Captures tensors of a save, and with `detect` makes the device digest the rest: see [`at_save`].
    pub fn at_save(&self, state: &mut StateDict<'_>, detect: bool, done: &mut OnDevice) -> Result<()> {
        at_save(self.kernels.as_ref(), &self.pool, state, detect, done)
    }

    /// Makes the late copy of a save, if it has tensors on this device. `captured`: whether a host tensor was
    /// captured at `save`.
    pub fn late_copy(
        &self,
        plan: &Plan,
        state: &StateDict<'_>,
        dependency: &Dependency,
        captured: impl Fn(usize) -> bool,
    ) -> Result<Option<Arc<LateCopy>>> {
        let ordinal = self.kernels.ordinal();
        let spans = state.streams.iter().any(|s| s.ordinal != ordinal);
        if plan.chunks.is_empty() || state.streams.iter().all(|s| s.ordinal != ordinal) {
            return Ok(None);
        }
        let mut pieces = Pieces { chunks: plan.chunks.len(), ..Pieces::default() };
        pieces.list.reserve(plan.segments.len());
        let (mut gathered, mut host) = (vec![false; plan.chunks.len()], 0);
        let (can_gather, slotted) = (!self.kernels.capture_memory().is_empty(), !self.slots.is_empty());
        for (chunk, planned) in plan.chunks.iter().enumerate() {
            let (mut to, begin) = (0, pieces.list.len());
            for segment in &plan.segments[planned.segments.clone()] {
                let bytes = segment.length as u64;
                if let SegmentSource::Tensor(index) = segment.source {
                    let (name, tensor) = state.tensors.get_index(index).expect("checked by the plan");
                    match tensor.location {
                        MemoryLocation::Device { stream, .. } if stream.ordinal == ordinal => {
                            pieces.add(name, tensor, Part { at: segment.at, bytes, to, chunk })?;
                        }
                        MemoryLocation::Host { .. } if !captured(index) && bytes > 0 => host = chunk + 1,
                        MemoryLocation::Device { .. } | MemoryLocation::Host { .. } => {}
                    }
                }
                to += bytes;
            }
            let parts = &pieces.list[begin..];
            gathered[chunk] =
                can_gather && (parts.len() > GATHERED_FROM_PIECES || parts.iter().any(|piece| piece.view.is_some()));
            if !gathered[chunk] && !slotted {
                // No kernel will read these pieces.
                pieces.list.truncate(begin);
            }
        }
        if pieces.list.is_empty() {
            return Ok(None);
        }
        let mut counted = lock(&self.counted);
        let (number, base) = (counted.0 + 1, counted.1);
        let strided = pieces.list.iter().any(|piece| piece.view.is_some());
        let device = match self.kernels.late_copy(number, base, &pieces) {
            Ok(Some(device)) => device,
            Ok(None) if strided => {
                let busy = "too many saves are under way for tensors that are to be gathered";
                return Err(Error::new(ErrorKind::Busy, busy));
            }
            Err(error) if strided => return Err(error),
            Ok(None) => return Ok(None),
            Err(error) => {
                tracing::warn!(
                    error = format_args!("{error:#}"),
                    "a save is neither gathered nor copied late on its device"
                );
                return Ok(None);
            }
        };
        *counted = (number, base + plan.chunks.len() as u64);
        Ok(Some(Arc::new(LateCopy::new(Planned {
            device,
            dependency: dependency.clone(),
            ordinal,
            gathered,
            spans,
            slotted,
            base,
            host,
        }))))
    }

    /// Fences a save on `streams`: true when they need not wait for the rest of its copies. False at the
    /// deadline, when the save is staged or has failed, and without slots: writers must then wait for its
    /// copies.
    pub fn fence(
        &self,
        ticket: &Arc<Ticket>,
        late_copy: &Arc<LateCopy>,
        streams: &[DeviceStream],
        deadline: Instant,
    ) -> Result<bool> {
        if !late_copy.serves(streams) {
            return Ok(false);
        }
        let _turn = late_copy.turn();
        if let Some(kernels) = late_copy.kernels() {
            return kernels.follow(streams).map(|()| true);
        }
        let Some(first) = self.reserve(ticket, late_copy, deadline) else { return Ok(false) };
        if first == ticket.extent().chunks {
            self.give_up(late_copy);
            return Ok(false);
        }
        self.launch(ticket, late_copy, streams, first > late_copy.handed())
    }

    /// As [`Scratch::fence`], at the end of a scope whose `streams` will write or free the tensors. When it
    /// returns true, nothing is queued from live memory any more, and `streams` come after everything that
    /// was.
    pub fn freeze(
        &self,
        ticket: &Arc<Ticket>,
        late_copy: &Arc<LateCopy>,
        streams: &[DeviceStream],
        deadline: Instant,
    ) -> Result<bool> {
        if !late_copy.serves(streams) || ticket.failed() {
            return Ok(false);
        }
        let _turn = late_copy.turn();
        if let Some(kernels) = late_copy.kernels() {
            return kernels.follow(streams).map(|()| true);
        }
        // Reserve slots first: after the freeze, a chunk without a slot could not be queued any more.
        if self.reserve(ticket, late_copy, deadline).is_none() {
            return Ok(false);
        }
        late_copy.freeze();
        let queued = ticket.queued.load(Ordering::Acquire);
        if queued == ticket.extent().chunks {
            self.give_up(late_copy);
            return Ok(false);
        }
        let behind_copies = queued > late_copy.handed() && !mutant::on(Mutant::ScopeOrder);
        self.launch(ticket, late_copy, streams, behind_copies)
    }

    /// Launches the kernels of a fence, with the slots that are reserved. False when the save is staged, has
    /// failed or was taken back.
    fn launch(
        &self,
        ticket: &Arc<Ticket>,
        late_copy: &Arc<LateCopy>,
        streams: &[DeviceStream],
        behind_copies: bool,
    ) -> Result<bool> {
        let Some(slots) = late_copy.launch(ticket) else {
            self.give_up(late_copy);
            return Ok(false);
        };
        lock(&self.watched).push((ticket.clone(), late_copy.clone()));
        match late_copy.queue(streams, behind_copies, &slots) {
            Ok(launch) => {
                late_copy.set_kernels(launch.kernels);
                launch.queued.map(|()| true)
            }
            Err(refused) => {
                lock(&self.watched).retain(|(_, watched)| !Arc::ptr_eq(watched, late_copy));
                self.give_up(late_copy);
                Err(refused)
            }
        }
    }

    /// Waits until every chunk is queued or has a slot; returns the first chunk with a slot.
    fn reserve(&self, ticket: &Ticket, late_copy: &LateCopy, deadline: Instant) -> Option<usize> {
        loop {
            self.reap();
            if ticket.failed() || ticket.staged.is_complete() {
                return None;
            }
            let handed = late_copy.handed();
            let mut free = lock(&self.free);
            let most = free.len().min(ticket.extent().chunks - handed);
            let first = (ticket.extent().chunks - most).max(late_copy.save.host);
            if ticket.queued.load(Ordering::Acquire) >= first {
                let rest = free.len() - (ticket.extent().chunks - first);
                let taken = free.split_off(rest);
                drop(free);
                let held = taken.into_iter().map(|slot| Some((slot, self.slots[slot]))).collect();
                let Err(mut refused) = late_copy.reserve(Slots { first, held }) else { return Some(first) };
                lock(&self.free).extend(refused.take(|_| true));
                return None;
            }
            drop(free);
            if Instant::now() >= deadline {
                return None;
            }
            ticket.wait_until_queued(first, deadline.min(Instant::now() + SLOT_POLL_INTERVAL));
        }
    }

    /// Frees the slot of a chunk that was handed over, if F is known.
    pub fn hand_over(&self, late_copy: &LateCopy, chunk: usize) {
        let free = late_copy.hand_over(chunk);
        lock(&self.free).extend(free);
    }

    /// Returns slots that are known to be free, also of saves that are staged or have failed.
    pub fn reap(&self) {
        let mut free = Vec::new();
        let mut watched = lock(&self.watched);
        let over = watched.extract_if(.., |(ticket, late_copy)| {
            let (slots, last) = late_copy.reap(ticket.staged.is_complete());
            free.extend(slots);
            last
        });
        // Dropped with no lock held: the last owner of kernels waits for them.
        let over: Vec<_> = over.collect();
        drop(watched);
        drop(over);
        if !free.is_empty() {
            lock(&self.free).extend(free);
        }
    }

    /// Returns all slots of a save that has no kernels queued.
    fn give_up(&self, late_copy: &LateCopy) {
        let free = late_copy.give_up();
        lock(&self.free).extend(free);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::super::late_copy::tests::fixtures::{late_copy, ticket};
    use super::*;
    use crate::device::{DeviceLateCopy, Digests, FenceKernels, Launch, Queued};
    use std::ops::Range;
    use std::sync::OnceLock;

    /// A device with three slots, whose kernels check the locks of the scratch in every call.
    #[derive(Debug)]
    struct Watching;

    static SCRATCH: OnceLock<Scratch> = OnceLock::new();

    fn scratch() -> &'static Scratch {
        SCRATCH.get_or_init(|| Scratch::new(Arc::new(Watching)))
    }

    /// Called with the state of a late copy locked, or with nothing locked.
    fn no_list_is_locked() {
        assert!(scratch().free.try_lock().is_ok(), "both locks are held");
    }

    impl Kernels for Watching {
        fn ordinal(&self) -> u32 {
            0
        }
        fn capture_memory(&self) -> Range<u64> {
            0..0
        }
        fn slots(&self) -> Result<&[u64]> {
            Ok(&[0, 4096, 8192])
        }
        fn capture(&self, _: DeviceStream, _: &Pieces, _: &mut Vec<Arc<dyn Queued>>) -> Result<()> {
            Err(Error::internal("nothing is captured"))
        }
        fn digest(&self, _: DeviceStream, _: &Pieces, _: &mut Vec<Arc<dyn Queued>>) -> Result<Arc<dyn Digests>> {
            Err(Error::internal("nothing is digested"))
        }
        fn late_copy(&self, _: u64, _: u64, _: &Pieces) -> Result<Option<Box<dyn DeviceLateCopy>>> {
            Ok(Some(Box::new(Self)))
        }
    }

    impl DeviceLateCopy for Watching {
        fn gather(&self, _: usize) -> Result<u64> {
            Err(Error::internal("nothing is gathered"))
        }
        fn publish(&self, _: u64) -> Result<()> {
            Ok(())
        }
        fn launch(&self, _: &[DeviceStream], _: &Dependency, _: bool, slots: &[u64]) -> Result<Launch> {
            no_list_is_locked();
            assert_eq!(slots, [8192, 4096]);
            Ok(Launch { kernels: Arc::new(Self), queued: Ok(()) })
        }
        fn check(&self) -> Result<()> {
            Ok(())
        }
    }

    impl FenceKernels for Watching {
        fn follow(&self, _: &[DeviceStream]) -> Result<()> {
            Ok(())
        }
        fn over(&self) -> bool {
            true
        }
        fn latched(&self) -> Option<usize> {
            no_list_is_locked();
            Some(1)
        }
    }

    /// Two threads must not deadlock: a fence once locked the free slots before a save's slots, and returning
    /// slots locked them in the opposite order.
    #[test]
    fn slots_are_given_back_with_one_lock_at_a_time() {
        let (scratch, ticket, late_copy) = (scratch(), ticket(3), Arc::new(late_copy(Box::new(Watching))));
        *lock(&scratch.free) = vec![0, 2, 1];
        late_copy.hand_over(0);
        ticket.queued.store(1, Ordering::Relaxed);
        let fenced = scratch.fence(&ticket, &late_copy, &[DeviceStream::legacy(0)], Instant::now()).unwrap();
        assert!(fenced);
        assert_eq!((&lock(&scratch.free)[..], late_copy.location(2)), (&[0][..], Some((0, 4096))));
        scratch.hand_over(&late_copy, 2);
        assert_eq!(
            (&lock(&scratch.free)[..], late_copy.location(1), late_copy.location(2)),
            (&[0, 1][..], Some((0, 8192)), None)
        );
        ticket.release();
        scratch.reap();
        assert_eq!((&lock(&scratch.free)[..], late_copy.location(1)), (&[0, 1, 2][..], None));
    }
}
