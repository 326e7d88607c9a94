//! Epochs of burn's own training loop as steps.

use ashore::{Catalog, Checkpoint, CheckpointExecutor};
use ashore_burn::{Epochs, Training};
use burn::lr_scheduler::LrSchedulerRecord;
use burn::lr_scheduler::linear::LinearLrSchedulerConfig;
use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::optim::{AdamConfig, GradientsParams, OptimizerRecord};
use burn::store::ModuleRecord;
use burn::tensor::{Device, Tensor};
use burn::train::checkpoint::{Checkpointer, CheckpointerError};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

#[path = "../examples/learner.rs"]
#[expect(dead_code, reason = "the example's main function")]
mod example;

const EPOCHS: u64 = 40;

#[test]
fn a_learner_that_is_killed_resumes_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let [whole, killed, forgetful] = ["whole", "killed", "forgetful"].map(|name| dir.path().join(name));
    train(&whole, &[], None);
    assert!(train(&killed, &[], Some(5)).is_none(), "the first run begins anew");
    for epoch in [12, 21, 30] {
        let resumed = train(&killed, &[], Some(epoch)).expect("the training resumes");
        assert!(resumed < epoch, "{resumed}");
    }
    // At the call of a save all of the save before the last has ended.
    assert!(train(&killed, &[], None).unwrap() >= 28, "a durable epoch is not lost");
    assert_eq!(difference(&whole, &killed), None);
    assert_eq!(steps(&killed), [38, 39, 40], "what the strategy keeps");

    train(&forgetful, &[], Some(20));
    train(&forgetful, &["--forget-optimizer"], None);
    let other = difference(&whole, &forgetful).expect("moments matter");
    assert!(other.starts_with("model."), "{other}");
}

/// Trains in `root`, and kills the training when it says that it saves epoch `kill_at`. Returns the epoch
/// from which it resumed.
fn train(root: &Path, arguments: &[&str], kill_at: Option<u64>) -> Option<u64> {
    let program = std::env::current_exe().unwrap().parent().unwrap().with_file_name("examples").join("learner");
    assert!(program.exists(), "run the whole `cargo test`, which builds the example {}", program.display());
    let mut command = Command::new(program);
    command.arg(root).arg(EPOCHS.to_string()).args(arguments).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let (mut resumed, mut killed) = (None, false);
    // burn's own lines are between ours.
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        match line.unwrap().split_once(' ').and_then(|(word, epoch)| Some((word.to_owned(), epoch.parse().ok()?))) {
            Some((word, epoch)) if word == "resumed" => resumed = Some(epoch),
            Some((word, epoch)) if word == "saving" && Some(epoch) == kill_at => {
                child.kill().unwrap(); // SIGKILL
                killed = true;
            }
            _ => {}
        }
    }
    let ended = child.wait().unwrap();
    assert_eq!((ended.success(), killed), (kill_at.is_none(), kill_at.is_some()), "{ended}");
    resumed
}

fn steps(root: &Path) -> Vec<u64> {
    Catalog::open(root).unwrap().list().unwrap().iter().map(|entry| entry.step).collect()
}

/// The first tensor of the last epoch that differs between the two directories.
fn difference(one: &Path, other: &Path) -> Option<String> {
    let [one, other] = [one, other].map(|root| {
        let checkpoint: Checkpoint = Catalog::open(root).unwrap().latest().unwrap().unwrap();
        assert_eq!(checkpoint.step(), EPOCHS);
        checkpoint
    });
    let names: Vec<String> = one.tensors().unwrap().map(|tensor| tensor.name.to_owned()).collect();
    assert!(names.iter().any(|name| name == "optimizer.hidden.weight.momentum.moment_2"), "{names:?}");
    assert!(other.tensors().unwrap().map(|tensor| tensor.name.to_owned()).eq(names.iter().cloned()));
    names.into_iter().find(|name| one.read(name).unwrap() != other.read(name).unwrap())
}

fn executor(root: &Path) -> Arc<CheckpointExecutor> {
    Arc::new(CheckpointExecutor::builder(root).arena(8 << 20).chunk(1 << 20).build().unwrap())
}

fn fresh() -> Training<Linear> {
    Training {
        model: LinearConfig::new(3, 2).init(&Device::default().autodiff()),
        optimizer: AdamConfig::new().init(),
        scheduler: LinearLrSchedulerConfig::new(0.1, 0.01, 10).init().unwrap(),
    }
}

