//! One transformer layer, top to bottom as in the papers (BitNet b1.58 2B4T technical report; `transformers` `modeling_bitnet.py`).

use bitnet_contracts::Result;

use super::cache::CpuCache;
use super::rope::Rope;
use super::run::{Observed, Row, Run};
use crate::kernels::{TernaryJob, ternary_matmul};
use crate::ternary::InterleavedMatrix;

/// A linear layer without bias.
pub(crate) type TernaryLinear = InterleavedMatrix;

/// The weights of a layer. H hidden, F intermediate, K keys and values.
#[derive(Debug)]
pub(crate) struct Layer {
    /// `[H]`
    pub(super) input_norm: Vec<f32>,
    /// `[H, H]`
    pub(super) q: TernaryLinear,
    /// `[K, H]`
    pub(super) k: TernaryLinear,
    /// `[K, H]`
    pub(super) v: TernaryLinear,
    /// `[H]`, over all heads at once
    pub(super) attention_sub_norm: Vec<f32>,
    /// `[H, H]`
    pub(super) o: TernaryLinear,
    /// `[H]`
    pub(super) post_attention_norm: Vec<f32>,
    /// `[F, H]`
    pub(super) gate: TernaryLinear,
    /// `[F, H]`
    pub(super) up: TernaryLinear,
    /// `[F]`
    pub(super) ffn_sub_norm: Vec<f32>,
    /// `[H, F]`
    pub(super) down: TernaryLinear,
}

/// The parts of a layer, in the order of the fields of [`Layer`] among the linear ones and among the norms as `load.rs` lists them.
pub(super) struct LayerParts {
    /// q, k, v, o, gate, up, down.
    pub(super) linears: [TernaryLinear; 7],
    /// Input, attention's sub-norm, post-attention, feed-forward's sub-norm.
    pub(super) norms: [Vec<f32>; 4],
}

impl Layer {
    pub(super) fn new(parts: LayerParts) -> Self {
        let [q, k, v, o, gate, up, down] = parts.linears;
        let [input_norm, attention_sub_norm, post_attention_norm, ffn_sub_norm] = parts.norms;
        Self { input_norm, q, k, v, attention_sub_norm, o, post_attention_norm, gate, up, ffn_sub_norm, down }
    }

    /// Runs the layer on the residual stream `run.buffers.x`, `[rows, H]`, in place. Keys and values go to `cache`.
    pub(super) fn forward(
        &self,
        index: usize,
        run: &mut Run,
        rope: &Rope,
        rows: &[Row],
        cache: &mut CpuCache,
        observed: &mut Observed,
    ) -> Result<()> {
        // Attention: one quantised input serves q, k and v.
        run.norm_and_quantize(&self.input_norm, "input norm", index)?;
        let b = &mut run.buffers;
        let jobs = [
            TernaryJob { weights: &self.q, out: &mut b.q, add: false },
            TernaryJob { weights: &self.k, out: &mut b.k, add: false },
            TernaryJob { weights: &self.v, out: &mut b.v, add: false },
        ];
        ternary_matmul(run.kernels, &run.threads, &run.quantized, jobs);
        run.lap(|t| &mut t.attention);
        run.rotate_and_store(rope, index, rows, cache)?;
        run.attend(rope, index, rows, cache, observed);
        run.lap(|t| &mut t.attention_scores);
        run.sub_norm_and_quantize(&self.attention_sub_norm, "attention sub-norm", index)?;
        run.project_and_add(&self.o);
        run.lap(|t| &mut t.attention);

        // Feed-forward: squared ReLU (or SiLU) on the gate branch, one quantised input for gate and up.
        run.norm_and_quantize(&self.post_attention_norm, "post-attention norm", index)?;
        let b = &mut run.buffers;
        let jobs = [
            TernaryJob { weights: &self.gate, out: &mut b.gate, add: false },
            TernaryJob { weights: &self.up, out: &mut b.up, add: false },
        ];
        ternary_matmul(run.kernels, &run.threads, &run.quantized, jobs);
        run.lap(|t| &mut t.feed_forward);
        run.gate_norm_and_quantize(&self.ffn_sub_norm, "FFN sub-norm", index)?;
        run.project_and_add(&self.down);
        run.lap(|t| &mut t.feed_forward);
        Ok(())
    }

    pub(super) fn linears(&self) -> [&TernaryLinear; 7] {
        [&self.q, &self.k, &self.v, &self.o, &self.gate, &self.up, &self.down]
    }

    /// The norms, in the order of [`LayerParts`].
    pub(super) fn norms(&self) -> [&Vec<f32>; 4] {
        [&self.input_norm, &self.attention_sub_norm, &self.post_attention_norm, &self.ffn_sub_norm]
    }

    /// Ternary weights of the layer: so many products a token.
    pub(super) fn ternary_weights(&self) -> usize {
        self.linears().iter().map(|l| l.rows() * l.columns()).sum()
    }

    /// Bytes of the layer's weights.
    pub(super) fn memory_bytes(&self) -> usize {
        self.linears().iter().map(|l| l.memory_bytes()).sum::<usize>()
            + self.norms().iter().map(|n| n.capacity() * 4).sum::<usize>()
    }
}
