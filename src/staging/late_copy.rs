//! The late copy of one save: the device copies chunks that have not left it at the fence within its own
//! memory, and the save reads them from there.
//!
//! `checks/model/fence.py` checks the protocol as a model, over all interleavings of small sizes; the names
//! are the model's. *F* is how many chunks had left the device when its stream came to the fence. The thread
//! that fences *reserves* slots for the last chunks, and waits until all chunks without a slot are queued.
//! The device latches F, makes late copies of the chunks from F on, and tells F. The stager reads F after a
//! chunk's completion event, and only then *judges*: it repeats, from the slot, a copy of a chunk from F on
//! that was made from live memory. A slot is free once F is known and its chunk is before F or handed over,
//! never earlier. If the driver refuses some of the kernels, F is never told: the save has failed, and its
//! slots are free when it is staged and the queued kernels have run.
//!
//! # States
//! Every event is a method of [`LateCopy`], and changes the state under its one lock. An event that is not in
//! the table changes nothing, and the method tells its caller so.
//!
//! | event | by | from | to |
//! |---|---|---|---|
//! | `reserve`: the last chunks have slots | a fence | open | reserved |
//! | `freeze`: nothing more is queued from live memory | the end of a scope | reserved | reserved, frozen |
//! | `give_up`: no kernels are launched | a fence | reserved, launched before `set_kernels` | open |
//! | `launch`: kernels are about to be queued, F may be told | a fence | reserved | launched |
//! | `set_kernels`: all or some kernels are queued | a fence | launched | launched, with kernels |
//! | `latched`: the device has told F | any thread that looks | launched, with kernels | latched |
//! | `withdraw`: the save will not be staged | the thread that took it out of the queue | open, reserved | withdrawn |
//! | `end`: the stager queues nothing more of the save | the stager | open, reserved | done |
//! | `reap`: the save is staged, and no kernel is pending | a fence, later | latched, or launched and refused in part | done |
//!
//! `hand_over` counts in every state. `decide` lets the stager queue a chunk from live memory while the late
//! copy is open, or reserved or launched and not frozen; `freeze` waits for a chunk that was decided. A
//! launch that could queue nothing goes back to open, so that the host can wait instead.
//!
//! **Locks.** The state lock is held for a few instructions; under it only the locks of a ticket's state and
//! completions are taken. The *turn* is a lock of its own, taken before all others. Its owner waits for
//! chunks to be queued, for slots and for the driver. Meanwhile no other thread may fence the same save, but
//! the stager must still read the state.

use crate::device::{Dependency, DeviceLateCopy, FenceKernels, Launch};
use crate::error::Result;
use crate::mutant::{self, Mutant};
use crate::state::DeviceStream;
use crate::sync::{Condvar, Mutex, MutexGuard, lock, wait};
use crate::ticket::Ticket;
use std::fmt;
use std::sync::Arc;

/// See the module.
pub(crate) struct LateCopy {
    /// What stays the same for the whole save.
    pub(super) save: Planned,
    locked: Mutex<Locked>,
    /// Notified when a chunk that was decided for live memory is queued.
    queued: Condvar,
    turn: Mutex<()>,
}

/// One save as planned in the call of `save`.
pub(super) struct Planned {
    pub device: Box<dyn DeviceLateCopy>,
    /// The work that wrote the tensors: late copies come after it.
    pub dependency: Dependency,
    pub ordinal: u32,
    /// Whether a chunk is gathered before it is copied.
    pub gathered: Vec<bool>,
    /// Some tensors are on another device: no fence makes late copies.
    pub spans: bool,
    /// The device has slots, so the watermark is used.
    pub slotted: bool,
    /// The watermark before the first chunk of this save.
    pub base: u64,
    /// No host tensor that is copied is in this chunk or later: a fence waits until all chunks before it are
    /// queued.
    pub host: usize,
}

/// What changes during the save.
#[derive(Default)]
struct Locked {
    state: State,
    slots: Slots,
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
        /// None while they are being queued.
        kernels: Option<Arc<dyn FenceKernels>>,
    },
    Latched {
        first: usize,
        kernels: Arc<dyn FenceKernels>,
    },
    Withdrawn,
    Done,
}

