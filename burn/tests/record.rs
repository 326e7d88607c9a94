//! Records of burn, saved and restored.

use ashore::{Checkpoint, CheckpointExecutor, Dtype, ErrorKind, StateDict};
use ashore_burn::{Training, put, record};
use burn::lr_scheduler::LrSchedulerRecord;
use burn::lr_scheduler::linear::LinearLrSchedulerConfig;
use burn::lr_scheduler::noam::NoamLrSchedulerConfig;
use burn::module::{Module, Param};
use burn::nn::{Linear, LinearConfig};
use burn::optim::{AdamConfig, GradientsParams, SgdConfig};
use burn::store::ModuleRecord;
use burn::tensor::{Bool, Device, FloatDType, Int, Tensor};
use std::time::Duration;

struct Fixture {
    executor: CheckpointExecutor,
    _root: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let executor = CheckpointExecutor::builder(root.path()).arena(8 << 20).chunk(1 << 20).build().unwrap();
        Self { executor, _root: root }
    }

    fn save(&self, state: StateDict<'static>) -> Checkpoint {
        let step = self.executor.catalog().latest().unwrap().map_or(1, |newest| newest.step() + 1);
        self.executor.save(step, state).unwrap().wait(Duration::from_secs(60)).unwrap();
        self.executor.checkpoint(step).unwrap()
    }
}

#[derive(Module, Debug)]
struct Kinds {
    float: Param<Tensor<2>>,
    half: Param<Tensor<1>>,
    int: Param<Tensor<1, Int>>,
    bool: Param<Tensor<1, Bool>>,
}

fn kinds(scale: f32, device: &Device) -> Kinds {
    let float = Tensor::<2>::from_data([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], device) * scale;
    Kinds {
        float: Param::from_tensor(float),
        half: Param::from_tensor(Tensor::<1>::from_data([0.5, 1.5], device).mul_scalar(scale).cast(FloatDType::F16)),
        int: Param::initialized(
            Default::default(),
            Tensor::<1, Int>::from_data([7, -8], device).mul_scalar(scale as i32),
        ),
        bool: Param::initialized(
            Default::default(),
            Tensor::<1>::from_data([1.0, 0.0, 1.0], device).greater_elem(0.5 / scale),
        ),
    }
}

#[test]
fn a_record_comes_back_with_ids_and_dtypes() {
    let (fixture, device) = (Fixture::new(), Device::default());
    let module = kinds(1.0, &device);
    let mut state = StateDict::new();
    put(&mut state, "average", module.clone().into_record()).unwrap();
    let checkpoint = fixture.save(state);
    let stored = |name: &str| checkpoint.tensor(name).map(|info| (info.dtype, info.shape.to_vec())).unwrap();
    assert_eq!(stored("average.float"), (Dtype::F32, vec![2, 3]));
    assert_eq!(stored("average.half"), (Dtype::F16, vec![2]));
    assert_eq!(stored("average.bool").1, [3]);
    assert_eq!(checkpoint.read_as::<f32>("average.float").unwrap(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);

    let restored = kinds(0.25, &device).load_record(record::<ModuleRecord>(&checkpoint, "average").unwrap());
    assert_eq!((restored.float.id, restored.int.id), (module.float.id, module.int.id));
    for (old, new) in [
        (module.float.val().into_data(), restored.float.val().into_data()),
        (module.half.val().into_data(), restored.half.val().into_data()),
        (module.int.val().into_data(), restored.int.val().into_data()),
        (module.bool.val().into_data(), restored.bool.val().into_data()),
    ] {
        assert_eq!(old, new);
    }

    let wrong = record::<ModuleRecord>(&checkpoint, "other").unwrap_err();
    assert_eq!(wrong.kind(), ErrorKind::NotFound);
    assert!(wrong.to_string().contains("other"), "{wrong}");
    let mut state = StateDict::new();
    put(&mut state, "twice", module.clone().into_record()).unwrap();
    let wrong = put(&mut state, "twice", module.into_record()).unwrap_err();
    assert!(wrong.to_string().contains(r#"tensor="twice."#), "{wrong}");
}

fn training(inputs: usize, device: &Device) -> Training<Linear> {
    Training {
        model: LinearConfig::new(inputs, 2).init(device),
        optimizer: AdamConfig::new().init(),
        scheduler: LinearLrSchedulerConfig::new(0.1, 0.01, 10).init().unwrap(),
    }
}

fn step(training: &mut Training<Linear>, device: &Device) {
    let loss = training.model.forward(Tensor::<2>::ones([1, 3], device)).sum();
    let gradients = GradientsParams::from_grads(loss.backward(), &training.model);
    let rate = training.scheduler.step();
    training.model = training.optimizer.step(rate, training.model.clone(), gradients);
}

#[test]
fn the_three_are_restored_together_or_refused() {
    let (fixture, device) = (Fixture::new(), Device::default().autodiff());
    let mut before = training(3, &device);
    (0..4).for_each(|_| step(&mut before, &device));
    let checkpoint = fixture.save(before.state().unwrap());
    assert_eq!(checkpoint.tensors().unwrap().len(), 2 + 4);

    let mut after = training(3, &device).restore(&checkpoint).unwrap();
    (0..4).for_each(|_| [&mut before, &mut after].into_iter().for_each(|training| step(training, &device)));
    assert_eq!(before.model.weight.val().into_data(), after.model.weight.val().into_data());
    assert_eq!(before.scheduler.step().base(), after.scheduler.step().base());

    let refused = |training: Training<Linear>| format!("{:#}", training.restore(&checkpoint).err().expect("refused"));
    let wrong = refused(training(4, &device));
    assert!(wrong.contains("another one than that of the checkpoint") && wrong.contains("weight"), "{wrong}");
    let bare = LinearConfig::new(3, 2).with_bias(false).init(&device);
    let wrong = refused(Training { model: bare, ..training(3, &device) });
    assert!(wrong.contains(r#"Unused tensors: ["bias"]"#), "{wrong}");
    let wrong = refused(Training { optimizer: SgdConfig::new().init(), ..training(3, &device) });
    assert!(wrong.contains("the optimizer is of another kind"), "{wrong}");
    let noam = NoamLrSchedulerConfig::new(0.1).init().unwrap();
    let wrong = refused(Training { scheduler: noam, ..training(3, &device) });
    assert!(wrong.contains("the scheduler is of another kind"), "{wrong}");
    let kind = record::<LrSchedulerRecord>(&checkpoint, "scheduler").unwrap();
    assert_eq!(kind.scalar::<u64>("0.remaining_iters"), Some(11 - 4));
}

#[test]
fn nothing_of_a_later_step_is_saved() {
    let (fixture, device) = (Fixture::new(), Device::default().autodiff());
    let mut training = training(3, &device);
    step(&mut training, &device);
    let weight = training.model.weight.val().into_data();
    let (promise, promised) = ashore::promise(ashore::Layout::new(Dtype::U8, [1]));
    let mut state = StateDict::new();
    state.tensor("first", promised).unwrap();
    put(&mut state, "model", training.model.clone().into_record()).unwrap();
    let save = fixture.executor.save(1, state).unwrap();
    (0..3).for_each(|_| step(&mut training, &device));
    promise.fulfil(vec![0_u8]).unwrap();
    save.wait(Duration::from_secs(60)).unwrap();
    let saved = fixture.executor.checkpoint(1).unwrap().read_as::<f32>("model.weight").unwrap();
    assert_eq!(saved, weight.try_to_vec::<f32>().unwrap());
    assert_ne!(saved, training.model.weight.val().into_data().try_to_vec::<f32>().unwrap());
}
