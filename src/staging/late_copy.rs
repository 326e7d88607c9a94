//! The fence on a device: chunks that have not left it are copied late, in its own memory, and read from there.
//!
//! The protocol is checked as a model, over all interleavings of small sizes, by `checks/model/fence.py`; the
//! names are the model's. *F* is how many chunks had left the device when its stream came to the fence. Slots
//! for the last chunks are *reserved* in the caller, who waits until all chunks without a slot are queued;
//! the device latches F, makes late copies of the chunks from F on, and tells F. The stager reads F after a chunk's
//! mark, and only then *judges*: a copy from live memory of a chunk from F on is made again from its slot. A
//! slot is free when F is known and its chunk is before F or handed over, and not before. Where the driver
//! refuses some of the kernels F is never told: the save has failed, and its slots are free when it is staged
//! and what was queued has run.

use super::gather::{OnDevice, Part, Room, at_save};
use crate::device::{DeviceLateCopy, Kernels, Pieces, Point};
use crate::error::{Error, ErrorKind, Result};
use crate::mutant::{self, Mutant};
use crate::plan::{From, Plan};
use crate::state::{DeviceStream, Place, StateDict};
use crate::sync::{Mutex, MutexGuard, lock};
use crate::ticket::Ticket;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// A chunk with more parts of tensors than this is put together on the device, and copied as one.
const MANY: usize = 8;
/// How often a fence that waits for slots looks for F of earlier saves.
const LOOK: Duration = Duration::from_micros(200);

/// The memory of a device: a room for what is captured, slots for late copies, and the saves that may have some.
#[derive(Debug)]
pub(crate) struct Scratch {
    kernels: Arc<dyn Kernels>,
    room: Arc<Room>,
    /// Addresses of the slots, and which of them are free.
    slots: Vec<u64>,
    free: Mutex<Vec<usize>>,
    /// Fences that were launched and still have slots, or kernels that may run.
    watched: Mutex<Vec<(Arc<Ticket>, Arc<LateCopy>)>>,
    /// Saves so far, and chunks of them.
    counted: Mutex<(u64, u64)>,
}

/// One save whose chunks can be put together on the device, and copied late there.
pub(crate) struct LateCopy {
    save: Box<dyn DeviceLateCopy>,
    point: Point,
    ordinal: u32,
    /// Chunks that are put together before they are copied.
    gathered: Vec<bool>,
    /// Some tensors are of another device: there is no late copy.
    spans: bool,
    /// There are slots: the watermark is looked at.
    slotted: bool,
    /// The watermark before its first chunk.
    pub base: u64,
    /// Chunks before this one hold tensors of the host, which a fence must see queued.
    host: usize,
    pub handed: AtomicUsize,
    launched: AtomicBool,
    slots: Mutex<Slots>,
    /// Held by whoever fences it: kernels are launched once.
    turn: Mutex<()>,
    /// Nothing more is queued from live memory. Held while what was decided to be is queued.
    frozen: Mutex<bool>,
    /// It will not be staged.
    withdrawn: AtomicBool,
}

/// Slots of the chunks from `first` on; None once they are given back.
#[derive(Default)]
struct Slots {
    first: usize,
    held: Vec<Option<(usize, u64)>>,
}

impl std::fmt::Debug for LateCopy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "LateCopy({:?})", self.latched())
    }
}

impl LateCopy {
    /// F, once it is told.
    pub fn latched(&self) -> Option<usize> {
        if self.launched() { self.save.latched() } else { None }
    }

    /// Whether kernels were launched.
    pub fn launched(&self) -> bool {
        self.launched.load(Ordering::Acquire)
    }

    /// Kernels that read live memory may still be to come.
    pub fn pending(&self) -> bool {
        self.launched() && !self.save.over()
    }

