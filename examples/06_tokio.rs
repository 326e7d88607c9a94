//! Saves from an asynchronous program. It waits for the save or for Ctrl-C, whichever comes first, and loses
//! no step in either case.
//!
//! Interrupt the program while it runs, or start it with `--interrupt`, which sends the signal after the
//! third step. The second run resumes where the first run ended.

use ashore::{CheckpointExecutor, HostTensor, StateDict};
use std::{sync::Arc, time::Duration};

const STEPS: u64 = 10;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = std::env::temp_dir().join("ashore-example-tokio");
    let interrupt = std::env::args().any(|argument| argument == "--interrupt");
    let executor = CheckpointExecutor::builder(&root).arena(16 << 20).chunk(1 << 20).keep_last(2).build_async().await?;
    let (mut step, mut weights) = match executor.latest_async().await? {
        Some(newest) => (newest.step(), Arc::new(newest.read_as_async::<f32>("weights").await?)),
        None => (0, Arc::new(vec![0.0_f32; 1 << 20])),
    };
    println!("begins after step {step}");

    let mut stop = std::pin::pin!(tokio::signal::ctrl_c());
    let mut stopped = false;
    while step < STEPS && !stopped {
        executor.fenced().await?; // the last save does not read the weights any more
        Arc::get_mut(&mut weights).expect("the only reference again").iter_mut().for_each(|weight| *weight += 1.0);
        step += 1;
        let mut state = StateDict::new();
        state.tensor("weights", HostTensor::new(weights.clone(), [1024, 1024]))?;
        let save = executor.save(step, state)?;
        if interrupt && step == 3 {
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::INT)?;
        }
        // A training program would only poll here: it need not wait for the save before the next fence.
        tokio::select! {
            outcome = save => println!("step {step} is durable after {:?}", outcome?.committed().map(|c| c.durable)),
            signal = &mut stop => {
                signal?;
                println!("interrupted at step {step}: the save under way is finished");
                stopped = true;
            }
        }
    }
    executor.shutdown_async(Duration::from_secs(60)).await?; // waits for the saves in progress

    let newest = ashore::Catalog::open(&root)?.latest()?.expect("steps were saved");
    let weights = newest.read_as_async::<f32>("weights").await?;
    assert!(weights.iter().all(|weight| *weight == step as f32), "the weights of step {step}");
    println!("ends with step {} durable", newest.step());
    if step == STEPS {
        std::fs::remove_dir_all(root)?;
    }
    Ok(())
}
