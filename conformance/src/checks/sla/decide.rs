//! Deciding a claim of the form "this share of all samples is within the limit": it holds at 99 % confidence, it is
//! broken at 99 % confidence, or it stays open.
//!
//! The argument is that of MLPerf's early stopping: each sample is within the limit or a miss, so misses are binomial,
//! and the exact binomial tail says how well they fit a claim that is just not true (or just true). It is looked at a
//! fixed number of times, and each look may err with an equal part of the one percent, so that all looks together err
//! with one percent at most.

use crate::case::Stop;
use std::time::{Duration, Instant};

/// How sure a decision is.
pub(super) const CONFIDENCE: f64 = 0.99;

/// Numbers of samples after which a claim may be found to hold. The second is enough for 95 % of samples without a miss.
pub(super) const LOOKS: [usize; 4] = [24, 120, 240, 480];

/// A share of all samples that must be within a limit, such as 0.95 for a 95th percentile.
#[derive(Debug, Clone, Copy)]
pub(super) struct Claim {
    /// The share.
    pub share: f64,
    /// The limit of one sample.
    pub limit: f64,
}

/// What the samples say of a claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ruling {
    /// True at the confidence asked for.
    Holds,
    /// False at the confidence asked for.
    Broken,
    /// More samples are needed.
    Open,
}

/// One measurement.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sample {
    /// By the caller's clock: a claim holds by this.
    pub wall: f64,
    /// The same without the time for which the machine had no processor to give: a claim is broken by this.
    pub own: f64,
}

impl Sample {
    /// A measurement that the machine's load does not change.
    pub(super) fn plain(value: f64) -> Self {
        Self { wall: value, own: value }
    }
}

/// A claim and what was measured to decide it.
#[derive(Debug)]
pub(super) struct Decision {
    /// What came of it.
    pub ruling: Ruling,
    /// The samples, in the order taken.
    pub samples: Vec<Sample>,
    /// Samples beyond the limit, by either time.
    misses: usize,
    own_misses: usize,
    limit: f64,
}

impl Claim {
    /// What `misses` among `samples` say.
    pub(super) fn ruling(self, samples: usize, misses: usize) -> Ruling {
        let Some(look) = LOOKS.into_iter().find(|&look| samples <= look) else { return Ruling::Open };
        let doubt = (1.0 - CONFIDENCE) / LOOKS.len() as f64;
        let rate = 1.0 - self.share;
        // Misses only add up: once there are too many for the next look, its other samples cannot change that.
        if at_least(look, misses, rate) <= doubt {
            Ruling::Broken
        } else if samples == look && at_most(look, misses, rate) <= doubt {
            Ruling::Holds
        } else {
            Ruling::Open
        }
    }

    /// Takes samples until the claim is decided, the looks or the time are used up, or there are no more samples.
    ///
    /// # Errors
    /// What `sample` stops with.
    pub(super) fn decide(
        self,
        budget: Duration,
        mut sample: impl FnMut() -> Result<Option<Sample>, Stop>,
    ) -> Result<Decision, Stop> {
        let start = Instant::now();
        let most = LOOKS[LOOKS.len() - 1];
        let mut decision =
            Decision { ruling: Ruling::Open, samples: Vec::new(), misses: 0, own_misses: 0, limit: self.limit };
        let beyond = |value: f64| usize::from(value.is_nan() || value > self.limit);
        while decision.samples.len() < most && start.elapsed() < budget {
            let Some(next) = sample()? else { break };
            decision.samples.push(next);
            decision.misses += beyond(next.wall);
            decision.own_misses += beyond(next.own);
            let taken = decision.samples.len();
            decision.ruling = match (self.ruling(taken, decision.misses), self.ruling(taken, decision.own_misses)) {
                (Ruling::Holds, _) => Ruling::Holds,
                (_, Ruling::Broken) => Ruling::Broken,
                _ => Ruling::Open,
            };
            if decision.ruling != Ruling::Open {
                break;
            }
        }
        Ok(decision)
    }
}

impl Decision {
    /// The samples by the caller's clock.
    pub(super) fn walls(&self) -> Vec<f64> {
        self.samples.iter().map(|s| s.wall).collect()
    }

    /// The samples in words.
    pub(super) fn text(&self) -> String {
        format!(
            "{} of {} above {}, {} of them for want of a processor, 95th percentile {:.3}",
            self.misses,
            self.samples.len(),
            self.limit,
            self.misses - self.own_misses,
            percentile(&self.walls(), 0.95),
        )
    }
}

