//! A training that may be killed at any moment. It then continues from its newest durable epoch as if it had
//! not been killed.
//!
//! `cargo run --example train -- runs/a 30` trains up to epoch 30. With `--forget-optimizer` it resumes with
//! a new optimizer, which gives a different result.

use ashore_burn::Training;
use ashore_burn::ashore::{CheckpointExecutor, Outcome};
use burn::lr_scheduler::linear::LinearLrSchedulerConfig;
use burn::module::Module;
use burn::nn::loss::{MseLoss, Reduction};
use burn::nn::{Linear, LinearConfig};
use burn::optim::{AdamConfig, GradientsParams};
use burn::tensor::{Device, Tensor, TensorData, activation::tanh};
use std::{error::Error, time::Duration};

const WIDTH: usize = 64;

#[derive(Module, Debug)]
struct Model {
    hidden: Linear,
    output: Linear,
}

impl Model {
    fn forward(&self, inputs: Tensor<2>) -> Tensor<2> {
        self.output.forward(tanh(self.hidden.forward(inputs)))
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [root, epochs, rest @ ..] = &arguments[..] else { return Err("usage: train ROOT EPOCHS".into()) };
    let (epochs, forget) = (epochs.parse::<u64>()?, rest == ["--forget-optimizer"]);

    let device = Device::default().autodiff();
    device.seed(7);
    let mut training = Training {
        model: Model {
            hidden: LinearConfig::new(WIDTH, WIDTH).init(&device),
            output: LinearConfig::new(WIDTH, 1).init(&device),
        },
        optimizer: AdamConfig::new().init(),
        scheduler: LinearLrSchedulerConfig::new(0.01, 0.001, 100).init()?,
    };

    let executor = CheckpointExecutor::builder(root).arena(16 << 20).chunk(1 << 20).keep_last(3).build()?;
    let mut epoch = 0;
    if let Some(newest) = executor.latest()? {
        let fresh = training.optimizer.clone();
        training = training.restore(&newest)?;
        if forget {
            training.optimizer = fresh;
        }
        epoch = newest.step();
        println!("resumed {epoch}");
    }
    while epoch < epochs {
        for batch in 0..3 {
            let inputs = noise(3 * epoch + batch, [8, WIDTH], &device);
            let targets = inputs.clone().sum_dim(1);
            let loss = MseLoss::new().forward(training.model.forward(inputs), targets, Reduction::Mean);
            let gradients = GradientsParams::from_grads(loss.backward(), &training.model);
            let rate = training.scheduler.step();
            training.model = training.optimizer.step(rate, training.model, gradients);
        }
        epoch += 1;
        executor.save(epoch, training.state()?)?.on_done(move |ended| {
            if matches!(ended, Ok(Outcome::Durable(_))) {
                println!("durable {epoch}");
            }
        });
    }
    Ok(executor.shutdown(Duration::from_secs(60))?)
}

/// Numbers between -1 and 1, the same for the same seed. So the epoch is all of the data's state that has to
/// be saved.
fn noise(seed: u64, shape: [usize; 2], device: &Device) -> Tensor<2> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let numbers = (0..shape[0] * shape[1]).map(|_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    });
    Tensor::from_data(TensorData::new(numbers.collect(), shape), device)
}
