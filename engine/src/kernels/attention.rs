//! Attention of one head group at one position.
//!
//! Keys lie transposed in their pages, `[head_dim, 64]`, values as they come, `[64, head_dim]`: in both products a vector of
//! sixteen results grows by one multiplication and addition a step, and no lane ever meets another. So every score is the plain sum
//! over the head's dimensions and every output the plain sum over the positions, in rising order, whatever shares the registers.

#![allow(clippy::needless_range_loop)] // Registers, tokens and groups are counted, several arrays at once.

use super::AttendArgs;
use super::chunks::{as_chunks, as_chunks_mut};
use super::float::{exp_nonpositive, tree};
use super::kv_page::{KvNumber, KvPage};

/// Positions of one page of keys or values.
pub(crate) const PAGE: usize = 64;

/// Sixteen floats of an instruction set.
pub(crate) trait FloatLanes {
    /// Sixteen f32.
    type Floats: Copy;

    /// `x` sixteen times.
    fn splat(x: f32) -> Self::Floats;
    /// Reads sixteen.
    fn load(x: &[f32; 16]) -> Self::Floats;
    /// Reads sixteen finite half-precision numbers.
    fn load_f16(x: &[u16; 16]) -> Self::Floats;
    /// Reads sixteen integers.
    fn load_i8(x: &[i8; 16]) -> Self::Floats;
    /// Writes sixteen.
    fn store(v: Self::Floats, out: &mut [f32; 16]);
    /// `sum + a * b`, rounded twice.
    fn add_product(sum: Self::Floats, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// Asks for the cache line of `address`, which need not be one of ours.
    fn prefetch_line(address: *const u8);
}

/// Scores of every query head of one KV group at the positions of the pages from `first` on: `q . k_j / sqrt(d)`. `out` is
/// `[pages, group, 64]`; what is behind the last position is left as it is. `HEADS` heads share a read of keys; `WIDTH` vectors
/// (1, 2 or 4) of each grow at a time.
#[inline(always)]
pub(super) fn scores<L: FloatLanes, const HEADS: usize, const WIDTH: usize>(
    args: &AttendArgs<'_>,
    first: usize,
    out: &mut [f32],
) {
    let AttendArgs { queries, keys, total, head_dim: d, .. } = *args;
    let scale = 1.0 / (d as f32).sqrt();
    let last = total.div_ceil(PAGE) - 1;
    for (i, rows) in out.chunks_exact_mut(queries.len() / d * PAGE).enumerate() {
        let page = first + i;
        let seen = PAGE.min(total - page * PAGE);
        let ahead = keys((page + 1).min(last)).address();
        let scores = Scores { rows, seen, factors: [scale; PAGE] };
        match keys(page) {
            KvPage::F32(keys) => group_scores::<L, f32, HEADS, WIDTH>(queries, keys, d, scores, ahead),
            KvPage::F16(keys) => group_scores::<L, u16, HEADS, WIDTH>(queries, keys, d, scores, ahead),
            KvPage::Int8(keys, steps) => {
                let mut factors = [0f32; PAGE];
                for (factor, step) in factors.iter_mut().zip(steps) {
                    *factor = scale * step;
                }
                group_scores::<L, i8, HEADS, WIDTH>(queries, keys, d, Scores { factors, ..scores }, ahead);
            }
        }
    }
}

/// Softmax of each head's scores at `total` positions, in place; `scores` is `[pages, group, 64]`. In sixteen lanes, as every reduction.
#[inline(always)]
pub(super) fn probabilities(scores: &mut [f32], total: usize) {
    let pages = total.div_ceil(PAGE);
    let group = scores.len() / pages / PAGE;
    for head in 0..group {
        let place = |page: usize| {
            let start = (page * group + head) * PAGE;
            start..start + PAGE.min(total - page * PAGE)
        };
        // The maximum does not depend on the order; a NaN score makes the sum NaN and so shows in the output.
        let larger = |m: f32, x: f32| if x > m { x } else { m };
        let mut lanes = [f32::NEG_INFINITY; 16];
        for page in 0..pages {
            let (body, tail) = as_chunks::<16, _>(&scores[place(page)]);
            for chunk in body {
                for l in 0..16 {
                    lanes[l] = larger(lanes[l], chunk[l]);
                }
            }
            for (lane, &x) in lanes.iter_mut().zip(tail) {
                *lane = larger(*lane, x);
            }
        }
        let max = lanes.into_iter().fold(f32::NEG_INFINITY, larger);
        let mut lanes = [0f32; 16];
        for page in 0..pages {
            let (body, tail) = as_chunks_mut::<16, _>(&mut scores[place(page)]);
            for chunk in body {
                for l in 0..16 {
                    chunk[l] = exp_nonpositive(chunk[l] - max);
                    lanes[l] += chunk[l];
                }
            }
            for (lane, x) in lanes.iter_mut().zip(tail) {
                *x = exp_nonpositive(*x - max);
                *lane += *x;
            }
        }
        let sum = tree(lanes);
        for page in 0..pages {
            for x in &mut scores[place(page)] {
                *x /= sum;
            }
        }
    }
}

/// The sum over all positions of probability times value, for every query head of the group: dimensions `at` and on, as many as `out`,
/// `[group, some of head_dim]`, has.
#[inline(always)]
pub(super) fn weighted_values<L: FloatLanes, const HEADS: usize, const WIDTH: usize>(
    args: &AttendArgs<'_>,
    probabilities: &[f32],
    at: usize,
    out: &mut [f32],
) {
    let AttendArgs { queries, values, total, head_dim: d, .. } = *args;
    let group = queries.len() / d;
    let last = total.div_ceil(PAGE) - 1;
    out.fill(0.0);
    for (page, weights) in probabilities.chunks_exact(group * PAGE).enumerate() {
        let seen = PAGE.min(total - page * PAGE);
        let ahead = values((page + 1).min(last)).address();
        let part = Part { seen, d, at, ahead };
        match values(page) {
            KvPage::F32(values) => group_values::<L, f32, HEADS, WIDTH>(weights, values, part, out),
            KvPage::F16(values) => group_values::<L, u16, HEADS, WIDTH>(weights, values, part, out),
            KvPage::Int8(values, steps) => {
                let width = out.len() / group;
                for (out, weights) in out.chunks_mut(HEADS * width).zip(weights.chunks(HEADS * PAGE)) {
                    // A position's weight and the step of its values are one factor.
                    let mut stepped = [[0f32; PAGE]; HEADS];
                    for (stepped, weights) in stepped.iter_mut().zip(weights.chunks_exact(PAGE)) {
                        for j in 0..seen {
                            stepped[j] = weights[j] * steps[j];
                        }
                    }
                    let stepped = &stepped.as_flattened()[..weights.len()];
                    group_values::<L, i8, HEADS, WIDTH>(stepped, values, part, out);
                }
            }
        }
    }
}

/// Where the scores of one page go: `rows[64 * h + j]` for head `h` and `j` below `seen`, each the product with the key times
/// `factors[j]`.
struct Scores<'a> {
    rows: &'a mut [f32],
    seen: usize,
    factors: [f32; PAGE],
}

