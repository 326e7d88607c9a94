//! A training that may be killed at any moment. It then continues from its newest durable step as if it had
//! not been killed.
//!
//! `cargo run --example train -- runs/a 60` trains up to step 60. With `--forget-optimizer` it resumes with
//! new moments, which gives a different result.

use ashore_candle::ashore::{CheckpointExecutor, Outcome, StateDict};
use ashore_candle::{AdamW, Fenced, Vars};
use candle_core::{DType, Device, Module, Tensor};
use candle_nn::{Optimizer, ParamsAdamW, VarBuilder, VarMap, linear, loss::mse, seq};
use std::{error::Error, sync::Arc, time::Duration};

const WIDTH: usize = 192;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [root, steps, rest @ ..] = &arguments[..] else { return Err("usage: train ROOT STEPS".into()) };
    let (steps, forget) = (steps.parse::<u64>()?, rest == ["--forget-optimizer"]);

    let map = VarMap::new();
    let named = VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu);
    let model = seq().add(linear(WIDTH, WIDTH, named.pp("hidden"))?).add_fn(|x| x.tanh()).add(linear(
        WIDTH,
        1,
        named.pp("output"),
    )?);
    let weights = Vars::from(&map);
    for (number, (_, var)) in weights.iter().enumerate() {
        // Candle's random numbers on the CPU cannot be seeded, but every run must begin with the same
        // weights.
        var.set(&(noise(number as u64, var.elem_count())?.reshape(var.shape())? * 0.1)?)?;
    }
    let adamw = AdamW::of(&weights, ParamsAdamW { lr: 0.01, ..ParamsAdamW::default() })?;
    let mut vars = Vars::new();
    vars.add_all("model.", &weights)?.add_all("optimizer.", adamw.state())?;

    let executor = CheckpointExecutor::builder(root).arena(16 << 20).chunk(1 << 20).keep_last(3).build()?;
    let executor = Arc::new(executor);
    let mut optimizer = Fenced::new(adamw, &executor);
    let mut step = 0;
    if let Some(newest) = executor.latest()? {
        if forget {
            let mut weights_alone = Vars::new();
            weights_alone.add_all("model.", &weights)?.restore_matching(&newest)?;
        } else {
            vars.restore(&newest)?;
        }
        step = newest.step();
        println!("resumed {step}");
    }
    while step < steps {
        let inputs = noise(1000 + step, 8 * WIDTH)?.reshape((8, WIDTH))?;
        let loss = mse(&model.forward(&inputs)?, &inputs.sum_keepdim(1)?)?;
        optimizer.backward_step(&loss)?;
        step += 1;

        let mut state = StateDict::new();
        vars.put(&mut state)?;
        executor.save(step, state)?.on_done(move |ended| {
            if matches!(ended, Ok(Outcome::Durable(_))) {
                println!("durable {step}");
            }
        });
    }
    Ok(executor.shutdown(Duration::from_secs(60))?)
}

/// Numbers between -1 and 1, the same for the same seed.
fn noise(seed: u64, count: usize) -> candle_core::Result<Tensor> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let numbers = (0..count).map(|_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    });
    Tensor::from_iter(numbers, &Device::Cpu)
}
