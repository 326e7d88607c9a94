//! The resources that this process uses: CPU time by thread, and memory.

use std::fs;
use std::time::Duration;

/// The thread that copies tensors into the arena.
const STAGER: &str = "ashore-stage";

/// CPU time so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cpu {
    /// CPU time of the stager.
    pub stage: Duration,
    /// CPU time of all other threads, except the caller of `now`.
    pub rest: Duration,
}

impl Cpu {
    /// Reads the CPU time of the existing threads and, for `rest`, of those that have ended. Zero if /proc
    /// has no data.
    pub fn now() -> Self {
        let mut stage = Duration::ZERO;
        for thread in fs::read_dir("/proc/self/task").into_iter().flatten().flatten() {
            if fs::read_to_string(thread.path().join("comm")).is_ok_and(|name| name.trim() == STAGER) {
                stage += ran(&thread.path());
            }
        }
        let process = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        let process = Duration::new(process.tv_sec as u64, process.tv_nsec as u32);
        Self { stage, rest: process.saturating_sub(stage) }
    }

    pub fn since(self, before: Self) -> Self {
        Self { stage: self.stage.saturating_sub(before.stage), rest: self.rest.saturating_sub(before.rest) }
    }
}

/// Converts to seconds per 10^9 bytes.
pub fn per_gb(time: Duration, bytes: u64) -> f64 {
    time.as_secs_f64() / (bytes as f64 / 1e9)
}

fn ran(thread: &std::path::Path) -> Duration {
    let stat = fs::read_to_string(thread.join("schedstat")).unwrap_or_default();
    Duration::from_nanos(stat.split(' ').next().and_then(|nanos| nanos.parse().ok()).unwrap_or(0))
}

/// The maximum of resident memory since `watch`.
pub struct Peak {
    before: u64,
}

impl Peak {
    /// Starts to measure.
    pub fn watch() -> Self {
        // Resets the peak. If that is not permitted, the peak includes earlier memory.
        let _ = fs::write("/proc/self/clear_refs", "5");
        Self { before: status("VmRSS") }
    }

    /// Returns the bytes above the resident memory at the start.
    pub fn bytes(&self) -> u64 {
        status("VmHWM").saturating_sub(self.before)
    }
}

fn status(field: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let kib = line.and_then(|line| line.trim().split(' ').next()?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

/// Describes this machine in a few words, for reports.
pub fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = memory.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().split(' ').next()?.parse().ok());
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').next().unwrap_or("?").to_owned();
    let gib = total.unwrap_or(0_u64) >> 20;
    format!("{cores} cores, {gib} GiB, Linux {}, load {load}", kernel.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_the_stager_is_told_from_that_of_others() {
        let spin = || {
            let began = std::time::Instant::now();
            while began.elapsed() < Duration::from_millis(60) {}
        };
        let before = Cpu::now();
        let (done, wait) = std::sync::mpsc::channel::<()>();
        let (tell, spun) = std::sync::mpsc::channel();
        let stager = std::thread::Builder::new().name(STAGER.into());
        let stager = stager.spawn(move || (spin(), tell.send(()), wait.recv())).unwrap();
        spun.recv().unwrap();
        let used = Cpu::now().since(before);
        assert!(used.stage >= Duration::from_millis(5), "{used:?}");
        assert!(used.rest < used.stage * 20, "{used:?}");
        drop(done);
        stager.join().unwrap().1.unwrap();
        assert_eq!(per_gb(Duration::from_secs(3), 1_500_000_000), 2.0);
    }

    #[test]
    fn the_peak_is_what_was_touched_in_between() {
        let peak = Peak::watch();
        drop(std::hint::black_box(vec![1_u8; 64 << 20]));
        assert!(peak.bytes() >= 32 << 20, "{}", peak.bytes());
    }
}