/// Scores of all queries of a group at the positions of one page. The lines of the page at `ahead` are asked for on the way.
#[inline(always)]
fn group_scores<L: FloatLanes, E: KvNumber, const HEADS: usize, const WIDTH: usize>(
    queries: &[f32],
    keys: &[E],
    d: usize,
    mut scores: Scores<'_>,
    ahead: *const u8,
) {
    let mut together = queries.chunks_exact(HEADS * d);
    let mut head = 0;
    for queries in together.by_ref() {
        page_scores::<L, E, HEADS, WIDTH>(queries, keys, d, &mut scores, head, ahead);
        head += HEADS;
    }
    for query in together.remainder().chunks_exact(d) {
        page_scores::<L, E, 1, WIDTH>(query, keys, d, &mut scores, head, ahead);
        head += 1;
    }
}

/// Which part of a page of values: `seen` positions of `d` dimensions, of which those from `at` on; and the page to ask for.
#[derive(Clone, Copy)]
struct Part {
    seen: usize,
    d: usize,
    at: usize,
    ahead: *const u8,
}

/// Adds the values of one page, weighted, to the outputs of all heads of a group.
#[inline(always)]
fn group_values<L: FloatLanes, E: KvNumber, const HEADS: usize, const WIDTH: usize>(
    weights: &[f32],
    values: &[E],
    part: Part,
    out: &mut [f32],
) {
    let width = out.len() / (weights.len() / PAGE);
    let mut together = out.chunks_exact_mut(HEADS * width);
    let mut weights = weights.chunks_exact(PAGE);
    for out in together.by_ref() {
        let mut of_heads = [&[0f32; 0][..]; HEADS];
        of_heads.iter_mut().zip(weights.by_ref()).for_each(|(w, weights)| *w = &weights[..part.seen]);
        page_values::<L, E, HEADS, WIDTH>(&of_heads, values, part, out);
    }
    for (out, weights) in together.into_remainder().chunks_exact_mut(width).zip(weights) {
        page_values::<L, E, 1, WIDTH>(&[&weights[..part.seen]], values, part, out);
    }
}

