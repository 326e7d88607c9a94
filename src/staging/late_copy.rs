//! The late copy of one save. Its devices copy chunks that have not left them at the fence within their own
//! memory, and the save reads the chunks from there.
//!
//! `checks/model/fence.py` checks a model of this protocol, over all interleavings of small sizes. The names
//! here are those of the model. *F* of a device is the number of chunks that had left the device when a
//! stream came to the fence. A chunk may have tensors of several devices. So watermark, F and slots are per
//! device, and concern the part of a chunk that lies there.
//!
//! The thread that fences *reserves* slots for the last chunks of each device, and waits until all chunks
//! without a slot are queued. Each device latches F, makes late copies of its parts of the chunks from F on,
//! and tells F. The fenced streams wait for the kernels of all devices, because these streams may write the
//! memory of all devices. The stager reads F after a chunk's completion event, and only then *judges*: if a
//! part was copied from live memory although its chunk is from F on, the stager repeats the copy from the
//! slot. A slot is free once its device has told F, and its chunk is before F or handed over. It is never
//! free earlier. If a driver refuses some of the kernels, not every device tells F. Then the save has failed,
//! and its slots are free when it is staged and the queued kernels have run.
//!
//! # States
//! Every event is a method of [`LateCopy`], and changes the state under its only lock. An event that is not
//! in the table changes nothing, and the method tells its caller so.
//!
//! | event | by | from | to |
//! |---|---|---|---|
//! | `reserve`: the last chunks have slots | a fence | open | reserved |
//! | `freeze`: nothing more is queued from live memory | the end of a scope | reserved | reserved, frozen |
//! | `give_up`: no kernels are launched | a fence | reserved, launched before `set_kernels` | open |
//! | `launch`: kernels are about to be queued, devices may tell F | a fence | reserved | launched |
//! | `set_kernels`: all or some kernels are queued | a fence | launched | launched, with kernels |
//! | `latched`: all devices have told F | any thread that looks | launched, with kernels | latched |
//! | `withdraw`: the save will not be staged | the thread that took it out of the queue | open, reserved | withdrawn |
//! | `end`: the stager queues nothing more of the save | the stager | open, reserved | done |
//! | `reap`: the save is staged, and no kernel is pending | a fence, later | latched, or launched and refused in part | done |
//!
//! `hand_over` counts in every state. `decide` lets the stager queue a chunk from live memory while the late
//! copy is open, or while it is reserved or launched and not frozen. `freeze` waits for a chunk that was
//! decided. A launch that could queue nothing goes back to open, so that the host can wait instead.
//!
//! **Locks.** The state lock is held for a few instructions. While a thread holds it, it takes only the locks
//! of a ticket's state and completions. The *turn* is another lock, which is taken before all others. Its
//! owner waits for chunks to be queued, for slots and for the driver. Meanwhile no other thread may fence the
//! same save, but the stager must still read the state.

use super::in_flight_chunk::{Origin, Origins};
use super::kernel_set::{KernelSet, Told};
use super::planned::{OnOneDevice, Planned};
use crate::error::Result;
use crate::mutant::{self, Mutant};
use crate::state::DeviceStream;
use crate::sync::{Condvar, Mutex, MutexGuard, lock, wait};
use crate::ticket::Ticket;
use smallvec::smallvec;
use std::fmt;
use std::sync::Arc;

/// The late copy of one save; see the module.
pub(crate) struct LateCopy {
    /// The data that stay the same for the whole save.
    pub(super) save: Planned,
    locked: Mutex<Locked>,
    /// Notified when a chunk that was decided for live memory is queued.
    queued: Condvar,
    turn: Mutex<()>,
}

/// The data that change during the save.
#[derive(Default)]
struct Locked {
    state: State,
    /// By device.
    slots: Vec<Slots>,
    /// Chunks handed over.
    handed: usize,
    /// The stager is queueing a chunk from live memory.
    decided: bool,
}

