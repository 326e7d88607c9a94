//! The late copy of one save: what has not left the device when its stream comes to the fence is copied in the device's own memory,
//! and read from there.
//!
//! The protocol is checked as a model, over all interleavings of small sizes, by `checks/model/fence.py`; the names are the model's.
//! *F* is how many chunks had left the device when its stream came to the fence. Slots for the last chunks are *reserved* in the
//! caller, who waits until all chunks without a slot are queued; the device latches F, makes late copies of the chunks from F on,
//! and tells F. The stager reads F after a chunk's mark, and only then *judges*: a copy from live memory of a chunk from F on is
//! made again from its slot. A slot is free when F is known and its chunk is before F or handed over, and not before. Where the
//! driver refuses some of the kernels F is never told: the save has failed, and its slots are free when it is staged and what was
//! queued has run.
//!
//! # States
//! Every event is a method of [`LateCopy`], and every change of state is made under its one lock. What is not in the table changes
//! nothing, and the method says so to its caller.
//!
//! | event | by | from | to |
//! |---|---|---|---|
//! | `reserve`: the last chunks have slots | a fence | open | reserved |
//! | `freeze`: nothing more is queued from live memory | the end of a scope | reserved | reserved, frozen |
//! | `give_up`: no kernels after all | a fence | reserved, launched before `set_kernels` | open |
//! | `launch`: kernels are about to be queued, F may be told | a fence | reserved | launched |
//! | `set_kernels`: they are queued, or some of them | a fence | launched | launched, with kernels |
//! | `latched`: the device has told F | any thread that looks | launched, with kernels | latched |
//! | `withdraw`: the save will not be staged | the thread that took it out of the queue | open, reserved | withdrawn |
//! | `end`: the stager queues no more of it | the stager | open, reserved | done |
//! | `reap`: it is staged, and no kernel is to come | a fence, later | latched, or launched and refused in part | done |
//!
//! `hand_over` counts in every state. `decide` lets the stager queue a chunk from live memory while the late copy is open, or reserved
//! or launched and not frozen; `freeze` waits for a chunk that was decided. A launch of which nothing could be queued goes back to
//! open, so that the host can wait instead.
//!
//! **Locks.** The lock of the state is held for a few instructions, and under it only those of a ticket's state and completions are
//! taken. The *turn* is a lock of its own, taken before all others: the thread that has it waits, for chunks to be queued, for slots, for the driver, and the next one
//! must not fence the same save meanwhile, while the stager has to go on looking at the state.

use crate::device::{DeviceLateCopy, FenceKernels, Launch, Point};
use crate::error::Result;
use crate::mutant::{self, Mutant};
use crate::state::DeviceStream;
use crate::sync::{Condvar, Mutex, MutexGuard, lock, wait};
use crate::ticket::Ticket;
use std::fmt;
use std::sync::Arc;

/// See the module.
pub(crate) struct LateCopy {
    /// What is the same for the whole save.
    pub(super) save: Planned,
    locked: Mutex<Locked>,
    /// Notified when a chunk that was decided for live memory is queued.
    queued: Condvar,
    turn: Mutex<()>,
}

/// One save as it was when it was asked for.
pub(super) struct Planned {
    pub device: Box<dyn DeviceLateCopy>,
    /// Behind the work that wrote the tensors.
    pub point: Point,
    pub ordinal: u32,
    /// Chunks that are put together before they are copied.
    pub gathered: Vec<bool>,
    /// Some tensors are of another device: there is no late copy.
    pub spans: bool,
    /// There are slots: the watermark is looked at.
    pub slotted: bool,
    /// The watermark before its first chunk.
    pub base: u64,
    /// Chunks before this one hold tensors of the host, which a fence must see queued.
    pub host: usize,
}

/// What changes.
#[derive(Default)]
struct Locked {
    state: State,
    slots: Slots,
    /// Chunks handed over.
    handed: usize,
    /// The stager is queueing a chunk from live memory.
    decided: bool,
}

