//! Two things measured in turn, because disks of virtual machines drift by more than half within minutes: only what was
//! measured side by side can be compared.

use crate::out::{self, median, quantile};
use crate::rng::Rng;
use ashore::Result;

/// Which of the two is to be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    Limit,
    Ours,
}

/// Enough is known when the 95 % interval of the median is within this part of it on either side.
const WITHIN: f64 = 0.03;
/// An interval of fewer pairs says little.
const AT_LEAST: usize = 8;
/// After so many blocks of two pairs, one in which the limit is compared with itself.
const NOISE_EVERY: usize = 4;

/// The ratios that were measured.
#[derive(Debug, Default)]
pub struct Pairs {
    /// The limit's time by ours: 1 is as fast as the machine.
    pub ratios: Vec<f64>,
    /// The limit's time by the limit's.
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
    /// By order statistics, so whatever the distribution: the interval ends at the values that the true median is beyond with a
    /// probability of 2.5 % each.
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

    /// Where the middle half of the limit's ratios to itself lies.
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

/// Measures until `decided`, but at most `rounds` pairs: blocks of Limit-Ours-Ours-Limit or the reverse, at random.
/// `sample` returns seconds.
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
