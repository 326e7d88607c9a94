//! Computes and prints times, ratios and speeds.

use rustix::time::{ClockId, clock_gettime};
use std::time::Duration;

/// The time of one pass over some bytes.
#[derive(Clone, Copy)]
pub struct Lap {
    pub wall: Duration,
    /// CPU time of all threads together, which is the relevant figure on a shared machine.
    pub cpu: Duration,
}

/// A scheme's ratio and its speeds, in GB/s of raw bytes.
#[derive(Clone, Copy)]
pub struct Speed {
    /// Coded bytes divided by raw bytes.
    pub ratio: f64,
    /// Per CPU time of one core.
    pub encode: f64,
    pub decode: f64,
}

impl Speed {
    /// Time to durable without compression, divided by the time with it, when coding on `cores` and writing
    /// at `disk` GB/s overlap fully.
    pub fn gain(&self, cores: f64, disk: f64) -> f64 {
        (1.0 / self.ratio).min(cores * self.encode / disk)
    }

    /// CPU seconds that coding takes for a gigabyte of raw bytes.
    pub fn cost(&self) -> f64 {
        1.0 / self.encode
    }
}

/// CPU time of this thread.
pub fn thread_time() -> Duration {
    since_epoch(ClockId::ThreadCPUTime)
}

/// CPU time of the whole program.
pub fn program_time() -> Duration {
    since_epoch(ClockId::ProcessCPUTime)
}

/// CPU time of every program on the machine, and the time that its hypervisor gave to other machines.
pub fn machine_time() -> Duration {
    // User, nice, system, idle, waiting for storage, interrupts, soft interrupts, stolen; hundredths of a
    // second.
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let fields = stat.lines().next().unwrap_or_default().split_whitespace().skip(1).take(8).enumerate();
    let busy = fields.filter(|&(i, _)| i != 3 && i != 4).filter_map(|(_, field)| field.parse::<u64>().ok());
    Duration::from_millis(10 * busy.sum::<u64>())
}

fn since_epoch(clock: ClockId) -> Duration {
    let time = clock_gettime(clock);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// GB/s.
pub fn rate(bytes: usize, time: Duration) -> f64 {
    bytes as f64 / 1e9 / time.as_secs_f64()
}

/// First quartile, median and third quartile.
pub fn quartiles(of: impl IntoIterator<Item = f64>) -> [f64; 3] {
    let mut all: Vec<f64> = of.into_iter().collect();
    all.sort_by(f64::total_cmp);
    let last = all.len() - 1;
    [1, 2, 3].map(|quarter| {
        let (at, rest) = (quarter * last / 4, (quarter * last % 4) as f64 / 4.0);
        all[at] + rest * (all[(at + 1).min(last)] - all[at])
    })
}

pub fn median(of: impl IntoIterator<Item = f64>) -> f64 {
    quartiles(of)[1]
}

/// A row of a table.
pub fn row(cells: &[String]) {
    println!("| {} |", cells.join(" | "));
}

/// A heading and the head of a table.
pub fn table(heading: &str, columns: &[&str]) {
    println!("\n## {heading}\n");
    println!("| {} |", columns.join(" | "));
    println!("|{}", "---|".repeat(columns.len()));
}
