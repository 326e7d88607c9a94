//! A coordinator over MPI, with point-to-point messages on a communicator of its own.

use super::board::{Board, Life, OnBoard};
use super::{Coordinator, Hello, Member, Round, Session, launcher};
use crate::error::{Error, ErrorKind, Result};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use mpi::Threading;
use mpi::environment::{initialize_with_threading, is_finalized, is_initialized, threading_support};
use mpi::point_to_point::{Destination, MatchedReceiveVec, Source};
use mpi::topology::{Communicator, SimpleCommunicator};
use std::collections::{HashMap, VecDeque};
use std::ops::{ControlFlow, Range};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const TAG: i32 = 1;
/// How long dropping a coordinator may take, because MPI_Finalize waits for all ranks.
const FINALIZE: Duration = Duration::from_secs(30);

/// The coordinator of ranks that MPI started.
///
/// A thread of its own makes all calls of MPI, on a duplicate of the world communicator. Messages are point
/// to point, because a collective cannot be given up at a deadline. The only collective is the one that
/// duplicates. If the program has not initialized MPI, this thread does, and finalizes MPI when the
/// coordinator is dropped. The program must not use MPI then. If the program has initialized MPI, it must
/// have requested `MPI_THREAD_MULTIPLE`.
///
/// mpirun ends all ranks when one rank dies, and errors of MPI itself end the job. A rank that hangs is
/// missing at the deadline.
///
/// ```no_run
/// use ashore::ranks::{Coordinator, Mpi};
/// use std::time::{Duration, Instant};
/// let ranks = Mpi::start(Instant::now() + Duration::from_secs(60))?;
/// println!("{} of {}", ranks.member().rank, ranks.member().world);
/// # Ok::<(), ashore::Error>(())
/// ```
#[derive(Debug)]
pub struct Mpi(OnBoard<Mail>);

impl Mpi {
    /// Starts the thread, which initializes MPI if the program has not, and waits until all ranks have
    /// started their threads. Every rank calls this, in the same order relative to its other uses of the
    /// world communicator.
    ///
    /// # Errors
    /// `Invalid` if the program initialized MPI without `MPI_THREAD_MULTIPLE`, or finalized it; `Deadline` if
    /// other ranks did not start in time.
    pub fn start(deadline: Instant) -> Result<Self> {
        let inbox = Arc::new(Inbox::default());
        let (jobs, received) = bounded(4);
        let (started, has_started) = bounded(1);
        let theirs = Arc::clone(&inbox);
        let thread = crate::thread::spawn("ashore-mpi".into(), move || run(&theirs, &received, &started))?;
        let member = match has_started.recv_deadline(deadline) {
            Ok(started) => started?,
            Err(RecvTimeoutError::Timeout) => {
                return Err(Error::new(ErrorKind::Deadline, "not all ranks started their coordinator by MPI in time"));
            }
            Err(RecvTimeoutError::Disconnected) => return Err(ended()),
        };
        let mail = Mail { member, inbox, jobs: Some(jobs), thread: Some(thread) };
        Ok(Self(OnBoard::new(mail, member)?))
    }
}

super::board::delegate!(Mpi);

fn ended() -> Error {
    Error::internal("the thread of MPI has ended")
}

/// The requests to the thread.
enum Job {
    /// Send the same bytes to these ranks, and answer when all messages are under way.
    Send(Vec<u8>, Range<i32>, Sender<()>),
    /// Look for messages, because a thread begins to wait for them.
    Look,
}

