//! Saves and restores of tensors of candle.

use ashore::{Checkpoint, CheckpointExecutor, ErrorKind, Layout, Promise, Source, StateDict, promise};
use ashore_candle::{AdamW, CandleTensor, Fenced, Unmatched, Vars, read_tensor};
use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, DType, Device, Storage, Tensor, Var};
use candle_nn::{Optimizer, ParamsAdamW, SGD};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

const MINUTE: Duration = Duration::from_secs(60);
const CPU: &Device = &Device::Cpu;

struct Fixture {
    executor: Arc<CheckpointExecutor>,
    _root: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let executor = CheckpointExecutor::builder(root.path()).arena(8 << 20).chunk(1 << 20).build().unwrap();
        Self { executor: Arc::new(executor), _root: root }
    }

    fn save(&self, step: u64, fill: impl FnOnce(&mut StateDict<'static>)) -> Checkpoint {
        let mut state = StateDict::new();
        fill(&mut state);
        self.executor.save(step, state).unwrap().wait(MINUTE).unwrap();
        self.executor.checkpoint(step).unwrap()
    }
}

fn vars(named: &[(&str, &Var)]) -> Vars {
    let mut vars = Vars::new();
    for (name, var) in named {
        vars.add(*name, var).unwrap();
    }
    vars
}

fn var(count: usize, dtype: DType) -> Var {
    Var::from_tensor(&Tensor::arange(0_f32, count as f32, CPU).unwrap().to_dtype(dtype).unwrap()).unwrap()
}

