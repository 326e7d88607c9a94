//! Scratch: the device memory for captured tensors and late copies, and the fences that make late copies.
//!
//! Each device has its own slots. The device of the executor gets them at start. Any other device gets them
//! in the call of `save` that first has tensors of it.
//!
//! **Locks.** A thread takes the turn of a save before all other locks. It holds the lock of the watched
//! saves while it reads the states of their late copies. It takes the lock of the free slots while it holds
//! no lock except the turn.

use super::capture_pool::CapturePool;
use super::kernel_set::KernelSet;
use super::late_copy::{LateCopy, Slot, Slots};
use super::on_device::{OnDevice, at_save};
use super::parts::{DeviceKernels, PartsOfSave};
use super::planned::{OnOneDevice, Planned};
use crate::device::{Dependency, Device, KernelMemory, Kernels};
use crate::error::Result;
use crate::mutant::{self, Mutant};
use crate::plan::Plan;
use crate::state::{DeviceStream, StateDict};
use crate::sync::{Mutex, lock};
use crate::ticket::Ticket;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How often a fence that waits for slots checks for F of earlier saves.
const SLOT_POLL_INTERVAL: Duration = Duration::from_micros(200);

/// The memory of the devices: a capture pool, slots for late copies, and the saves that may have slots.
#[derive(Debug)]
pub(crate) struct Scratch {
    /// Kernels of the executor's device.
    kernels: Arc<dyn Kernels>,
    pool: Arc<CapturePool>,
    /// The devices whose tensors saves have had. The device of the executor is the first.
    equipped: Mutex<Vec<Equipped>>,
    /// Size of a chunk, and size of the scratch on each device other than the executor's.
    memory: (usize, u64),
    /// The free slots, by device.
    free: Mutex<Vec<Vec<Slot>>>,
    /// Saves with launched fences that still have slots, or kernels that may run.
    watched: Mutex<Vec<(Arc<Ticket>, Arc<LateCopy>)>>,
    /// The number of saves, and of their chunks, so far.
    counted: Mutex<(u64, u64)>,
}

/// A device, and its kernels if it has any.
#[derive(Debug)]
struct Equipped {
    ordinal: u32,
    kernels: Option<Arc<dyn Kernels>>,
}

impl Scratch {
    /// `chunk` and `scratch` are the sizes that are requested from each device other than the device of
    /// `kernels`.
    pub fn new(kernels: Arc<dyn Kernels>, chunk: usize, scratch: u64) -> Self {
        let (pool, home) = (CapturePool::new(kernels.capture_memory()), kernels.clone());
        let (equipped, free, memory) = (Mutex::default(), Mutex::default(), (chunk, scratch));
        let (watched, counted) = (Mutex::default(), Mutex::default());
        let scratch = Self { kernels, pool, equipped, memory, free, watched, counted };
        scratch.add(&mut lock(&scratch.equipped), home.ordinal(), Some(home));
        scratch
    }

    /// For each device of `streams` whose tensors no save has had, loads its kernels and allocates its slots.
    /// If a device refuses, fences wait for the copies of saves with tensors of this device.
    pub fn equip(&self, device: &dyn Device, streams: &[DeviceStream]) {
        let (chunk, scratch) = self.memory;
        let mut equipped = lock(&self.equipped);
        for stream in streams {
            let ordinal = stream.ordinal;
            if equipped.iter().any(|known| known.ordinal == ordinal) {
                continue;
            }
            let memory = KernelMemory { ordinal: Some(ordinal), chunk, gather: 0, scratch, given: None };
            let kernels = (scratch > 0).then(|| device.kernels(memory)).transpose().unwrap_or_else(|error| {
                let error = format_args!("{error:#}");
                tracing::warn!(
                    error,
                    device = ordinal,
                    "no scratch on this device: fences wait for copies to the host"
                );
                None
            });
            self.add(&mut equipped, ordinal, kernels);
        }
    }

    fn add(&self, equipped: &mut Vec<Equipped>, ordinal: u32, kernels: Option<Arc<dyn Kernels>>) {
        let slots = kernels.as_ref().and_then(|kernels| kernels.slots().ok()).unwrap_or_default();
        let slot = |&address: &u64| Slot { device: equipped.len(), address };
        lock(&self.free).push(slots.iter().rev().map(slot).collect());
        equipped.push(Equipped { ordinal, kernels });
    }

    /// Captures tensors of a save, and with `detect` makes the device digest the rest: see [`at_save`].
    pub fn at_save(&self, state: &mut StateDict<'_>, detect: bool, done: &mut OnDevice) -> Result<()> {
        at_save(self.kernels.as_ref(), &self.pool, state, detect, done)
    }