    /// True where nothing is to be queued from live memory any more. Held while a chunk is queued from there.
    pub fn decide(&self) -> MutexGuard<'_, bool> {
        lock(&self.frozen)
    }

    /// Fails when the device is lost, and F will never be told.
    pub fn check(&self) -> Result<()> {
        self.save.check()
    }

    /// From here on no kernels are launched for a save that will not be staged. Whether there are some that may be to come.
    pub fn withdraw(&self, ticket: &Ticket) -> bool {
        let _live = lock(&ticket.live);
        self.withdrawn.store(true, Ordering::Release);
        self.launched() && self.latched().is_none()
    }

    /// Whether a fence on these streams can make late copies.
    fn serves(&self, streams: &[DeviceStream]) -> bool {
        let here = !streams.is_empty() && streams.iter().all(|stream| stream.ordinal == self.ordinal);
        here && self.slotted && !self.spans
    }

    /// Puts a chunk together, if that is what is done with it: the device, and an address for the first byte of its slab.
    pub fn gather(&self, chunk: usize) -> Result<Option<(u32, u64)>> {
        if self.gathered.get(chunk) != Some(&true) {
            return Ok(None);
        }
        self.save.gather(chunk).map(|address| Some((self.ordinal, address)))
    }

    /// Tells the device, behind the copies so far, that this chunk has left it.
    pub fn publish(&self, chunk: usize) -> Result<()> {
        if self.slotted { self.save.publish(self.base + chunk as u64 + 1) } else { Ok(()) }
    }

    /// Where a chunk from F on lies: the device and an address.
    pub fn place(&self, chunk: usize) -> Option<(u32, u64)> {
        let slots = lock(&self.slots);
        let held = slots.held.get(chunk.checked_sub(slots.first)?)?;
        held.map(|(_, address)| (self.ordinal, address))
    }
}

impl Scratch {
    pub fn new(kernels: Arc<dyn Kernels>) -> Self {
        let slots = kernels.slots().unwrap_or_default().to_vec();
        let (free, room) = ((0..slots.len()).rev().collect(), Room::new(kernels.room()));
        Self { kernels, room, slots, free: Mutex::new(free), watched: Mutex::default(), counted: Mutex::default() }
    }

    /// Captures what is to be captured of a save, and with `detect` has the rest digested: see [`at_save`].
    pub fn at_save(&self, state: &mut StateDict<'_>, detect: bool, done: &mut OnDevice) -> Result<()> {
        at_save(self.kernels.as_ref(), &self.room, state, detect, done)
    }

    /// The late copy of a save, if there are tensors of this device in it. `captured` are tensors of the host taken at `save`.
    pub fn late_copy(
        &self,
        plan: &Plan,
        state: &StateDict<'_>,
        point: &Point,
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
        let (can_gather, slotted) = (!self.kernels.room().is_empty(), !self.slots.is_empty());
        for (chunk, planned) in plan.chunks.iter().enumerate() {
            let (mut to, begin) = (0, pieces.list.len());
            for segment in &plan.segments[planned.segments.clone()] {
                let bytes = segment.length as u64;
                if let From::Tensor(index) = segment.from {
                    let (name, tensor) = state.tensors.get_index(index).expect("checked by the plan");
                    match tensor.place {
                        Place::Device { stream, .. } if stream.ordinal == ordinal => {
                            pieces.add(name, tensor, Part { at: segment.at, bytes, to, chunk })?;
                        }
                        Place::Host { .. } if !captured(index) && bytes > 0 => host = chunk + 1,
                        Place::Device { .. } | Place::Host { .. } => {}
                    }
                }
                to += bytes;
            }
            let parts = &pieces.list[begin..];
            gathered[chunk] = can_gather && (parts.len() > MANY || parts.iter().any(|piece| piece.view.is_some()));
            if !gathered[chunk] && !slotted {
                // No kernel will look at them.
                pieces.list.truncate(begin);
            }
        }
        if pieces.list.is_empty() {
            return Ok(None);
        }
        let mut counted = lock(&self.counted);
        let (number, base) = (counted.0 + 1, counted.1);
        let strided = pieces.list.iter().any(|piece| piece.view.is_some());
        let save = match self.kernels.late_copy(number, base, &pieces) {
            Ok(Some(save)) => save,
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
        Ok(Some(Arc::new(LateCopy {
            save,
            point: point.clone(),
            ordinal,
            gathered,
            spans,
            slotted,
            base,
            host,
            handed: AtomicUsize::new(0),
            launched: AtomicBool::new(false),
            slots: Mutex::default(),
            turn: Mutex::default(),
            frozen: Mutex::default(),
            withdrawn: AtomicBool::new(false),
        })))
    }

    /// Fences a save on `streams`: true when they need not wait for the rest of its copies. False at the deadline, when it is
    /// staged or has failed, and where there are no slots: whoever writes must then wait as if there were no scratch.
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
        let _turn = lock(&late_copy.turn);
        if late_copy.launched() {
            return late_copy.save.follow(streams).map(|()| true);
        }
        match self.reserve(ticket, late_copy, deadline) {
            Some(first) if first < ticket.chunks => {
                self.launch(ticket, late_copy, streams, first > late_copy.handed.load(Ordering::Acquire))
            }
            _ => Ok(false),
        }
    }

