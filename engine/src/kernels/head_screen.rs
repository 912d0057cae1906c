//! The screened output head: which tokens' logits can be among the largest, from 4 bits a weight, so that the head itself is read for
//! those alone. What comes out is exact.
//!
//! A row `w` of the head is stored as codes `c_i = round(w_i / D + u_i + 7.5)` with a step `D` of its own and one random offset `u_i` a
//! column (subtractive dither). So `w'_i = D (c_i - 7.5 - u_i)` misses `w_i` by an error that is uniform in `[-D/2, D/2]` and
//! independent from column to column, whatever the weights are. Such errors are strictly sub-Gaussian with variance `D^2 / 12`:
//! the error of `w' . h` exceeds `D |h| sqrt(ln(2 / p) / 6)` with a probability of at most `p`, for every `h` that knows nothing of `u`.
//! With `p` = 2^-80 for a row, a token of the 2B model is decided wrongly with a probability below 2^-63.
//!
//! The rest of the bound is certain: `h` is taken in 15 bits, `h = s q + r`, which costs at most `8 D sqrt(n) |r|`, and the roundings of
//! the sums, here and in the head itself, are covered by their number.

#![allow(clippy::needless_range_loop)] // Registers, tokens and groups are counted, several arrays at once.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use super::Kernels;
use super::chunks::{as_chunks, as_chunks_mut};
use super::columns::Columns;
use super::float::ROUND;
use super::pages::Pages;
use super::ternary_tile::{BLOCK_BYTES, DotLanes, ROWS};
use super::threads::Threads;
use crate::model::FloatTable;
use bitnet_contracts::Result;

/// Columns of one 64-byte block: byte `4 * row + j` holds column `j` in its low half and column `4 + j` in its high half.
const BLOCK: usize = 8;
/// Row groups in one piece of work, whose largest estimate is kept.
const PIECE: usize = 4;
/// Rows of one piece.
const PIECE_ROWS: usize = PIECE * ROWS;
/// `ln(2 / p)` for `p` = 2^-80.
const LOG_RARITY: f64 = 81.0 * std::f64::consts::LN_2;
/// Rows known exactly at first, besides those asked for: the better the bound, the fewer rows pass it.
const FIRST: usize = 8;

/// The 4-bit codes of a head.
#[derive(Debug)]
pub(crate) struct HeadScreen {
    /// `[rows / 16, columns / 8]` blocks.
    codes: Pages,
    /// The step of each row; 0 behind the last.
    steps: Vec<f32>,
    /// The widest step of each piece, and of all.
    widest: Vec<f32>,
    widest_of_all: f32,
    /// The offset of each column, in [0, 1).
    offsets: Vec<f32>,
    rows: usize,
    columns: usize,
}

/// Working memory of a caller.
#[derive(Debug, Default)]
pub(crate) struct ScreenScratch {
    /// `h` in 15 bits: upper and lower seven bits, four columns a dword.
    upper: Vec<i32>,
    lower: Vec<i32>,
    /// Estimated logit of each row.
    estimates: Vec<f32>,
    /// Largest estimate of each piece and its row.
    peaks: Vec<(f32, u32)>,
    /// Rows whose logit is wanted exactly.
    chosen: Vec<u32>,
    order: Vec<u32>,
    /// The result: rows and logits, by row.
    logits: Vec<(u32, f32)>,
}

impl ScreenScratch {
    /// What was found last: rows and logits, by row.
    pub(crate) fn logits(&self) -> &[(u32, f32)] {
        &self.logits
    }

    /// Bytes allocated.
    pub(crate) fn memory_bytes(&self) -> usize {
        let dwords = [&self.upper, &self.lower].map(|v| v.capacity()).iter().sum::<usize>();
        let rows = [&self.chosen, &self.order].map(|v| v.capacity()).iter().sum::<usize>();
        4 * (dwords + rows + self.estimates.capacity()) + 8 * (self.peaks.capacity() + self.logits.capacity())
    }
}

/// A head and the state, `[columns]`, that it is applied to.
pub(crate) struct HeadAndState<'a> {
    pub(crate) head: &'a FloatTable,
    pub(crate) hidden: &'a [f32],
}

impl HeadAndState<'_> {
    /// The logits of some rows, as the head itself computes them. False when the head cannot be read.
    fn logits(&self, kernels: &Kernels, threads: &Threads, rows: &[u32], out: &mut Vec<(u32, f32)>) -> bool {
        out.clear();
        out.extend(rows.iter().map(|&row| (row, 0.0)));
        let worth = rows.len() * self.hidden.len() > 1 << 17;
        let failed = AtomicBool::new(false);
        threads.for_each_chunk(out, 16, worth, |_, rows| {
            for (row, logit) in rows {
                let one = std::slice::from_mut(logit);
                if self.head.with_rows(*row as usize, 1, |row| kernels.head(row, self.hidden, 1, one)).is_err() {
                    failed.store(true, Ordering::Relaxed);
                }
            }
        });
        !failed.into_inner()
    }
}

