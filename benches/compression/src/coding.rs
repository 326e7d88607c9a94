//! Measures how fast blocks are coded, in passes over a window of memory, by one thread or several.

use crate::block::{BLOCK, Codec, Scheme};
use crate::data::Kind;
use crate::disk::WRITE;
use crate::figures::{Lap, Speed, median, rate, thread_time};
use crate::memory::Aligned;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// The memory to code, larger than the caches.
pub struct Window {
    pub name: &'static str,
    pub width: usize,
    pub raw: Aligned,
    last: Option<Aligned>,
}

impl Window {
    pub fn new(kind: &Kind, len: usize) -> Self {
        let tiled = |bytes: &Vec<u8>| Aligned::tiled(bytes, len);
        Self { name: kind.name, width: kind.width, raw: tiled(&kind.bytes), last: kind.last.as_ref().map(tiled) }
    }

    pub fn last(&self) -> Option<&[u8]> {
        self.last.as_deref()
    }

    fn blocks(&self) -> usize {
        self.raw.len() / BLOCK
    }

    fn block(&self, i: usize) -> (&[u8], Option<&[u8]>) {
        let range = i * BLOCK..(i + 1) * BLOCK;
        (&self.raw[range.clone()], self.last().map(|last| &last[range]))
    }
}

/// One scheme over one window, with the laps measured so far.
pub struct Trial<'a> {
    window: &'a Window,
    pub scheme: Scheme,
    coded: Vec<u8>,
    starts: Vec<usize>,
    workers: Vec<Worker>,
    pub encoded: Vec<Lap>,
    pub decoded: Vec<Lap>,
}

struct Worker {
    codec: Codec,
    /// As large as one write, and used from start to end, as a program would use it.
    out: Aligned,
    at: usize,
}

impl Worker {
    fn new(scheme: Scheme) -> Self {
        Self { codec: Codec::new(scheme), out: Aligned::zeroed(WRITE + BLOCK), at: 0 }
    }

    fn advance(&mut self) -> usize {
        let at = self.at;
        self.at = (at + BLOCK) % WRITE;
        at
    }
}

impl<'a> Trial<'a> {
    /// Codes the window once and checks every decoded bit.
    pub fn new(window: &'a Window, scheme: Scheme, threads: usize) -> Self {
        let workers = (0..threads).map(|_| Worker::new(scheme)).collect();
        let (encoded, decoded, starts) = (Vec::new(), Vec::new(), vec![0]);
        let mut trial = Self { window, scheme, coded: Vec::new(), starts, workers, encoded, decoded };
        let Worker { codec, out, .. } = &mut trial.workers[0];
        let mut back = Aligned::zeroed(BLOCK);
        for i in 0..window.blocks() {
            let (raw, last) = window.block(i);
            let length = codec.encode(raw, last, out);
            codec.decode(&out[..length], last, &mut back);
            assert!(*back == *raw, "{}: {scheme}: block {i} came back different", window.name);
            trial.coded.extend_from_slice(&out[..length]);
            trial.starts.push(trial.coded.len());
        }
        trial
    }

    /// Runs one pass of coding and one of decoding.
    pub fn lap(&mut self) {
        let window = self.window;
        let encode = |worker: &mut Worker, i| {
            let (raw, last) = window.block(i);
            let at = worker.advance();
            worker.codec.encode(raw, last, &mut worker.out[at..]);
        };
        self.encoded.push(pass(&mut self.workers, window.blocks(), encode));
        let (coded, starts) = (&self.coded, &self.starts);
        let decode = |worker: &mut Worker, i: usize| {
            let at = worker.advance();
            let coded = &coded[starts[i]..starts[i + 1]];
            worker.codec.decode(coded, window.block(i).1, &mut worker.out[at..at + BLOCK]);
        };
        self.decoded.push(pass(&mut self.workers, window.blocks(), decode));
    }

    /// Medians of the laps so far.
    pub fn speed(&self) -> Speed {
        let len = self.window.raw.len();
        let rate = |laps: &[Lap]| median(laps.iter().map(|lap| rate(len, lap.cpu)));
        let ratio = self.coded.len() as f64 / len as f64;
        Speed { ratio, encode: rate(&self.encoded), decode: rate(&self.decoded) }
    }
}

/// Copies the window block by block, as `Trial::lap` codes it.
pub fn copy(window: &Window, threads: usize) -> Lap {
    let mut outs: Vec<_> = (0..threads).map(|_| (Aligned::zeroed(WRITE), 0)).collect();
    pass(&mut outs, window.blocks(), |(out, at), i| {
        out[*at..*at + BLOCK].copy_from_slice(window.block(i).0);
        *at = (*at + BLOCK) % WRITE;
        std::hint::black_box(out);
    })
}

/// Digests the window as the library does.
pub fn digest(window: &Window, threads: usize) -> Lap {
    pass(&mut vec![0; threads], window.blocks(), |sum, i| {
        *sum ^= crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64Nvme, window.block(i).0);
        std::hint::black_box(sum);
    })
}

/// Runs a thread for each worker, which takes blocks until none is left.
fn pass<W: Send>(workers: &mut [W], blocks: usize, work: impl Fn(&mut W, usize) + Sync) -> Lap {
    let next = AtomicUsize::new(0);
    let take = |worker: &mut W| {
        let began = thread_time();
        loop {
            match next.fetch_add(1, Ordering::Relaxed) {
                i if i < blocks => work(worker, i),
                _ => return thread_time() - began,
            }
        }
    };
    let began = Instant::now();
    let cpu: Duration = std::thread::scope(|scope| {
        let threads: Vec<_> = workers.iter_mut().map(|worker| scope.spawn(|| take(worker))).collect();
        threads.into_iter().map(|thread| thread.join().expect("a worker")).sum()
    });
    Lap { wall: began.elapsed(), cpu }
}
