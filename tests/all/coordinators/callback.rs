//! An all-gather of the program: in step, out of step, late and hostile.

use super::{hello, member, session, within};
use ashore::ranks::{Callback, Coordinator, Phase, Round};
use ashore::{Error, ErrorKind, Result};
use std::ops::ControlFlow;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// An all-gather of threads. The calls of a seat are matched with those of the others by their number.
pub struct Group {
    rounds: Mutex<Vec<Vec<Option<Vec<u8>>>>>,
    calls: Vec<Mutex<usize>>,
    changed: Condvar,
}

impl Group {
    pub fn new(world: u32) -> Arc<Self> {
        let calls = (0..world).map(|_| Mutex::new(0)).collect();
        Arc::new(Self { rounds: Mutex::default(), calls, changed: Condvar::new() })
    }

    pub fn all_gather(&self, seat: u32, message: &[u8], deadline: Instant) -> Result<Vec<Vec<u8>>> {
        let seat = seat as usize;
        let mut call = self.calls[seat].lock().unwrap();
        let number = *call;
        *call += 1;
        drop(call);
        let mut rounds = self.rounds.lock().unwrap();
        while rounds.len() <= number {
            rounds.push(vec![None; self.calls.len()]);
        }
        rounds[number][seat] = Some(message.to_vec());
        self.changed.notify_all();
        loop {
            if let Some(all) = rounds[number].iter().cloned().collect() {
                return Ok(all);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::new(ErrorKind::Deadline, "the collective timed out"));
            }
            rounds = self.changed.wait_timeout(rounds, left).unwrap().0;
        }
    }
}

fn ok(_: u32, _: &[u8]) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// Met, with what the all-gather returns from then on.
fn met(later: impl Fn(&[u8], Instant) -> Result<Vec<Vec<u8>>> + Send + 'static) -> (Callback, Round) {
    let calls = Mutex::new(0);
    let all_gather = move |message: &[u8], deadline| {
        let mut calls = calls.lock().unwrap();
        *calls += 1;
        if *calls <= 2 { Ok(vec![message.to_vec()]) } else { later(message, deadline) }
    };
    let ranks = Callback::new(member(0, 1), all_gather).unwrap();
    let session = session();
    ranks.meet(&hello(member(0, 1), "t"), &mut |_| Ok(session), within(5000)).unwrap();
    (ranks, Round { session: session.id, save: 0, phase: Phase::Agree })
}

fn breaks(ranks: &Callback, round: Round, kind: ErrorKind, millis: u64) {
    let error = ranks.gather(round, b"m", &mut ok, within(millis)).unwrap_err();
    assert_eq!(error.kind(), kind, "{error:?}");
    let broken = ranks.tell(round, Some(b"m"), within(5000)).unwrap_err();
    assert_eq!(broken.kind(), ErrorKind::Unavailable, "{broken:?}");
    assert!(broken.to_string().contains("meet again"), "{broken}");
}

#[test]
fn a_message_of_another_round_breaks_the_group() {
    let first = Mutex::new(None);
    let (ranks, round) = met(move |message, _| {
        let stale = first.lock().unwrap().get_or_insert_with(|| message.to_vec()).clone();
        Ok(vec![stale])
    });
    ranks.gather(round, b"m", &mut ok, within(5000)).unwrap();
    let next = Round { save: 1, ..round };
    breaks(&ranks, next, ErrorKind::Unavailable, 5000);
    assert_eq!(ranks.missing(next), [0], "the rank that is out of step");
}

#[test]
fn hostile_answers_are_errors() {
    breaks_with(|_, _| Ok(Vec::new()), ErrorKind::Invalid);
    breaks_with(|m, _| Ok(vec![m.to_vec(), m.to_vec()]), ErrorKind::Invalid);
    breaks_with(|_, _| Ok(vec![Vec::new()]), ErrorKind::Unavailable);
    breaks_with(|_, _| Ok(vec![vec![0xff; 1 << 20]]), ErrorKind::Unavailable);
    breaks_with(|m, _| Ok(vec![m[..m.len() - 1].to_vec()]), ErrorKind::Unavailable);
    breaks_with(|_, _| Err(Error::new(ErrorKind::Device, "NCCL has failed")), ErrorKind::Device);
    breaks_with(|_, _| panic!("a bug of the program"), ErrorKind::Internal);
}

type AllGather = fn(&[u8], Instant) -> Result<Vec<Vec<u8>>>;

fn breaks_with(later: AllGather, kind: ErrorKind) {
    let (ranks, round) = met(later);
    breaks(&ranks, round, kind, 20_000);
}

/// The function of a program may ignore its deadline: the wait for it ends, and the next meeting waits for no
/// thread that hangs.
#[test]
fn an_all_gather_that_hangs_delays_nothing_beyond_its_deadline() {
    let hung = Mutex::new(false);
    let (ranks, round) = met(move |message, _| {
        if !std::mem::replace(&mut *hung.lock().unwrap(), true) {
            thread::sleep(Duration::from_millis(4000));
        }
        Ok(vec![message.to_vec()])
    });
    let start = Instant::now();
    breaks(&ranks, round, ErrorKind::Deadline, 300);
    let meet = || ranks.meet(&hello(member(0, 1), "t"), &mut |_| Ok(session()), within(20_000));
    assert_eq!(meet().unwrap_err().kind(), ErrorKind::Unavailable);
    assert!(start.elapsed() < Duration::from_millis(3900), "{:?}", start.elapsed());
    thread::sleep(Duration::from_millis(4000));
    meet().unwrap();
}
