//! The oracle's logits of any token history, and how far a backend's row may be from them.

use crate::backend::{Capabilities, Noise, Semantics};
use crate::case::Stop;
use crate::tolerance;
use golden::metrics::{margin, max_abs_diff, nmse, pearson};
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
    /// The model's own quantisation gap: the largest squared error, over the positions so far, that int8 activations
    /// bring into the logits, relative to the logits.
    gap: f64,
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
        // The gap is asked for only where the arithmetic is not held to single values.
        let gapless = (self.semantics, self.noise) == (Semantics::Fp32, Noise::F32);
        let mut other = (!gapless).then(|| self.oracle.start(other.oracle()));
        let (mut gap, mut reach) = (0.0f64, 0.0f64);
        let mut rows = Vec::with_capacity(tokens.len());
        for &token in tokens {
            let logits = own.step(token)?;
            if let Some(other) = &mut other {
                gap = gap.max(nmse(&other.step(token)?, &logits));
            }
            reach = logits.iter().fold(reach, |m, x| m.max(x.abs()));
            let firm = gapless || self.noise == Noise::F32 && own.closest_tie > tolerance::FUZZ_TIE;
            rows.push(Row { logits, firm, gap, reach });
        }
        Ok(rows)
    }

    /// How far a backend's logits are from a row, in units of what it is allowed: above 1 it is wrong.
    pub(super) fn distance(&self, seen: &[f32], row: &Row) -> f64 {
        let worst_if_nan = |x: f64| if x.is_nan() { f64::INFINITY } else { x };
        let gap = worst_if_nan(max_abs_diff(seen, &row.logits));
        if (self.semantics, self.noise) == (Semantics::Fp32, Noise::F32) {
            return gap / fp32_limit(row);
        }
        let (correlation, flips) = match self.noise {
            Noise::F32 => (1.0 - tolerance::A8_CORRELATION.limit(), tolerance::FUZZ_FLIP_GAPS),
            Noise::Coarse => (1.0 - tolerance::COARSE_CORRELATION.limit(), tolerance::FUZZ_COARSE_GAPS),
        };
        let exact = gap / a8_limit(row);
        if row.firm || exact <= 1.0 {
            return exact;
        }
        // A flip may have happened: the row is held to what rounding does to this model's logits.
        let in_gaps = worst_if_nan(nmse(seen, &row.logits)) / (flips * row.gap);
        if pearson(seen, &row.logits) >= correlation { in_gaps.min(1.0) } else { worst_if_nan(in_gaps) }
    }

    /// The lead of the first logit over the second that leaves no doubt about the most likely token; `None` where the
    /// row is not firm, so that no lead does.
    pub(super) fn clear_margin(&self, row: &Row) -> Option<f64> {
        if !row.firm {
            return None;
        }
        let within = match self.semantics {
            Semantics::Fp32 => fp32_limit(row),
            Semantics::W158A8 => a8_limit(row),
        };
        Some(2.0 * within)
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

/// How far a logit may be from the oracle's in `fp32` semantics. Small logits are held to an absolute limit.
fn fp32_limit(row: &Row) -> f64 {
    tolerance::FP32_LOGIT.limit() * row.reach.max(tolerance::FUZZ_SMALL_REACH) * tolerance::FUZZ_FP32_FACTOR
}

/// The same in `w1.58a8` where no activation was near a tie.
fn a8_limit(row: &Row) -> f64 {
    tolerance::A8_ROW.limit().max(tolerance::FUZZ_A8_RELATIVE * row.reach)
}
