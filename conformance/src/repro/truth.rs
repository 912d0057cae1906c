//! The oracle's logits of any token history, and how far a backend's row may be from them.

use crate::backend::{Capabilities, Noise, Semantics};
use crate::case::Stop;
use crate::tolerance;
use golden::metrics::{margin, max_abs_diff, nmse};
use golden::oracle::{Oracle, OracleError};
use std::collections::HashMap;
use std::path::Path;
use std::rc::Rc;

/// The oracle on one model, in the semantics and with the noise that a backend declares.
pub(super) struct Truth {
    oracle: Oracle,
    semantics: Semantics,
    noise: Noise,
    known: HashMap<Vec<u32>, Rc<Vec<Row>>>,
}

/// The logits of one position.
#[derive(Debug, Clone)]
pub(super) struct Row {
    /// The oracle's.
    pub logits: Vec<f64>,
    /// Whether float32 arithmetic must come to these logits: no activation so far was near a rounding tie.
    pub firm: bool,
    /// The model's own quantisation gap, the distance of its two semantics: the largest squared error relative to the
    /// logits, over the positions so far.
    gap: f64,
    /// The same as the largest difference of a logit.
    apart: f64,
    /// The largest magnitude of a logit so far.
    reach: f64,
}

impl Truth {
    /// Reads the model of a folder.
    pub(super) fn of(dir: &Path, declared: &Capabilities) -> Result<Self, Stop> {
        let oracle = Oracle::load(dir).map_err(cannot)?;
        Ok(Self { oracle, semantics: declared.semantics, noise: declared.noise, known: HashMap::new() })
    }

    /// The rows of every position of a sequence.
    pub(super) fn rows(&mut self, tokens: &[u32]) -> Result<Rc<Vec<Row>>, Stop> {
        if let Some(rows) = self.known.get(tokens) {
            return Ok(rows.clone());
        }
        let rows = Rc::new(self.evaluate(tokens).map_err(cannot)?);
        self.known.insert(tokens.to_vec(), rows.clone());
        Ok(rows)
    }

    fn evaluate(&self, tokens: &[u32]) -> Result<Vec<Row>, OracleError> {
        let mut own = self.oracle.start(self.semantics.oracle());
        let other = match self.semantics {
            Semantics::Fp32 => Semantics::W158A8,
            Semantics::W158A8 => Semantics::Fp32,
        };
        let mut other = self.oracle.start(other.oracle());
        let (mut gap, mut apart, mut reach) = (0.0f64, 0.0f64, 0.0f64);
        let mut rows = Vec::with_capacity(tokens.len());
        for &token in tokens {
            let logits = own.step(token)?;
            let beside = other.step(token)?;
            gap = gap.max(nmse(&beside, &logits));
            apart = apart.max(max_abs_diff(&beside, &logits));
            reach = logits.iter().fold(reach, |m, x| m.max(x.abs()));
            // In fp32 semantics nothing is rounded to codes, and the tie stays at its start.
            let firm = self.noise == Noise::F32 && own.nearest_tie > tolerance::FUZZ_TIE.limit();
            rows.push(Row { logits, firm, gap, apart, reach });
        }
        Ok(rows)
    }

    /// How far a backend's logits are from a row, in units of what it is allowed: above 1 it is wrong.
    pub(super) fn distance(&self, seen: &[f32], row: &Row) -> f64 {
        let worst_if_nan = |x: f64| if x.is_nan() { f64::INFINITY } else { x };
        let gap = worst_if_nan(max_abs_diff(seen, &row.logits));
        let exact = gap / self.within(row);
        if row.firm || exact <= 1.0 {
            return exact;
        }
        // A flip may have happened: the row is held to what rounding does to this model's logits.
        let flipped = tolerance::FUZZ_FLIP_GAPS.limit() * row.gap;
        worst_if_nan(nmse(seen, &row.logits)) / tolerance::FUZZ_FLIP_NMSE.limit().max(flipped)
    }