/// The states of the module's table.
#[derive(Default)]
enum State {
    #[default]
    Open,
    Reserved {
        frozen: bool,
    },
    Launched {
        frozen: bool,
        /// None while the kernels are being queued.
        kernels: Option<Arc<KernelSet>>,
    },
    Latched {
        told: Told,
        kernels: Arc<KernelSet>,
    },
    Withdrawn,
    Done,
}

/// Memory of a device for one late copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    /// Index of its device in the scratch.
    pub device: usize,
    pub address: u64,
}

/// The slots on one device, for the chunks from `first` on. None for a chunk without a part there, and for a
/// slot that was given back.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Slots {
    pub first: usize,
    pub held: Vec<Option<Slot>>,
}

impl Slots {
    /// Removes and returns the slots of the chunks that `which` selects.
    pub fn take(&mut self, which: impl Fn(usize) -> bool) -> impl Iterator<Item = Slot> {
        let held = self.held.iter_mut().zip(self.first..).filter(move |(_, chunk)| which(*chunk));
        held.filter_map(|(held, _)| held.take())
    }
}

impl Locked {
    /// F of each device that has told it. None when no kernels are launched.
    fn told(&mut self) -> Option<Told> {
        if let State::Launched { kernels: Some(kernels), .. } = &self.state {
            let told = kernels.told();
            if !told.iter().all(Option::is_some) {
                return Some(told);
            }
            self.state = State::Latched { told, kernels: kernels.clone() };
        }
        if let State::Latched { told, .. } = &self.state { Some(told.clone()) } else { None }
    }

    /// Whether all devices have told F.
    fn is_latched(&mut self) -> bool {
        _ = self.told();
        matches!(self.state, State::Latched { .. })
    }

    /// Removes and returns the slots that `which` selects by the index of the device and the chunk.
    fn take(&mut self, which: impl Fn(usize, usize) -> bool) -> Vec<Slot> {
        let devices = self.slots.iter_mut().enumerate();
        devices.flat_map(|(device, slots)| slots.take(|chunk| which(device, chunk)).collect::<Vec<_>>()).collect()
    }
}

impl fmt::Debug for LateCopy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let locked = lock(&self.locked);
        let (name, frozen) = match &locked.state {
            State::Open => ("open", false),
            State::Reserved { frozen } => ("reserved", *frozen),
            State::Launched { frozen, kernels: None } => ("launched", *frozen),
            State::Launched { frozen, kernels: Some(_) } => ("launched, with kernels", *frozen),
            State::Latched { .. } => ("latched", false),
            State::Withdrawn => ("withdrawn", false),
            State::Done => ("done", false),
        };
        write!(f, "LateCopy({name}{})", if frozen { ", frozen" } else { "" })
    }
}

impl LateCopy {
    pub(super) fn new(save: Planned) -> Self {
        Self { save, locked: Mutex::default(), queued: Condvar::default(), turn: Mutex::default() }
    }

    /// Whether a fence on these streams can make late copies.
    pub(super) fn serves(&self, streams: &[DeviceStream]) -> bool {
        self.save.slotted && !streams.is_empty()
    }