/// Slots of the chunks from `first` on, by number and address; None once they are given back.
#[derive(Default)]
pub(super) struct Slots {
    pub first: usize,
    pub held: Vec<Option<(usize, u64)>>,
}

impl Slots {
    /// Removes the slots of the chunks that `which` selects, and returns their numbers.
    pub fn take(&mut self, which: impl Fn(usize) -> bool) -> Vec<usize> {
        let held = self.held.iter_mut().zip(self.first..).filter(|(_, chunk)| which(*chunk));
        held.filter_map(|(held, _)| held.take().map(|(slot, _)| slot)).collect()
    }
}

impl Locked {
    /// F, once it is told.
    fn latched(&mut self) -> Option<usize> {
        if let State::Launched { kernels: Some(kernels), .. } = &self.state
            && let Some(first) = kernels.latched()
        {
            self.state = State::Latched { first, kernels: kernels.clone() };
        }
        if let State::Latched { first, .. } = self.state { Some(first) } else { None }
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
        let here = !streams.is_empty() && streams.iter().all(|stream| stream.ordinal == self.save.ordinal);
        here && self.save.slotted && !self.save.spans
    }

    /// Takes the turn, which one thread has at a time, so that kernels are launched once.
    pub(super) fn turn(&self) -> MutexGuard<'_, ()> {
        lock(&self.turn)
    }

    /// Open to reserved; returns the slots if the state is not open any more.
    pub(super) fn reserve(&self, slots: Slots) -> Result<(), Slots> {
        let mut locked = lock(&self.locked);
        if !matches!(locked.state, State::Open) {
            return Err(slots);
        }
        (locked.state, locked.slots) = (State::Reserved { frozen: false }, slots);
        Ok(())
    }

    /// Ends queueing from live memory, and waits for one chunk that was decided.
    pub(super) fn freeze(&self) {
        let mut locked = lock(&self.locked);
        if let State::Reserved { frozen } = &mut locked.state {
            *frozen = true;
        }
        while locked.decided {
            locked = wait(&self.queued, locked);
        }
    }

    /// Reserved to launched; returns the addresses of the slots. None when the save has ended or was taken
    /// back: no kernels may be queued then. A save that fails later learns from `end` or `withdraw` that
    /// kernels may read its sources.
    pub(super) fn launch(&self, ticket: &Ticket) -> Option<Vec<u64>> {
        let mut locked = lock(&self.locked);
        let State::Reserved { frozen } = locked.state else { return None };
        if ticket.failed() || ticket.staged.is_complete() {
            return None;
        }
        locked.state = State::Launched { frozen, kernels: None };
        Some(locked.slots.held.iter().flatten().map(|(_, address)| *address).collect())
    }

    /// Makes the device queue the kernels.
    ///
    /// # Errors
    /// Nothing was queued.
    pub(super) fn queue(&self, streams: &[DeviceStream], behind_copies: bool, slots: &[u64]) -> Result<Launch> {
        self.save.device.launch(streams, &self.save.dependency, behind_copies, slots)
    }

    /// Sets the queued kernels, which tell F.
    pub(super) fn set_kernels(&self, queued: Arc<dyn FenceKernels>) {
        if let State::Launched { kernels, .. } = &mut lock(&self.locked).state {
            *kernels = Some(queued);
        }
    }

    /// Back to open if no kernels are queued; returns the slots.
    pub(super) fn give_up(&self) -> Vec<usize> {
        let mut locked = lock(&self.locked);
        match locked.state {
            State::Reserved { .. } | State::Launched { kernels: None, .. } => locked.state = State::Open,
            State::Launched { .. } | State::Latched { .. } => return Vec::new(),
            // Slots that a fence reserved earlier.
            State::Open | State::Withdrawn | State::Done => {}
        }
        locked.slots.take(|_| true)
    }

    /// F, once it is told.
    pub fn latched(&self) -> Option<usize> {
        lock(&self.locked).latched()
    }

    /// Whether kernels were launched, or are being queued, and the save is not done.
    pub fn launched(&self) -> bool {
        matches!(lock(&self.locked).state, State::Launched { .. } | State::Latched { .. })
    }

    /// The kernels that were launched.
    pub(super) fn kernels(&self) -> Option<Arc<dyn FenceKernels>> {
        match &lock(&self.locked).state {
            State::Launched { kernels, .. } => kernels.clone(),
            State::Latched { kernels, .. } => Some(kernels.clone()),
            _ => None,
        }
    }

    /// Whether kernels that read live memory are being queued or may still run.
    pub fn pending(&self) -> bool {
        let kernels = match &lock(&self.locked).state {
            State::Launched { kernels, .. } => kernels.clone(),
            _ => return false,
        };
        // Asked with no lock held, because `over` calls the driver.
        kernels.is_none_or(|kernels| !kernels.over())
    }

    /// Fails when the device is lost, and F will never be told.
    pub fn check(&self) -> Result<()> {
        // Asking the kernels detects a lost device.
        _ = self.pending();
        self.save.device.check()
    }

    /// Whether nothing is queued from live memory any more.
    pub fn frozen(&self) -> bool {
        matches!(lock(&self.locked).state, State::Reserved { frozen: true } | State::Launched { frozen: true, .. })
    }

    /// Decides to queue one chunk from live memory; `freeze` waits for it. None when nothing more is queued
    /// from there.
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
        locked.latched().is_none() && matches!(locked.state, State::Launched { .. })
    }

    /// Records that the stager queues nothing more of the save, and forbids further kernels. Launched kernels
    /// go on.
    pub fn end(&self) {
        let mut locked = lock(&self.locked);
        if let State::Open | State::Reserved { .. } = locked.state {
            locked.state = State::Done;
        }
    }

    /// Counts a chunk that is handed over; returns its slot if that is free by now.
    pub(super) fn hand_over(&self, chunk: usize) -> Vec<usize> {
        let mut locked = lock(&self.locked);
        locked.handed += 1;
        if locked.latched().is_some() { locked.slots.take(|i| i == chunk) } else { Vec::new() }
    }

    /// Chunks handed over.
    pub(super) fn handed(&self) -> usize {
        lock(&self.locked).handed
    }

    /// Returns the slots that are free by now, and whether nothing is left to watch. `staged`: the save is
    /// staged.
    pub(super) fn reap(&self, staged: bool) -> (Vec<usize>, bool) {
        let pending = self.latched().is_none() && staged && self.pending();
        let mut locked = lock(&self.locked);
        let first = match (locked.latched(), &locked.state) {
            (Some(first), _) => first,
            // Some kernels could not be queued, so F is never told; the queued ones have ended.
            (None, State::Launched { .. }) if staged && !pending => 0,
            (None, State::Launched { .. }) => return (Vec::new(), false),
            (None, _) => return (Vec::new(), true),
        };
        let last = staged || mutant::on(Mutant::SlotEarly);
        let slots = locked.slots.take(|chunk| chunk < first || last);
        let before = staged.then(|| std::mem::replace(&mut locked.state, State::Done));
        drop(locked);
        // Dropped with no lock held: the last owner of kernels frees memory.
        drop(before);
        (slots, last)
    }

    /// Gathers a chunk, if it is one to be gathered. Returns the device and the address of the slab's first
    /// byte there.
    pub fn gather(&self, chunk: usize) -> Result<Option<(u32, u64)>> {
        if self.save.gathered.get(chunk) != Some(&true) {
            return Ok(None);
        }
        self.save.device.gather(chunk).map(|address| Some((self.save.ordinal, address)))
    }

    /// Advances the watermark past this chunk, behind the copies so far.
    pub fn publish(&self, chunk: usize) -> Result<()> {
        if self.save.slotted { self.save.device.publish(self.save.base + chunk as u64 + 1) } else { Ok(()) }
    }

    /// Where the late copy of a chunk from F on is: the device and an address.
    pub fn location(&self, chunk: usize) -> Option<(u32, u64)> {
        let locked = lock(&self.locked);
        let held = locked.slots.held.get(chunk.checked_sub(locked.slots.first)?)?;
        held.map(|(_, address)| (self.save.ordinal, address))
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
