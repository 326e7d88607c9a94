//! AdamW: gradient descent with first and second moments, and weight decay separate from the gradient.

const RATE: f32 = 1e-3;
const BETA_FIRST: f32 = 0.9;
const BETA_SECOND: f32 = 0.999;
const EPSILON: f32 = 1e-8;
const DECAY: f32 = 0.01;

/// The minimum number of elements that are worth a thread.
const SHARE_MIN: usize = 64 << 10;

/// The factors of a step, the same on the host and on a GPU (`kernels/training.cu`).
#[derive(Clone, Copy)]
pub struct Rates {
    /// The learning rate divided by the bias of the first moment.
    pub rate: f32,
    /// One over the bias of the second moment.
    pub unbias: f32,
    pub beta_first: f32,
    pub beta_second: f32,
    pub epsilon: f32,
    /// The weight decay multiplied by the rate.
    pub decay: f32,
}

impl Rates {
    /// Returns the factors of `step`, which counts from 1.
    pub fn at(step: u64) -> Self {
        let power = i32::try_from(step).unwrap_or(i32::MAX);
        Self {
            rate: (f64::from(RATE) / (1.0 - f64::from(BETA_FIRST).powi(power))) as f32,
            unbias: (1.0 / (1.0 - f64::from(BETA_SECOND).powi(power))) as f32,
            beta_first: BETA_FIRST,
            beta_second: BETA_SECOND,
            epsilon: EPSILON,
            decay: RATE * DECAY,
        }
    }
}

/// Changes `parameter` and its moments by `gradient`; `step` counts from 1. Elements are independent, so the
/// result does not depend on `threads`.
pub fn update(
    parameter: &mut [f32],
    first: &mut [f32],
    second: &mut [f32],
    gradient: &[f32],
    step: u64,
    threads: usize,
) {
    let rates = Rates::at(step);
    let change = |((p, m), v): ((&mut [f32], &mut [f32]), &mut [f32]), g: &[f32]| change(p, m, v, g, rates);

    let share = parameter.len().div_ceil(threads.max(1)).max(SHARE_MIN);
    let moments = parameter.chunks_mut(share).zip(first.chunks_mut(share)).zip(second.chunks_mut(share));
    std::thread::scope(|scope| {
        let mut parts = moments.zip(gradient.chunks(share));
        let mine = parts.next();
        for (moments, gradient) in parts {
            scope.spawn(move || change(moments, gradient));
        }
        if let Some((moments, gradient)) = mine {
            change(moments, gradient);
        }
    });
}

fn change(p: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32], rates: Rates) {
    let Rates { rate, unbias, beta_first, beta_second, epsilon, decay } = rates;
    for (((p, m), v), g) in p.iter_mut().zip(m).zip(v).zip(g) {
        *m = beta_first * *m + (1.0 - beta_first) * g;
        *v = beta_second * *v + (1.0 - beta_second) * (g * g);
        *p -= rate * *m / ((*v * unbias).sqrt() + epsilon) + decay * *p;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_step_moves_by_the_rate_against_the_gradient() {
        let (mut p, mut m, mut v) = (vec![1.0, 1.0, 0.0], vec![0.0; 3], vec![0.0; 3]);
        update(&mut p, &mut m, &mut v, &[0.5, -2.0, 0.0], 1, 1);
        for (got, expected) in p.iter().zip([1.0 - RATE - RATE * DECAY, 1.0 + RATE - RATE * DECAY, 0.0]) {
            assert!((got - expected).abs() < 1e-6, "{got} {expected}");
        }
        assert_eq!(m, [0.05, -0.2, 0.0].map(|x: f32| (1.0 - BETA_FIRST) / 0.1 * x));
    }

    #[test]
    fn the_result_does_not_depend_on_the_number_of_threads() {
        let run = |threads| {
            let g: Vec<f32> = (0..3 * SHARE_MIN + 17).map(|i| (i as f32).sin()).collect();
            let (mut p, mut m, mut v) = (g.clone(), vec![0.0; g.len()], vec![0.0; g.len()]);
            (1..4).for_each(|step| update(&mut p, &mut m, &mut v, &g, step, threads));
            p.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
        };
        assert!(run(1) == run(2) && run(1) == run(5));
    }
}