/// What the kernel of an instruction set needs.
pub(crate) struct ScreenPass<'a> {
    codes: &'a [u8],
    blocks: usize,
    upper: &'a [i32],
    lower: &'a [i32],
    steps: &'a [f32],
    /// An estimate is `step * (factor * sum - bias)`.
    factor: f32,
    bias: f32,
}

/// Estimates of the rows of groups `first .. first + out.len() / 16`.
#[inline(always)]
pub(super) fn screen<L: DotLanes>(pass: &ScreenPass<'_>, first: usize, out: &mut [f32]) {
    let (blocks, _) = as_chunks::<BLOCK_BYTES, _>(pass.codes);
    let (upper, lower) = (as_chunks::<2, _>(pass.upper).0, as_chunks::<2, _>(pass.lower).0);
    for (g, out) in out.chunks_mut(ROWS).enumerate() {
        let group = &blocks[(first + g) * pass.blocks..(first + g + 1) * pass.blocks];
        let mut sums = [[0i32; ROWS]; 2];
        let run = (L::RUN_4BIT / 2).max(1);
        for ((blocks, upper), lower) in group.chunks(run).zip(upper.chunks(run)).zip(lower.chunks(run)) {
            let mut partial = [[L::zero(); 2]; 2];
            for ((block, upper), lower) in blocks.iter().zip(upper).zip(lower) {
                L::prefetch(block.as_ptr().wrapping_add(4096));
                let halves = L::unpack_4bit(block);
                for p in 0..2 {
                    let chain = p % (L::PARTIALS / 2);
                    partial[0][chain] = L::mac(partial[0][chain], halves[p], L::broadcast(upper[p]));
                    partial[1][chain] = L::mac(partial[1][chain], halves[p], L::broadcast(lower[p]));
                }
            }
            for part in 0..2 {
                for p in 0..2 {
                    L::fold(partial[part][p], &mut sums[part]);
                }
            }
        }
        for (r, out) in out.iter_mut().enumerate() {
            // Exact: 15 * 2^7 * 127 * columns stays below 2^63, and the conversion rounds once.
            let sum = (i64::from(sums[0][r]) * 128 + i64::from(sums[1][r])) as f32;
            *out = pass.steps[(first + g) * ROWS + r] * (pass.factor * sum - pass.bias);
        }
    }
}

impl HeadScreen {
    /// Makes the codes of `head`.
    ///
    /// # Errors
    /// `MemoryError::AllocationFailed`, `ModelError::LoadingFailed` when the head cannot be read.
    pub(crate) fn new(head: &FloatTable, kernels: &Kernels, threads: &Threads) -> Result<Self> {
        let (rows, columns) = (head.rows(), head.columns());
        let group_bytes = columns.div_ceil(BLOCK) * BLOCK_BYTES;
        let groups = rows.div_ceil(ROWS);
        let mut codes = Pages::zeroed(groups.saturating_mul(group_bytes))?;
        let offsets: Vec<f32> = (0..columns as u64).map(offset).collect();
        let mut steps = vec![0f32; groups * ROWS];
        let places = Columns::new(&mut steps, ROWS);
        let failure = Mutex::new(None);
        threads.for_each_chunk(&mut codes, group_bytes.max(1), true, |g, group| {
            let (mut row, mut packed) = (vec![0f32; columns], vec![0u8; columns.next_multiple_of(BLOCK)]);
            let count = ROWS.min(rows - g * ROWS);
            let outcome = head.with_rows(g * ROWS, count, |group_rows| {
                for r in 0..count {
                    group_rows.row(r).widen(&mut row);
                    let step = kernels.screen_codes(&row, &offsets, &mut packed);
                    let (pairs, _) = as_chunks::<BLOCK, _>(&packed);
                    for (pair, block) in pairs.iter().zip(as_chunks_mut::<BLOCK_BYTES, _>(group).0) {
                        let pair = u64::from_le_bytes(*pair);
                        let lane = (pair | pair >> 28) as u32;
                        block[4 * r..4 * r + 4].copy_from_slice(&lane.to_le_bytes());
                    }
                    // SAFETY: group `g` is this piece's own, and the vector stays borrowed while the threads run.
                    let place = unsafe { places.slice(g, r, 1) };
                    place[0] = step;
                }
            });
            if let Err(error) = outcome {
                *failure.lock().unwrap_or_else(|e| e.into_inner()) = Some(error);
            }
        });
        if let Some(error) = failure.into_inner().unwrap_or_else(|e| e.into_inner()) {
            return Err(error);
        }
        Ok(Self::of_parts(codes, steps, offsets, (rows, columns)))
    }