#[test]
fn every_dtype_and_shape_comes_back() {
    use DType::{BF16, F8E4M3, F16, F32, F64, I16, I32, I64, U8, U32};
    let fixture = Fixture::new();
    let kinds = [U8, U32, I16, I32, I64, BF16, F16, F32, F64, F8E4M3];
    let mut saved = Vars::new();
    for dtype in kinds {
        let values = Tensor::arange(0_f32, 6.0, CPU).unwrap().reshape((2, 3)).unwrap().to_dtype(dtype).unwrap();
        saved.add(dtype.as_str(), &Var::from_tensor(&values).unwrap()).unwrap();
    }
    saved.add("scalar", &Var::new(7_i64, CPU).unwrap()).unwrap();
    saved.add("empty", &Var::zeros((0, 4), F32, CPU).unwrap()).unwrap();
    saved.add("long", &var(1_000_003, F32)).unwrap();
    let checkpoint = fixture.save(1, |state| saved.put(state).unwrap());

    let mut restored = Vars::new();
    for (name, var) in saved.iter() {
        restored.add(name, &Var::zeros(var.shape(), var.dtype(), CPU).unwrap()).unwrap();
    }
    restored.restore(&checkpoint).unwrap();
    for ((name, old), (_, new)) in saved.iter().zip(restored.iter()) {
        let values = |var: &Var| var.to_dtype(F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!((old.dtype(), old.dims()), (new.dtype(), new.dims()), "{name}");
        assert_eq!(values(old), values(new), "{name}");
        let read = read_tensor(&checkpoint, name, CPU).unwrap();
        assert_eq!((read.dtype(), read.dims()), (old.dtype(), old.dims()), "{name}");
    }
    assert_eq!(
        read_tensor(&checkpoint, "bf16", CPU).unwrap().to_dtype(F32).unwrap().to_vec2::<f32>().unwrap()[1][2],
        5.0
    );
}

#[test]
fn views_are_saved_as_they_are_seen() {
    let fixture = Fixture::new();
    let whole = Tensor::arange(0_f32, 24.0, CPU).unwrap().reshape((4, 6)).unwrap();
    let views = [
        ("rows", whole.narrow(0, 1, 2).unwrap()),
        ("columns", whole.narrow(1, 2, 3).unwrap()),
        ("transposed", whole.t().unwrap()),
        ("large", Tensor::arange(0_f32, 600_000.0, CPU).unwrap().reshape((600, 1000)).unwrap().t().unwrap()),
        ("broadcast", Tensor::new(&[1_f32, 2.0], CPU).unwrap().broadcast_as((3, 2)).unwrap()),
    ];
    let checkpoint = fixture.save(1, |state| {
        for (name, view) in &views {
            state.tensor(*name, CandleTensor::new(view).unwrap()).unwrap();
        }
    });
    for (name, view) in &views {
        let read = read_tensor(&checkpoint, name, CPU).unwrap();
        assert_eq!(read.to_vec2::<f32>().unwrap(), view.to_vec2::<f32>().unwrap(), "{name}");
    }
}

#[test]
fn tied_vars_are_written_once_and_restored_together() {
    let fixture = Fixture::new();
    let (tied, other) = (var(50_000, DType::F32), var(4, DType::F32));
    let named = vars(&[("embedding", &tied), ("head", &tied), ("bias", &other)]);
    let mut state = StateDict::new();
    named.put(&mut state).unwrap();
    assert_eq!(state.bytes(), 4 * 50_004);
    assert_eq!(state.aliases().collect::<Vec<_>>(), [("head", "embedding")]);
    fixture.executor.save(1, state).unwrap().wait(MINUTE).unwrap();

    let checkpoint = fixture.executor.checkpoint(1).unwrap();
    tied.set(&tied.zeros_like().unwrap()).unwrap();
    named.restore(&checkpoint).unwrap();
    assert_eq!(tied.get(49_999).unwrap().to_scalar::<f32>().unwrap(), 49_999.0);

    // Untied when it was saved, and tied now: one of the two would be lost.
    let untied = vars(&[("bias", &other), ("embedding", &var(4, DType::F32)), ("head", &var(4, DType::F64))]);
    let checkpoint = fixture.save(2, |state| untied.put(state).unwrap());
    let wrong = vars(&[("bias", &other), ("embedding", &other), ("head", &other)]).restore(&checkpoint).unwrap_err();
    assert!(wrong.to_string().contains(r#""head": stored F64 [4], the Var is F32 [4]"#), "{wrong}");
    let untied = vars(&[("bias", &other), ("embedding", &Var::zeros(4, DType::F32, CPU).unwrap())]);
    let checkpoint = fixture.save(3, |state| untied.put(state).unwrap());
    let wrong = vars(&[("bias", &other), ("embedding", &other)]).restore(&checkpoint).unwrap_err();
    assert!(wrong.to_string().contains(r#"tensors=["bias", "embedding"]"#), "{wrong}");
}

#[test]
fn what_does_not_match_is_named_and_nothing_is_changed() {
    let fixture = Fixture::new();
    let (a, b) = (var(6, DType::F32), var(3, DType::I64));
    let checkpoint = fixture.save(1, |state| vars(&[("a", &a), ("b", &b)]).put(state).unwrap());
    let zeros = |shape: &[usize], dtype| Var::zeros(shape, dtype, CPU).unwrap();

    let (new_a, c) = (zeros(&[6], DType::F32), zeros(&[1], DType::F32));
    let renamed = vars(&[("a", &new_a), ("c", &c)]);
    let wrong = renamed.restore(&checkpoint).unwrap_err();
    assert_eq!((wrong.kind(), wrong.step()), (ErrorKind::Invalid, Some(1)));
    assert!(wrong.to_string().contains(r#"missing=["c"] unexpected=["b"]"#), "{wrong}");
    assert_eq!(new_a.to_vec1::<f32>().unwrap(), [0.0; 6]);

    let Unmatched { missing, unexpected, .. } = renamed.restore_matching(&checkpoint).unwrap();
    assert_eq!((missing, unexpected), (vec!["c".to_owned()], vec!["b".to_owned()]));
    assert_eq!(new_a.to_vec1::<f32>().unwrap(), a.to_vec1::<f32>().unwrap());

    for (other, said) in [
        (zeros(&[6], DType::F64), r#""a": stored F32 [6], the Var is F64 [6]"#),
        (zeros(&[2, 3], DType::F32), r#""a": stored F32 [6], the Var is F32 [2, 3]"#),
    ] {
        let same = zeros(&[3], DType::I64);
        let wrong = vars(&[("a", &other), ("b", &same)]).restore_matching(&checkpoint).unwrap_err();
        assert!(wrong.to_string().contains(said), "{wrong}");
        assert_eq!(same.to_vec1::<i64>().unwrap(), [0; 3]);
    }
    assert!(Vars::new().add("a", &a).unwrap().add("a", &b).unwrap_err().to_string().contains(r#"tensor="a""#));
}

#[test]
fn what_cannot_be_saved_is_refused() {
    let small = Tensor::from_raw_buffer(&[0; 4], DType::F4, &[8], CPU).unwrap();
    let wrong = CandleTensor::new(&small).unwrap_err();
    assert!(wrong.to_string().contains("dtype=f4"), "{wrong}");
    // Safe code can make such a tensor, so reading it must not leave the storage.
    let storage = Storage::Cpu(CpuStorage::F32(vec![1.0; 4]));
    let wrong = CandleTensor::new(&Tensor::from_storage(storage, 5, BackpropOp::none(), false)).unwrap_err();
    assert!(wrong.to_string().contains("shape=[5] strides=[1] storage_bytes=16"), "{wrong}");
}

/// Begins a save of `vars` that reads nothing before the promise is kept.
fn held_save(fixture: &Fixture, vars: &Vars) -> (Promise, ashore::Save) {
    let (promise, promised) = promise(Layout::new(ashore::Dtype::U8, [1 << 20]));
    let mut state = StateDict::new();
    state.tensor("first", promised).unwrap();
    vars.put(&mut state).unwrap();
    (promise, fixture.executor.save(1, state).unwrap())
}

#[test]
fn a_fenced_optimizer_waits_for_the_save() {
    let fixture = Fixture::new();
    let weights = var(1 << 16, DType::F32);
    let before = weights.to_vec1::<f32>().unwrap();
    let mut optimizer = Fenced::new(SGD::new(vec![weights.clone()], 0.5).unwrap(), &fixture.executor);
    let gradients = weights.sqr().unwrap().sum_all().unwrap().backward().unwrap();
    let (promise, save) = held_save(&fixture, &vars(&[("weights", &weights)]));
    let watched = weights.clone();
    let later = thread::spawn(move || {
        thread::sleep(Duration::from_millis(500));
        let waiting = watched.max(0).unwrap().to_scalar::<f32>().unwrap();
        promise.fulfil(vec![0_u8; 1 << 20]).unwrap();
        waiting
    });
    optimizer.step(&gradients).unwrap();
    assert_eq!(weights.max(0).unwrap().to_scalar::<f32>().unwrap(), 0.0, "the step was made");
    assert_eq!(later.join().unwrap(), 65535.0, "the step waited");
    save.wait(MINUTE).unwrap();
    assert_eq!(fixture.executor.checkpoint(1).unwrap().read_as::<f32>("weights").unwrap(), before);
}

#[test]
fn a_forgotten_fence_fails_the_first_saves() {
    let fixture = Fixture::new();
    let weights = var(1 << 20, DType::F32);
    let (promise, save) = held_save(&fixture, &vars(&[("weights", &weights)]));
    weights.set(&weights.zeros_like().unwrap()).unwrap();
    promise.fulfil(vec![0_u8; 1 << 20]).unwrap();
    let wrong = save.wait(MINUTE).unwrap_err();
    assert!(wrong.to_string().contains("weights"), "{wrong}");
}

#[test]
fn candle_cannot_write_while_a_chunk_is_copied() {
    let weights = var(1 << 10, DType::F32);
    let source = CandleTensor::new(&weights).unwrap();
    let (zeros, writer) = (weights.zeros_like().unwrap(), weights.clone());
    let mut writing = None;
    source.read(&mut |_| {
        let (zeros, writer) = (zeros.clone(), writer.clone());
        let written = thread::spawn(move || writer.set(&zeros).unwrap());
        thread::sleep(Duration::from_millis(100));
        assert!(!written.is_finished(), "the write waits for the copy");
        writing = Some(written);
    });
    writing.unwrap().join().unwrap();
    assert_eq!(weights.max(0).unwrap().to_scalar::<f32>().unwrap(), 0.0);
}

#[test]
fn small_tensors_need_no_fence() {
    let fixture = Fixture::new();
    let count = var(10, DType::I64);
    let (promise, save) = held_save(&fixture, &vars(&[("count", &count)]));
    count.set(&count.zeros_like().unwrap()).unwrap();
    promise.fulfil(vec![0_u8; 1 << 20]).unwrap();
    save.wait(MINUTE).unwrap();
    assert_eq!(fixture.executor.checkpoint(1).unwrap().read_as::<i64>("count").unwrap(), Vec::from_iter(0..10));
}

#[test]
fn adamw_computes_what_that_of_candle_computes() {
    let start = Tensor::arange(0_f32, 300.0, CPU).unwrap().reshape((20, 15)).unwrap();
    let [ours, theirs] = [(); 2].map(|()| Var::from_tensor(&(&start / 100.0).unwrap()).unwrap());
    let params = || ParamsAdamW { lr: 0.05, weight_decay: 0.1, ..ParamsAdamW::default() };
    let mut our_adamw = AdamW::of(&vars(&[("weights", &ours)]), params()).unwrap();
    let mut their_adamw = candle_nn::AdamW::new(vec![theirs.clone()], params()).unwrap();
    for step in 0..30 {
        for (var, optimizer) in [(&ours, &mut our_adamw as &mut dyn Step), (&theirs, &mut their_adamw)] {
            let loss = ((var.as_tensor() * f64::from(step)).unwrap().sin().unwrap() - &start).unwrap();
            optimizer.backward(&loss.sqr().unwrap().sum_all().unwrap());
        }
        let bits = |var: &Var| {
            var.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect::<Vec<_>>()
        };
        assert_eq!(bits(&ours), bits(&theirs), "step {step}");
    }
    let unnamed = AdamW::new(vec![theirs], (vars(&[("weights", &ours)]), params())).unwrap_err();
    assert!(unnamed.to_string().contains("a name for every Var"), "{unnamed}");
}

trait Step {
    fn backward(&mut self, loss: &Tensor);
}

impl<O: Optimizer> Step for O {
    fn backward(&mut self, loss: &Tensor) {
        self.backward_step(loss).unwrap();
    }
}
