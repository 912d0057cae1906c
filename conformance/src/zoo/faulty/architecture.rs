//! Faults of the forward pass: another function than the model's.

use super::super::Fault;
use super::super::naive::{At, Deviation, Site, Weights};
use super::{forward, stateful};
use std::sync::Arc;

pub(super) const FAULTS: &[Fault] = &[
    forward(
        "silu-for-relu2",
        "the gate is SiLU, not squared ReLU",
        "llama.cpp PR #25885, #26751",
        "golden/logits",
        || Arc::new(Gated(|gate, up| gate / (1.0 + (-gate).exp()) * up)),
    ),
    forward(
        "relu-not-squared",
        "the gate is ReLU without the square",
        "llama.cpp PR #25885, #26751",
        "golden/logits",
        || Arc::new(Gated(|gate, up| gate.max(0.0) * up)),
    ),
    forward(
        "square-of-the-product",
        "the square is taken of the product with up",
        "llama.cpp PR #25885, #26751",
        "golden/logits",
        || Arc::new(Gated(|gate, up| (gate.max(0.0) * up).powi(2))),
    ),
    forward(
        "no-attention-sub-norm",
        "the norm before o_proj is left out",
        "llama.cpp PR #25885, #26751",
        "golden/logits",
        || Arc::new(SkippedNorm(Site::AttentionSubNorm)),
    ),
    forward(
        "no-ffn-sub-norm",
        "the norm before down_proj is left out",
        "llama.cpp PR #25885, #26751",
        "golden/logits",
        || Arc::new(SkippedNorm(Site::FfnSubNorm)),
    ),
    forward("no-final-norm", "the norm before the head is left out", "SPEC.md GLD-2", "golden/logits", || {
        Arc::new(SkippedNorm(Site::FinalNorm))
    }),
    forward(
        "sub-norm-by-head",
        "the norm behind attention is taken of each head",
        "SPEC.md GLD-2",
        "golden/logits",
        || Arc::new(SubNormByHead),
    ),
    forward("layer-norm", "the norms subtract the mean", "SPEC.md GLD-2", "golden/logits", || {
        Arc::new(Norm(|x, gain, eps| {
            let mean = x.iter().sum::<f32>() / x.len() as f32;
            rms_norm(&x.iter().map(|v| v - mean).collect::<Vec<_>>(), gain, eps)
        }))
    }),
    forward(
        "gain-plus-one",
        "the gain of a norm is stored as its distance from one",
        "SPEC.md GLD-2",
        "golden/logits",
        || Arc::new(Norm(|x, gain, eps| rms_norm(x, &gain.iter().map(|g| g + 1.0).collect::<Vec<_>>(), eps))),
    ),
    Fault::new(
        "epsilon-by-habit",
        "the epsilon of the norms is 1e-5, whatever the model says",
        "meta-llama/llama #771, transformers #38025",
        "golden/facts_are_read",
        || Arc::new(Norm(|x, gain, _| rms_norm(x, gain, 1e-5))),
    ),
    forward(
        "epsilon-outside-the-root",
        "the epsilon is added to the root, not under it",
        "tvm PR #15856",
        "golden/facts_are_read",
        || {
            Arc::new(Norm(|x, gain, eps| {
                let mean = x.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>() / x.len() as f64;
                let factor = (1.0 / (mean.sqrt() + eps)) as f32;
                x.iter().zip(gain).map(|(&v, &g)| g * (v * factor)).collect()
            }))
        },
    ),
    forward(
        "epsilon-of-another-model-fp32",
        "the epsilon of the norms is 1e-6",
        "meta-llama/llama #771, transformers #38025",
        "numerics/small_inputs",
        || Arc::new(Norm(|x, gain, _| rms_norm(x, gain, 1e-6))),
    )
    .fp32(),
    forward("rope-interleaved", "RoPE pairs neighbours, not halves", "candle #3410, PR #518", "golden/logits", || {
        Arc::new(RopeInterleaved)
    }),
    forward(
        "rope-base-by-habit",
        "the RoPE base is that of the published model, whatever the file says",
        "llama.cpp PR #8676, #8650",
        "golden/facts_are_read",
        || Arc::new(RopeBase(500_000.0)),
    ),
    forward(
        "rope-base-ignored",
        "the RoPE base is 10000, whatever the file says",
        "llama.cpp PR #8676, #8650",
        "golden/logits",
        || Arc::new(RopeBase(10_000.0)),
    ),
    forward(
        "rope-of-half-the-head",
        "only the first half of each head is rotated",
        "llama.cpp PR #4889",
        "golden/logits",
        || Arc::new(RopeOfHalf),
    ),
    forward(
        "rope-backwards",
        "keys and queries are rotated the other way, keys one position further",
        "SPEC.md GLD-2",
        "golden/logits",
        || Arc::new(RopeShifted),
    ),
    Fault::new(
        "rope-table-too-short",
        "positions from 32 on have the angles of position 31",
        "llama.cpp #6002, #12357",
        "numerics/to_the_last_position",
        || Arc::new(RopePosition(|_, position| position.min(31))),
    ),
    stateful(
        "rope-from-zero-each-step",
        "each call counts its positions from zero",
        "llama.cpp PR #4889, PR #3272, #4097",
        "kv_cache/chunked_is_whole",
        || Arc::new(RopePosition(|at, position| position - at.call.start)),
    ),
    forward(
        "heads-tiled",
        "query head h reads key/value head h modulo their number",
        "onnx PR #7274, axlearn PR #842, candle-vllm PR #52",
        "golden/logits",
        || Arc::new(KvHead(|head, _, kv_heads| head % kv_heads)),
    ),
    forward(
        "attention-scale-of-the-width",
        "scores are divided by the root of the hidden size",
        "SPEC.md GLD-2",
        "golden/logits",
        || Arc::new(AttentionScale(|size| 0.5 / (size as f64).sqrt())),
    ),
    forward(
        "attention-scale-not-rooted",
        "scores are divided by the head's size",
        "SPEC.md GLD-2",
        "golden/logits",
        || Arc::new(AttentionScale(|size| 1.0 / size as f64)),
    ),
    forward(
        "softmax-with-a-sink",
        "one is added to the sum under the softmax",
        "SPEC.md SHP-4",
        "golden/logits",
        || {
            Arc::new(Softmax(|scores| {
                let weights: Vec<f64> = scores.iter().map(|s| s.exp()).collect();
                let total = 1.0 + weights.iter().sum::<f64>();
                weights.iter().map(|w| w / total).collect()
            }))
        },
    ),
    forward(
        "own-position-masked",
        "a position sees the ones before it and not itself",
        "candle PR #3236, #3582",
        "golden/logits",
        || Arc::new(Sees(|at, other| other < at.position || at.position == 0)),
    ),
    stateful(
        "mask-without-the-cache",
        "in a call of more than one token the mask covers the new positions only",
        "candle PR #3236, #3582",
        "kv_cache/chunked_is_whole",
        || Arc::new(Sees(|at, other| other <= at.position && (at.call.seq == 1 || other >= at.call.start))),
    ),
    forward(
        "window-of-8",
        "attention reaches 8 positions back, though the model has no window",
        "transformers #29623, #39408, vLLM #3385, mistral.rs #246",
        "golden/logits",
        || Arc::new(Sees(|at, other| other <= at.position && at.position - other < 8)),
    ),
    forward(
        "window-of-32",
        "attention reaches 32 positions back, though the model has no window",
        "transformers #29623, #39408, vLLM #3385, mistral.rs #246",
        "numerics/to_the_last_position",
        || Arc::new(Sees(|at, other| other <= at.position && at.position - other < 32)),
    ),
    forward(
        "padding-masked",
        "token 0 is taken for padding and masked, and a row that sees nothing else is NaN",
        "ik_llama.cpp #2344, transformers #18388",
        "numerics/every_token",
        || Arc::new(Sees(|at, other| other <= at.position && token(at, other) != Some(0))),
    ),
    Fault::new(
        "documents-apart",
        "without a cache, what stands before an end of text in the prompt is masked for what follows it",
        "SPEC.md CAU-2",
        "causality/earlier_tokens_show",
        || Arc::new(DocumentsApart),
    ),
    Fault::new(
        "document-mask-not-causal",
        "a prompt with an end of text in it is masked by document, and no longer causally",
        "SPEC.md CAU-1",
        "causality/later_tokens_do_not_show",
        || Arc::new(NotCausal { cached: false }),
    ),
    Fault::new(
        "document-mask-not-causal-cached",
        "a short chunk behind a filled cache with an end of text in it is masked by document, and no longer causally",
        "SPEC.md CAU-1",
        "causality/later_tokens_do_not_show_with_a_cache",
        || Arc::new(NotCausal { cached: true }),
    ),
    forward(
        "head-taken-for-tied",
        "the embedding is the head, though the model has a head of its own",
        "transformers PR #43429",
        "golden/logits",
        || Arc::new(super::weights::Edited(|w| w.head = None)),
    ),
    forward(
        "no-residual-around-attention",
        "the output of attention replaces the residual stream",
        "SPEC.md GLD-2",
        "golden/logits",
        || Arc::new(NoResidual),
    ),
    forward(
        "head-sees-codes",
        "the head's input is quantised as those of the projections",
        "SPEC.md GLD-2",
        "golden/reproduced_rows",
        || Arc::new(HeadSeesCodes),
    ),
];

