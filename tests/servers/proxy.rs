//! A proxy of HTTP/1.1 between a client and a store, which makes faults. Which request meets which fault
//! follows from a rule or a seed; the number of faults is bounded. It judges the checksums of parts, which
//! the servers of the tests take unseen.

use super::http::{self, Message};
use rustix::net::sockopt::set_socket_linger;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

/// What goes wrong with one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The store is not asked; the answer is this status with this code of S3 in its body.
    Status(u16, &'static str),
    /// The store is asked; the answer is this status.
    LandsThen(u16),
    /// The store is asked; the connection ends without an answer.
    AnswerLost,
    /// The connection ends without an answer, and the request reaches the store after this time.
    LandsLater(Duration),
    /// The connection is reset, and the store is not asked.
    ResetBefore,
    /// The store is asked; the connection is reset.
    ResetAfter,
    /// The store is asked, and answers after this time.
    Slow(Duration),
    /// The answer's body comes in pieces, which take this time together.
    SlowBody(Duration),
    /// The answer's body ends in its middle.
    Truncated,
    /// The answer's body stops in its middle for this time, and then the connection ends.
    Stalled(Duration),
    /// One byte of the answer's body is another.
    FlippedAnswer,
    /// One byte of the request's body is another when it comes to the judge of checksums.
    FlippedRequest,
}

/// Which requests a fault is for: the method (`""` for any), and a part of the path with the query.
#[derive(Clone, Debug)]
pub struct Rule {
    pub method: &'static str,
    pub path: String,
    pub fault: Fault,
    /// So many matching requests pass before.
    pub skip: usize,
    /// So many of them meet it.
    pub times: usize,
}

/// Faults by chance.
#[derive(Clone, Debug)]
pub struct Chance {
    pub seed: u64,
    /// One in so many requests meets a fault.
    pub one_in: u64,
    pub faults: Vec<Fault>,
    /// No more faults than these.
    pub left: usize,
}

/// A request that the proxy has seen.
#[derive(Clone, Debug)]
pub struct Seen {
    number: u64,
    pub method: String,
    pub path: String,
    /// What the signature covers of the body: its SHA-256, or `UNSIGNED-PAYLOAD`.
    pub payload: String,
    /// It has a CRC-64/NVME of its body.
    pub checked: bool,
    /// The answer's status; 0 when there was none.
    pub status: u16,
    pub fault: Option<Fault>,
}

struct Shared {
    upstream: SocketAddr,
    rules: Mutex<Vec<Rule>>,
    chance: Mutex<Option<Chance>>,
    seen: Mutex<Vec<Seen>>,
    away: AtomicBool,
    deaf: AtomicBool,
    /// Requests so far.
    count: AtomicU64,
    ended: AtomicBool,
}

/// The proxy, until it is dropped.
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Proxy {
    /// A proxy in front of the server at `http://HOST:PORT`, at a free port.
    pub fn before(url: &str) -> Self {
        let upstream = url.trim_start_matches("http://").split('/').next().unwrap().parse().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            upstream,
            rules: Mutex::default(),
            chance: Mutex::default(),
            seen: Mutex::default(),
            away: AtomicBool::new(false),
            deaf: AtomicBool::new(false),
            count: AtomicU64::new(0),
            ended: AtomicBool::new(false),
        });
        let accepting = shared.clone();
        thread::spawn(move || {
            for client in listener.incoming() {
                if accepting.ended.load(Ordering::SeqCst) {
                    break;
                }
                let shared = accepting.clone();
                if let Ok(client) = client {
                    thread::spawn(move || serve(&client, &shared));
                }
            }
        });
        Self { address, shared }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The next requests that match meet this fault.
    pub fn fault(&self, method: &'static str, path: &str, fault: Fault, times: usize) {
        self.rule(Rule { method, path: path.to_owned(), fault, skip: 0, times });
    }

    pub fn rule(&self, rule: Rule) {
        locked(&self.shared.rules).push(rule);
    }

    pub fn chance(&self, chance: Chance) {
        *locked(&self.shared.chance) = Some(chance);
    }

    /// No more faults.
    pub fn calm(&self) {
        locked(&self.shared.rules).clear();
        *locked(&self.shared.chance) = None;
        self.away(false);
    }

    /// While the store is away, connections are reset.
    pub fn away(&self, away: bool) {
        self.shared.away.store(away, Ordering::SeqCst);
    }

    /// While the store is deaf, it does not hear conditions.
    pub fn deaf(&self, deaf: bool) {
        self.shared.deaf.store(deaf, Ordering::SeqCst);
    }

    /// The requests since the last call.
    pub fn seen(&self) -> Vec<Seen> {
        std::mem::take(&mut locked(&self.shared.seen))
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        // Wakes the thread that accepts.
        drop(TcpStream::connect(self.address));
    }
}

impl Shared {
    /// The number of a request, and the fault that it meets.
    fn record(&self, request: &Message) -> (u64, Option<Fault>) {
        let mut seen = locked(&self.seen);
        let (number, fault) = (self.count.fetch_add(1, Ordering::SeqCst), self.fault_of(request));
        let (method, path) = (request.method().to_owned(), request.path().to_owned());
        let payload = request.get("x-amz-content-sha256").unwrap_or_default().to_owned();
        let checked = request.get(CHECKSUM).is_some();
        seen.push(Seen { number, method, path, payload, checked, status: 0, fault });
        (number, fault)
    }

