//! Honest ways to compute the same numbers: other orders of summing, float32 throughout, 16-bit floats where they are
//! declared, other ways to the activation factor and to the softmax, other element types of the outputs.

use super::super::HonestVariant;
use super::super::naive::{At, Deviation, Honest, Naive, Ternary, Weights};
use crate::backend::{Capabilities, Noise, Semantics};
use crate::invariance::Invariance;
use bitnet_contracts::{DType, InferenceOutput, KVCache, Result, Tensor};
use half::{bf16, f16};
use std::sync::Arc;

/// A variant that declares all that the naive engine can do.
const fn variant(
    name: &'static str,
    what: &'static str,
    semantics: Semantics,
    make: fn() -> Arc<dyn Deviation>,
) -> HonestVariant {
    HonestVariant { name, what, declare: |c| c, semantics, make }
}

/// One that declares 16-bit floats somewhere.
const fn coarse(name: &'static str, what: &'static str, make: fn() -> Arc<dyn Deviation>) -> HonestVariant {
    HonestVariant { name, what, declare: declared_coarse, semantics: Semantics::W158A8, make }
}

fn declared_coarse(capabilities: Capabilities) -> Capabilities {
    capabilities.with_noise(Noise::Coarse)
}

/// As above, and the logits that a caller sees are not those that generation chooses from.
fn rounded_outputs(capabilities: Capabilities) -> Capabilities {
    capabilities.with_invariance(Invariance::default()).with_noise(Noise::Coarse)
}

pub(super) const VARIANTS: &[HonestVariant] = &[
    variant("sums-in-order", "float32 sums from the first term on", Semantics::W158A8, || Arc::new(Sums(in_order))),
    variant("sums-reversed", "float32 sums from the last term on", Semantics::W158A8, || Arc::new(Sums(reversed))),
    variant("sums-pairwise", "float32 sums of halves", Semantics::W158A8, || Arc::new(Sums(pairwise))),
    variant("sums-in-lanes", "float32 sums in eight lanes", Semantics::W158A8, || Arc::new(Sums(in_lanes))),
    variant("sums-in-order-fp32", "float32 sums from the first term on", Semantics::Fp32, || Arc::new(Sums(in_order))),
    variant("sums-pairwise-fp32", "float32 sums of halves", Semantics::Fp32, || Arc::new(Sums(pairwise))),
    variant("sums-in-lanes-fp32", "float32 sums in eight lanes", Semantics::Fp32, || Arc::new(Sums(in_lanes))),
    variant("one-division", "the activation factor is one division", Semantics::W158A8, || Arc::new(OneDivision)),
    variant("one-pass-softmax", "the softmax in one pass, in float32", Semantics::W158A8, || Arc::new(OnePass)),
    variant("noise-times-ten", "every step is off by up to ten roundings", Semantics::W158A8, || Arc::new(Noisy)),
    variant("rope-in-f64", "RoPE in double precision", Semantics::W158A8, || Arc::new(RopeInDouble)),
    variant("logits-f64", "logits are f64", Semantics::W158A8, || {
        Arc::new(Outputs(|mut o| {
            o.logits = o.logits.to_dtype(DType::F64)?;
            Ok(o)
        }))
    }),
    variant("logits-strided", "logits are a part of a larger tensor", Semantics::W158A8, || {
        Arc::new(Outputs(|mut o| {
            let vocab = o.logits.dim(2)?;
            o.logits = o.logits.pad_with_zeros(2, 3, 5)?.narrow(2, 3, vocab)?;
            Ok(o)
        }))
    }),
    coarse("f16-cache", "keys and values are f16", || Arc::new(Kept(|x| f16::from_f32(x).to_f32()))),
    coarse("bf16-cache", "keys and values are bf16", || Arc::new(Kept(|x| bf16::from_f32(x).to_f32()))),
    coarse("bf16-norms", "norms give bf16", || Arc::new(NormsInBf16)),
    coarse("bf16-residual", "the residual stream is bf16", || Arc::new(ResidualInBf16)),
    coarse("bf16-throughout", "all that goes from one step to the next is bf16", || Arc::new(Bf16Throughout)),
    HonestVariant {
        declare: rounded_outputs,
        ..coarse("logits-f16", "logits are f16", || {
            Arc::new(Outputs(|mut o| {
                o.logits = o.logits.to_dtype(DType::F16)?;
                Ok(o)
            }))
        })
    },
    HonestVariant {
        declare: rounded_outputs,
        ..coarse("logits-bf16", "logits are bf16", || {
            Arc::new(Outputs(|mut o| {
                o.logits = o.logits.to_dtype(DType::BF16)?;
                Ok(o)
            }))
        })
    },
    coarse("optional-outputs-f16", "hidden states and attention weights are f16", || {
        Arc::new(Outputs(|mut o| {
            o.hidden_states = o.hidden_states.map(|h| h.to_dtype(DType::F16)).transpose()?;
            let narrow = |layers: Vec<Tensor>| layers.iter().map(|w| w.to_dtype(DType::F16)).collect();
            o.attention_weights = o.attention_weights.map(narrow).transpose()?;
            Ok(o)
        }))
    }),
];

