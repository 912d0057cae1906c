//! The float kernels, once for all instruction sets.
//!
//! Reductions keep sixteen partial sums (element `i` goes to lane `i % 16`) and add the lanes up in one fixed tree. The compiler
//! vectorises that without changing a bit, since Rust neither reorders float additions nor fuses multiply-adds on its own.

use super::chunks::{as_chunks, as_chunks_mut};
use crate::model::FloatRows;

/// Partial sums of a reduction.
const LANES: usize = 16;

/// What [`quantize`] found out about a row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct ActivationScale {
    /// The quantiser's factor `k`: `q = round(x * k)`.
    pub(crate) k: f32,
    /// Sum of the int8 values.
    pub(crate) sum: i32,
}

/// Adds the lanes up: 16, 8, 4, 2, 1.
#[inline(always)]
pub(super) fn tree(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// `sum_i a[i] * b[i]` in sixteen lanes.
#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let (a_body, a_tail) = as_chunks::<LANES, _>(a);
    let (b_body, b_tail) = as_chunks::<LANES, _>(b);
    for (x, y) in a_body.iter().zip(b_body) {
        for l in 0..LANES {
            lanes[l] += x[l] * y[l];
        }
    }
    for (l, (x, y)) in a_tail.iter().zip(b_tail).enumerate() {
        lanes[l] += x * y;
    }
    tree(lanes)
}

/// See [`super::Kernels::rms_norm`]. `transformers` `BitNetRMSNorm`: normalise first, then multiply by the gain.
#[inline(always)]
pub(super) fn rms_norm(x: &[f32], gain: &[f32], eps: f32, out: &mut [f32]) -> bool {
    let mean = dot(x, x) / x.len() as f32;
    let factor = 1.0 / (mean + eps).sqrt();
    for ((o, &x), &g) in out.iter_mut().zip(x).zip(gain) {
        *o = g * (x * factor);
    }
    mean.is_finite()
}

/// Adding and subtracting 1.5 * 2^23 rounds to the nearest integer, ties to even, for |x| < 2^22.
pub(super) const ROUND: f32 = 12_582_912.0;

/// See [`super::Kernels::quantize`].
#[inline(always)]
pub(super) fn quantize(x: &[f32], out: &mut [i8]) -> Option<ActivationScale> {
    // Magnitudes compare as integers, with infinity and NaN above every number: none is lost, as it would be in a float maximum.
    let magnitude = |x: &f32| x.to_bits() & 0x7fff_ffff;
    let largest = x.iter().map(magnitude).fold(0, u32::max);
    if largest >= f32::INFINITY.to_bits() {
        return None;
    }
    let absmax = f32::from_bits(largest).max(1e-5);
    let k = (1.0 / absmax) * 127.0;
    let (body, padding) = out.split_at_mut(x.len());
    for (o, &x) in body.iter_mut().zip(x) {
        let rounded = (x * k + ROUND).to_bits() as i32 - ROUND.to_bits() as i32;
        *o = rounded.clamp(-128, 127) as i8;
    }
    padding.fill(0);
    let sum = body.iter().map(|&q| i32::from(q)).sum();
    Some(ActivationScale { k, sum })
}

/// See [`super::Kernels::relu2_gate`].
#[inline(always)]
pub(super) fn relu2_gate(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((o, &u), &g) in out.iter_mut().zip(up).zip(gate) {
        // A NaN gate must stay one: f32::max would turn it into 0.
        let r = if g < 0.0 { 0.0 } else { g };
        *o = u * (r * r);
    }
}

/// See [`super::Kernels::silu_gate`]. Both signs go by `e^-|x|`, which cannot overflow.
#[inline(always)]
pub(super) fn silu_gate(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((o, &u), &g) in out.iter_mut().zip(up).zip(gate) {
        let e = exp_nonpositive(-g.abs());
        let sigmoid = if g < 0.0 { e / (1.0 + e) } else { 1.0 / (1.0 + e) };
        *o = u * (g * sigmoid);
    }
}

/// See [`super::Kernels::all_finite`].
#[inline(always)]
pub(super) fn all_finite(x: &[f32]) -> bool {
    let largest = x.iter().map(|x| x.to_bits() & 0x7fff_ffff).fold(0, u32::max);
    largest < f32::INFINITY.to_bits()
}

