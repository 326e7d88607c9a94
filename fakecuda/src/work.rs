//! What streams are made of: pieces of work, where they read and write, and the queues that they wait in. The
//! device holds these; what is done with them is in the modules above it.

use crate::event::Event;
use crate::host::Range;
use crate::kernel::Launch;
use crate::memory::Block;
use std::collections::VecDeque;
use std::sync::Arc;
use std::thread::ThreadId;
use std::time::Duration;

/// Long enough to cost nothing, short enough for a missed wake-up not to matter.
pub const PATIENCE: Duration = Duration::from_millis(20);

/// One end of a copy, as it was when the copy was enqueued.
#[derive(Clone, Copy)]
pub enum Spot {
    /// On the device of this number.
    Device(usize, u64, Block),
    Pinned(u64, Range),
    Pageable(u64),
}

/// One piece of work.
#[derive(Clone)]
pub enum Work {
    Copy { to: Spot, from: Spot, bytes: u64 },
    Fill { to: Spot, value: u8, bytes: u64 },
    Launch(Arc<Launch>),
    Write { to: Spot, value: u64, bytes: u64 },
    Await { at: Spot, value: u32, test: u32 },
    Record(Arc<Event>, u64),
    Wait(Arc<Event>, u64),
    Call(extern "C" fn(u64), u64),
    Free(Block),
    Nothing,
}

/// Work in a queue.
pub struct Item {
    pub work: Work,
    pub seq: u64,
    /// Other streams of this device, and how far they must have come before.
    pub after: Vec<(u64, u64)>,
    /// Fails with this code instead of being done.
    pub fault: Option<i32>,
}

/// What a stream is to the others.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub enum Role {
    /// Made by the program, ordered with the legacy stream.
    #[default]
    Blocking,
    /// Made by the program, ordered with nothing.
    NonBlocking,
    /// The legacy default stream of a device.
    Legacy,
    /// The default stream of a thread, ordered like a blocking one.
    OfThread,
}

#[derive(Default)]
pub struct Stream {
    pub queue: VecDeque<Item>,
    /// How much was ever enqueued and done.
    pub enqueued: u64,
    pub done: u64,
    pub role: Role,
    pub destroyed: bool,
    pub priority: i32,
    pub capture: Option<u64>,
}

impl Stream {
    /// Ends at once: what was enqueued counts as done.
    pub fn close(&mut self) {
        self.destroyed = true;
        self.queue.clear();
        self.done = self.enqueued;
    }
}

/// A capture under way.
pub struct Capture {
    pub mode: i32,
    pub thread: ThreadId,
    pub origin: u64,
    pub work: Vec<Work>,
    pub invalid: bool,
}

/// What was captured: a sequence, which is one of the orders that the graph allows.
pub type Graph = Vec<Work>;
