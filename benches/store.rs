//! Saves a state to an object store and reads it back. Prints bytes per second, CPU seconds per GB of this
//! process, and the peak memory of this process. `just store-bench s3://bucket/prefix` runs this bench; the
//! environment names the endpoint and the credentials.

use ashore::{Catalog, CheckpointExecutor, StateDict, Targets};
use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_secs(3600);

/// The bytes of a tensor.
const TENSOR: usize = 64 << 20;

/// The CPU time that all threads of this process have used.
fn cpu() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("proc");
    let fields = stat.rsplit_once(')').expect("the name of the program ends").1.split_whitespace();
    // Fields 14 and 15, in hundredths of a second.
    let ticks: u64 = fields.skip(11).take(2).map(|field| field.parse::<u64>().expect("a number")).sum();
    Duration::from_millis(ticks * 10)
}

/// The peak memory of this process, in MiB.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("proc");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
    line.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).expect("a number") >> 10
}

/// Runs `work` on `bytes` bytes, and prints its cost.
fn measure(what: &str, round: usize, bytes: usize, work: impl FnOnce() -> ashore::Result<()>) -> ashore::Result<()> {
    let (began, before) = (Instant::now(), cpu());
    work()?;
    let (took, cpu, gb) = (began.elapsed().as_secs_f64(), (cpu() - before).as_secs_f64(), bytes as f64 / 1e9);
    let (rate, per_gb, peak) = (gb * 1000.0 / took, cpu / gb, peak());
    println!(
        "{{\"what\":\"{what}\",\"round\":{round},\"bytes\":{bytes},\"seconds\":{took:.3},\"mb_per_s\":{rate:.0},\
        \"cpu_s_per_gb\":{per_gb:.3},\"peak_mib\":{peak}}}"
    );
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1).filter(|argument| !argument.starts_with("--"));
    let Some(root) = arguments.next() else {
        println!("usage: store ROOT [MIB [ROUNDS [WRITERS]]], where ROOT is a URL such as s3://bucket/prefix");
        return Ok(());
    };
    let mut number = |default: usize| arguments.next().map_or(Ok(default), |text| text.parse());
    let (mib, rounds, writers) = (number(1024)?, number(3)?, number(4)?);
    let count = (mib << 20).div_ceil(TENSOR);
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let data: Vec<Arc<Vec<u64>>> =
        (0..count).map(|_| Arc::new(std::iter::repeat_with(&mut random).take(TENSOR / 8).collect())).collect();
    let (names, bytes): (Vec<_>, _) = ((0..count).map(|i| format!("tensor.{i}")).collect(), count * TENSOR);
    let executor = CheckpointExecutor::builder(&root).writers(writers).keep_last(1).save_timeout(LONG).build()?;
    for round in 1..=rounds {
        let mut state = StateDict::new();
        for (name, data) in names.iter().zip(&data) {
            state.tensor(name, data.clone())?;
        }
        let step = executor.latest()?.map_or(1, |latest| latest.step() + 1);
        measure("put", round, bytes, || executor.save(step, state)?.wait(LONG).map(drop))?;
    }
    executor.shutdown(LONG)?;
    let mut targets: Vec<Vec<u64>> = data.iter().map(|data| vec![0; data.len()]).collect();
    for round in 1..=rounds {
        let latest = Catalog::open(&root)?.latest()?.ok_or("no step is there")?;
        let into = names.iter().zip(&mut targets).fold(Targets::new(), |all, (name, to)| all.elements(name, to));
        measure("get", round, bytes, || latest.read_into(into))?;
    }
    assert!(targets.iter().zip(&data).all(|(read, saved)| *read == **saved), "what was read is what was saved");
    Ok(())
}