/// `e^x` for x <= 0 to about 1e-7 relative, 0 below -87: the polynomial of Cephes `expf` after a Cody-Waite reduction by ln 2.
/// Our own, so that it vectorises and gives the same bits on every instruction set and platform.
#[inline(always)]
pub(super) fn exp_nonpositive(x: f32) -> f32 {
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    let clamped = if x < -87.0 { -87.0 } else { x };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (clamped - n * LN2_HI) - n * LN2_LO;
    let mut p = 1.987_569_1e-4f32;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let e = (p * (r * r) + r) + 1.0;
    // 2^n through the exponent bits; n is within -126..=0.
    let power = f32::from_bits(((shifted.to_bits() as i32 - ROUND.to_bits() as i32 + 127) as u32) << 23);
    if x < -87.0 { 0.0 } else { e * power }
}

/// See [`super::Kernels::head`].
#[inline(always)]
pub(super) fn head(rows: FloatRows<'_>, hidden: &[f32], tokens: usize, out: &mut [f32]) {
    match rows {
        FloatRows::F32 { values, columns } => {
            for (row, out) in values.chunks_exact(columns).zip(out.chunks_exact_mut(tokens)) {
                head_row(row, |&w| w, hidden, out);
            }
        }
        FloatRows::Bf16 { values, columns } => {
            for (row, out) in values.chunks_exact(columns).zip(out.chunks_exact_mut(tokens)) {
                head_row(row, |&w| f32::from_bits(u32::from(w) << 16), hidden, out);
            }
        }
    }
}

/// One row of the head against all tokens, four at a time; each token's sum is the same as [`dot`]'s.
#[inline(always)]
fn head_row<W>(row: &[W], widen: impl Fn(&W) -> f32 + Copy, hidden: &[f32], out: &mut [f32]) {
    let columns = row.len();
    let (out4, out1) = as_chunks_mut::<4, _>(out);
    let (hidden4, hidden1) = hidden.split_at(out4.len() * 4 * columns);
    for (out, hidden) in out4.iter_mut().zip(hidden4.chunks_exact(4 * columns)) {
        *out = head_tokens::<W, 4>(row, widen, hidden);
    }
    for (out, hidden) in out1.iter_mut().zip(hidden1.chunks_exact(columns)) {
        [*out] = head_tokens::<W, 1>(row, widen, hidden);
    }
}