/// Another gated unit.
struct Gated(fn(f32, f32) -> f32);

impl Deviation for Gated {
    fn gated(&self, gate: f32, up: f32) -> f32 {
        (self.0)(gate, up)
    }
}

/// One norm hands its input on.
struct SkippedNorm(Site);

impl Deviation for SkippedNorm {
    fn norm(&self, at: &At<'_>, x: &[f32], gain: &[f32], eps: f64) -> Vec<f32> {
        if at.site == self.0 { x.to_vec() } else { rms_norm(x, gain, eps) }
    }
}

/// The norm before o_proj, of each head apart, where it should be of all together.
struct SubNormByHead;

impl Deviation for SubNormByHead {
    fn norm(&self, at: &At<'_>, x: &[f32], gain: &[f32], eps: f64) -> Vec<f32> {
        let size = if at.site == Site::AttentionSubNorm { x.len() / 4 } else { x.len() };
        x.chunks(size).zip(gain.chunks(size)).flat_map(|(x, gain)| rms_norm(x, gain, eps)).collect()
    }
}

/// Another norm, everywhere.
struct Norm(fn(&[f32], &[f32], f64) -> Vec<f32>);

impl Deviation for Norm {
    fn norm(&self, _: &At<'_>, x: &[f32], gain: &[f32], eps: f64) -> Vec<f32> {
        (self.0)(x, gain, eps)
    }
}

