//! Attention of one head group at one position.
//!
//! Keys lie transposed in their pages, `[head_dim, 64]`, values as they come, `[64, head_dim]`: in both products a vector of
//! sixteen results grows by one multiplication and addition a step, and no lane ever meets another. So every score is the plain sum
//! over the head's dimensions and every output the plain sum over the positions, in rising order, whatever shares the registers.

#![allow(clippy::needless_range_loop)] // Registers, tokens and groups are counted, several arrays at once.

use super::AttendArgs;
use super::chunks::{as_chunks, as_chunks_mut};
use super::float::softmax;

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
    /// Writes sixteen.
    fn store(v: Self::Floats, out: &mut [f32; 16]);
    /// `sum + a * b`, rounded twice.
    fn add_product(sum: Self::Floats, a: Self::Floats, b: Self::Floats) -> Self::Floats;
}

/// See [`super::Kernels::attend`]: `softmax(q . k_j / sqrt(d))` over `0..total`, then the weighted sum of the values, for every query
/// head of one KV group. `HEADS` heads share a read of keys or values; `WIDTH` vectors (1, 2 or 4) of each grow at a time.
#[inline(always)]
pub(super) fn attend<L: FloatLanes, const HEADS: usize, const WIDTH: usize>(
    args: &AttendArgs<'_>,
    scores: &mut [f32],
    out: &mut [f32],
) {
    let AttendArgs { queries, keys, values, total, head_dim: d } = *args;
    let scale = 1.0 / (d as f32).sqrt();
    for page in 0..total.div_ceil(PAGE) {
        let (first, keys) = (page * PAGE, keys(page));
        let seen = PAGE.min(total - first);
        let (queries, queries_left) = (queries.chunks_exact(HEADS * d), queries.chunks_exact(HEADS * d).remainder());
        let heads = queries.len() * HEADS;
        for (i, queries) in queries.enumerate() {
            page_scores::<L, HEADS, WIDTH>(
                queries,
                keys,
                d,
                scale,
                &mut scores[i * HEADS * total + first..],
                total,
                seen,
            );
        }
        for (i, query) in queries_left.chunks_exact(d).enumerate() {
            page_scores::<L, 1, WIDTH>(query, keys, d, scale, &mut scores[(heads + i) * total + first..], total, seen);
        }
    }
    for row in scores.chunks_exact_mut(total) {
        softmax(row);
    }
    out.fill(0.0);
    for page in 0..total.div_ceil(PAGE) {
        let (first, values) = (page * PAGE, values(page));
        let values = &values[..PAGE.min(total - first) * d];
        let mut groups = out.chunks_exact_mut(HEADS * d);
        let mut head = 0;
        for out in groups.by_ref() {
            page_values::<L, HEADS, WIDTH>(&scores[head * total + first..], total, values, d, out);
            head += HEADS;
        }
        for out in groups.into_remainder().chunks_exact_mut(d) {
            page_values::<L, 1, WIDTH>(&scores[head * total + first..], total, values, d, out);
            head += 1;
        }
    }
}

/// Scores of `HEADS` queries at the positions of one page: `scores[h * stride + j]` for `j` below `seen`.
#[inline(always)]
fn page_scores<L: FloatLanes, const HEADS: usize, const WIDTH: usize>(
    queries: &[f32],
    keys: &[f32],
    d: usize,
    scale: f32,
    scores: &mut [f32],
    stride: usize,
    seen: usize,
) {
    let (vectors, _) = as_chunks::<16, _>(keys);
    let (vectors, _) = as_chunks::<WIDTH, _>(vectors);
    let stretches = PAGE / 16 / WIDTH;
    for stretch in 0..seen.div_ceil(16 * WIDTH) {
        let mut sums = [[L::splat(0.0); WIDTH]; HEADS];
        for i in 0..d {
            let mut key = [L::splat(0.0); WIDTH];
            for v in 0..WIDTH {
                key[v] = L::load(&vectors[stretches * i + stretch][v]);
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
                let place = &mut scores[h * stride + first..][..16.min(seen - first)];
                // A whole vector at once; what is cut short one by one.
                if let Ok(place) = <&mut [f32; 16]>::try_from(&mut *place) {
                    for l in 0..16 {
                        place[l] = row[l] * scale;
                    }
                } else {
                    for (score, sum) in place.iter_mut().zip(row) {
                        *score = sum * scale;
                    }
                }
            }
        }
    }
}

/// Adds the values of one page, weighted, to the outputs of `HEADS` heads.
#[inline(always)]
fn page_values<L: FloatLanes, const HEADS: usize, const WIDTH: usize>(
    weights: &[f32],
    stride: usize,
    values: &[f32],
    d: usize,
    out: &mut [f32],
) {
    let weights: [&[f32]; HEADS] = std::array::from_fn(|h| &weights[h * stride..][..values.len() / d]);
    let mut at = 0;
    while at + 16 * WIDTH <= d {
        page_values_at::<L, HEADS, WIDTH>(&weights, values, d, at, out);
        at += 16 * WIDTH;
    }
    while at + 16 <= d {
        page_values_at::<L, HEADS, 1>(&weights, values, d, at, out);
        at += 16;
    }
    if at < d {
        for (j, value) in values.chunks_exact(d).enumerate() {
            for h in 0..HEADS {
                for (o, v) in out[h * d + at..(h + 1) * d].iter_mut().zip(&value[at..]) {
                    *o += weights[h][j] * v;
                }
            }
        }
    }
}

/// Dimensions `at .. at + 16 * V` of [`page_values`].
#[inline(always)]
fn page_values_at<L: FloatLanes, const HEADS: usize, const V: usize>(
    weights: &[&[f32]; HEADS],
    values: &[f32],
    d: usize,
    at: usize,
    out: &mut [f32],
) {
    let mut sums = [[L::splat(0.0); V]; HEADS];
    for h in 0..HEADS {
        let (place, _) = as_chunks::<16, _>(&out[h * d + at..]);
        for v in 0..V {
            sums[h][v] = L::load(&place[v]);
        }
    }
    for (j, value) in values.chunks_exact(d).enumerate() {
        let (value, _) = as_chunks::<16, _>(&value[at..]);
        let mut loaded = [L::splat(0.0); V];
        for v in 0..V {
            loaded[v] = L::load(&value[v]);
        }
        for h in 0..HEADS {
            let w = L::splat(weights[h][j]);
            for v in 0..V {
                sums[h][v] = L::add_product(sums[h][v], w, loaded[v]);
            }
        }
    }
    for h in 0..HEADS {
        let (place, _) = as_chunks_mut::<16, _>(&mut out[h * d + at..]);
        for v in 0..V {
            L::store(sums[h][v], &mut place[v]);
        }
    }
}