    /// Notes the status of an answer before the client has it.
    fn answered(&self, number: u64, status: u16) {
        if let Some(seen) = locked(&self.seen).iter_mut().find(|seen| seen.number == number) {
            seen.status = status;
        }
    }

    fn fault_of(&self, request: &Message) -> Option<Fault> {
        let (method, path) = (request.method(), request.path());
        for rule in locked(&self.rules).iter_mut() {
            if (rule.method.is_empty() || rule.method == method) && path.contains(&rule.path) {
                if rule.skip > 0 {
                    rule.skip -= 1;
                } else if rule.times > 0 {
                    rule.times -= 1;
                    return Some(rule.fault);
                }
            }
        }
        let mut chance = locked(&self.chance);
        let chance = chance.as_mut()?;
        let (meets, which) = (random(&mut chance.seed), random(&mut chance.seed));
        if chance.left == 0 || !meets.is_multiple_of(chance.one_in) {
            return None;
        }
        chance.left -= 1;
        Some(chance.faults[which as usize % chance.faults.len()])
    }

    fn ask(&self, request: &Message) -> std::io::Result<Message> {
        let mut store = TcpStream::connect(self.upstream)?;
        store.set_read_timeout(Some(Duration::from_secs(60)))?;
        store.set_nodelay(true)?;
        let mut asked = request.clone();
        asked.set("connection", "close");
        if self.deaf.load(Ordering::SeqCst) {
            asked
                .headers
                .retain(|(key, _)| !["if-match", "if-none-match"].contains(&key.to_ascii_lowercase().as_str()));
        }
        asked.write_to(&mut store)?;
        http::read_answer(&mut store, request.method() == "HEAD")
    }
}

/// splitmix64.
fn random(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *seed;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Answers the requests of one connection, one after the other.
fn serve(client: &TcpStream, shared: &Arc<Shared>) {
    let _ = client.set_read_timeout(Some(Duration::from_secs(120)));
    let _ = client.set_nodelay(true);
    loop {
        if shared.away.load(Ordering::SeqCst) {
            return reset(client);
        }
        let Ok(Some(request)) = http::read_request(&mut &*client) else { return };
        if shared.away.load(Ordering::SeqCst) {
            return reset(client);
        }
        let (number, fault) = shared.record(&request);
        if answer(client, shared, &request, number, fault).is_none() {
            return;
        }
    }
}

/// Returns None when the connection has ended.
fn answer(
    client: &TcpStream,
    shared: &Arc<Shared>,
    request: &Message,
    number: u64,
    fault: Option<Fault>,
) -> Option<()> {
    let send = |answer: &Message| {
        shared.answered(number, answer.status());
        let mut client = client;
        answer.write_to(&mut client).ok()
    };
    let mut out = client;
    let mut request = request.clone();
    match fault {
        Some(Fault::Status(status, code)) => {
            let mut answer = http::error(status, code);
            if request.method() == "HEAD" {
                answer.body.clear();
            }
            return send(&answer);
        }
        Some(Fault::ResetBefore) => {
            reset(client);
            return None;
        }
        Some(Fault::LandsLater(after)) => {
            let shared = shared.clone();
            thread::spawn(move || {
                thread::sleep(after);
                drop(shared.ask(&request));
            });
            return None;
        }
        Some(Fault::Slow(time)) => thread::sleep(time),
        Some(Fault::FlippedRequest) => flip(&mut request.body),
        _ => {}
    }
    if !checksum_matches(&request) {
        return send(&http::error(400, "BadDigest"));
    }
    let Ok(mut answer) = shared.ask(&request) else {
        reset(client);
        return None;
    };
    let half = answer.body.len() / 2;
    match fault {
        Some(Fault::LandsThen(status)) => return send(&http::error(status, "InternalError")),
        Some(Fault::AnswerLost) => return None,
        Some(Fault::ResetAfter) => {
            reset(client);
            return None;
        }
        Some(Fault::FlippedAnswer) => flip(&mut answer.body),
        Some(Fault::Truncated | Fault::Stalled(_)) if half > 0 => {
            out.write_all(&answer.head()).and_then(|()| out.write_all(&answer.body[..half])).ok()?;
            if let Some(Fault::Stalled(time)) = fault {
                thread::sleep(time);
            }
            return None;
        }
        Some(Fault::SlowBody(time)) if half > 0 => {
            out.write_all(&answer.head()).ok()?;
            shared.answered(number, answer.status());
            let pieces = answer.body.chunks(answer.body.len().div_ceil(10));
            for piece in pieces {
                thread::sleep(time / 10);
                out.write_all(piece).ok()?;
            }
            return Some(());
        }
        _ => {}
    }
    send(&answer)
}

/// The end of the connection is an RST.
fn reset(client: &TcpStream) {
    let _ = set_socket_linger(client, Some(Duration::ZERO));
    // What was sent and not read would make it an RST anyway; this makes it one always.
    let _ = client.set_nonblocking(true);
    let _ = { client }.read(&mut [0; 1]);
}

fn flip(body: &mut [u8]) {
    if let Some(middle) = body.len().checked_sub(1).map(|last| last / 2) {
        body[middle] ^= 1;
    }
}

/// The header of a CRC-64/NVME.
const CHECKSUM: &str = "x-amz-checksum-crc64nvme";

/// Judges the CRC64-NVME of a request, in base64, if it has one.
fn checksum_matches(request: &Message) -> bool {
    let Some(said) = request.get(CHECKSUM) else { return true };
    let crc = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64Nvme, &request.body);
    said == http::base64(&crc.to_be_bytes())
}
