//! Metrics for Prometheus. Installs a recorder, builds an executor, saves, and prints what a scrape gets.
//!
//! `cargo run --example 09_metrics --features metrics`

use ashore::{CheckpointExecutor, StateDict};
use metrics_exporter_prometheus::PrometheusBuilder;
use std::sync::Arc;
use std::time::Duration;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // Without buckets the exporter would export summaries, which cannot be added up over processes.
    let buckets = [0.0001, 0.001, 0.01, 0.1, 1.0, 10.0, 100.0];
    // A program that is scraped uses `install`, which serves HTTP (feature `http-listener` of the exporter).
    let recorder = PrometheusBuilder::new().set_buckets(&buckets)?.install_recorder()?;

    let root = tempfile::tempdir()?;
    let executor = CheckpointExecutor::builder(root.path()).arena(16 << 20).chunk(1 << 20).keep_last(2).build()?;
    for step in 1..=5 {
        let mut state = StateDict::new();
        state.tensor("weights", Arc::new(vec![step as f32; 1 << 20]))?;
        executor.save(step, state)?.wait(Duration::from_secs(60))?;
    }
    executor.latest()?.ok_or("no step")?.read_as::<f32>("weights")?;
    executor.shutdown(Duration::from_secs(60))?;

    recorder.run_upkeep();
    println!("{}", recorder.render());
    Ok(())
}
