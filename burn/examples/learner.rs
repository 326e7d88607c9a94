//! The training loop of burn. It may be killed at any moment, and then continues from its newest durable
//! epoch as if it had not been killed.
//!
//! `cargo run --features learner --example learner -- runs/a 30` trains up to epoch 30. With
//! `--forget-optimizer` it resumes with a new optimizer, which gives a different result.

use ashore_burn::Epochs;
use ashore_burn::ashore::CheckpointExecutor;
use burn::data::dataloader::{DataLoader, DataLoaderBuilder, batcher::Batcher};
use burn::data::dataset::InMemDataset;
use burn::lr_scheduler::linear::LinearLrSchedulerConfig;
use burn::module::Module;
use burn::nn::loss::{MseLoss, Reduction};
use burn::nn::{Linear, LinearConfig};
use burn::optim::{AdamConfig, ModuleOptimizer, OptimizerRecord};
use burn::tensor::{Device, Tensor, TensorData, activation::tanh};
use burn::train::checkpoint::{
    Checkpointer, CheckpointerError, CheckpointingAction, CheckpointingStrategy, KeepLastNCheckpoints,
};
use burn::train::logger::InMemoryMetricLogger;
use burn::train::metric::store::EventStoreClient;
use burn::train::{InferenceStep, Learner, RegressionOutput, SupervisedTraining, TrainOutput, TrainStep};
use std::{error::Error, path::Path, sync::Arc, time::Duration};

const WIDTH: usize = 64;

/// Two layers.
#[derive(Module, Debug)]
pub struct Model {
    hidden: Linear,
    output: Linear,
}

impl TrainStep for Model {
    type Input = Tensor<2>;
    type Output = RegressionOutput;

    fn step(&self, inputs: Tensor<2>) -> TrainOutput<RegressionOutput> {
        let output = InferenceStep::step(self, inputs);
        TrainOutput::new(self, output.loss.backward(), output)
    }
}

impl InferenceStep for Model {
    type Input = Tensor<2>;
    type Output = RegressionOutput;

    fn step(&self, inputs: Tensor<2>) -> RegressionOutput {
        let targets = inputs.clone().sum_dim(1);
        let output = self.output.forward(tanh(self.hidden.forward(inputs)));
        let loss = MseLoss::new().forward(output.clone(), targets.clone(), Reduction::Mean);
        RegressionOutput::new(loss, output, targets)
    }
}

/// Makes inputs of numbers between -1 and 1. They are the same for the same seeds.
struct Noise;

impl Batcher<u64, Tensor<2>> for Noise {
    fn batch(&self, seeds: Vec<u64>, device: &Device) -> Tensor<2> {
        let rows = seeds.len();
        let numbers = seeds.into_iter().flat_map(|seed| {
            let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            (0..WIDTH).map(move |_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 40) as f32 / (1 << 23) as f32 - 1.0
            })
        });
        Tensor::from_data(TensorData::new(numbers.collect(), [rows, WIDTH]), device)
    }
}

fn data() -> Arc<dyn DataLoader<Tensor<2>>> {
    DataLoaderBuilder::new(Noise).batch_size(8).build(InMemDataset::new((0..24).collect()))
}

/// A training that writes its own logs to `logs`.
pub fn training(logs: &Path) -> SupervisedTraining<Model> {
    SupervisedTraining::new(logs, data(), data())
        .with_metric_logger(InMemoryMetricLogger::new())
        .with_application_logger(None)
}

fn optimizer() -> ModuleOptimizer {
    AdamConfig::new().init()
}

/// The initial model, optimizer and schedule.
pub fn learner() -> Result<Learner<Model>, Box<dyn Error>> {
    let device = Device::default().autodiff();
    device.seed(7);
    let model = Model {
        hidden: LinearConfig::new(WIDTH, WIDTH).init(&device),
        output: LinearConfig::new(WIDTH, 1).init(&device),
    };
    Ok(Learner::new(model, optimizer(), LinearLrSchedulerConfig::new(0.01, 0.001, 100).init()?))
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [root, last, rest @ ..] = &arguments[..] else { return Err("usage: learner ROOT EPOCHS".into()) };

    let executor = CheckpointExecutor::builder(root).arena(16 << 20).chunk(1 << 20).build()?;
    let executor = Arc::new(executor);
    let epochs = Epochs::new(executor.clone());
    let of_optimizer = MayForget { epochs: epochs.clone(), forgets: rest == ["--forget-optimizer"] };
    let mut training = training(root.as_ref())
        .num_epochs(last.parse()?)
        .with_checkpointing_strategy(Told(KeepLastNCheckpoints::new(3)))
        .with_custom_checkpointers(epochs.clone(), of_optimizer, epochs);
    if let Some(newest) = executor.latest()? {
        println!("resumed {}", newest.step());
        training = training.checkpoint(newest.step() as usize);
    }
    if let Some(error) = training.launch(learner()?).error {
        return Err(error.to_string().into());
    }
    Ok(executor.shutdown(Duration::from_secs(60))?)
}

/// Prints when an epoch is about to be saved.
struct Told(KeepLastNCheckpoints);

impl CheckpointingStrategy for Told {
    fn checkpointing(&mut self, epoch: usize, metrics: &EventStoreClient) -> Vec<CheckpointingAction> {
        println!("saving {epoch}");
        self.0.checkpointing(epoch, metrics)
    }
}

/// The checkpointer of the optimizer. It restores a new optimizer if it `forgets`.
struct MayForget {
    epochs: Epochs,
    forgets: bool,
}

impl Checkpointer<OptimizerRecord> for MayForget {
    fn save(&self, epoch: usize, record: OptimizerRecord) -> Result<(), CheckpointerError> {
        self.epochs.save(epoch, record)
    }

    fn delete(&self, epoch: usize) -> Result<(), CheckpointerError> {
        Checkpointer::<OptimizerRecord>::delete(&self.epochs, epoch)
    }

    fn restore(&self, epoch: usize) -> Result<OptimizerRecord, CheckpointerError> {
        if self.forgets { Ok(optimizer().to_record()) } else { self.epochs.restore(epoch) }
    }
}
