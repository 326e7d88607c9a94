//! Coming from torch's distributed checkpointing: `execute_save`, once with a staged state, and once with a
//! state that is still being staged and is larger than the arena.

use ashore::compat::torch::{AsyncCheckpointExecutor, ExecuteOptions, Staging, ThreadExecutor, ThreadGroup};
use ashore::{Checkpoint, CheckpointExecutor, Dtype, Layout, StateDict};
use std::{sync::Arc, time::Duration};

const MINUTE: Duration = Duration::from_secs(60);
const LEN: usize = 3 << 20;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = std::env::temp_dir().join(format!("ashore-from-torch-{}", std::process::id()));
    let engine = CheckpointExecutor::builder(&root).arena(2 << 20).chunk(1 << 20).build()?;
    let executor = ThreadExecutor::new(Arc::new(engine))?;

    // future = executor.execute_save(state_dict, checkpoint_id=root / "step-100")
    let mut state = StateDict::new();
    state.tensor("weights", Arc::new(vec![0.5_f32; 1000]))?.value("epoch", &3)?;
    let future = executor.execute_save(state.into(), ExecuteOptions::new().checkpoint_id(root.join("step-100")))?;
    let metadata = future.result(MINUTE)?.ok_or("no other save was under way")?;
    println!("saved {:?}", metadata.state_dict_metadata.keys());
    let place = metadata.storage_meta.ok_or("the engine says where")?.checkpoint_id;
    let saved = Checkpoint::open(&place)?;
    assert_eq!((saved.read_as::<f32>("weights")?, saved.value::<u32>("epoch")?), (vec![0.5; 1000], 3));

    // The same executor again, with a staging future: the executor writes each tensor as it arrives.
    let names = ["embedding", "head"];
    let tensors = names.map(|name| (name.to_owned(), Layout::new(Dtype::U8, [LEN])));
    let (mut stage, staging) = Staging::channel(StateDict::new(), tensors)?;
    let future = executor.execute_save(staging.into(), ExecuteOptions::new().checkpoint_id("step-200"))?;
    for (name, fill) in names.into_iter().zip(1_u8..) {
        stage.deliver(name, vec![fill; LEN])?;
    }
    future.result(MINUTE)?.ok_or("no other save was under way")?;
    assert_eq!(executor.executor().checkpoint(200)?.read("head")?, vec![2; LEN]);

    // A process group must consist of the engine's ranks. `execute_save` refuses any other group before it
    // touches anything.
    let wrong = ExecuteOptions::new().checkpoint_id("step-300").process_group(ThreadGroup::new(2).remove(0));
    assert!(executor.execute_save(StateDict::new().into(), wrong).is_err());
    executor.close(MINUTE)?;
    std::fs::remove_dir_all(root)?;
    Ok(())
}