    /// As [`Scratch::fence`], at the end of a scope whose `streams` will write or free the tensors: when it returns true, nothing is
    /// queued from live memory any more, and they come after all that was.
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
        let _turn = lock(&late_copy.turn);
        if late_copy.launched() {
            return late_copy.save.follow(streams).map(|()| true);
        }
        // Room first: what has no slot could not be queued any more once it is frozen.
        if self.reserve(ticket, late_copy, deadline).is_none() {
            return Ok(false);
        }
        *late_copy.decide() = true;
        let queued = ticket.queued.load(Ordering::Acquire);
        if queued == ticket.chunks {
            self.give_back(late_copy, |_| true);
            return Ok(false);
        }
        let behind_copies = queued > late_copy.handed.load(Ordering::Acquire) && !mutant::on(Mutant::ScopeOrder);
        let launched = self.launch(ticket, late_copy, streams, behind_copies);
        if !late_copy.launched() {
            // Nothing was: somebody waits on the host, for chunks that are still to be queued.
            *late_copy.decide() = false;
        }
        launched
    }

    /// Launches the kernels of a fence, with the slots that are reserved. False when the save is staged, has failed or was taken back.
    fn launch(
        &self,
        ticket: &Arc<Ticket>,
        late_copy: &Arc<LateCopy>,
        streams: &[DeviceStream],
        behind_copies: bool,
    ) -> Result<bool> {
        let slots: Vec<u64> = lock(&late_copy.slots).held.iter().flatten().map(|(_, address)| *address).collect();
        let begun = {
            // A save that fails from here on sees that kernels will read its sources.
            let _live = lock(&ticket.live);
            let over = ticket.failed() || ticket.staged.is_complete() || late_copy.withdrawn.load(Ordering::Acquire);
            // Before the launch: from then on F may be told.
            late_copy.launched.store(!over, Ordering::Release);
            !over
        };
        if !begun {
            self.give_back(late_copy, |_| true);
            return Ok(false);
        }
        lock(&self.watched).push((ticket.clone(), late_copy.clone()));
        let launched = late_copy.save.launch(streams, &late_copy.point, behind_copies, &slots);
        if launched.is_err() && !late_copy.save.begun() {
            late_copy.launched.store(false, Ordering::Release);
            lock(&self.watched).retain(|(_, watched)| !Arc::ptr_eq(watched, late_copy));
            self.give_back(late_copy, |_| true);
        }
        launched.map(|()| true)
    }

    /// Waits until every chunk is queued or has a slot: the first one that has.
    fn reserve(&self, ticket: &Ticket, late_copy: &LateCopy, deadline: Instant) -> Option<usize> {
        loop {
            self.reap();
            if ticket.failed() || ticket.staged.is_complete() {
                return None;
            }
            let mut free = lock(&self.free);
            let most = free.len().min(ticket.chunks - late_copy.handed.load(Ordering::Acquire));
            let first = (ticket.chunks - most).max(late_copy.host);
            if ticket.queued.load(Ordering::Acquire) >= first {
                let rest = free.len() - (ticket.chunks - first);
                let held = free.split_off(rest).into_iter().map(|slot| Some((slot, self.slots[slot]))).collect();
                *lock(&late_copy.slots) = Slots { first, held };
                return Some(first);
            }
            drop(free);
            if Instant::now() >= deadline {
                return None;
            }
            ticket.wait_until_queued(first, deadline.min(Instant::now() + LOOK));
        }
    }

    /// A chunk was handed over: its slot is free, if F is known.
    pub fn hand_over(&self, late_copy: &LateCopy, chunk: usize) {
        late_copy.handed.fetch_add(1, Ordering::AcqRel);
        if late_copy.latched().is_some() {
            self.give_back(late_copy, |i| i == chunk);
        }
    }

    /// Gives back what is known to be free, also of saves that are staged or have failed.
    pub fn reap(&self) {
        let mut watched = lock(&self.watched);
        let mut over = Vec::new();
        watched.retain(|(ticket, late_copy)| {
            let staged = ticket.staged.is_complete();
            let latched = match late_copy.latched() {
                Some(latched) => latched,
                // Not all kernels could be queued, and F is never told: those that were have ended.
                None if staged && !late_copy.pending() => 0,
                None => return true,
            };
            let ended = staged || mutant::on(Mutant::SlotEarly);
            self.give_back(late_copy, |i| i < latched || ended);
            if ended {
                over.push(late_copy.clone());
            }
            !ended
        });
    }

    /// Never with both locks held: `reserve` takes `slots` while it holds `free`.
    fn give_back(&self, late_copy: &LateCopy, which: impl Fn(usize) -> bool) {
        let mut slots = lock(&late_copy.slots);
        let first = slots.first;
        let held = slots.held.iter_mut().enumerate().filter(|(i, _)| which(first + i));
        let back: Vec<usize> = held.filter_map(|(_, held)| held.take().map(|(slot, _)| slot)).collect();
        drop(slots);
        lock(&self.free).extend(back);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::device::{Digests, Queued};
    use std::ops::Range;

    /// Kernels that were never launched, over three slots.
    #[derive(Debug)]
    struct Idle([u64; 3]);

    impl Kernels for Idle {
        fn ordinal(&self) -> u32 {
            0
        }
        fn room(&self) -> Range<u64> {
            0..0
        }
        fn slots(&self) -> Result<&[u64]> {
            Ok(&self.0)
        }
        fn capture(&self, _: DeviceStream, _: &Pieces, _: &mut Vec<Arc<dyn Queued>>) -> Result<()> {
            Err(Error::internal("idle"))
        }
        fn digest(&self, _: DeviceStream, _: &Pieces, _: &mut Vec<Arc<dyn Queued>>) -> Result<Arc<dyn Digests>> {
            Err(Error::internal("idle"))
        }
        fn late_copy(&self, _: u64, _: u64, _: &Pieces) -> Result<Option<Box<dyn DeviceLateCopy>>> {
            Ok(Some(Box::new(Self(self.0))))
        }
    }

    impl DeviceLateCopy for Idle {
        fn gather(&self, _: usize) -> Result<u64> {
            Err(Error::internal("idle"))
        }
        fn publish(&self, _: u64) -> Result<()> {
            Ok(())
        }
        fn launch(&self, _: &[DeviceStream], _: &Point, _: bool, _: &[u64]) -> Result<()> {
            Err(Error::internal("idle"))
        }
        fn begun(&self) -> bool {
            false
        }
        fn follow(&self, _: &[DeviceStream]) -> Result<()> {
            Ok(())
        }
        fn over(&self) -> bool {
            true
        }
        fn check(&self) -> Result<()> {
            Ok(())
        }
        fn latched(&self) -> Option<usize> {
            None
        }
    }

    /// A fence took the slots of a save under the lock of those that are free; `give_back` took the two the
    /// other way around. Two threads could wait for each other.
    #[test]
    fn slots_are_given_back_with_one_lock_at_a_time() {
        let scratch = Scratch::new(Arc::new(Idle([0, 4096, 8192])));
        let late_copy = LateCopy {
            save: Box::new(Idle([0; 3])),
            point: Arc::new(()),
            ordinal: 0,
            gathered: Vec::new(),
            spans: false,
            slotted: true,
            base: 0,
            host: 0,
            handed: AtomicUsize::new(0),
            launched: AtomicBool::new(false),
            slots: Mutex::new(Slots { first: 1, held: vec![Some((2, 8192)), Some((1, 4096))] }),
            turn: Mutex::default(),
            frozen: Mutex::default(),
            withdrawn: AtomicBool::new(false),
        };
        *lock(&scratch.free) = vec![0];
        scratch.give_back(&late_copy, |chunk| {
            assert!(scratch.free.try_lock().is_ok(), "both locks are held");
            chunk == 2
        });
        assert_eq!(
            (&lock(&scratch.free)[..], late_copy.place(1), late_copy.place(2)),
            (&[0, 1][..], Some((0, 8192)), None)
        );
    }
}