/// Float sums in another order: of projections in fp32 semantics, of norms and of the head in both.
struct Sums(fn(&[f32]) -> f32);

impl Deviation for Sums {
    fn norm(&self, _: &At<'_>, x: &[f32], gain: &[f32], eps: f64) -> Vec<f32> {
        let squares: Vec<f32> = x.iter().map(|v| v * v).collect();
        let factor = 1.0 / ((self.0)(&squares) / x.len() as f32 + eps as f32).sqrt();
        x.iter().zip(gain).map(|(v, g)| g * (v * factor)).collect()
    }

    fn dots_float(&self, _: &At<'_>, matrix: &Ternary, x: &[f32]) -> Vec<f32> {
        let dot = |trits: &[i8]| (self.0)(&trits.iter().zip(x).map(|(&t, v)| f32::from(t) * v).collect::<Vec<_>>());
        matrix.each_row().map(dot).collect()
    }

    fn rescale(&self, _: &At<'_>, product: i32, scale: f32, k: f32) -> f32 {
        product as f32 * (scale / k)
    }

    fn head(&self, _: &At<'_>, weights: &Weights, hidden: &[f32]) -> Vec<f32> {
        let product = |row: &[f32]| (self.0)(&row.iter().zip(hidden).map(|(a, b)| a * b).collect::<Vec<_>>());
        weights.head().chunks_exact(hidden.len()).map(product).collect()
    }
}

fn in_order(terms: &[f32]) -> f32 {
    terms.iter().sum()
}

fn reversed(terms: &[f32]) -> f32 {
    terms.iter().rev().sum()
}

fn pairwise(terms: &[f32]) -> f32 {
    match terms.len() {
        0..=2 => terms.iter().sum(),
        n => pairwise(&terms[..n / 2]) + pairwise(&terms[n / 2..]),
    }
}

fn in_lanes(terms: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 8];
    terms.iter().enumerate().for_each(|(i, term)| lanes[i % 8] += term);
    lanes.iter().sum()
}

/// 127 / a is another float than (1 / a) × 127 for a quarter of all a, by one unit in the last place.
struct OneDivision;

impl Deviation for OneDivision {
    fn quantise(&self, _: &At<'_>, x: &[f32]) -> (Vec<i16>, f32) {
        let k = 127.0 / x.iter().fold(1e-5f32, |a, &v| a.max(v.abs()));
        (x.iter().map(|&v| (v * k).round_ties_even().clamp(-127.0, 127.0) as i16).collect(), k)
    }
}

/// The sum is corrected whenever a larger score comes, as attention in tiles does it.
struct OnePass;

impl Deviation for OnePass {
    fn softmax(&self, _: &At<'_>, scores: &[f64]) -> Vec<f64> {
        let (mut largest, mut total) = (f32::NEG_INFINITY, 0.0f32);
        for &score in scores {
            let score = score as f32;
            if score > largest {
                total *= (largest - score).exp();
                largest = score;
            }
            total += (score - largest).exp();
        }
        scores.iter().map(|&score| f64::from((score as f32 - largest).exp() / total)).collect()
    }
}

/// Approximations of roots, exponentials and divisions, each as good as fast ones are.
struct Noisy;

impl Noisy {
    /// A number off by up to ten roundings, the same number always by the same. What needs few bits comes out right.
    fn off(x: f32) -> f32 {
        if x.to_bits().trailing_zeros() >= 10 {
            return x;
        }
        let draw = x.to_bits().wrapping_mul(0x9e37_79b1) >> 16;
        x * (1.0 + (draw as f32 / 32_768.0 - 1.0) * 10.0 * f32::EPSILON / 2.0)
    }
}

