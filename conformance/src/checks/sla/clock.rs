//! The times of a request as SPEC.md defines them, and an engine's own figures held against the caller's clock.

use super::decide::percentile;
use super::noise::millis;
use crate::case::Context;
use crate::tolerance::{self, Tolerance};
use bitnet_contracts::GenerationResult;
use std::time::Duration;

/// One generation as its caller sees it, in milliseconds.
#[derive(Debug, Clone, Copy)]
pub(super) struct Request {
    /// From the call to its return.
    pub whole: f64,
    /// From the call to the first id.
    pub first: f64,
    /// Ids returned.
    pub ids: usize,
}

impl Request {
    /// The time per output token: what came after the first id, for each id after the first. `None` for fewer than two.
    pub(super) fn time_per_output_token(&self) -> Option<f64> {
        (self.ids >= 2).then(|| (self.whole - self.first) / (self.ids - 1) as f64)
    }

    /// Ids a second.
    pub(super) fn tokens_per_second(&self) -> f64 {
        self.ids as f64 * 1e3 / self.whole
    }
}

/// What an engine accounts for: the time to the first id and the time of every other one, in milliseconds.
pub(super) fn accounted(result: &GenerationResult) -> f64 {
    let others: Duration = result.timing.per_token.iter().skip(1).sum();
    millis(result.timing.time_to_first_token + others)
}

/// Figures that an engine tells, each beside the time that it must fit into, in milliseconds.
#[derive(Debug, Clone, Default)]
pub(super) struct Figures(Vec<(f64, f64)>);

impl Figures {
    /// Adds a figure and the time around it.
    pub(super) fn add(&mut self, told: f64, around: f64) {
        self.0.push((told, around));
    }

    /// Asserts that the figures are no longer than the times around them, all together, so that one disturbed call does
    /// not decide. What is measured within a time can never be longer than it, whatever the machine does.
    #[track_caller]
    pub(super) fn fit(&self, ctx: &mut Context<'_>, what: &str, around: &str) {
        let (told, whole) = self.0.iter().fold((0.0, 0.0), |(t, a), (told, around)| (t + told, a + around));
        let what = format!("{what} over {around}: {told:.4} ms in {whole:.4} ms, sums over {} calls", self.0.len());
        ctx.check_within(what, (told - tolerance::CLOCK_STEP.limit()) / whole, &tolerance::TIME_WITHIN);
    }

    /// The share of its time that the median figure owns up to; 1 where there is no figure.
    pub(super) fn share(&self) -> f64 {
        let shares: Vec<f64> = self.0.iter().map(|(told, around)| told / around.max(1e-9)).collect();
        if shares.is_empty() { 1.0 } else { percentile(&shares, 0.5) }
    }

    /// Asserts that the median figure leaves out little of the time around it. What disturbs a call seldom falls
    /// between the engine's clock and the caller's.
    #[track_caller]
    pub(super) fn own_up(&self, ctx: &mut Context<'_>, what: &str, around: &str, tolerance: &Tolerance) {
        ctx.check_within(format!("{what}, missing from {around} in the median call"), 1.0 - self.share(), tolerance);
    }

    /// Asserts that not all figures are the same: measured times never are.
    #[track_caller]
    pub(super) fn vary(&self, ctx: &mut Context<'_>, what: &str) {
        let same = self.0.iter().all(|(told, _)| Some(told) == self.0.first().map(|(first, _)| first));
        ctx.check(!same, format!("{what} differs from call to call"), format!("{:?} every time", self.0.first()));
    }
}

/// Whether any two times differ, of as many as can be expected to.
pub(super) fn differ(times: &[Duration]) -> bool {
    times.len() < 3 || times.windows(2).any(|pair| pair[0] != pair[1])
}

#[cfg(test)]
mod tests {
    use super::super::decide::{Claim, Ruling, at_least, at_most};
    use super::*;

    const SPEC: &str = include_str!("../../../SPEC.md");

    /// The worked example of SPEC.md, with the functions that the checks use.
    #[test]
    fn the_worked_example_comes_out() {
        let request = Request { whole: 100.0, first: 40.0, ids: 13 };
        let tpot = request.time_per_output_token().expect("more than one id");
        let says = |text: String| assert!(SPEC.contains(&text), "SPEC.md does not say {text:?}");
        says("asks for 13 ids after a prompt of 8".to_string());
        says("the call returns after 100 ms".to_string());
        says(format!("TPOT = (100 ms − 40 ms) / (13 − 1) = {tpot} ms"));
        says(format!("13 / 0.1 s = {} tokens a second", request.tokens_per_second()));
        says(format!("40 ms / 8 = {} ms", request.first / 8.0));
        assert_eq!(Request { ids: 1, ..request }.time_per_output_token(), None);

        let claim = Claim { share: 0.95, limit: 100.0 };
        assert_eq!((claim.ruling(120, 0), claim.ruling(120, 1)), (Ruling::Holds, Ruling::Open));
        says(format!("0.95^120 = {:.4}", at_most(120, 0, 0.05)));
        says(format!("one of 120 leaves {:.4}", at_most(120, 1, 0.05)));
        assert_eq!((claim.ruling(24, 6), claim.ruling(24, 5)), (Ruling::Broken, Ruling::Open));
        says(format!("6 of 24 has the probability {:.4}", at_least(24, 6, 0.05)));
    }

    #[test]
    fn one_disturbed_call_does_not_hide_an_honest_figure() {
        let mut figures = Figures::default();
        assert_eq!(figures.share(), 1.0);
        for around in [1.0, 1.1, 30.0] {
            figures.add(0.99, around);
        }
        assert!((figures.share() - 0.9).abs() < 1e-12);
        assert!(differ(&[1, 2, 2].map(Duration::from_nanos)) && !differ(&[2, 2, 2].map(Duration::from_nanos)));
    }
}
