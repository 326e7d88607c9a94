//! The stager against a device that copies late, small enough for Miri.

use super::*;
use crate::completion::Signal;
use crate::device::{Device, Host, WaitGuard, Waits};
use crate::error::{Error, ErrorKind, Result};
use crate::memory::Arena;
use crate::plan::{Chunk, Plan, Shape, Sink};
use crate::state::{DeviceStream, StateDict};
use crate::sync::{Mutex, lock};
use crate::testing::LateDevice;
use crate::ticket::{Extent, Issue, Ticket};
use std::sync::Arc;
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_secs(600);

/// A sink that copies each chunk and returns the slab at once.
#[derive(Default)]
struct Kept {
    chunks: Mutex<Vec<(usize, Vec<u8>)>>,
    ended: Mutex<bool>,
}

impl Sink for Kept {
    fn accept(self: Arc<Self>, chunk: Chunk) {
        lock(&self.chunks).push((chunk.index, chunk.lease.bytes().to_vec()));
    }

    fn end(self: Arc<Self>) {
        *lock(&self.ended) = true;
    }
}

fn stager(device: impl Device + 'static) -> Stager {
    let signal = Arc::new(Signal::default());
    let arena = Arena::new(3 * 4096, 4096, &device, signal.clone()).unwrap();
    Stager::new(signal, arena, Arc::new(device), None, false)
}

fn push(stager: &Stager, tensor: &Arc<Vec<u8>>) -> (Arc<Ticket>, Arc<Plan>, Arc<Kept>) {
    push_of(stager, tensor, Vec::new(), LONG)
}

/// Pushes a save as if `streams` had written the tensor, with its own deadline.
fn push_of(
    stager: &Stager,
    tensor: &Arc<Vec<u8>>,
    streams: Vec<DeviceStream<'static>>,
    patience: Duration,
) -> (Arc<Ticket>, Arc<Plan>, Arc<Kept>) {
    let mut state = StateDict::new();
    state.tensor("t", tensor.clone()).unwrap();
    let plan = Arc::new(Plan::new(&state, Shape { chunk: 4096, files: 1, rank: None }, &[]).unwrap());
    let issue =
        Issue { step: 1, attempt: Default::default(), deadline: Instant::now() + patience, grace: Duration::ZERO };
    let ticket = Arc::new(Ticket::new(issue, Instant::now(), stager.signal.clone(), stager.calls.clone()));
    ticket.begin(Extent { chunks: plan.chunks.len(), streams, ..Extent::default() });
    let sink = Arc::new(Kept::default());
    let captured = Captured::default();
    stager.push(Job {
        prediction: None,
        ticket: ticket.clone(),
        plan: plan.clone(),
        state,
        captured,
        behind: None,
        late_copy: None,
        allocation: None,
        queued: Vec::new(),
        borrowed: false,
        not_before: None,
        sink: sink.clone(),
    });
    (ticket, plan, sink)
}

/// The bytes of the tensor that were handed over, without the header before them.
fn staged(plan: &Plan, sink: &Kept) -> Vec<u8> {
    let chunks = lock(&sink.chunks);
    let mut file = Vec::new();
    for ((index, bytes), expected) in chunks.iter().zip(0..) {
        assert_eq!(*index, expected);
        file.extend_from_slice(&bytes[..plan.chunks[*index].length]);
    }
    file.split_off(plan.shards[0].header.len() as usize)
}

fn with(stager: &Stager, test: impl FnOnce() -> Result<()>) {
    std::thread::scope(|scope| {
        scope.spawn(|| stager.run());
        let result = test();
        stager.stop();
        result.unwrap();
    });
    assert_eq!(stager.arena.free(), 3);
}

#[test]
fn what_is_handed_over_is_what_was_there_at_the_fence() {
    for device in [Some(LateDevice::default()), None] {
        let stager = device.map_or_else(|| stager(Host), stager);
        with(&stager, || {
            let mut tensor = Arc::new((0..10_000).map(|i| i as u8).collect::<Vec<_>>());
            let expected = tensor.to_vec();
            let (ticket, plan, sink) = push(&stager, &tensor);
            stager.fence(LONG)?;
            Arc::get_mut(&mut tensor).expect("released").fill(0xEE);
            drop(tensor);
            ticket.staged.wait_forever().unwrap()?;
            assert_eq!(staged(&plan, &sink), expected);
            Ok(())
        });
    }
}

