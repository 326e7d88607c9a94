//! AdamW that keeps its whole state in Vars.

use crate::vars::Vars;
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Error, Result, Var};
use candle_nn::{Optimizer, ParamsAdamW};
use std::collections::HashSet;

/// AdamW with the results of [`candle_nn::AdamW`], bit for bit, but with moments and a step count that can be
/// saved. In candle's type these are private, so a training that uses it cannot resume as if it had not
/// stopped.
///
/// ```
/// use ashore_candle::{AdamW, Vars};
/// use candle_core::{DType, Device, Var};
/// use candle_nn::{Optimizer, ParamsAdamW};
///
/// let mut weights = Vars::new();
/// weights.add("weights", &Var::ones(3, DType::F32, &Device::Cpu)?)?;
/// let optimizer = AdamW::of(&weights, ParamsAdamW::default())?;
/// assert_eq!(optimizer.state().names().collect::<Vec<_>>(), ["exp_avg.weights", "exp_avg_sq.weights", "step"]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct AdamW {
    moments: Vec<Moments>,
    /// A scalar on the host, so that reading it never waits for a device.
    step: Var,
    state: Vars,
    params: ParamsAdamW,
}

#[derive(Debug)]
struct Moments {
    var: Var,
    /// The running averages of the gradient and of its square.
    first: Var,
    second: Var,
}

impl AdamW {
    /// Creates an optimizer of those `vars` that have float dtypes. The names of the moments derive from the
    /// names of their Vars. A Var that has several names is optimized once.
    ///
    /// # Errors
    /// The errors of candle, from the allocation of the moments.
    pub fn of(vars: &Vars, params: ParamsAdamW) -> Result<Self> {
        let step = Var::zeros((), DType::I64, &Device::Cpu)?;
        let (mut state, mut moments, mut known) = (Vars::new(), Vec::new(), HashSet::new());
        state.add("step", &step).map_err(Error::wrap)?;
        for (name, var) in vars.iter().filter(|(_, var)| var.dtype().is_float()) {
            if !known.insert(var.id()) {
                continue;
            }
            let zeros = || Var::zeros(var.shape(), var.dtype(), var.device());
            let (first, second) = (zeros()?, zeros()?);
            state.add(format!("exp_avg.{name}"), &first).map_err(Error::wrap)?;
            state.add(format!("exp_avg_sq.{name}"), &second).map_err(Error::wrap)?;
            moments.push(Moments { var: var.clone(), first, second });
        }
        Ok(Self { moments, step, state, params })
    }

    /// The moments, named `exp_avg.` and `exp_avg_sq.` followed by the name of their Var, and `step`. The
    /// program saves these beside the weights.
    pub fn state(&self) -> &Vars {
        &self.state
    }

    /// The parameters. They are not part of the state, because the program sets them.
    pub fn params(&mut self) -> &mut ParamsAdamW {
        &mut self.params
    }
}

impl Optimizer for AdamW {
    /// The names of the Vars, and the parameters.
    type Config = (Vars, ParamsAdamW);

    /// As [`AdamW::of`], but fails for a Var without a name, because its moments could not be saved.
    fn new(vars: Vec<Var>, (names, params): Self::Config) -> Result<Self> {
        let (mut named, mut nameless) = (Vars::new(), vars.iter().map(|var| var.id()).collect::<HashSet<_>>());
        let wanted = nameless.clone();
        for (name, var) in names.iter().filter(|(_, var)| wanted.contains(&var.id())) {
            named.add(name, var).map_err(Error::wrap)?;
            nameless.remove(&var.id());
        }
        if !nameless.is_empty() {
            candle_core::bail!("AdamW needs a name for every Var: its moments are saved under it");
        }
        Self::of(&named, params)
    }

    fn step(&mut self, grads: &GradStore) -> Result<()> {
        let step = self.step.to_scalar::<i64>()? + 1;
        let ParamsAdamW { lr, beta1, beta2, eps, weight_decay } = self.params;
        let correction = |beta: f64| 1.0 / (1.0 - beta.powi(step as i32));
        for Moments { var, first, second } in &self.moments {
            let Some(grad) = grads.get(var) else { continue };
            first.set(&((first.as_tensor() * beta1)? + (grad * (1.0 - beta1))?)?)?;
            second.set(&((second.as_tensor() * beta2)? + (grad.sqr()? * (1.0 - beta2))?)?)?;
            let root = ((second.as_tensor() * correction(beta2))?.sqrt()? + eps)?;
            let update = ((first.as_tensor() * correction(beta1))? / root)?;
            let decayed = (var.as_tensor() * (1.0 - lr * weight_decay))?;
            var.set(&(decayed - (update * lr)?)?)?;
        }
        self.step.set(&candle_core::Tensor::new(step, &Device::Cpu)?)
    }

    fn learning_rate(&self) -> f64 {
        self.params.lr
    }

    fn set_learning_rate(&mut self, lr: f64) {
        self.params.lr = lr;
    }
}