#[inline(always)]
fn head_tokens<W, const N: usize>(row: &[W], widen: impl Fn(&W) -> f32 + Copy, hidden: &[f32]) -> [f32; N] {
    let columns = row.len();
    let token: [&[f32]; N] = std::array::from_fn(|t| &hidden[t * columns..(t + 1) * columns]);
    let mut lanes = [[0f32; LANES]; N];
    let (body, tail) = as_chunks::<LANES, _>(row);
    let tokens: [&[[f32; LANES]]; N] = token.map(|t| as_chunks::<LANES, _>(t).0);
    for (i, w) in body.iter().enumerate() {
        let w: [f32; LANES] = std::array::from_fn(|l| widen(&w[l]));
        for t in 0..N {
            for l in 0..LANES {
                lanes[t][l] += tokens[t][i][l] * w[l];
            }
        }
    }
    let done = body.len() * LANES;
    for (l, w) in tail.iter().enumerate() {
        for t in 0..N {
            lanes[t][l] += token[t][done + l] * widen(w);
        }
    }
    lanes.map(tree)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn exp_is_right_to_two_units_in_the_last_place() {
        let mut worst = 0f64;
        for i in 0..=870_000 {
            let x = -(i as f32) * 1e-4;
            let truth = f64::from(x).exp();
            worst = worst.max((f64::from(exp_nonpositive(x)) - truth).abs() / truth);
        }
        assert!(worst < 2.5e-7, "{worst}");
        assert_eq!(exp_nonpositive(0.0), 1.0);
        assert_eq!(exp_nonpositive(f32::NEG_INFINITY), 0.0);
        assert!(exp_nonpositive(f32::NAN).is_nan());
    }

    #[test]
    fn rounding_is_half_to_even() {
        // absmax 127 makes k exactly (1/127)*127 = 1.0 in f32.
        let x = [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5];
        let mut q = [99i8; 12];
        let scale = quantize(&x, &mut q).unwrap();
        assert_eq!(scale.k, (1.0f32 / 127.0) * 127.0);
        assert_eq!(q, [127, 0, 2, 2, 0, -2, -2, 126, -126, 0, 0, 0]);
        assert_eq!(scale.sum, 127);
    }

    #[test]
    fn zeroes_quantise_to_zeroes_and_non_finite_values_are_refused() {
        let mut q = [1i8; 16];
        let scale = quantize(&[0.0; 16], &mut q).unwrap();
        assert_eq!((q, scale.k, scale.sum), ([0; 16], (1.0f32 / 1e-5) * 127.0, 0));
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = [1.0; 5];
            x[3] = bad;
            assert!(quantize(&x, &mut q).is_none());
            assert!(!all_finite(&x));
        }
    }

    #[test]
    fn an_overflowing_norm_is_reported() {
        let mut out = [0.0; 4];
        assert!(!rms_norm(&[1e30; 4], &[1.0; 4], 1e-5, &mut out));
        assert!(rms_norm(&[1e10; 4], &[1.0; 4], 1e-5, &mut out));
        assert_eq!(out, [1.0; 4]);
    }

    #[test]
    fn a_nan_gate_stays_nan() {
        let mut out = [0.0; 3];
        relu2_gate(&[f32::NAN, -3.0, 3.0], &[1.0, 1.0, 2.0], &mut out);
        assert!(out[0].is_nan());
        assert_eq!(out[1..], [0.0, 18.0]);
        silu_gate(&[f32::NAN, f32::NEG_INFINITY, f32::INFINITY], &[1.0; 3], &mut out);
        assert!(out.iter().all(|u| !u.is_finite()), "what is not finite shows");
    }

    #[test]
    fn silu_is_right_and_the_same_bits_on_every_instruction_set() {
        use crate::kernels::{Isa, Kernels};
        let gate: Vec<f32> = (-9_000..9_001).map(|i| i as f32 * 0.01).collect();
        let up = vec![2.0; gate.len()];
        let mut reference = vec![0.0; gate.len()];
        silu_gate(&gate, &up, &mut reference);
        for (&g, &u) in gate.iter().zip(&reference) {
            let x = f64::from(g);
            let truth = 2.0 * x / (1.0 + (-x).exp());
            // Below -87 the exponential is a zero.
            assert!((f64::from(u) - truth).abs() <= 5e-7 * truth.abs() + 1e-35, "{g}: {u} {truth}");
        }
        for isa in Isa::available() {
            let mut out = vec![0.0; gate.len()];
            Kernels::of(isa).unwrap().silu_gate(&gate, &up, &mut out);
            assert!(out.iter().map(|u| u.to_bits()).eq(reference.iter().map(|u| u.to_bits())), "{isa}");
        }
    }

    proptest! {
        #[test]
        fn quantised_values_are_the_rounded_quotients(x in prop::collection::vec(-1e4f32..1e4, 1..70)) {
            let mut q = vec![0i8; x.len()];
            let scale = quantize(&x, &mut q).unwrap();
            for (&x, &q) in x.iter().zip(&q) {
                prop_assert_eq!(f32::from(q), (x * scale.k).round_ties_even());
            }
        }

        #[test]
        fn tokens_of_a_head_tile_equal_single_dots(columns in 1usize..70, tokens in 1usize..7, seed in any::<u32>()) {
            let value = |i: usize| (((i as u32).wrapping_mul(2_654_435_761).wrapping_add(seed) >> 8) as f32 / (1 << 23) as f32) - 1.0;
            let w: Vec<f32> = (0..columns).map(value).collect();
            let x: Vec<f32> = (0..columns * tokens).map(|i| value(i + 1000)).collect();
            let mut out = vec![0.0; tokens];
            head(FloatRows::F32 { values: &w, columns }, &x, tokens, &mut out);
            for t in 0..tokens {
                prop_assert_eq!(out[t].to_bits(), dot(&x[t * columns..(t + 1) * columns], &w).to_bits());
            }
        }
    }
}