    /// What float32 arithmetic may be off by in a firm row.
    fn within(&self, row: &Row) -> f64 {
        let reach = row.reach.max(tolerance::SMALL_REACH.limit());
        match self.semantics {
            // Random small networks are worse conditioned than the golden cases: eight bits of noise, which make the
            // gap, tell what 24 bits of noise may do here.
            Semantics::Fp32 => {
                let of_gap = tolerance::FUZZ_FP32_OF_GAP.limit() * row.apart;
                of_gap.max(tolerance::FP32_LOGIT.limit() * reach)
            }
            Semantics::W158A8 => tolerance::FUZZ_A8_LOGIT.limit() * reach,
        }
    }

    /// The lead of the first logit over the second that leaves no doubt about the most likely token; `None` where the
    /// row is not firm, so that no lead does.
    pub(super) fn clear_margin(&self, row: &Row) -> Option<f64> {
        if !row.firm {
            return None;
        }
        Some(2.0 * self.within(row))
    }

    /// The most likely token, where there is no doubt about it.
    pub(super) fn clear_top(&self, row: &Row) -> Option<u32> {
        let clear = margin(&row.logits) > self.clear_margin(row)?;
        golden::metrics::top1(&row.logits).filter(|_| clear).map(|token| token as u32)
    }
}

fn cannot(error: OracleError) -> Stop {
    Stop::Inconclusive(format!("the oracle cannot evaluate the model: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn truth(semantics: Semantics, noise: Noise) -> Truth {
        let folder = fixtures::preset("odd-vocab-257", 1).and_then(|f| f.folder()).expect("a preset");
        let declared = Capabilities::new(semantics).with_noise(noise);
        Truth::of(folder.path(), &declared).expect("a model")
    }

    fn distances(truth: &mut Truth, tokens: &[u32], seen: &[Row]) -> Vec<f64> {
        let rows = truth.rows(tokens).expect("tokens of the vocabulary");
        let f32s = |row: &Row| row.logits.iter().map(|&x| x as f32).collect::<Vec<_>>();
        rows.iter().zip(seen).map(|(row, seen)| truth.distance(&f32s(seen), row)).collect()
    }

    #[test]
    fn the_oracles_own_rows_are_right_and_those_of_other_semantics_or_tokens_are_not() {
        let (tokens, other) = ([3, 14, 15, 92, 65], [4, 14, 15, 92, 65]);
        for semantics in [Semantics::Fp32, Semantics::W158A8] {
            let mut own = truth(semantics, Noise::F32);
            let rows = own.rows(&tokens).expect("rows");
            assert!(rows.iter().any(|row| row.firm), "nothing to hold a backend to");
            assert!(distances(&mut own, &tokens, &rows).iter().all(|&d| d < 0.05), "{semantics:?}");
            let wrong = own.rows(&other).expect("rows");
            assert!(distances(&mut own, &tokens, &wrong).iter().all(|&d| d > 2.0), "{semantics:?}");
            let opposite = if semantics == Semantics::Fp32 { Semantics::W158A8 } else { Semantics::Fp32 };
            let opposite = truth(opposite, Noise::F32).rows(&tokens).expect("rows");
            assert!(distances(&mut own, &tokens, &opposite).iter().any(|&d| d > 2.0), "{semantics:?}");
        }
    }

    #[test]
    fn coarse_arithmetic_is_held_to_the_quantisation_gap_only() {
        let (tokens, other) = ([3, 14, 15, 92, 65], [4, 14, 15, 92, 65]);
        let mut coarse = truth(Semantics::W158A8, Noise::Coarse);
        let fp32 = truth(Semantics::Fp32, Noise::F32).rows(&tokens).expect("rows");
        assert!(distances(&mut coarse, &tokens, &fp32).iter().all(|&d| d <= 1.0));
        let wrong = coarse.rows(&other).expect("rows");
        assert!(distances(&mut coarse, &tokens, &wrong)[0] > 1.0);
        assert!(coarse.clear_top(&wrong[0]).is_none());
    }

    #[test]
    fn nan_is_as_far_off_as_can_be() {
        for (semantics, noise) in [(Semantics::Fp32, Noise::F32), (Semantics::W158A8, Noise::Coarse)] {
            let mut own = truth(semantics, noise);
            let mut rows = own.rows(&[3]).expect("rows").to_vec();
            rows[0].logits[0] = f64::NAN;
            assert_eq!(distances(&mut own, &[3], &rows), [f64::INFINITY]);
        }
    }
}
