//! A training loop with a fast local tier and a shared tier behind it. If the machine dies, only the steps
//! that were not promoted yet are lost.
//!
//! Run `cargo run --example 10_tiers -- runs/fast runs/shared`, delete `runs/fast` as the loss of the machine
//! would, and run the command again: it resumes from the newest step in the shared tier.

use ashore::tiers::Tier;
use ashore::{CheckpointExecutor, StateDict};
use std::{path::Path, sync::Arc, time::Duration};

const LONG: Duration = Duration::from_secs(60);

/// Trains `steps` steps. Returns the step from which the training resumed, and the tier in which that step
/// was found.
pub(crate) fn train(fast: &Path, shared: &Path, steps: u64) -> ashore::Result<(u64, Option<String>)> {
    let tier = Tier::at(shared.to_string_lossy()).named("shared").keep_last(20);
    let builder = CheckpointExecutor::builder(fast).arena(16 << 20).chunk(1 << 20).keep_last(2);
    let executor = builder.tier(tier).build()?;
    let found = executor.latest()?;
    let (done, mut weights) = match &found {
        Some(newest) => (newest.step(), newest.read_as::<f32>("weights")?),
        None => (0, vec![0.0; 1_000_000]),
    };
    for step in done + 1..=done + steps {
        weights.iter_mut().for_each(|weight| *weight += 1.0);
        let mut state = StateDict::new();
        state.tensor("weights", Arc::new(weights.clone()))?;
        let save = executor.save(step, state)?;
        save.wait(LONG)?; // durable in the fast tier: the process may die
        let promoted = save.durable_in("shared"); // once durable there, the machine may die
        if step == done + steps {
            println!("step {step} is in {}", promoted.wait(LONG)?.path.display());
        }
    }
    executor.shutdown(LONG)?; // waits for promotions; its error names steps that were not promoted
    Ok((done, found.and_then(|newest| newest.tier().map(str::to_owned))))
}

fn main() -> ashore::Result<()> {
    let mut roots = std::env::args().skip(1);
    let (fast, shared) = (roots.next().unwrap_or("fast".into()), roots.next().unwrap_or("shared".into()));
    let (from, tier) = train(fast.as_ref(), shared.as_ref(), 3)?;
    println!("went on from step {from} in {}", tier.unwrap_or("the fast tier".into()));
    Ok(())
}