#[test]
fn a_save_that_fails_half_way_gives_everything_back() {
    let device = LateDevice::default();
    device.fail_when_run(2);
    let stager = stager(device);
    with(&stager, || {
        let tensor = Arc::new(vec![1; 10_000]);
        let (ticket, _, sink) = push(&stager, &tensor);
        stager.fence(LONG)?;
        assert_eq!(ticket.staged.wait_forever().unwrap().unwrap_err().kind(), ErrorKind::Device);
        assert_eq!(Arc::strong_count(&tensor), 1);
        let deadline = Instant::now() + LONG;
        while !*lock(&sink.ended) {
            assert!(Instant::now() < deadline);
            std::thread::yield_now();
        }
        Ok(())
    });
}

#[test]
fn a_fence_at_its_deadline_leaves_no_read_behind() {
    let device = LateDevice::default();
    device.hold();
    let stager = stager(device.clone());
    with(&stager, || {
        let tensor = Arc::new(vec![1; 10_000]);
        let (ticket, ..) = push(&stager, &tensor);
        assert_eq!(stager.fence(Duration::from_millis(1)).unwrap_err().kind(), ErrorKind::Deadline);
        device.release();
        ticket.staged.wait_forever().unwrap().unwrap_err();
        assert_eq!(Arc::strong_count(&tensor), 1);
        Ok(())
    });
}

/// Streams wait until the last clone of this is dropped.
#[derive(Debug)]
struct Holding(WaitGuard);

impl Waits for Holding {
    fn at_once(&self) -> usize {
        1
    }

    fn order(&self, _: &[DeviceStream]) -> Result<Option<WaitGuard>> {
        Ok(Some(self.0.clone()))
    }
}

#[test]
fn streams_are_held_until_every_save_of_their_fence_is_staged_or_has_failed() {
    type Ending = fn(&Stager, &Ticket);
    let fail: Ending = |_, ticket| assert!(ticket.fail(Error::new(ErrorKind::Cancelled, "enough")));
    let staged: Ending = |stager, ticket| stager.saves.release(ticket);
    for [first, second] in [[fail, fail], [fail, staged], [staged, fail], [staged, staged]] {
        let hold: WaitGuard = Arc::new(());
        let stager = stager(Host);
        stager.offer(None, Some(Arc::new(Holding(hold.clone()))));
        let tensor = Arc::new(vec![1; 100]);
        let save = || push_of(&stager, &tensor, vec![DeviceStream::legacy(0)], LONG).0;
        let (one, two) = (save(), save());
        [&one, &two].iter().for_each(|ticket| (0..ticket.extent().chunks).for_each(|_| ticket.advance()));
        // Two references belong to the test and to the device, not to saves.
        let held = || Arc::strong_count(&hold) - 2;
        let fence = || stager.fence_on(&[DeviceStream::legacy(0)], LONG);
        fence().unwrap();
        fence().unwrap();
        assert_eq!(held(), 4);
        first(&stager, &one);
        assert_eq!(held(), 2);
        // A new fence does not wait for the first save.
        fence().unwrap();
        assert_eq!(held(), 3);
        second(&stager, &two);
        assert_eq!(held(), 0);
        two.keep_wait_guard(hold.clone());
        assert_eq!(held(), 0);
    }
}

#[test]
fn streams_are_let_go_when_a_save_falls_due_behind_one_that_is_stuck() {
    let device = LateDevice::default();
    device.hold();
    let stager = stager(device.clone());
    with(&stager, || {
        let (hold, tensor): (WaitGuard, _) = (Arc::new(()), Arc::new(vec![1; 100]));
        let (first, ..) = push(&stager, &tensor);
        while device.queued() == 0 {
            std::thread::yield_now();
        }
        let (second, ..) = push_of(&stager, &tensor, vec![DeviceStream::legacy(0)], Duration::from_millis(20));
        second.keep_wait_guard(hold.clone());
        let late = second.done.wait(Instant::now() + LONG).expect("long before the first").unwrap_err();
        assert_eq!((late.kind(), Arc::strong_count(&hold)), (ErrorKind::Deadline, 1));
        assert!(!first.done.is_complete());
        device.release();
        first.staged.wait_forever().unwrap()
    });
}
