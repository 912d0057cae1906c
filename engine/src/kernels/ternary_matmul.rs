//! The front door of the ternary product: `y = (codes - 1) . q / k * scale` for any number of tokens, threads and matrices that share
//! one quantised input.

use std::cell::RefCell;

use super::activations::QuantizedActivations;
use super::columns::Columns;
use super::ternary_panel::PanelScratch;
use super::ternary_tile::ROWS;
use super::{Kernels, Threads};
use crate::ternary::InterleavedMatrix;

/// Multiply-accumulates below which a parallel section costs more than it saves.
const WORTH_MACS: usize = 1 << 18;
/// Pieces of work a thread, so that one that is held up does not hold up all.
const PIECES: usize = 2;

/// One matrix and where its product goes, `[tokens, rows]`.
pub struct TernaryJob<'a> {
    /// The weights, `[rows, columns]`.
    pub weights: &'a InterleavedMatrix,
    /// The product.
    pub out: &'a mut [f32],
    /// Whether the product is added to what is there.
    pub add: bool,
}

/// One job as the kernels see it.
pub(crate) struct Product<'a> {
    pub(super) weights: &'a InterleavedMatrix,
    pub(super) activations: &'a QuantizedActivations,
    out: Columns,
    add: bool,
}

impl Product<'_> {
    #[inline(always)]
    pub(super) fn tokens(&self) -> usize {
        self.activations.tokens()
    }

    pub(super) fn is_tiled(&self) -> bool {
        self.activations.is_tiled()
    }

    /// Writes the products of one token and of the row groups from `group` on. `sums` are of codes, which are trits plus one.
    #[inline(always)]
    pub(super) fn finish<const G: usize>(&self, token: usize, group: usize, sums: [&[i32; ROWS]; G]) {
        let (k, bias) = self.activations.inverse(token);
        let scale = self.weights.scale();
        let first = group * ROWS;
        let rows = (G * ROWS).min(self.weights.rows() - first);
        // SAFETY: every group of a job is computed by one thread and the jobs' outputs are distinct and stay borrowed for the call of
        // `ternary_matmul`: nobody else has these elements.
        let out = unsafe { self.out.slice(token, first, rows) };
        // Two roundings in this order, as transformers has them: a value that comes out the same there and here cannot fall to
        // another side of a rounding tie further on.
        for (g, sums) in sums.iter().enumerate() {
            let mut y = [0f32; ROWS];
            for l in 0..ROWS {
                y[l] = (sums[l] - bias) as f32 / k * scale;
            }
            let out = &mut out[g * ROWS..rows.min((g + 1) * ROWS)];
            match (<&mut [f32; ROWS]>::try_from(&mut *out), self.add) {
                (Ok(out), true) => (0..ROWS).for_each(|l| out[l] += y[l]),
                (Ok(out), false) => *out = y,
                (Err(_), true) => out.iter_mut().zip(y).for_each(|(o, y)| *o += y),
                (Err(_), false) => out.copy_from_slice(&y[..out.len()]),
            }
        }
    }
}

thread_local! {
    static PANEL: RefCell<PanelScratch> = RefCell::default();
}

/// Computes all `jobs` on the same activations in one parallel section.
///
/// The result does not depend on the instruction set, the threads, or on which tokens share a call: the integer sums are exact and
/// each output value is `sum / k * scale` in f32.
///
/// # Panics
/// When a matrix's columns or an output's size do not fit the activations (a bug of the caller).
pub fn ternary_matmul<const JOBS: usize>(
    kernels: &Kernels,
    threads: &Threads,
    activations: &QuantizedActivations,
    jobs: [TernaryJob<'_>; JOBS],
) {
    let tokens = activations.tokens();
    let products = jobs.map(|job| {
        let (rows, columns) = (job.weights.rows(), job.weights.columns());
        assert_eq!(columns, activations.columns(), "activations do not fit the matrix");
        assert_eq!(activations.packing(), Some(job.weights.packing()), "activations are for another packing");
        assert_eq!(job.out.len(), tokens * rows, "output does not fit the matrix");
        Product { weights: job.weights, activations, out: Columns::new(job.out, rows), add: job.add }
    });
    if tokens == 0 {
        return;
    }
    let macs: usize = products.iter().map(|p| tokens * p.weights.rows() * p.weights.columns()).sum();
    let groups: usize = products.iter().map(|p| p.weights.groups()).sum();
    let worth = macs >= WORTH_MACS;
    // Pieces are runs of neighbouring groups of one matrix, whole panels of them.
    let share = if worth { groups.div_ceil(threads.count() * PIECES) } else { groups };
    let piece = share.next_multiple_of(kernels.panel_groups()).max(1);
    let pieces = products.iter().map(|p| p.weights.groups().div_ceil(piece)).sum();
    threads.for_each(pieces, worth, |mut index| {
        for product in &products {
            let own = product.weights.groups().div_ceil(piece);
            if index < own {
                let first = index * piece;
                let end = (first + piece).min(product.weights.groups());
                PANEL.with_borrow_mut(|scratch| (kernels.product)(product, first, end, scratch));
                return;
            }
            index -= own;
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Isa;
    use crate::kernels::guarded::{Guarded, Place};
    use crate::ternary::interleaved::{Packing, TritSource};
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
        let row = |r: usize, out: &mut [i8]| {
            out.copy_from_slice(&trits[r * columns..(r + 1) * columns]);
            Ok(())
        };
        let source = TritSource { rows, columns, scale, row: &row };
        let weights = Packing::ALL.map(|packing| {
            let kernels = Kernels::of(Isa::Portable).unwrap().with_packing(packing);
            InterleavedMatrix::pack(&source, kernels, &Threads::new(Some(1)).unwrap()).unwrap()
        });
        let expected = reference(trits, x, rows, columns, scale);
        for isa in Isa::available() {
            for (weights, count) in weights.iter().flat_map(|w| [1, 2, 3].map(|count| (w, count))) {
                let kernels = Kernels::of(isa).unwrap().with_packing(weights.packing());
                let threads = Threads::new(Some(count)).unwrap();
                let mut q = QuantizedActivations::default();
                q.quantize(kernels, &threads, x, columns, &|| "x".to_string()).unwrap();
                let mut out = Guarded::<f32>::new(tokens * rows, Place::any::<f32>(rows + columns));
                let mut added = Guarded::of(&vec![0.5f32; tokens * rows], Place::any::<f32>(columns + tokens));
                let jobs = [
                    TernaryJob { weights, out: &mut out, add: false },
                    TernaryJob { weights, out: &mut added, add: true },
                ];
                ternary_matmul(kernels, &threads, &q, jobs);
                assert_eq!(
                    *out,
                    *expected,
                    "{isa}, {:?}, {count} threads, {rows}x{columns}, {tokens} tokens",
                    weights.packing()
                );
                assert!(added.iter().zip(&expected).all(|(a, e)| *a == 0.5 + e), "{isa}: added to what was there");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn every_path_equals_the_definition(rows in 1usize..70, columns in 1usize..300, tokens in 1usize..41, seed in any::<u64>()) {
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
