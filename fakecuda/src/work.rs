//! The contents of streams: pieces of work, the memory that they read and write, and the queues in which they
//! wait. The device holds these objects; the modules above it run the work.

use crate::event::Event;
use crate::host::Range;
use crate::kernel::Launch;
use crate::memory::Block;
use std::collections::VecDeque;
use std::sync::Arc;
use std::thread::ThreadId;
use std::time::Duration;

/// Long enough to cost nothing, and short enough that a missed wake-up does not matter.
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
    /// Other streams of this device, and the number that each must have reached before.
    pub after: Vec<(u64, u64)>,
    /// If set, the work fails with this code instead of running.
    pub fault: Option<i32>,
}

/// How a stream is ordered with other streams.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub enum Role {
    /// Created by the program, and ordered with the legacy stream.
    #[default]
    Blocking,
    /// Created by the program, and not ordered with any other stream.
    NonBlocking,
    /// The legacy default stream of a device.
    Legacy,
    /// The default stream of a thread, ordered like a blocking stream.
    OfThread,
}

#[derive(Default)]
pub struct Stream {
    pub queue: VecDeque<Item>,
    /// How many pieces of work were ever enqueued and done.
    pub enqueued: u64,
    pub done: u64,
    pub role: Role,
    pub destroyed: bool,
    pub priority: i32,
    pub capture: Option<u64>,
}

impl Stream {
    /// Ends the stream at once. All enqueued work counts as done.
    pub fn close(&mut self) {
        self.destroyed = true;
        self.queue.clear();
        self.done = self.enqueued;
    }
}

/// A capture that is under way.
pub struct Capture {
    pub mode: i32,
    pub thread: ThreadId,
    pub origin: u64,
    pub work: Vec<Work>,
    pub invalid: bool,
}

/// The captured work: a sequence, which is one of the orders that the graph allows.
pub type Graph = Vec<Work>;