    /// Takes the turn. Only one thread has it at a time, so that kernels are launched once.
    pub(super) fn turn(&self) -> MutexGuard<'_, ()> {
        lock(&self.turn)
    }

    /// Changes the state from open to reserved. Returns the slots if the state is not open any more.
    pub(super) fn reserve(&self, slots: Vec<Slots>) -> Result<(), Vec<Slots>> {
        let mut locked = lock(&self.locked);
        if !matches!(locked.state, State::Open) {
            return Err(slots);
        }
        (locked.state, locked.slots) = (State::Reserved { frozen: false }, slots);
        Ok(())
    }

    /// Ends queueing from live memory, and waits for a chunk that was decided.
    pub(super) fn freeze(&self) {
        let mut locked = lock(&self.locked);
        if let State::Reserved { frozen } = &mut locked.state {
            *frozen = true;
        }
        while locked.decided {
            locked = wait(&self.queued, locked);
        }
    }

    /// Changes the state from reserved to launched. Returns the addresses of the slots by device, 0 for a
    /// chunk without a slot. None when the save has ended or was taken back; no kernels may be queued then. A
    /// save that fails later learns from `end` or `withdraw` that kernels may read its sources.
    pub(super) fn launch(&self, ticket: &Ticket) -> Option<Vec<Vec<u64>>> {
        let mut locked = lock(&self.locked);
        let State::Reserved { frozen } = locked.state else { return None };
        if ticket.failed() || ticket.staged.is_complete() {
            return None;
        }
        locked.state = State::Launched { frozen, kernels: None };
        let addresses = |slots: &Slots| slots.held.iter().map(|slot| slot.map_or(0, |slot| slot.address)).collect();
        Some(locked.slots.iter().map(addresses).collect())
    }

    /// Sets the queued kernels, which tell F.
    pub(super) fn set_kernels(&self, queued: Arc<KernelSet>) {
        if let State::Launched { kernels, .. } = &mut lock(&self.locked).state {
            *kernels = Some(queued);
        }
    }

    /// Changes the state back to open if no kernels are queued, and returns the slots.
    pub(super) fn give_up(&self) -> Vec<Slot> {
        let mut locked = lock(&self.locked);
        match locked.state {
            State::Reserved { .. } | State::Launched { kernels: None, .. } => locked.state = State::Open,
            State::Launched { .. } | State::Latched { .. } => return Vec::new(),
            // Slots that a fence reserved earlier.
            State::Open | State::Withdrawn | State::Done => {}
        }
        locked.take(|_, _| true)
    }

    /// F of each device that has told it.
    pub fn told(&self) -> Told {
        let told = lock(&self.locked).told();
        told.unwrap_or_else(|| smallvec![None; self.save.devices.len()])
    }

    /// The memory from which a chunk has to be copied. The part of a device that has told F is in its slot.
    pub(super) fn origins(&self, chunk: usize, told: &Told) -> Origins {
        let origin = |(on, told): (&OnOneDevice, &Option<usize>)| match told {
            _ if !on.has_any(chunk..chunk + 1) => Origin::Nothing,
            Some(_) => Origin::Slot,
            None => Origin::Live,
        };
        self.save.devices.iter().zip(told).map(origin).collect()
    }

    /// True if kernels were launched, or are being queued, and the save is not done.
    pub fn launched(&self) -> bool {
        matches!(lock(&self.locked).state, State::Launched { .. } | State::Latched { .. })
    }

    /// The kernels that were launched.
    pub(super) fn kernels(&self) -> Option<Arc<KernelSet>> {
        match &lock(&self.locked).state {
            State::Launched { kernels, .. } => kernels.clone(),
            State::Latched { kernels, .. } => Some(kernels.clone()),
            _ => None,
        }
    }

    /// True if kernels that read live memory are being queued or may still run.
    pub fn pending(&self) -> bool {
        let kernels = match &lock(&self.locked).state {
            State::Launched { kernels, .. } => kernels.clone(),
            _ => return false,
        };
        // No lock is held here, because `over` calls the driver.
        kernels.is_none_or(|kernels| !kernels.over())
    }

    /// Fails if a device is lost, because it will never tell its F.
    pub fn check(&self) -> Result<()> {
        // Asking the kernels detects a lost device.
        _ = self.pending();
        self.save.devices.iter().try_for_each(|on| on.device.check())
    }

    /// True if nothing is queued from live memory any more.
    pub fn frozen(&self) -> bool {
        matches!(lock(&self.locked).state, State::Reserved { frozen: true } | State::Launched { frozen: true, .. })
    }

    /// Decides to queue one chunk from live memory; `freeze` waits for this chunk. None when nothing more is
    /// queued from live memory.
    pub fn decide(&self) -> Option<Decided<'_>> {
        let mut locked = lock(&self.locked);
        let free = match locked.state {
            State::Open => true,
            State::Reserved { frozen } | State::Launched { frozen, .. } => !frozen,
            State::Latched { .. } | State::Withdrawn | State::Done => false,
        };
        locked.decided |= free;
        free.then(|| Decided(self))
    }

    /// Forbids further kernels for a save that will not be staged. True if launched kernels may still run.
    pub fn withdraw(&self) -> bool {
        let mut locked = lock(&self.locked);
        if let State::Open | State::Reserved { .. } = locked.state {
            locked.state = State::Withdrawn;
        }
        !locked.is_latched() && matches!(locked.state, State::Launched { .. })
    }

    /// Records that the stager queues nothing more of the save, and forbids further kernels. Launched kernels
    /// go on.
    pub fn end(&self) {
        let mut locked = lock(&self.locked);
        if let State::Open | State::Reserved { .. } = locked.state {
            locked.state = State::Done;
        }
    }

    /// Counts a chunk that is handed over. Returns its slots that are free by now.
    pub(super) fn hand_over(&self, chunk: usize) -> Vec<Slot> {
        let mut locked = lock(&self.locked);
        locked.handed += 1;
        let Some(told) = locked.told() else { return Vec::new() };
        locked.take(|device, held| held == chunk && told[device].is_some())
    }

    /// Chunks handed over.
    pub(super) fn handed(&self) -> usize {
        lock(&self.locked).handed
    }

    /// Returns the slots that are free by now, and true if nothing is left to watch. `staged`: the save is
    /// staged.
    pub(super) fn reap(&self, staged: bool) -> (Vec<Slot>, bool) {
        let ended = staged && !self.pending();
        let mut locked = lock(&self.locked);
        let told = locked.told().unwrap_or_default();
        let over = match locked.state {
            State::Latched { .. } => staged || mutant::on(Mutant::SlotEarly),
            // Some kernels could not be queued, so not every device will tell F. The queued kernels have
            // ended.
            State::Launched { .. } => ended,
            _ => return (Vec::new(), true),
        };
        let before = |device: usize, chunk| told.get(device).is_some_and(|first| first.is_some_and(|f| chunk < f));
        let slots = locked.take(|device, chunk| over || before(device, chunk));
        let last = (over && staged).then(|| std::mem::replace(&mut locked.state, State::Done));
        drop(locked);
        // Dropped with no lock held, because the last owner of kernels frees memory.
        drop(last);
        (slots, over)
    }

    /// The device of a tensor, by its index in the save, if it has kernels for the save.
    pub fn device_of(&self, tensor: usize) -> Option<usize> {
        let ordinal = self.save.ordinals.get(tensor).copied().flatten()?;
        self.save.devices.iter().position(|on| on.ordinal == ordinal)
    }

    /// Gathers a device's part of a chunk, if the chunk is to be gathered. Returns the address there that
    /// corresponds to the slab's first byte.
    pub fn gather(&self, device: usize, chunk: usize) -> Result<Option<u64>> {
        let on = &self.save.devices[device];
        if on.gathered.get(chunk) != Some(&true) {
            return Ok(None);
        }
        on.device.gather(chunk).map(Some)
    }

    /// Advances the watermarks of the devices whose part of this chunk is copied from live memory. The
    /// devices do that behind the copies queued so far.
    pub(super) fn publish(&self, chunk: usize, origins: &Origins) -> Result<()> {
        let watermark = self.save.base + chunk as u64 + 1;
        let live = self.save.devices.iter().zip(origins).filter(|(_, origin)| **origin == Origin::Live);
        let mut live = live.filter(|_| self.save.slotted);
        live.try_for_each(|(on, _)| on.device.publish(watermark))
    }

    /// The address of the late copy of a chunk on a device that has told F.
    pub fn slot(&self, device: usize, chunk: usize) -> Option<u64> {
        let locked = lock(&self.locked);
        let slots = locked.slots.get(device)?;
        let held = slots.held.get(chunk.checked_sub(slots.first)?)?;
        held.map(|slot| slot.address)
    }

    /// The ordinal of a device of the save.
    pub fn ordinal(&self, device: usize) -> u32 {
        self.save.devices[device].ordinal
    }
}

/// A chunk that the stager is queueing from live memory.
pub(crate) struct Decided<'a>(&'a LateCopy);

impl Drop for Decided<'_> {
    fn drop(&mut self) {
        lock(&self.0.locked).decided = false;
        self.0.queued.notify_all();
    }
}

#[cfg(test)]
pub(super) mod tests;
