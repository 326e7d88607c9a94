//! A program that has both cudarc and its peer; it is only checked, never run.

use ashore::adapters::cudarc::CudaTensor;
use ashore::{CheckpointExecutor, Fence, StateDict};
use cudarc::driver::CudaContext;
use std::sync::Arc;
use std::time::Duration;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let executor = CheckpointExecutor::builder("checkpoints").build()?;
    let stream = CudaContext::new(0)?.new_stream()?;
    let (weights, bias) = (stream.alloc_zeros::<f32>(6)?, Arc::new(stream.alloc_zeros::<f64>(2)?));
    let save = executor.scope(Fence::on(&[(&stream).into()]), |scope| {
        let mut state = StateDict::new();
        state.tensor("weights", CudaTensor::new(&weights, [2, 3])?)?;
        state.tensor("bias", CudaTensor::new(bias.clone(), [2])?)?;
        scope.save(1, state)
    })??;
    #[cfg(feature = "cubecl")]
    println!("beside {:?}", cubecl_cuda::CudaDevice::new(0));
    save.wait(Duration::from_secs(60))?;
    Ok(())
}