impl Deviation for Noisy {
    fn norm(&self, at: &At<'_>, x: &[f32], gain: &[f32], eps: f64) -> Vec<f32> {
        Honest.norm(at, x, gain, eps).into_iter().map(Self::off).collect()
    }

    fn rescale(&self, at: &At<'_>, product: i32, scale: f32, k: f32) -> f32 {
        Self::off(Honest.rescale(at, product, scale, k))
    }

    fn softmax(&self, at: &At<'_>, scores: &[f64]) -> Vec<f64> {
        Honest.softmax(at, scores).into_iter().map(|p| f64::from(Self::off(p as f32))).collect()
    }

    fn gated(&self, gate: f32, up: f32) -> f32 {
        Self::off(Honest.gated(gate, up))
    }
}

/// Angles that are not rounded to float32 on the way.
struct RopeInDouble;

impl Deviation for RopeInDouble {
    fn rope(&self, _: &At<'_>, head: &mut [f32], position: usize, theta: f64) {
        let (size, half) = (head.len(), head.len() / 2);
        for i in 0..half {
            let (sin, cos) = (position as f64 * theta.powf(-2.0 * i as f64 / size as f64)).sin_cos();
            let (a, b) = (f64::from(head[i]), f64::from(head[i + half]));
            head[i] = (a * cos - b * sin) as f32;
            head[i + half] = (b * cos + a * sin) as f32;
        }
    }
}

/// What the cache holds is rounded.
struct Kept(fn(f32) -> f32);

impl Deviation for Kept {
    fn remember(&self, _: &At<'_>, values: &mut [f32]) {
        values.iter_mut().for_each(|x| *x = (self.0)(*x));
    }
}

struct NormsInBf16;

impl Deviation for NormsInBf16 {
    fn norm(&self, _: &At<'_>, x: &[f32], gain: &[f32], eps: f64) -> Vec<f32> {
        let mean = x.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>() / x.len() as f64;
        let factor = (1.0 / (mean + eps).sqrt()) as f32;
        x.iter().zip(gain).map(|(&v, &g)| bf16::from_f32(g * bf16::from_f32(v * factor).to_f32()).to_f32()).collect()
    }
}

struct ResidualInBf16;

impl Deviation for ResidualInBf16 {
    fn residual(&self, _: &At<'_>, x: &mut [f32], y: &[f32]) {
        x.iter_mut().zip(y).for_each(|(x, y)| *x = bf16::from_f32(*x + y).to_f32());
    }
}

/// As a model that was moved to bf16 computes.
struct Bf16Throughout;

impl Deviation for Bf16Throughout {
    fn embed(&self, at: &At<'_>, weights: &Weights, token: u32) -> Vec<f32> {
        let mut x = Honest.embed(at, weights, token);
        self.projected(at, &mut x);
        x
    }

    fn norm(&self, at: &At<'_>, x: &[f32], gain: &[f32], eps: f64) -> Vec<f32> {
        NormsInBf16.norm(at, x, gain, eps)
    }

    fn projected(&self, _: &At<'_>, values: &mut [f32]) {
        values.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32());
    }

    fn remember(&self, at: &At<'_>, values: &mut [f32]) {
        self.projected(at, values);
    }

    fn softmax(&self, at: &At<'_>, scores: &[f64]) -> Vec<f64> {
        let rounded: Vec<f64> = scores.iter().map(|&s| bf16::from_f64(s).to_f64()).collect();
        Honest.softmax(at, &rounded).into_iter().map(|p| bf16::from_f64(p).to_f64()).collect()
    }

    fn residual(&self, at: &At<'_>, x: &mut [f32], y: &[f32]) {
        ResidualInBf16.residual(at, x, y);
    }

    fn gated(&self, gate: f32, up: f32) -> f32 {
        bf16::from_f32(Honest.gated(gate, up)).to_f32()
    }
}

/// The outputs of a call in another form.
struct Outputs(fn(InferenceOutput) -> Result<InferenceOutput>);

impl Deviation for Outputs {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        (self.0)(engine.honest_forward(ids, cache)?)
    }
}
