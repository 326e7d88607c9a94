//! Saves borrowed state in a scope. The scope ends when nothing reads the state any more.

use ashore::{CheckpointExecutor, Fence, HostTensor, StateDict};
use std::time::Duration;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = std::env::temp_dir().join(format!("ashore-example-{}", std::process::id()));
    let executor = CheckpointExecutor::builder(&root).arena(16 << 20).chunk(1 << 20).build()?;
    let mut weights = vec![0.5_f32; 3 << 20];

    let (save, loss) = executor.scope(Fence::host(), |scope| -> ashore::Result<_> {
        let mut state = StateDict::new();
        state.tensor("weights", HostTensor::new(&weights[..], [3 << 10, 1 << 10]))?;
        let save = scope.save(1, state)?;
        let loss: f32 = weights.iter().map(|w| (w - 1.0).powi(2)).sum(); // forward and backward read them
        Ok((save, loss))
    })??;
    weights.iter_mut().for_each(|w| *w -= 0.1); // the scope has ended: the weights may be written

    save.wait(Duration::from_secs(60))?;
    assert_eq!(executor.checkpoint(1)?.read_as::<f32>("weights")?[0], 0.5);
    println!("saved at loss {loss}, and the weights have moved on to {}", weights[0]);
    executor.shutdown(Duration::from_secs(60))?;
    std::fs::remove_dir_all(root)?;
    Ok(())
}