    /// Makes the late copy of a save, if the save has tensors on devices with kernels. `captured` tells
    /// whether a host tensor was captured at `save`.
    pub fn late_copy(
        &self,
        plan: &Plan,
        state: &StateDict<'_>,
        dependency: &Dependency,
        captured: impl Fn(usize) -> bool,
    ) -> Result<Option<Arc<LateCopy>>> {
        let has = |ordinal: u32| state.streams.iter().any(|stream| stream.ordinal == ordinal);
        let equipped = lock(&self.equipped);
        let devices = equipped.iter().enumerate().filter(|(_, on)| has(on.ordinal));
        let slotted =
            |on: &Equipped| on.kernels.as_ref().is_some_and(|kernels| kernels.slots().is_ok_and(|s| !s.is_empty()));
        let all_slotted = devices.clone().all(|(_, on)| slotted(on));
        let kernels = |(place, on): (usize, &Equipped)| Some(DeviceKernels { place, kernels: on.kernels.clone()? });
        let devices: Vec<_> = devices.filter_map(kernels).collect();
        drop(equipped);
        if plan.chunks.is_empty() || devices.is_empty() {
            return Ok(None);
        }
        let parts = PartsOfSave::find(devices, plan, state, captured)?;
        let (host, asked) = (parts.host, parts.devices());
        let mut counted = lock(&self.counted);
        let (number, base) = (counted.0 + 1, counted.1);
        let devices = parts.prepare(number, base)?;
        if devices.is_empty() {
            return Ok(None);
        }
        *counted = (number, base + plan.chunks.len() as u64);
        Ok(Some(Arc::new(LateCopy::new(Planned {
            chunks: plan.chunks.len(),
            slotted: all_slotted && devices.len() == asked,
            ordinals: state.tensors.values().map(|t| t.location.stream().map(|stream| stream.ordinal)).collect(),
            devices,
            dependency: dependency.clone(),
            base,
            host,
        }))))
    }