    /// A screen as it was made before: `steps` of [`Self::step_count`] rows, and codes that `fill` writes.
    ///
    /// # Errors
    /// `MemoryError::AllocationFailed`.
    pub(crate) fn restore(
        (rows, columns): (usize, usize),
        steps: Vec<f32>,
        fill: impl FnOnce(&mut [u8]),
    ) -> Result<Self> {
        let mut codes = Pages::zeroed(rows.div_ceil(ROWS).saturating_mul(columns.div_ceil(BLOCK) * BLOCK_BYTES))?;
        fill(&mut codes);
        let offsets = (0..columns as u64).map(offset).collect();
        Ok(Self::of_parts(codes, steps, offsets, (rows, columns)))
    }

    /// The number of steps of a head of `rows` rows.
    pub(crate) fn step_count(rows: usize) -> usize {
        rows.next_multiple_of(ROWS)
    }

    /// The step of each row.
    pub(crate) fn steps(&self) -> &[f32] {
        &self.steps
    }

    /// The codes of all rows.
    pub(crate) fn codes(&self) -> &[u8] {
        &self.codes
    }

    fn of_parts(codes: Pages, steps: Vec<f32>, offsets: Vec<f32>, (rows, columns): (usize, usize)) -> Self {
        let widest: Vec<f32> =
            steps.chunks(PIECE_ROWS).map(|steps| steps.iter().copied().fold(0.0, f32::max)).collect();
        let widest_of_all = widest.iter().copied().fold(0.0, f32::max);
        Self { codes, steps, widest, widest_of_all, offsets, rows, columns }
    }

