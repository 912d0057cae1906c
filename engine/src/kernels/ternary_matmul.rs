//! The front door of the ternary product: `y = (codes - 1) . q / k * scale` for any number of tokens, threads and matrices that share
//! one quantised input.

use super::columns::Columns;
use super::ternary_tile::ROWS;
use super::{Kernels, Threads};
use crate::ternary::InterleavedMatrix;
use bitnet_contracts::{ForwardPassError, Result};

/// Multiply-accumulates below which a parallel section costs more than it saves.
const WORTH_MACS: usize = 1 << 18;

/// Int8 activations of some tokens, one absmax scale each.
#[derive(Debug, Default)]
pub struct QuantizedActivations {
    values: Vec<i8>,
    inverse: Vec<(f32, i32)>,
    stride: usize,
    columns: usize,
}

impl QuantizedActivations {
    /// Quantises `x`, `[tokens, columns]`. `what` names the input in the error.
    ///
    /// # Errors
    /// `ForwardPassError::NumericalInstability` when a row holds NaN or infinity.
    ///
    /// # Panics
    /// When `columns` is 0 (a bug of the caller).
    pub fn quantize(&mut self, kernels: &Kernels, x: &[f32], columns: usize, what: &dyn Fn() -> String) -> Result<()> {
        self.columns = columns;
        self.stride = columns.next_multiple_of(super::ternary_tile::BLOCK);
        let tokens = x.len() / columns;
        self.values.resize(tokens * self.stride, 0);
        self.inverse.clear();
        for (row, out) in x.chunks_exact(columns).zip(self.values.chunks_exact_mut(self.stride)) {
            let Some(scale) = kernels.quantize(row, out) else {
                return Err(ForwardPassError::NumericalInstability {
                    details: format!("NaN or infinity in {}", what()),
                }
                .into());
            };
            self.inverse.push((scale.k, scale.sum));
        }
        Ok(())
    }

    /// Number of tokens held.
    pub fn tokens(&self) -> usize {
        self.inverse.len()
    }

    /// Bytes allocated.
    pub fn memory_bytes(&self) -> usize {
        self.values.capacity() + self.inverse.capacity() * size_of::<(f32, i32)>()
    }
}

/// One matrix and where its product goes, `[tokens, rows]`.
pub struct TernaryJob<'a> {
    /// The weights, `[rows, columns]`.
    pub weights: &'a InterleavedMatrix,
    /// The product.
    pub out: &'a mut [f32],
}

