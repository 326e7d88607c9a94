//! Watches a save: its progress, when its tensors may be written again, and when it is durable.
//!
//! `staged()` and the save itself are futures for any runtime. In this example a plain thread waits for them.

use ashore::{CheckpointExecutor, Outcome, StateDict};
use std::{sync::Arc, time::Duration};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = std::env::temp_dir().join(format!("ashore-example-{}", std::process::id()));
    let executor = CheckpointExecutor::builder(&root).arena(64 << 20).build()?;
    let tensor = Arc::new(vec![1_u8; 100 << 20]);
    let mut state = StateDict::new();
    state.tensor("tensor", tensor.clone())?;

    let save = executor.save(1, state)?;
    while save.progress().phase < ashore::Phase::Publishing {
        let progress = save.progress();
        println!("{:?}: {} of {} bytes written", progress.phase, progress.written, progress.bytes);
        std::thread::sleep(Duration::from_millis(20));
    }
    save.staged().wait(Duration::from_secs(60))?;
    assert_eq!(Arc::strong_count(&tensor), 1, "staged: the tensor is ours again");
    match save.wait(Duration::from_secs(60))? {
        Outcome::Durable(step) => {
            println!("step {} durable after {:?} in {}", step.step, step.durable, step.path.display())
        }
        other => println!("not saved: {other:?}"),
    }
    executor.shutdown(Duration::from_secs(60))?;
    std::fs::remove_dir_all(root)?;
    Ok(())
}