    /// Bytes held.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.codes.len() + (self.steps.capacity() + self.widest.capacity() + self.offsets.capacity()) * 4
    }

    /// Finds the logits of at least the `top` largest rows of the head, of every row that equals the last of them, and of the rows in
    /// `also`: they are in `scratch.logits()`, by row, each as the head itself computes it. False when so many rows pass that the
    /// whole head is the better way, when the state is too large for the bound, and when the head cannot be read.
    pub(crate) fn largest(
        &self,
        head: &HeadAndState<'_>,
        kernels: &Kernels,
        threads: &Threads,
        top: usize,
        also: &[u32],
        scratch: &mut ScreenScratch,
    ) -> bool {
        let most = self.rows / 8;
        if top > most / 2 {
            return false;
        }
        let Some(slack) = self.estimate(kernels, threads, head.hidden, scratch) else { return false };
        let ScreenScratch { estimates, peaks, chosen, order, logits, .. } = scratch;

        // A first choice of good rows, one a piece: the `top`-th largest of their logits is a floor for what is looked for.
        order.clear();
        order.extend(0..peaks.len() as u32);
        let first = (top + FIRST).min(peaks.len());
        let falling = |a: &u32, b: &u32| peaks[*b as usize].0.total_cmp(&peaks[*a as usize].0);
        order.select_nth_unstable_by(first - 1, falling);
        chosen.clear();
        chosen.extend(order[..first].iter().map(|&piece| peaks[piece as usize].1));
        if !head.logits(kernels, threads, chosen, logits) || logits.iter().any(|(_, logit)| !logit.is_finite()) {
            return false;
        }
        let floor = if top <= first {
            logits.select_nth_unstable_by(top.max(1) - 1, |a, b| b.1.total_cmp(&a.1)).1.1
        } else {
            f32::NEG_INFINITY
        };

        // Every row whose logit may reach the floor.
        let reaches = |estimate: f32, step: f32| f64::from(estimate) + f64::from(step) * slack >= f64::from(floor);
        chosen.clear();
        for (piece, steps) in self.steps.chunks(PIECE_ROWS).enumerate() {
            if !reaches(peaks[piece].0, self.widest[piece]) {
                continue;
            }
            let from = piece * PIECE_ROWS;
            let rows = PIECE_ROWS.min(self.rows - from);
            for (r, (&estimate, &step)) in estimates[from..from + rows].iter().zip(steps).enumerate() {
                if reaches(estimate, step) {
                    chosen.push((from + r) as u32);
                }
            }
            if chosen.len() > most {
                return false;
            }
        }
        chosen.extend(also.iter().copied().filter(|&row| (row as usize) < self.rows));
        chosen.sort_unstable();
        chosen.dedup();
        head.logits(kernels, threads, chosen, logits)
    }

    /// Fills in estimates and peaks; gives how far a row's logit can be from its estimate, in steps of the row.
    fn estimate(
        &self,
        kernels: &Kernels,
        threads: &Threads,
        hidden: &[f32],
        scratch: &mut ScreenScratch,
    ) -> Option<f64> {
        let n = (self.columns as f64).sqrt();
        let absmax = hidden.iter().fold(0f32, |m, h| m.max(h.abs()));
        let norm = hidden.iter().map(|&h| f64::from(h) * f64::from(h)).sum::<f64>().sqrt();
        // Far from where f32 overflows, in the head's sums too.
        if !norm.is_finite() || f64::from(self.widest_of_all) * 16.0 * n * norm > 1e30 {
            return None;
        }
        let unit = (absmax / 16256.0).max(f32::MIN_POSITIVE);
        let blocks = self.columns.div_ceil(BLOCK);
        for dwords in [&mut scratch.upper, &mut scratch.lower] {
            dwords.clear();
            dwords.resize(blocks * 2, 0);
        }
        let (mut bias, mut missed) = (0f64, 0f64);
        for (d, (hidden, offsets)) in hidden.chunks(4).zip(self.offsets.chunks(4)).enumerate() {
            let (mut upper, mut lower) = ([0u8; 4], [0u8; 4]);
            for (j, (&h, &u)) in hidden.iter().zip(offsets).enumerate() {
                let q = (h / unit).round_ties_even().clamp(-16256.0, 16256.0) as i32;
                let high = (q + 64) >> 7;
                upper[j] = high as i8 as u8;
                lower[j] = (q - 128 * high) as i8 as u8;
                let taken = f64::from(q) * f64::from(unit);
                bias += (7.5 + f64::from(u)) * taken;
                missed += (f64::from(h) - taken).powi(2);
            }
            scratch.upper[d] = i32::from_ne_bytes(upper);
            scratch.lower[d] = i32::from_ne_bytes(lower);
        }
        let pass = ScreenPass {
            codes: &self.codes,
            blocks,
            upper: &scratch.upper,
            lower: &scratch.lower,
            steps: &self.steps,
            factor: unit,
            bias: bias as f32,
        };
        let groups = self.steps.len() / ROWS;
        scratch.estimates.resize(groups * ROWS, 0.0);
        scratch.peaks.resize(groups.div_ceil(PIECE), (0.0, 0));
        let peaks = Columns::new(&mut scratch.peaks, groups.div_ceil(PIECE));
        let rows = self.rows;
        let worth = self.codes.len() > 1 << 18;
        // Eight pieces at a time: long enough to stream.
        threads.for_each_chunk(&mut scratch.estimates, 8 * PIECE_ROWS, worth, |chunk, estimates| {
            kernels.screen(&pass, chunk * 8 * PIECE, estimates);
            for (p, estimates) in estimates.chunks(PIECE_ROWS).enumerate() {
                let from = (chunk * 8 + p) * PIECE_ROWS;
                let inside = &estimates[..PIECE_ROWS.min(rows - from).min(estimates.len())];
                let peak = inside.iter().enumerate().fold((f32::NEG_INFINITY, from as u32), |best, (r, &e)| {
                    if e > best.0 { (e, (from + r) as u32) } else { best }
                });
                // SAFETY: piece `chunk * 8 + p` is this chunk's own, and the vector stays borrowed while the threads run.
                let place = unsafe { peaks.slice(0, chunk * 8 + p, 1) };
                place[0] = peak;
            }
        });
        // The dither's bound; what `h` lost in 15 bits; the roundings of the estimate, whose terms are at most 16 sqrt(n) |h|, and of
        // the head's sum in sixteen lanes and a tree, of terms with sum |w h| <= 8 D sqrt(n) |h|.
        let rounding = f64::from(f32::EPSILON) * (64.0 * n + 8.0 * n * (self.columns as f64 / 16.0 + 16.0));
        Some(norm * ((LOG_RARITY / 6.0).sqrt() + rounding) + 8.0 * n * missed.sqrt())
    }
}

/// A number in [0, 1) for column `i`: the upper 24 bits of splitmix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number
/// generators", 2014).
fn offset(i: u64) -> f32 {
    let mut z = i.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 40) as f32 / (1u32 << 24) as f32
}

/// See [`Kernels::screen_codes`].
#[inline(always)]
pub(super) fn codes(row: &[f32], offsets: &[f32], out: &mut [u8]) -> f32 {
    // Magnitudes compare as integers.
    let largest = row.iter().map(|w| w.to_bits() & 0x7fff_ffff).fold(0, u32::max);
    // So that 0.5 < w / D + u + 7.5 < 15.5, a hair apart for the rounding of the quotient.
    let step = (f32::from_bits(largest) / 6.999).max(f32::MIN_POSITIVE);
    let inverse = 1.0 / step;
    for ((o, &w), &u) in out.iter_mut().zip(row).zip(offsets) {
        // To the nearest integer: what is right in the middle may go either way, half a step from both.
        *o = ((w * inverse + (u + 7.5)) + ROUND).to_bits() as u8;
    }
    out[row.len()..].fill(0);
    step
}

#[cfg(test)]
mod tests;
