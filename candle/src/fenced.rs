//! An optimizer behind a fence.

use ashore::CheckpointExecutor;
#[cfg(feature = "cuda")]
use ashore::adapters::cudarc::cudarc::driver::CudaStream;
use candle_core::backprop::GradStore;
use candle_core::{Error, Result, Var};
use candle_nn::Optimizer;
use std::sync::Arc;

/// An optimizer whose `step` first waits until no save reads the tensors any more, and then writes them.
///
/// The wait is the executor's [`fence`](CheckpointExecutor::fence), which costs one atomic load if no save is
/// reading.
///
/// ```
/// use ashore_candle::{Fenced, ashore::CheckpointExecutor};
/// use candle_core::{DType, Device, Var};
/// use candle_nn::{Optimizer, SGD};
/// use std::sync::Arc;
///
/// # let root = tempfile::tempdir()?;
/// # let root = root.path();
/// let executor = Arc::new(CheckpointExecutor::builder(root).arena(4 << 20).chunk(1 << 20).build()?);
/// let weights = Var::ones(3, DType::F32, &Device::Cpu)?;
/// let mut optimizer = Fenced::new(SGD::new(vec![weights.clone()], 0.5)?, &executor);
/// optimizer.backward_step(&weights.sqr()?.sum_all()?)?; // fences, then writes `weights`
/// assert_eq!(weights.to_vec1::<f32>()?, [0.0; 3]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Fenced<O> {
    optimizer: O,
    executor: Arc<CheckpointExecutor>,
    /// The stream that waits instead of the thread.
    #[cfg(feature = "cuda")]
    stream: Option<Arc<CudaStream>>,
}

impl<O> Fenced<O> {
    /// Puts a fence of `executor` before every step of `optimizer`.
    pub fn new(optimizer: O, executor: &Arc<CheckpointExecutor>) -> Self {
        Self {
            optimizer,
            executor: executor.clone(),
            #[cfg(feature = "cuda")]
            stream: None,
        }
    }

    /// Makes the stream of `device` wait instead of the thread. Use this for an optimizer all of whose Vars
    /// are on that device or on the host. See [`CheckpointExecutor::fence_on`].
    #[cfg(feature = "cuda")]
    #[must_use]
    pub fn on(mut self, device: &candle_core::CudaDevice) -> Self {
        self.stream = Some(device.cuda_stream());
        self
    }

    /// The optimizer, for functions that its type has beyond the trait. Steps through this reference are not
    /// fenced.
    pub fn inner(&mut self) -> &mut O {
        &mut self.optimizer
    }

    /// Waits until no save so far reads the tensors any more. Call this before writing a saved tensor by
    /// other means than `step`, for example an average of the weights.
    ///
    /// # Errors
    /// As [`CheckpointExecutor::fence`].
    pub fn fence(&self) -> ashore::Result<()> {
        #[cfg(feature = "cuda")]
        if let Some(stream) = &self.stream {
            return self.executor.fence_on(&[stream.into()]);
        }
        self.executor.fence()
    }
}

impl<O: Optimizer> Optimizer for Fenced<O> {
    type Config = (O::Config, Arc<CheckpointExecutor>);

    fn new(vars: Vec<Var>, (config, executor): Self::Config) -> Result<Self> {
        Ok(Self::new(O::new(vars, config)?, &executor))
    }

    /// Fences, then steps.
    fn step(&mut self, grads: &GradStore) -> Result<()> {
        self.fence().map_err(Error::wrap)?;
        self.optimizer.step(grads)
    }

    fn learning_rate(&self) -> f64 {
        self.optimizer.learning_rate()
    }

    fn set_learning_rate(&mut self, lr: f64) {
        self.optimizer.set_learning_rate(lr);
    }
}