/// Computes all `jobs` on the same activations in one parallel section.
///
/// The result does not depend on the instruction set, the threads, or on which tokens share a call: the integer sums are exact and
/// each output value is `sum / k * scale` in f32.
///
/// # Panics
/// When a matrix's columns or an output's size do not fit the activations (a bug of the caller).
pub fn ternary_matmul(
    kernels: &Kernels,
    threads: &Threads,
    activations: &QuantizedActivations,
    jobs: &mut [TernaryJob<'_>],
) {
    let tokens = activations.tokens();
    let mut parts: Vec<(&InterleavedMatrix, Columns, usize)> = Vec::new();
    let mut macs = 0;
    for job in jobs {
        let (rows, columns) = (job.weights.rows(), job.weights.columns());
        assert_eq!(columns, activations.columns, "activations do not fit the matrix");
        assert_eq!(job.out.len(), tokens * rows, "output does not fit the matrix");
        macs += tokens * rows * columns;
        let out = Columns::new(job.out, rows);
        parts.extend((0..job.weights.groups()).map(|group| (job.weights, out, group)));
    }
    if tokens == 0 {
        return;
    }
    // Groups are handed out in runs, so that a thread streams through neighbouring memory.
    let worth = macs >= WORTH_MACS;
    let runs = if worth { threads.count() * 4 } else { 1 };
    let run_length = parts.len().div_ceil(runs).max(1);
    let runs = parts.len().div_ceil(run_length);
    threads.for_each(runs, worth, |run| {
        let mut sums = vec![0i32; tokens * ROWS];
        for &(weights, out, group) in parts.iter().skip(run * run_length).take(run_length) {
            (kernels.tile)(weights.group(group), &activations.values, tokens, &mut sums);
            let first = group * ROWS;
            let rows = ROWS.min(weights.rows() - first);
            for (t, (sums, &(k, bias))) in sums.chunks_exact(ROWS).zip(&activations.inverse).enumerate() {
                // SAFETY: the groups of a job are distinct and so are the jobs' outputs, which stay borrowed for this call: nobody
                // else has these elements of row `t`.
                let out = unsafe { out.slice(t, first, rows) };
                // Two roundings in this order, as transformers has them: a value that comes out the same there and here cannot fall to
                // another side of a rounding tie further on.
                for (o, &sum) in out.iter_mut().zip(sums) {
                    *o = (sum - bias) as f32 / k * weights.scale();
                }
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Isa;
    use proptest::prelude::*;

    fn mix(i: usize, seed: u64) -> u64 {
        (i as u64 ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 20
    }

    /// The definition, on plain trits.
    fn reference(trits: &[i8], x: &[f32], rows: usize, columns: usize, scale: f32) -> Vec<f32> {
        let mut out = Vec::new();
        for x in x.chunks_exact(columns) {
            let absmax = x.iter().fold(1e-5f32, |m, v| m.max(v.abs()));
            let k = (1.0 / absmax) * 127.0;
            let q: Vec<i32> = x.iter().map(|v| (v * k).round_ties_even().clamp(-128.0, 127.0) as i32).collect();
            for row in trits.chunks_exact(columns).take(rows) {
                let sum: i32 = row.iter().zip(&q).map(|(&t, &q)| i32::from(t) * q).sum();
                out.push(sum as f32 / k * scale);
            }
        }
        out
    }

    fn check(rows: usize, columns: usize, tokens: usize, x: &[f32], trits: &[i8]) {
        let scale = 0.37;
        let weights = InterleavedMatrix::pack(rows, columns, scale, &Threads::new(Some(1)).unwrap(), &|r, out| {
            out.copy_from_slice(&trits[r * columns..(r + 1) * columns]);
            Ok(())
        })
        .unwrap();
        let expected = reference(trits, x, rows, columns, scale);
        for isa in Isa::available() {
            let kernels = Kernels::of(isa).unwrap();
            for count in [1, 2, 3] {
                let threads = Threads::new(Some(count)).unwrap();
                let mut q = QuantizedActivations::default();
                q.quantize(kernels, x, columns, &|| "x".to_string()).unwrap();
                let mut out = vec![f32::NAN; tokens * rows];
                ternary_matmul(kernels, &threads, &q, &mut [TernaryJob { weights: &weights, out: &mut out }]);
                assert_eq!(out, expected, "{isa}, {count} threads, {rows}x{columns}, {tokens} tokens");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn every_path_equals_the_definition(rows in 1usize..70, columns in 1usize..300, tokens in 1usize..20, seed in any::<u64>()) {
            let trits: Vec<i8> = (0..rows * columns).map(|i| (mix(i, seed) % 3) as i8 - 1).collect();
            let x: Vec<f32> = (0..tokens * columns).map(|i| (mix(i, !seed) % 2001) as f32 - 1000.0).collect();
            check(rows, columns, tokens, &x, &trits);
        }
    }

    /// Same-sign saturating inputs: a 16-bit accumulator that holds more than one block overflows here.
    #[test]
    fn saturating_inputs_do_not_overflow() {
        let (rows, columns, tokens) = (33, 7000, 3);
        for (trit, sign) in [(1i8, 1.0), (1, -1.0), (-1, 1.0), (-1, -1.0)] {
            check(rows, columns, tokens, &vec![sign * 5.0; tokens * columns], &vec![trit; rows * columns]);
        }
    }

    /// Large enough to be cut for several threads.
    #[test]
    fn parallel_sections_cover_every_row() {
        let (rows, columns, tokens) = (1500, 1031, 5);
        let trits: Vec<i8> = (0..rows * columns).map(|i| (mix(i, 7) % 3) as i8 - 1).collect();
        let x: Vec<f32> = (0..tokens * columns).map(|i| (mix(i, 9) % 2001) as f32 - 1000.0).collect();
        check(rows, columns, tokens, &x, &trits);
    }
}