/// The sample that a share of all samples does not exceed (nearest rank): the `ceil(share · n)`-th smallest; NaN without
/// samples.
pub(super) fn percentile(samples: &[f64], share: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

/// The probability of at most `hits` in `draws` where each has probability `p`.
pub(super) fn at_most(draws: usize, hits: usize, p: f64) -> f64 {
    if hits >= draws {
        return 1.0;
    }
    let mut term = (1.0 - p).powi(draws as i32);
    let mut sum = term;
    for k in 0..hits {
        term *= (draws - k) as f64 / (k + 1) as f64 * p / (1.0 - p);
        sum += term;
    }
    sum.min(1.0)
}

/// The probability of at least `hits` in `draws` where each has probability `p`.
pub(super) fn at_least(draws: usize, hits: usize, p: f64) -> f64 {
    if hits == 0 { 1.0 } else { 1.0 - at_most(draws, hits - 1, p) }
}

#[cfg(test)]
mod tests {
    use super::super::super::support::mix;
    use super::*;

    const P95: Claim = Claim { share: 0.95, limit: 100.0 };
    const LONG: Duration = Duration::from_secs(3600);

    fn ruling_of(claim: Claim, mut sample: impl FnMut(usize) -> Sample) -> (Ruling, usize) {
        let mut taken = 0;
        let decision = claim
            .decide(LONG, || {
                taken += 1;
                Ok(Some(sample(taken)))
            })
            .expect("no sample stops");
        (decision.ruling, decision.samples.len())
    }

    #[test]
    fn without_a_miss_the_second_look_decides() {
        assert_eq!(ruling_of(P95, |_| Sample::plain(1.0)), (Ruling::Holds, 120));
        // ln 0.0025 / ln 0.95 = 116.8: any fewer would not do.
        assert!(0.95f64.powi(116) > 0.0025 && 0.95f64.powi(117) < 0.0025);
    }

    #[test]
    fn six_misses_of_the_first_look_break_it_at_once_and_five_do_not() {
        assert_eq!(ruling_of(P95, |_| Sample::plain(150.0)), (Ruling::Broken, 6));
        let five = |n: usize| Sample::plain(if n <= 5 { 150.0 } else { 1.0 });
        assert_eq!(ruling_of(P95, five).0, Ruling::Holds);
    }

    #[test]
    fn a_nan_is_a_miss() {
        assert_eq!(ruling_of(P95, |_| Sample::plain(f64::NAN)).0, Ruling::Broken);
    }

    #[test]
    fn time_that_the_machine_withheld_neither_breaks_a_claim_nor_lets_it_hold() {
        assert_eq!(ruling_of(P95, |_| Sample { wall: 150.0, own: 75.0 }), (Ruling::Open, 480));
    }

    #[test]
    fn a_spent_budget_and_the_end_of_the_samples_leave_it_open() {
        let spent = P95.decide(Duration::ZERO, || Ok(Some(Sample::plain(1.0)))).expect("no sample stops");
        assert_eq!((spent.ruling, spent.samples.len()), (Ruling::Open, 0));
        assert_eq!(P95.decide(LONG, || Ok(None)).expect("no sample stops").ruling, Ruling::Open);
    }

    /// At the border between true and false either answer is wrong, and each comes in one run of a hundred at most.
    #[test]
    fn either_error_is_at_most_one_percent() {
        for share in [0.95, 0.5] {
            let claim = Claim { share, limit: 0.5 };
            let (mut holds, mut broken, runs) = (0, 0, 4000u64);
            for run in 0..runs {
                let draw = |n: usize| mix(run << 20 | n as u64) as f64 / u64::MAX as f64;
                match ruling_of(claim, |n| Sample::plain(if draw(n) < share { 0.0 } else { 1.0 })).0 {
                    Ruling::Holds => holds += 1,
                    Ruling::Broken => broken += 1,
                    Ruling::Open => {}
                }
            }
            assert!(holds * 100 <= runs && broken * 100 <= runs, "{share}: {holds} and {broken} of {runs}");
            assert!(holds > 0 && broken > 0);
        }
    }

    #[test]
    fn tails_are_the_binomials() {
        assert!((at_most(4, 1, 0.5) - 5.0 / 16.0).abs() < 1e-15);
        assert!((at_least(4, 3, 0.5) - 5.0 / 16.0).abs() < 1e-15);
        assert_eq!((at_most(4, 4, 0.5), at_least(4, 0, 0.5)), (1.0, 1.0));
    }

    #[test]
    fn percentiles_are_samples() {
        let samples: Vec<f64> = (1..=20).rev().map(f64::from).collect();
        assert_eq!([0.05, 0.5, 0.95, 1.0].map(|share| percentile(&samples, share)), [1.0, 10.0, 19.0, 20.0]);
        assert!(percentile(&[], 0.5).is_nan());
    }
}
