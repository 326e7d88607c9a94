//! Measures two things alternately. The disks of virtual machines drift by more than half within minutes, so
//! only measurements made side by side can be compared.

use crate::out::{self, median, quantile};
use crate::rng::Rng;
use ashore::Result;

/// The one of the two to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    Limit,
    Ours,
}

/// The result is decided when the 95 % interval of the median is within this fraction of it on either side.
const WITHIN: f64 = 0.03;
/// The minimum number of pairs for an interval.
pub const AT_LEAST: usize = 8;
/// After this many blocks of two pairs, one block compares the limit with itself.
const NOISE_EVERY: usize = 4;

/// The measured ratios.
#[derive(Debug, Default)]
pub struct Pairs {
    /// The limit's time divided by ours: 1 is as fast as the machine.
    pub ratios: Vec<f64>,
    /// The limit's time divided by the limit's.
    pub noise: Vec<f64>,
}

/// A median and its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    pub median: f64,
    pub low: f64,
    pub high: f64,
}

impl Estimate {
    /// Estimates from order statistics, valid for any distribution: the true median is below the interval
    /// with a probability of 2.5 %, and above it with 2.5 %.
    pub fn of(samples: &[f64]) -> Self {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let n = sorted.len();
        let skip = ((n as f64 - 1.96 * (n as f64).sqrt()) / 2.0).floor().max(0.0) as usize;
        let at = |i: usize| sorted.get(i).copied().unwrap_or(0.0);
        Self { median: median(sorted.iter().copied()), low: at(skip), high: at((n - 1.min(n)).saturating_sub(skip)) }
    }

    pub fn is_decided(&self) -> bool {
        (self.high - self.low) / 2.0 <= WITHIN * self.median
    }
}

impl Pairs {
    pub fn estimate(&self) -> Estimate {
        Estimate::of(&self.ratios)
    }

    pub fn decided(&self) -> bool {
        self.ratios.len() >= AT_LEAST && self.estimate().is_decided()
    }

    /// Returns the middle half of the limit's ratios to itself.
    pub fn noise(&self) -> (f64, f64) {
        (quantile(self.noise.iter().copied(), 0.25), quantile(self.noise.iter().copied(), 0.75))
    }

    pub fn verdict(&self) -> String {
        let Estimate { median, low, high } = self.estimate();
        let said =
            format!("{median:.3} of the limit, 95 % interval {low:.3} to {high:.3}, {} pairs", self.ratios.len());
        if self.decided() { said } else { format!("undecided: {said}") }
    }
}

/// Measures until `decided`, but at most `rounds` pairs: blocks of Limit-Ours-Ours-Limit or the reverse, at
/// random. `sample` returns seconds.
pub fn run(rounds: u32, seed: u64, mut sample: impl FnMut(Turn) -> Result<f64>) -> Result<Pairs> {
    let (mut pairs, mut rng) = (Pairs::default(), Rng::new(seed));
    let bar = out::progress(u64::from(rounds));
    let mut blocks = 0;
    while pairs.ratios.len() < rounds as usize && !pairs.decided() {
        let mut first = if rng.below(2) == 0 { Turn::Limit } else { Turn::Ours };
        for _ in 0..2_usize.min(rounds as usize - pairs.ratios.len()) {
            let one = sample(first)?;
            let ratio = match first {
                Turn::Limit => one / sample(Turn::Ours)?,
                Turn::Ours => sample(Turn::Limit)? / one,
            };
            pairs.ratios.push(ratio);
            first = if first == Turn::Limit { Turn::Ours } else { Turn::Limit };
            bar.inc(1);
        }
        blocks += 1;
        if blocks % NOISE_EVERY == 1 {
            let one = sample(Turn::Limit)?;
            pairs.noise.push(one / sample(Turn::Limit)?);
        }
        bar.set_message(pairs.verdict());
    }
    bar.finish_and_clear();
    Ok(pairs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interval_holds_the_true_median_nineteen_times_in_twenty() {
        let mut rng = Rng::new(3);
        let mut normal = || (0..12).map(|_| f64::from(rng.signed_unit())).sum::<f64>() * 0.1 + 1.0;
        let held = (0..1000).filter(|_| {
            let samples: Vec<f64> = (0..40).map(|_| normal()).collect();
            let estimate = Estimate::of(&samples);
            (estimate.low..=estimate.high).contains(&1.0)
        });
        let held = held.count();
        assert!((920..=990).contains(&held), "{held}");
    }

    #[test]
    fn a_drift_of_the_machine_is_no_difference_and_a_difference_is_found() {
        for slower in [1.0, 1.25] {
            let mut drift = 1.0;
            let pairs = run(100, 7, |turn| {
                drift *= 1.01;
                Ok(if turn == Turn::Ours { drift * slower } else { drift })
            });
            let pairs = pairs.unwrap();
            assert!(pairs.decided() && (pairs.estimate().median - 1.0 / slower).abs() < 0.02, "{}", pairs.verdict());
            assert!(!pairs.noise.is_empty());
        }
    }

    #[test]
    fn noise_that_hides_the_answer_is_called_undecided() {
        let mut rng = Rng::new(5);
        let pairs = run(20, 7, |_| Ok(1.0 + f64::from(rng.signed_unit()).abs())).unwrap();
        assert!(!pairs.decided() && pairs.verdict().starts_with("undecided"), "{}", pairs.verdict());
        assert_eq!(pairs.ratios.len(), 20);
        assert!(Pairs::default().verdict().starts_with("undecided"));
    }
}