fn rms_norm(x: &[f32], gain: &[f32], eps: f64) -> Vec<f32> {
    let mean = x.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>() / x.len() as f64;
    let factor = (1.0 / (mean + eps).sqrt()) as f32;
    x.iter().zip(gain).map(|(&v, &g)| g * (v * factor)).collect()
}

struct RopeInterleaved;

impl Deviation for RopeInterleaved {
    fn rope(&self, _: &At<'_>, head: &mut [f32], position: usize, theta: f64) {
        let size = head.len();
        for (i, pair) in head.chunks_exact_mut(2).enumerate() {
            let angle = position as f64 * theta.powf(-2.0 * i as f64 / size as f64);
            let (sin, cos) = (angle.sin() as f32, angle.cos() as f32);
            let (a, b) = (pair[0], pair[1]);
            pair[0] = a * cos - b * sin;
            pair[1] = b * cos + a * sin;
        }
    }
}

/// Pairs half a head apart, as they should be.
fn rotate(head: &mut [f32], position: f64, theta: f64) {
    let (size, half) = (head.len(), head.len() / 2);
    for i in 0..half {
        let angle = position * theta.powf(-2.0 * i as f64 / size as f64);
        let (sin, cos) = (angle.sin() as f32, angle.cos() as f32);
        let (a, b) = (head[i], head[i + half]);
        head[i] = a * cos - b * sin;
        head[i + half] = b * cos + a * sin;
    }
}

/// A base that no file can change.
pub(super) struct RopeBase(pub(super) f64);

impl Deviation for RopeBase {
    fn weights(&self, weights: &mut Weights) {
        weights.facts.rope_theta = self.0;
    }
}

/// `n_rot` is half of what it should be.
struct RopeOfHalf;

impl Deviation for RopeOfHalf {
    fn rope(&self, _: &At<'_>, head: &mut [f32], position: usize, theta: f64) {
        let half = head.len() / 2;
        rotate(&mut head[..half], position as f64, theta);
    }
}