    /// Fences a save on `streams`. Returns true if `streams` need not wait for the rest of its copies.
    /// Returns false at the deadline, if the save is staged or has failed, and without slots. Then writers
    /// must wait for its copies.
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
        let Some(slots) = self.reserve(ticket, late_copy, deadline) else { return Ok(false) };
        if slots == 0 && ticket.queued.load(Ordering::Acquire) == late_copy.save.chunks {
            self.give_up(late_copy);
            return Ok(false);
        }
        self.launch(ticket, late_copy, streams, |on, first| on.has_any(late_copy.handed()..first))
    }

    /// As [`Scratch::fence`], at the end of a scope whose `streams` will write or free the tensors. When it
    /// returns true, nothing is queued from live memory any more, and `streams` come after all copies that
    /// were.
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
        // Reserve slots first, because after the freeze a chunk without a slot could not be queued any more.
        if self.reserve(ticket, late_copy, deadline).is_none() {
            return Ok(false);
        }
        late_copy.freeze();
        let queued = ticket.queued.load(Ordering::Acquire);
        if queued == late_copy.save.chunks {
            self.give_up(late_copy);
            return Ok(false);
        }
        let behind_copies = queued > late_copy.handed() && !mutant::on(Mutant::ScopeOrder);
        self.launch(ticket, late_copy, streams, |_, _| behind_copies)
    }

    /// Launches the kernels of a fence, with the reserved slots. Returns false if the save is staged, has
    /// failed or was taken back.
    fn launch(
        &self,
        ticket: &Arc<Ticket>,
        late_copy: &Arc<LateCopy>,
        streams: &[DeviceStream],
        behind: impl Fn(&OnOneDevice, usize) -> bool,
    ) -> Result<bool> {
        let Some(slots) = late_copy.launch(ticket) else {
            self.give_up(late_copy);
            return Ok(false);
        };
        lock(&self.watched).push((ticket.clone(), late_copy.clone()));
        match KernelSet::launch(&late_copy.save, streams, &slots, behind) {
            Ok((kernels, queued)) => {
                late_copy.set_kernels(Arc::new(kernels));
                queued.map(|()| true)
            }
            Err(refused) => {
                lock(&self.watched).retain(|(_, watched)| !Arc::ptr_eq(watched, late_copy));
                self.give_up(late_copy);
                Err(refused)
            }
        }
    }

    /// Waits until every part of a chunk is queued or has a slot. Returns the number of slots. None at the
    /// deadline, and if the save is staged or has failed.
    fn reserve(&self, ticket: &Ticket, late_copy: &LateCopy, deadline: Instant) -> Option<usize> {
        let save = &late_copy.save;
        loop {
            self.reap();
            if ticket.failed() || ticket.staged.is_complete() {
                return None;
            }
            let from = late_copy.handed().max(save.host);
            let mut free = lock(&self.free);
            let firsts: Vec<_> = save.devices.iter().map(|on| on.first_with_slot(from, free[on.place].len())).collect();
            let first = firsts.iter().copied().fold(save.host, usize::max);
            if ticket.queued.load(Ordering::Acquire) >= first {
                let slots = save.devices.iter().zip(firsts).map(|(on, first)| {
                    let free = &mut free[on.place];
                    let held =
                        (first..save.chunks).map(|chunk| free.pop_if(|_| on.has_any(chunk..chunk + 1))).collect();
                    Slots { first, held }
                });
                let slots: Vec<_> = slots.collect();
                drop(free);
                let count = slots.iter().map(|slots| slots.held.iter().flatten().count()).sum();
                let Err(mut refused) = late_copy.reserve(slots) else { return Some(count) };
                self.give_back(refused.iter_mut().flat_map(|slots| slots.take(|_| true)));
                return None;
            }
            drop(free);
            if Instant::now() >= deadline {
                return None;
            }
            ticket.wait_until_queued(first, deadline.min(Instant::now() + SLOT_POLL_INTERVAL));
        }
    }

    fn give_back(&self, slots: impl IntoIterator<Item = Slot>) {
        let mut free = lock(&self.free);
        slots.into_iter().for_each(|slot| free[slot.device].push(slot));
    }

    /// Frees the slots of a chunk that was handed over, on the devices whose F is known.
    pub fn hand_over(&self, late_copy: &LateCopy, chunk: usize) {
        self.give_back(late_copy.hand_over(chunk));
    }

    /// Returns slots that are known to be free, including slots of saves that are staged or have failed.
    pub fn reap(&self) {
        let mut free = Vec::new();
        let mut watched = lock(&self.watched);
        let over = watched.extract_if(.., |(ticket, late_copy)| {
            let (slots, last) = late_copy.reap(ticket.staged.is_complete());
            free.extend(slots);
            last
        });
        // Dropped with no lock held, because the last owner of kernels waits for them.
        let over: Vec<_> = over.collect();
        drop(watched);
        drop(over);
        if !free.is_empty() {
            self.give_back(free);
        }
    }

    /// Returns all slots of a save that has no kernels queued.
    fn give_up(&self, late_copy: &LateCopy) {
        self.give_back(late_copy.give_up());
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::super::late_copy::tests::fixtures::{on_one, ticket};
    use super::*;
    use crate::device::{DeviceLateCopy, Digests, FenceKernels, Launch, Pieces, Queued};
    use crate::error::Error;
    use std::ops::Range;
    use std::sync::OnceLock;

    /// A device with three slots, whose kernels check the locks of the scratch in every call.
    #[derive(Debug)]
    struct Watching;

    static SCRATCH: OnceLock<Scratch> = OnceLock::new();

    fn scratch() -> &'static Scratch {
        SCRATCH.get_or_init(|| Scratch::new(Arc::new(Watching), 4096, 0))
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
        fn refuse_captures(&self, _: &[DeviceStream]) -> Result<()> {
            Ok(())
        }
        fn launch(&self, _: Option<DeviceStream>, _: &Dependency, _: bool, slots: &[u64]) -> Result<Launch> {
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
        let (scratch, ticket, late_copy) = (scratch(), ticket(3), Arc::new(on_one(Watching)));
        let slot = |number: u64| Slot { device: 0, address: number * 4096 };
        let free = || lock(&scratch.free)[0].clone();
        *lock(&scratch.free) = vec![vec![slot(0), slot(1), slot(2)]];
        late_copy.hand_over(0);
        ticket.queued.store(1, Ordering::Relaxed);
        let fenced = scratch.fence(&ticket, &late_copy, &[DeviceStream::legacy(0)], Instant::now()).unwrap();
        assert!(fenced);
        assert_eq!((free(), late_copy.slot(0, 2)), (vec![slot(0)], Some(4096)));
        scratch.hand_over(&late_copy, 2);
        let left = (late_copy.slot(0, 1), late_copy.slot(0, 2));
        assert_eq!((free(), left), (vec![slot(0), slot(1)], (Some(8192), None)));
        ticket.release();
        scratch.reap();
        assert_eq!((free(), late_copy.slot(0, 1)), (vec![slot(0), slot(1), slot(2)], None));
    }
}
