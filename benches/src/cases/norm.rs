//! RMSNorm and quantisation.

use bitnet_contracts::Result;
use bitnet_engine::alone::norm_and_quantize;
use bitnet_engine::kernels::{Kernels, QuantizedActivations, TernaryJob, Threads, ternary_matmul};
use bitnet_engine::ternary::interleaved::{InterleavedMatrix, Packing, TritSource};

use super::{Case, Outcome, Work, check, number};

const EPS: f32 = 1e-5;

/// Some rows, normalised and quantised.
pub struct NormCase {
    kernels: &'static Kernels,
    threads: Threads,
    x: Vec<f32>,
    gain: Vec<f32>,
    out: QuantizedActivations,
}

impl NormCase {
    /// `tokens` rows of `columns`.
    pub fn new(kernels: &Kernels, threads: &Threads, tokens: usize, columns: usize) -> Self {
        Self {
            kernels: kernels.with_packing(Packing::TwoBits),
            threads: threads.clone(),
            x: (0..tokens * columns).map(number).collect(),
            gain: (0..columns).map(|i| 1.0 + 0.5 * number(i)).collect(),
            out: QuantizedActivations::default(),
        }
    }
}

impl Case for NormCase {
    fn run(&mut self) -> Result<()> {
        norm_and_quantize(self.kernels, &self.threads, &self.x, &self.gain, EPS, &mut self.out)
    }

    /// Reads the integers back through the product with a matrix of some unit rows.
    fn verify(&self) -> Outcome {
        let columns = self.gain.len();
        let looked_at = [0, columns / 2, columns - 1];
        let row = |row: usize, out: &mut [i8]| {
            out.fill(0);
            out[looked_at[row]] = 1;
            Ok(())
        };
        let source = TritSource { rows: looked_at.len(), columns, scale: 1.0, row: &row };
        let weights = InterleavedMatrix::pack(&source, self.kernels, &self.threads)?;
        let tokens = self.x.len() / columns;
        let mut out = vec![0f32; tokens * looked_at.len()];
        let job = TernaryJob { weights: &weights, out: &mut out, add: false };
        ternary_matmul(self.kernels, &self.threads, &self.out, [job]);
        for (token, x) in self.x.chunks_exact(columns).enumerate() {
            let mean = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / columns as f64;
            let factor = 1.0 / (mean + f64::from(EPS)).sqrt();
            let normed: Vec<f64> =
                x.iter().zip(&self.gain).map(|(&x, &g)| f64::from(g) * f64::from(x) * factor).collect();
            let absmax = normed.iter().fold(0f64, |m, n| m.max(n.abs()));
            for (i, &column) in looked_at.iter().enumerate() {
                // A value stands for itself to half a step; a hair more for the roundings of the norm.
                let (is, should) = (f64::from(out[token * looked_at.len() + i]), normed[column]);
                check((is - should).abs() <= 0.501 * absmax / 127.0, || {
                    format!("column {column} of token {token}: {is}, not {should}")
                })?;
            }
        }
        Ok(())
    }

    fn work(&self) -> Work {
        Work::Cache(self.x.len() * 4)
    }
}