fn step(training: &mut Training<Linear>) {
    let loss = training.model.forward(Tensor::<2>::ones([1, 3], &Device::default().autodiff())).sum();
    let gradients = GradientsParams::from_grads(loss.backward(), &training.model);
    training.model = training.optimizer.step(training.scheduler.step(), training.model.clone(), gradients);
}

/// Saves an epoch as burn does, in a thread for each record.
fn save(epochs: &Epochs, epoch: usize, training: &Training<Linear>) {
    let model = training.model.clone().into_record();
    let (optimizer, scheduler) = (training.optimizer.to_record(), training.scheduler.to_record());
    std::thread::scope(|scope| {
        scope.spawn(move || epochs.save(epoch, model).unwrap());
        scope.spawn(move || epochs.save(epoch, optimizer).unwrap());
        scope.spawn(move || epochs.save(epoch, scheduler).unwrap());
    });
}

#[test]
fn three_records_of_an_epoch_are_one_step() {
    let root = tempfile::tempdir().unwrap();
    let executor = executor(root.path());
    let epochs = Epochs::new(executor.clone());
    let mut training = fresh();
    (0..3).for_each(|_| step(&mut training));
    epochs.save(3, training.scheduler.to_record()).unwrap();
    epochs.save(3, training.model.clone().into_record()).unwrap();
    assert!(executor.latest().unwrap().is_none(), "a record is missing");
    // Records of another epoch are another step.
    epochs.save(4, training.optimizer.to_record()).unwrap();
    assert!(executor.latest().unwrap().is_none(), "a record is missing of each");
    epochs.save(3, training.optimizer.to_record()).unwrap();
    let saved = executor.latest().unwrap().unwrap();
    assert_eq!((saved.step(), saved.tensors().unwrap().len()), (3, 2 + 4));

    // As a loop of one's own restores it, and as burn's does.
    let restored = fresh().restore(&saved).unwrap();
    let weight = |model: &Linear| model.weight.val().into_data();
    assert_eq!(weight(&restored.model), weight(&training.model));
    let restored = fresh().model.load_record(epochs.restore(3).unwrap());
    assert_eq!(weight(&restored), weight(&training.model));
    let moments: OptimizerRecord = epochs.restore(3).unwrap();
    assert_eq!(moments.len(), training.optimizer.to_record().len());
    let schedule: LrSchedulerRecord = epochs.restore(3).unwrap();
    assert_eq!(schedule.scalar::<u64>("0.remaining_iters"), Some(11 - 3));
    let missing = Checkpointer::<ModuleRecord>::restore(&epochs, 4).err().expect("not saved");
    assert!(matches!(&missing, CheckpointerError::Unknown(why) if why.contains("step=4")), "{missing}");

    // A training that went back saves the epoch again.
    step(&mut training);
    let epochs = Epochs::new(executor.clone());
    save(&epochs, 3, &training);
    assert_eq!(weight(&fresh().restore(&executor.checkpoint(3).unwrap()).unwrap().model), weight(&training.model));
}

#[test]
fn an_epoch_stays_until_another_is_durable() {
    let root = tempfile::tempdir().unwrap();
    let epochs = Epochs::new(executor(root.path()));
    let training = fresh();
    let delete = |epoch| {
        Checkpointer::<ModuleRecord>::delete(&epochs, epoch).unwrap();
        Checkpointer::<OptimizerRecord>::delete(&epochs, epoch).unwrap();
        Checkpointer::<LrSchedulerRecord>::delete(&epochs, epoch).unwrap();
    };
    delete(1);
    save(&epochs, 1, &training);
    save(&epochs, 2, &training);
    delete(1);
    assert_eq!(steps(root.path()), [2]);
    // burn's metric strategy deletes an epoch before it saves the next one.
    delete(2);
    assert_eq!(steps(root.path()), [2]);
    save(&epochs, 3, &training);
    assert_eq!(steps(root.path()), [3]);
}

#[test]
fn a_failed_save_ends_the_training_with_its_error() {
    let (root, logs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let executor = executor(root.path());
    executor.shutdown(Duration::from_secs(60)).unwrap();
    let epochs = Epochs::new(executor.clone());
    let training = example::training(logs.path()).num_epochs(2);
    let training = training.with_custom_checkpointers(epochs.clone(), epochs.clone(), epochs);
    let error = training.launch(example::learner().unwrap()).error.expect("no epoch was saved").to_string();
    assert!(error.contains("the executor is shut down"), "{error}");
}