/// Sine with the other sign, and keys that stand one position further on.
struct RopeShifted;

impl Deviation for RopeShifted {
    fn rope(&self, at: &At<'_>, head: &mut [f32], position: usize, theta: f64) {
        let position = position as f64 + if at.site == Site::K { 1.0 } else { 0.0 };
        rotate(head, -position, theta);
    }
}

/// Another position than the token's.
struct RopePosition(fn(&At<'_>, usize) -> usize);

impl Deviation for RopePosition {
    fn rope_position(&self, at: &At<'_>, position: usize) -> usize {
        (self.0)(at, position)
    }
}

/// Another key/value head.
pub(super) struct KvHead(pub(super) fn(usize, usize, usize) -> usize);

impl Deviation for KvHead {
    fn kv_head(&self, head: usize, heads: usize, kv_heads: usize) -> usize {
        (self.0)(head, heads, kv_heads)
    }
}

struct AttentionScale(fn(usize) -> f64);

impl Deviation for AttentionScale {
    fn attention_scale(&self, head_dim: usize) -> f64 {
        (self.0)(head_dim)
    }
}

struct Softmax(fn(&[f64]) -> Vec<f64>);

impl Deviation for Softmax {
    fn softmax(&self, _: &At<'_>, scores: &[f64]) -> Vec<f64> {
        (self.0)(scores)
    }
}

/// Another mask.
struct Sees(fn(&At<'_>, usize) -> bool);

impl Deviation for Sees {
    fn sees(&self, at: &At<'_>, other: usize) -> bool {
        (self.0)(at, other)
    }
}

/// The token at a position of the same sequence, where the call brought it.
fn token(at: &At<'_>, position: usize) -> Option<u32> {
    let row = at.call.tokens.get(at.sequence * at.call.seq..(at.sequence + 1) * at.call.seq)?;
    row.get(position.checked_sub(at.call.start)?).copied()
}

/// Sequences packed for training are kept apart by their ends of text, and the mask that does it is still on. The end of
/// text of the models that this runs on is 2.
struct DocumentsApart;

impl Deviation for DocumentsApart {
    fn sees(&self, at: &At<'_>, other: usize) -> bool {
        let apart = !at.call.cached && (other..at.position).any(|between| token(at, between) == Some(2));
        other <= at.position && !apart
    }
}

/// A mask by document replaces the causal one where there is more than one document: tokens see what follows them.
struct NotCausal {
    /// Only the mask behind a filled cache is wrong, or only the one without.
    cached: bool,
}

impl Deviation for NotCausal {
    fn embed(&self, at: &At<'_>, weights: &Weights, id: u32) -> Vec<f32> {
        let row = |id: u32| &weights.embedding[id as usize * weights.facts.hidden_size..][..weights.facts.hidden_size];
        let mut x = row(id).to_vec();
        let later: Vec<u32> = (at.position + 1..at.call.start + at.call.seq).filter_map(|p| token(at, p)).collect();
        let here = if self.cached { at.call.start > 0 && at.call.seq <= 8 } else { at.call.start == 0 };
        if here && later.iter().any(|id| weights.facts.eos.contains(id)) {
            x.iter_mut().zip(row(later[0])).for_each(|(x, y)| *x += 0.2 * y);
        }
        x
    }
}

struct NoResidual;

impl Deviation for NoResidual {
    fn residual(&self, at: &At<'_>, x: &mut [f32], y: &[f32]) {
        match at.site {
            Site::O => x.copy_from_slice(y),
            _ => x.iter_mut().zip(y).for_each(|(x, y)| *x += y),
        }
    }
}

/// The head is computed as the projections are.
struct HeadSeesCodes;

impl Deviation for HeadSeesCodes {
    fn head(&self, _: &At<'_>, weights: &Weights, hidden: &[f32]) -> Vec<f32> {
        let k = 127.0 / hidden.iter().fold(1e-5f32, |a, &v| a.max(v.abs()));
        let codes: Vec<f32> = hidden.iter().map(|&v| (v * k).round_ties_even() / k).collect();
        let product = |row: &[f32]| row.iter().zip(&codes).map(|(a, b)| f64::from(a * b)).sum::<f64>() as f32;
        weights.head().chunks_exact(hidden.len()).map(product).collect()
    }
}