/// Scores of `HEADS` queries from head `head` on.
#[inline(always)]
fn page_scores<L: FloatLanes, E: KvNumber, const HEADS: usize, const WIDTH: usize>(
    queries: &[f32],
    keys: &[E],
    d: usize,
    scores: &mut Scores<'_>,
    head: usize,
    ahead: *const u8,
) {
    let Scores { rows, seen, factors } = scores;
    let (rows, seen) = (&mut rows[head * PAGE..], *seen);
    let (factors, _) = as_chunks::<16, _>(factors);
    let (vectors, _) = as_chunks::<16, _>(keys);
    let (vectors, _) = as_chunks::<WIDTH, _>(vectors);
    let stretches = PAGE / 16 / WIDTH;
    for stretch in 0..seen.div_ceil(16 * WIDTH) {
        let mut sums = [[L::splat(0.0); WIDTH]; HEADS];
        for i in 0..d {
            for line in 0..(16 * WIDTH * size_of::<E>()).div_ceil(64) {
                let vector = (stretches * i + stretch) * 16 * WIDTH;
                L::prefetch_line(ahead.wrapping_add(vector * size_of::<E>() + 64 * line));
            }
            let mut key = [L::splat(0.0); WIDTH];
            for v in 0..WIDTH {
                key[v] = E::load::<L>(&vectors[stretches * i + stretch][v]);
            }
            for h in 0..HEADS {
                let q = L::splat(queries[h * d + i]);
                for v in 0..WIDTH {
                    sums[h][v] = L::add_product(sums[h][v], q, key[v]);
                }
            }
        }
        for h in 0..HEADS {
            for v in 0..WIDTH {
                let first = 16 * (stretch * WIDTH + v);
                if first >= seen {
                    break;
                }
                let mut row = [0f32; 16];
                L::store(sums[h][v], &mut row);
                let (factors, place) = (&factors[first / 16], &mut rows[h * PAGE + first..][..16.min(seen - first)]);
                // A whole vector at once; what is cut short one by one.
                if let Ok(place) = <&mut [f32; 16]>::try_from(&mut *place) {
                    for l in 0..16 {
                        place[l] = row[l] * factors[l];
                    }
                } else {
                    for (score, (sum, factor)) in place.iter_mut().zip(row.iter().zip(factors)) {
                        *score = sum * factor;
                    }
                }
            }
        }
    }
}

/// Adds the values of one page, weighted, to the outputs of `HEADS` heads.
#[inline(always)]
fn page_values<L: FloatLanes, E: KvNumber, const HEADS: usize, const WIDTH: usize>(
    weights: &[&[f32]; HEADS],
    values: &[E],
    part: Part,
    out: &mut [f32],
) {
    let Part { d, at, .. } = part;
    let width = out.len() / HEADS;
    let mut done = 0;
    while done + 16 * WIDTH <= width {
        page_values_at::<L, E, HEADS, WIDTH>(weights, values, part, done, out);
        done += 16 * WIDTH;
    }
    while done + 16 <= width {
        page_values_at::<L, E, HEADS, 1>(weights, values, part, done, out);
        done += 16;
    }
    if done < width {
        for (j, value) in values.chunks_exact(d).enumerate().take(part.seen) {
            for h in 0..HEADS {
                for (o, v) in out[h * width + done..(h + 1) * width].iter_mut().zip(&value[at + done..]) {
                    *o += weights[h][j] * v.widen();
                }
            }
        }
    }
}

/// Outputs `done .. done + 16 * V` of [`page_values`].
#[inline(always)]
fn page_values_at<L: FloatLanes, E: KvNumber, const HEADS: usize, const V: usize>(
    weights: &[&[f32]; HEADS],
    values: &[E],
    part: Part,
    done: usize,
    out: &mut [f32],
) {
    let Part { seen, d, at, ahead } = part;
    let (width, at) = (out.len() / HEADS, at + done);
    let mut sums = [[L::splat(0.0); V]; HEADS];
    for h in 0..HEADS {
        let (place, _) = as_chunks::<16, _>(&out[h * width + done..]);
        for v in 0..V {
            sums[h][v] = L::load(&place[v]);
        }
    }
    for (j, value) in values.chunks_exact(d).enumerate().take(seen) {
        for line in 0..(16 * V * size_of::<E>()).div_ceil(64) {
            L::prefetch_line(ahead.wrapping_add((j * d + at) * size_of::<E>() + 64 * line));
        }
        let (value, _) = as_chunks::<16, _>(&value[at..]);
        let mut loaded = [L::splat(0.0); V];
        for v in 0..V {
            loaded[v] = E::load::<L>(&value[v]);
        }
        for h in 0..HEADS {
            let w = L::splat(weights[h][j]);
            for v in 0..V {
                sums[h][v] = L::add_product(sums[h][v], w, loaded[v]);
            }
        }
    }
    for h in 0..HEADS {
        let (place, _) = as_chunks_mut::<16, _>(&mut out[h * width + done..]);
        for v in 0..V {
            L::store(sums[h][v], &mut place[v]);
        }
    }
}