/// The body of the thread, which is the only thread that calls MPI.
fn run(inbox: &Inbox, jobs: &Receiver<Job>, started: &Sender<Result<Member>>) {
    let universe = match begin() {
        Ok(universe) => universe,
        Err(error) => {
            let _ = started.send(Err(error));
            return;
        }
    };
    let communicator = SimpleCommunicator::world().duplicate();
    let _ = started.send(member(&communicator));
    let mut pause = Duration::ZERO;
    loop {
        if receive(&communicator, inbox) {
            pause = Duration::ZERO;
        }
        pause = (pause * 2).clamp(Duration::from_micros(50), if inbox.is_awaited() { MILLI } else { 20 * MILLI });
        match jobs.recv_timeout(pause) {
            Ok(Job::Send(bytes, to, sent)) => {
                send(&communicator, &bytes, to, inbox);
                let _ = sent.send(());
            }
            Ok(Job::Look) => pause = Duration::ZERO,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    // Do not free the communicator: that is a collective, and other ranks may be gone.
    std::mem::forget(communicator);
    drop(universe);
}

const MILLI: Duration = Duration::from_millis(1);

fn begin() -> Result<Option<mpi::environment::Universe>> {
    if is_finalized() {
        return Err(Error::invalid("the program has finalized MPI: drop the coordinator first"));
    }
    if !is_initialized()
        && let Some((universe, threads)) = initialize_with_threading(Threading::Funneled)
    {
        if threads < Threading::Funneled {
            return Err(Error::invalid("this MPI allows no threads beside that of the program"));
        }
        return Ok(Some(universe));
    }
    if threading_support() < Threading::Multiple {
        return Err(Error::invalid(
            "the program has initialized MPI for one thread: initialize it with MPI_THREAD_MULTIPLE, or not at all, so \
             that the coordinator does it",
        ));
    }
    Ok(None)
}

fn member(communicator: &SimpleCommunicator) -> Result<Member> {
    let number = |n: i32| u32::try_from(n).map_err(|_| Error::internal("a rank of MPI is negative"));
    let (rank, world) = (number(communicator.rank())?, number(communicator.size())?);
    // MPI does not tell the local rank, but the launcher of MPI does.
    let launched = launcher::detect().ok().flatten().filter(|m| (m.rank, m.world) == (rank, world));
    Ok(Member { rank, world, local_rank: launched.map_or(0, |member| member.local_rank) })
}

/// Receives the messages that have arrived. True if there was any.
fn receive(communicator: &SimpleCommunicator, inbox: &Inbox) -> bool {
    let mut any = false;
    while let Some(found) = communicator.any_process().immediate_matched_probe_with_tag(TAG) {
        let (bytes, _) = found.matched_receive_vec::<u8>();
        any = true;
        if let Some((key, bytes)) = parse(&bytes) {
            inbox.put(key, bytes.to_vec(), true);
        }
    }
    any
}

/// Sends, and receives meanwhile, until MPI has all messages under way. For short messages that is at once.
/// MPI cannot give up a message, so a caller whose deadline passes stops waiting for this thread.
fn send(communicator: &SimpleCommunicator, bytes: &[u8], to: Range<i32>, inbox: &Inbox) {
    mpi::request::scope(|scope| {
        let send = |rank| communicator.process_at_rank(rank).immediate_send_with_tag(scope, bytes, TAG);
        let mut requests: Vec<_> = to.map(send).collect();
        loop {
            requests = requests.into_iter().filter_map(|request| request.test().err()).collect();
            if requests.is_empty() {
                return;
            }
            if !receive(communicator, inbox) {
                std::thread::sleep(Duration::from_micros(200));
            }
        }
    });
}

fn pack(key: &str, bytes: &[u8]) -> Vec<u8> {
    [&(key.len() as u16).to_le_bytes(), key.as_bytes(), bytes].concat()
}

fn parse(bytes: &[u8]) -> Option<(&str, &[u8])> {
    let (len, rest) = bytes.split_first_chunk::<2>()?;
    let (key, bytes) = rest.split_at_checked(usize::from(u16::from_le_bytes(*len)))?;
    Some((std::str::from_utf8(key).ok()?, bytes))
}

/// The messages that have arrived, and the messages that this rank has put.
#[derive(Debug, Default)]
struct Inbox {
    letters: Mutex<Letters>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Letters {
    by_key: HashMap<String, Vec<u8>>,
    /// Keys in the order in which their messages arrived.
    order: VecDeque<String>,
    most: usize,
    /// A message has arrived since the last wait.
    news: bool,
    awaited: bool,
}

impl Inbox {
    fn lock(&self) -> MutexGuard<'_, Letters> {
        self.letters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_awaited(&self) -> bool {
        self.lock().awaited
    }

    /// Ranks do not remove messages on other ranks, so the oldest messages are dropped.
    fn put(&self, key: &str, bytes: Vec<u8>, news: bool) {
        let mut letters = self.lock();
        if letters.by_key.insert(key.to_owned(), bytes).is_none() {
            letters.order.push_back(key.to_owned());
        }
        while letters.order.len() > letters.most.max(1000) {
            let Some(oldest) = letters.order.pop_front() else { break };
            letters.by_key.remove(&oldest);
        }
        letters.news |= news;
        drop(letters);
        self.changed.notify_all();
    }

    fn retain(&self, keep: impl Fn(&str) -> bool) {
        let mut letters = self.lock();
        letters.by_key.retain(|key, _| keep(key));
        letters.order.retain(|key| keep(key));
    }
}

#[derive(Debug)]
struct Mail {
    member: Member,
    inbox: Arc<Inbox>,
    /// None once this is being dropped, which ends the thread.
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Mail {
    fn drop(&mut self) {
        self.jobs = None;
        let Some(thread) = self.thread.take() else { return };
        let until = Instant::now() + FINALIZE;
        while !thread.is_finished() && Instant::now() < until {
            std::thread::sleep(MILLI);
        }
        if thread.is_finished() {
            let _ = thread.join();
        } else {
            tracing::warn!("MPI was not finalized in time: another rank hangs, or has ended");
        }
    }
}

impl Board for Mail {
    type Held = ();

    const SHOWS_ALL: bool = false;

    fn check_token(&self, _token: &str) -> Result<()> {
        // The communicator connects the processes of one run.
        Ok(())
    }

    fn put(&self, key: &str, bytes: &[u8], until: Instant) -> Result<()> {
        self.inbox.lock().most = 1000 + 16 * self.member.world as usize;
        self.inbox.put(key, bytes.to_vec(), false);
        let (sent, was_sent) = bounded(1);
        // Rank 0 tells all others, and they tell rank 0.
        let to = if self.member.rank == 0 { 1..self.member.world as i32 } else { 0..1 };
        let late = || Error::new(ErrorKind::Unavailable, "MPI sent no message in time: another rank does not receive");
        let jobs = self.jobs.as_ref().ok_or_else(ended)?;
        jobs.send_deadline(Job::Send(pack(key, bytes), to, sent), until).map_err(|_| late())?;
        was_sent.recv_deadline(until).map_err(|_| late())
    }

    fn announce(&self, key: &str, bytes: &[u8], until: Instant) -> Result<()> {
        self.put(key, bytes, until)
    }

    fn read(&self, key: &str, _longest: usize, _until: Instant) -> Result<Option<Vec<u8>>> {
        Ok(self.inbox.lock().by_key.get(key).cloned())
    }

    fn list(&self, folder: &str, _until: Instant) -> Result<Vec<String>> {
        let name = |key: &String| Some(key.strip_prefix(folder)?.strip_prefix('/')?.to_owned());
        Ok(self.inbox.lock().order.iter().filter_map(name).collect())
    }

    fn remove(&self, key: &str, _until: Instant) {
        self.inbox.retain(|other| other != key);
    }

    fn remove_others(&self, session: &str, _until: Instant) {
        self.inbox.retain(|key| !key.starts_with("messages-") || key.starts_with(session));
    }

    fn life(&self, _key: &str, _nearby: bool, _until: Instant) -> Life {
        Life::Unknown
    }

    fn hint(&self) -> &'static str {
        "missing ranks hang, or have not come here"
    }

    fn now(&self) -> Instant {
        Instant::now()
    }

    fn wait(&self, _folder: &str, _turn: u32, until: Instant) {
        let until = until.min(Instant::now() + Duration::from_secs(1));
        let mut letters = self.inbox.lock();
        letters.awaited = true;
        drop(letters);
        if let Some(jobs) = &self.jobs {
            let _ = jobs.try_send(Job::Look);
        }
        letters = self.inbox.lock();
        while !letters.news {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            letters = self.inbox.changed.wait_timeout(letters, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        letters.news = false;
        letters.awaited = false;
    }
}