/// See the table.
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
    /// The numbers of those of such chunks, which are not held any more then.
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

    /// The turn of one thread at a time: kernels are launched once.
    pub(super) fn turn(&self) -> MutexGuard<'_, ()> {
        lock(&self.turn)
    }

    /// Open to reserved; gives the slots back where it is not open any more.
    pub(super) fn reserve(&self, slots: Slots) -> Result<(), Slots> {
        let mut locked = lock(&self.locked);
        if !matches!(locked.state, State::Open) {
            return Err(slots);
        }
        (locked.state, locked.slots) = (State::Reserved { frozen: false }, slots);
        Ok(())
    }

    /// From here on nothing is queued from live memory; one chunk that was decided is waited for.
    pub(super) fn freeze(&self) {
        let mut locked = lock(&self.locked);
        if let State::Reserved { frozen } = &mut locked.state {
            *frozen = true;
        }
        while locked.decided {
            locked = wait(&self.queued, locked);
        }
    }

    /// Reserved to launched: the addresses of the slots. None, and no kernels are to be queued, when the save has ended or was taken
    /// back. A save that fails from here on finds, by `end` or `withdraw`, that kernels may read its sources.
    pub(super) fn launch(&self, ticket: &Ticket) -> Option<Vec<u64>> {
        let mut locked = lock(&self.locked);
        let State::Reserved { frozen } = locked.state else { return None };
        if ticket.failed() || ticket.staged.is_complete() {
            return None;
        }
        locked.state = State::Launched { frozen, kernels: None };
        Some(locked.slots.held.iter().flatten().map(|(_, address)| *address).collect())
    }

    /// Has the device queue the kernels.
    ///
    /// # Errors
    /// Nothing was queued.
    pub(super) fn queue(&self, streams: &[DeviceStream], behind_copies: bool, slots: &[u64]) -> Result<Launch> {
        self.save.device.launch(streams, &self.save.point, behind_copies, slots)
    }

    /// The kernels that were queued: F can be looked for.
    pub(super) fn set_kernels(&self, queued: Arc<dyn FenceKernels>) {
        if let State::Launched { kernels, .. } = &mut lock(&self.locked).state {
            *kernels = Some(queued);
        }
    }

    /// Back to open, where no kernels are queued: the slots.
    pub(super) fn give_up(&self) -> Vec<usize> {
        let mut locked = lock(&self.locked);
        match locked.state {
            State::Reserved { .. } | State::Launched { kernels: None, .. } => locked.state = State::Open,
            State::Launched { .. } | State::Latched { .. } => return Vec::new(),
            // What a fence had reserved before.
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

    /// Kernels that read live memory may still be to come.
    pub fn pending(&self) -> bool {
        let kernels = match &lock(&self.locked).state {
            State::Launched { kernels, .. } => kernels.clone(),
            _ => return false,
        };
        // Asked with no lock held: that is a call of the driver.
        kernels.is_none_or(|kernels| !kernels.over())
    }

    /// Fails when the device is lost, and F will never be told.
    pub fn check(&self) -> Result<()> {
        // Asking is how one learns that the device is lost.
        _ = self.pending();
        self.save.device.check()
    }

    /// Whether nothing is queued from live memory any more.
    pub fn frozen(&self) -> bool {
        matches!(lock(&self.locked).state, State::Reserved { frozen: true } | State::Launched { frozen: true, .. })
    }

    /// Decides that one chunk is queued from live memory, which a freeze waits for. None where nothing is any more.
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

    /// From here on no kernels are launched for a save that will not be staged. Whether there are some that may be to come.
    pub fn withdraw(&self) -> bool {
        let mut locked = lock(&self.locked);
        if let State::Open | State::Reserved { .. } = locked.state {
            locked.state = State::Withdrawn;
        }
        locked.latched().is_none() && matches!(locked.state, State::Launched { .. })
    }

    /// The stager queues nothing more of the save, and no kernels are launched for it. Kernels that were launched go on.
    pub fn end(&self) {
        let mut locked = lock(&self.locked);
        if let State::Open | State::Reserved { .. } = locked.state {
            locked.state = State::Done;
        }
    }

    /// Counts a chunk that is handed over: its slot, if that is free by now.
    pub(super) fn hand_over(&self, chunk: usize) -> Vec<usize> {
        let mut locked = lock(&self.locked);
        locked.handed += 1;
        if locked.latched().is_some() { locked.slots.take(|i| i == chunk) } else { Vec::new() }
    }

    /// Chunks handed over.
    pub(super) fn handed(&self) -> usize {
        lock(&self.locked).handed
    }

    /// The slots that are free by now, and whether nothing is left to be watched. `staged`: the save is.
    pub(super) fn reap(&self, staged: bool) -> (Vec<usize>, bool) {
        let pending = self.latched().is_none() && staged && self.pending();
        let mut locked = lock(&self.locked);
        let first = match (locked.latched(), &locked.state) {
            (Some(first), _) => first,
            // Not all kernels could be queued, and F is never told: those that were have ended.
            (None, State::Launched { .. }) if staged && !pending => 0,
            (None, State::Launched { .. }) => return (Vec::new(), false),
            (None, _) => return (Vec::new(), true),
        };
        let last = staged || mutant::on(Mutant::SlotEarly);
        let slots = locked.slots.take(|chunk| chunk < first || last);
        let before = staged.then(|| std::mem::replace(&mut locked.state, State::Done));
        drop(locked);
        // With no lock held: the last owner of kernels gives memory back.
        drop(before);
        (slots, last)
    }

    /// Puts a chunk together, if that is what is done with it: the device, and an address for the first byte of its slab.
    pub fn gather(&self, chunk: usize) -> Result<Option<(u32, u64)>> {
        if self.save.gathered.get(chunk) != Some(&true) {
            return Ok(None);
        }
        self.save.device.gather(chunk).map(|address| Some((self.save.ordinal, address)))
    }

    /// Tells the device, behind the copies so far, that this chunk has left it.
    pub fn publish(&self, chunk: usize) -> Result<()> {
        if self.save.slotted { self.save.device.publish(self.save.base + chunk as u64 + 1) } else { Ok(()) }
    }

    /// Where a chunk from F on lies: the device and an address.
    pub fn place(&self, chunk: usize) -> Option<(u32, u64)> {
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
