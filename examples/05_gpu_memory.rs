//! Saves tensors in GPU memory, allocated with cudarc, while the GPU continues, and restores them.
//! `--simulated` runs the example without a GPU, on the simulated driver of this project's tests. Leave that
//! option out of your program.

use ashore::adapters::cudarc::CudaTensor;
use ashore::{CheckpointExecutor, DeviceChoice, Fence, StateDict};
use cudarc::driver::CudaContext;
use std::time::Duration;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    if std::env::args().nth(1).as_deref() == Some("--simulated") {
        return simulated();
    }
    let root = std::env::temp_dir().join(format!("ashore-example-{}", std::process::id()));
    // A missing GPU is an error here; `DeviceChoice::Auto` would continue without one.
    let executor =
        CheckpointExecutor::builder(&root).device(DeviceChoice::Cuda(0)).arena(16 << 20).chunk(1 << 20).build()?;
    println!("copies with {}", executor.device());
    let stream = CudaContext::new(0)?.new_stream()?;
    let mut weights = stream.clone_htod(&vec![0.5_f32; 3 << 20])?;

    // The program cannot write borrowed tensors in the scope. At the end of the scope the stream waits for
    // the copies on the GPU; this thread does not wait for them.
    let save = executor.scope(Fence::on(&[(&stream).into()]), |scope| {
        let mut state = StateDict::new();
        state.tensor("weights", CudaTensor::new(&weights, [3 << 10, 1 << 10])?)?;
        scope.save(1, state)
        // ... forward and backward read the weights ...
    })??;
    stream.memset_zeros(&mut weights)?; // the optimizer's step: queued at once, starts after the copies

    save.wait(Duration::from_secs(60))?;
    let saved = executor.checkpoint(1)?.read_as::<f32>("weights")?;
    assert!(saved.iter().all(|&w| w == 0.5));
    stream.memcpy_htod(&saved, &mut weights)?;
    assert_eq!(stream.clone_dtoh(&weights)?, saved);
    println!("step 1 is durable, and the weights are as they were then");
    executor.shutdown(Duration::from_secs(60))?;
    std::fs::remove_dir_all(root)?;
    Ok(())
}

/// Runs this program again in a child process whose loader finds the simulated driver under the name of the
/// CUDA driver.
fn simulated() -> Result<(), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?;
    for name in ["libcuda.so", "libcuda.so.1"] {
        std::os::unix::fs::symlink(fakecuda::library(), folder.path().join(name))?;
    }
    println!("simulated driver, no GPU: this shows that it works, not how fast");
    let mut again = std::process::Command::new(std::env::current_exe()?);
    let ended = again.env("LD_LIBRARY_PATH", folder.path()).status()?;
    if ended.success() { Ok(()) } else { Err(format!("it failed: {ended}").into()) }
}
