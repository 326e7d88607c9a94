//! Saves the steps that `expected.json` describes, for the stock readers to read:
//! `cargo run --example stock_writer -- ROOT`. The arena is smaller than the first step, so that the step's
//! bytes go through reused slabs as those of a real state do.

use ashore::{CheckpointExecutor, Dtype, HostTensor, Layout, StateDict, Value};
use serde::Deserialize;
use std::sync::Arc;
use std::time::Duration;

#[derive(Deserialize)]
struct Table {
    steps: Vec<Step>,
}

#[derive(Deserialize)]
struct Step {
    step: u64,
    /// Name, dtype, shape.
    tensors: Vec<(String, Dtype, Vec<usize>)>,
}

/// One of each kind of Python's, as `check.py` expects them.
fn kinds() -> Value {
    use Value as V;
    let text = |text: &str| V::Text(text.into());
    V::List(vec![
        V::Big("-1ffffffffffffffff".into()),
        V::Bytes(vec![0, 255]),
        V::Complex(0.5, f64::INFINITY),
        V::Tuple(vec![V::Set(vec![V::Int(2), V::Int(1)]), V::FrozenSet(vec![V::None])]),
        V::Ordered(vec![(text("b"), V::Int(1)), (text("a"), V::Int(2))]),
        V::Counter(vec![(V::Int(9), V::Int(2))]),
        V::Dict(vec![(V::Tuple(vec![V::Int(1), text("x")]), V::Bool(true))]),
        V::Dict(vec![(text("$set"), V::Int(1)), (V::Int(5), V::Int(2)), (V::Bool(false), V::Int(3))]),
        V::Numpy("float32".into(), Box::new(V::Float(0.5))),
        V::Numpy("datetime64[ns]".into(), Box::new(V::Int(7))),
    ])
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = std::env::args_os().nth(1).ok_or("usage: stock_writer ROOT")?;
    let table: Table = serde_json::from_str(include_str!("expected.json"))?;
    let executor = CheckpointExecutor::builder(root).arena(2 << 20).chunk(256 << 10).files(3).build()?;
    for Step { step, tensors } in &table.steps {
        let mut state = StateDict::new();
        for (index, (name, dtype, shape)) in tensors.iter().enumerate() {
            let layout = Layout::new(*dtype, shape);
            let modulus = if *dtype == Dtype::BOOL { 2 } else { 256 };
            let bytes: Vec<u8> =
                (0..layout.bytes()?).map(|i| ((i * 31 + index as u64 * 17 + 7) % 251 % modulus) as u8).collect();
            state.tensor(name, HostTensor::with_dtype(Arc::new(bytes), *dtype, shape))?;
        }
        state.value("nested", &serde_json::json!({ "lr": 0.1, "milestones": [1, 2] }))?;
        state.value("kinds", &kinds())?;
        let outcome = executor.save(*step, state)?.wait(Duration::from_secs(60))?;
        println!("{outcome:?}");
    }
    executor.shutdown(Duration::from_secs(60))?;
    Ok(())
}
