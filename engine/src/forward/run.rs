//! What one caller works with: kernels, threads, buffers that are allocated once, and the clock.

use std::time::{Duration, Instant};

use bitnet_contracts::{ForwardPassError, Result};

use super::attention::AttentionWeights;
use super::cache::CpuCache;
use super::layer::TernaryLinear;
use super::rope::Rope;
use super::transformer::Transformer;
use crate::kernels::{
    HeadAndState, Kernels, QuantizedActivations, RowFailure, ScreenScratch, TernaryJob, Threads, head_matmul,
    ternary_matmul,
};
use crate::model::Activation;

/// Most rows that go through a layer together, a multiple of every panel's tile. Longer inputs are cut; where does not show in the
/// results. A layer's weights are read once for so many tokens.
const MAX_ROWS: usize = 264;

/// One token of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Row {
    /// Which sequence of the batch.
    pub(crate) sequence: usize,
    /// Position in its sequence.
    pub(crate) position: usize,
    /// Token id, below the vocabulary size.
    pub(crate) token: u32,
}

/// Where the time of some passes went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Times {
    /// Rows of the embedding and angles of the positions.
    pub embedding: Duration,
    /// Attention's four ternary products.
    pub attention: Duration,
    /// Rotation, the cache's new keys and values, scores, softmax, weighted values.
    pub attention_scores: Duration,
    /// The feed-forward block's three ternary products.
    pub feed_forward: Duration,
    /// The final norm.
    pub normalization: Duration,
    /// A layer's norms and its gate, each one pass with the quantisation behind it.
    pub quantization: Duration,
    /// The head, or its screen and the rows that pass it.
    pub logits: Duration,
}

/// Which logits a caller wants.
pub(crate) enum Wanted<'a> {
    /// Those of every row, `[rows, vocabulary]`.
    Every(&'a mut [f32]),
    /// Those of the last row, `[vocabulary]`.
    Last(&'a mut [f32]),
    /// At least the `top` largest of the last row and those of the tokens in `also`: they are in [`Run::largest`] if `enough` is set;
    /// if not, the whole head is the better way ([`Run::last_logits`]).
    Largest { top: usize, also: &'a [u32], enough: &'a mut bool },
}

/// What a caller wants to see besides logits.
#[derive(Debug, Default)]
pub(crate) struct Observed {
    /// Attention probabilities.
    pub(crate) attention: Option<AttentionWeights>,
    /// Final normed states, `[rows, H]`.
    pub(crate) hidden: Option<Vec<f32>>,
}

/// Buffers for up to [`MAX_ROWS`] rows, `[rows, width]` each.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    pub(super) x: Vec<f32>,
    pub(super) normed: Vec<f32>,
    pub(super) q: Vec<f32>,
    pub(super) k: Vec<f32>,
    pub(super) v: Vec<f32>,
    /// `[KV heads, rows, width of a group]`.
    pub(super) attended: Vec<f32>,
    pub(super) gate: Vec<f32>,
    pub(super) up: Vec<f32>,
    pub(super) angles: Vec<f32>,
    /// Attention of one row by all threads: queries, scores, outputs.
    pub(super) deep: [Vec<f32>; 3],
}

/// One caller's state. Results never depend on what ran before.
pub(crate) struct Run {
    pub(super) kernels: &'static Kernels,
    pub(super) threads: Threads,
    pub(super) quantized: QuantizedActivations,
    pub(super) buffers: Buffers,
    screen: ScreenScratch,
    pub(super) eps: f32,
    pub(super) hidden: usize,
    intermediate: usize,
    pub(super) head_dim: usize,
    pub(super) kv_heads: usize,
    activation: Activation,
    times: Times,
    clock: Instant,
}

impl Run {
    pub(crate) fn new(model: &Transformer, kernels: &'static Kernels, threads: Threads) -> Self {
        let d = &model.description;
        Self {
            kernels,
            threads,
            quantized: QuantizedActivations::default(),
            buffers: Buffers::default(),
            screen: ScreenScratch::default(),
            eps: d.rms_norm_eps as f32,
            hidden: d.hidden_size,
            intermediate: d.intermediate_size,
            head_dim: d.head_dim(),
            kv_heads: d.num_key_value_heads,
            activation: d.activation,
            times: Times::default(),
            clock: Instant::now(),
        }
    }

    /// The kernels in use.
    pub(crate) fn kernels(&self) -> &'static Kernels {
        self.kernels
    }

    /// Times since the last call of this function.
    pub(crate) fn take_times(&mut self) -> Times {
        std::mem::take(&mut self.times)
    }

    /// Bytes of the buffers: residual stream and projections, then int8 activations.
    pub(crate) fn memory_bytes(&self) -> (usize, usize) {
        let b = &self.buffers;
        let floats = [&b.x, &b.normed, &b.q, &b.k, &b.v, &b.attended, &b.gate, &b.up, &b.angles];
        let floats: usize = floats.into_iter().chain(&b.deep).map(|v| v.capacity() * 4).sum();
        (floats, self.quantized.memory_bytes() + self.screen.memory_bytes())
    }

    /// Runs `rows` through `model`. `cache` must have room for every row's position; rows of one sequence come in order.
    ///
    /// # Errors
    /// `ForwardPassError::NumericalInstability` naming the place where NaN or infinity first shows.
    pub(crate) fn forward(
        &mut self,
        model: &Transformer,
        rows: &[Row],
        cache: &mut CpuCache,
        mut wanted: Wanted<'_>,
        observed: &mut Observed,
    ) -> Result<()> {
        let vocabulary = model.description.vocab_size;
        // Pieces of about one length, whole tiles.
        let pieces = rows.len().div_ceil(MAX_ROWS).max(1);
        let piece = rows.len().div_ceil(pieces).next_multiple_of(self.kernels.tile_tokens());
        let mut done = 0;
        for chunk in rows.chunks(piece) {
            self.layers(model, chunk, cache, observed)?;
            let first = done;
            done += chunk.len();
            match &mut wanted {
                Wanted::Every(logits) => {
                    self.logits(model, 0, &mut logits[first * vocabulary..done * vocabulary])?;
                }
                Wanted::Last(logits) if done == rows.len() => self.logits(model, chunk.len() - 1, logits)?,
                Wanted::Largest { top, also, enough } if done == rows.len() => {
                    **enough = self.largest_logits(model, chunk.len() - 1, *top, also)?;
                }
                Wanted::Last(_) | Wanted::Largest { .. } => {}
            }
        }
        Ok(())
    }

    /// What the last call with [`Wanted::Largest`] found.
    pub(crate) fn largest(&self) -> &[(u32, f32)] {
        self.screen.logits()
    }

    /// Logits of the last row of the last call.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub(crate) fn last_logits(&mut self, model: &Transformer, out: &mut [f32]) -> Result<()> {
        let rows = self.buffers.normed.len() / self.hidden;
        self.logits(model, rows - 1, out)
    }

    /// Embedding rows into the residual stream, RoPE angles of the rows' positions.
    fn embed(&mut self, model: &Transformer, rows: &[Row]) -> Result<()> {
        self.clock = Instant::now();
        self.resize(rows.len(), model);
        for (row, x) in rows.iter().zip(self.buffers.x.chunks_exact_mut(self.hidden)) {
            model.embedding.row(row.token as usize, x)?;
        }
        self.buffers.angles.clear();
        for row in rows {
            model.rope.angles(row.position, &mut self.buffers.angles);
        }
        self.lap(|t| &mut t.embedding);
        Ok(())
    }

    /// Embedding and layer 0 only, for a look at its buffers.
    #[cfg(test)]
    pub(super) fn first_layer(
        &mut self,
        model: &Transformer,
        rows: &[Row],
        cache: &mut CpuCache,
        observed: &mut Observed,
    ) -> Result<()> {
        self.embed(model, rows)?;
        model.layers[0].forward(0, self, &model.rope, rows, cache, observed)
    }

    /// Embedding, all layers, final norm: leaves `[rows, H]` in `buffers.normed`.
    fn layers(
        &mut self,
        model: &Transformer,
        rows: &[Row],
        cache: &mut CpuCache,
        observed: &mut Observed,
    ) -> Result<()> {
        self.embed(model, rows)?;
        for (index, layer) in model.layers.iter().enumerate() {
            layer.forward(index, self, &model.rope, rows, cache, observed)?;
        }
        self.final_norm(&model.norm)?;
        self.lap(|t| &mut t.normalization);
        if let Some(hidden) = &mut observed.hidden {
            hidden.extend_from_slice(&self.buffers.normed);
        }
        Ok(())
    }

    /// The largest logits of a row, if the screen is the way to find them.
    fn largest_logits(&mut self, model: &Transformer, row: usize, top: usize, also: &[u32]) -> Result<bool> {
        let hidden = &self.buffers.normed[row * self.hidden..(row + 1) * self.hidden];
        let head = HeadAndState { head: model.head(), hidden };
        let enough = model.screen.largest(&head, self.kernels, &self.threads, top, also, &mut self.screen);
        let finite = self.screen.logits().iter().all(|(_, logit)| logit.is_finite());
        self.lap(|t| &mut t.logits);
        if enough && !finite { Err(unstable("the logits", None)) } else { Ok(enough) }
    }

    /// Logits of the rows from `first` on.
    fn logits(&mut self, model: &Transformer, first: usize, out: &mut [f32]) -> Result<()> {
        let hidden = &self.buffers.normed[first * self.hidden..];
        head_matmul(self.kernels, &self.threads, model.head(), hidden, out)?;
        let finite = self.kernels.all_finite(out);
        self.lap(|t| &mut t.logits);
        if finite { Ok(()) } else { Err(unstable("the logits", None)) }
    }

    fn resize(&mut self, rows: usize, model: &Transformer) {
        let d = &model.description;
        let b = &mut self.buffers;
        for buffer in [&mut b.x, &mut b.q, &mut b.attended] {
            buffer.resize(rows * d.hidden_size, 0.0);
        }
        for buffer in [&mut b.k, &mut b.v] {
            buffer.resize(rows * d.kv_size(), 0.0);
        }
        for buffer in [&mut b.gate, &mut b.up] {
            buffer.resize(rows * d.intermediate_size, 0.0);
        }
    }

    /// Adds the time since the last lap to one of the counters.
    pub(super) fn lap(&mut self, counter: impl Fn(&mut Times) -> &mut Duration) {
        let now = Instant::now();
        *counter(&mut self.times) += now - self.clock;
        self.clock = now;
    }

    /// RMSNorm of every row of the residual stream into `buffers.normed`.
    fn final_norm(&mut self, gain: &[f32]) -> Result<()> {
        let (kernels, eps, h) = (self.kernels, self.eps, self.hidden);
        self.buffers.normed.resize(self.buffers.x.len(), 0.0);
        for (x, out) in self.buffers.x.chunks_exact(h).zip(self.buffers.normed.chunks_exact_mut(h)) {
            if !kernels.rms_norm(x, gain, eps, out) {
                return Err(unstable("the input of the final norm", None));
            }
        }
        Ok(())
    }

    fn quantized(&mut self, outcome: std::result::Result<(), RowFailure>, what: &str, layer: usize) -> Result<()> {
        self.lap(|t| &mut t.quantization);
        outcome.map_err(|failure| match failure {
            RowFailure::Source => unstable(&format!("the input of the {what}"), Some(layer)),
            RowFailure::NotFinite => unstable(&format!("the output of the {what}"), Some(layer)),
        })
    }

    /// RMSNorm of the residual stream, then int8.
    pub(super) fn norm_and_quantize(&mut self, gain: &[f32], what: &str, layer: usize) -> Result<()> {
        let (kernels, eps, h, x) = (self.kernels, self.eps, self.hidden, &self.buffers.x);
        let row = |r: usize, out: &mut [f32], _: &mut [f32]| kernels.rms_norm(&x[r * h..(r + 1) * h], gain, eps, out);
        let outcome = self.quantized.fill(kernels, &self.threads, x.len() / h, h, row);
        self.quantized(outcome, what, layer)
    }

    /// RMSNorm of the heads' outputs, then int8.
    pub(super) fn sub_norm_and_quantize(&mut self, gain: &[f32], what: &str, layer: usize) -> Result<()> {
        let (kernels, eps, h, x) = (self.kernels, self.eps, self.hidden, &self.buffers.attended);
        let (rows, width) = (x.len() / h, h / self.kv_heads);
        let row = |r: usize, out: &mut [f32], whole: &mut [f32]| {
            for (head, part) in whole.chunks_exact_mut(width).enumerate() {
                part.copy_from_slice(&x[(head * rows + r) * width..][..width]);
            }
            kernels.rms_norm(whole, gain, eps, out)
        };
        let outcome = self.quantized.fill(kernels, &self.threads, rows, h, row);
        self.quantized(outcome, what, layer)
    }

    /// `activation(gate) * up`, its RMSNorm, then int8.
    pub(super) fn gate_norm_and_quantize(&mut self, gain: &[f32], what: &str, layer: usize) -> Result<()> {
        let (kernels, eps, f) = (self.kernels, self.eps, self.intermediate);
        let (gate, up, activation) = (&self.buffers.gate, &self.buffers.up, self.activation);
        let row = |r: usize, out: &mut [f32], gated: &mut [f32]| {
            let (gate, up) = (&gate[r * f..(r + 1) * f], &up[r * f..(r + 1) * f]);
            match activation {
                Activation::Relu2 => kernels.relu2_gate(gate, up, gated),
                Activation::Silu => kernels.silu_gate(gate, up, gated),
            }
            kernels.rms_norm(gated, gain, eps, out)
        };
        let outcome = self.quantized.fill(kernels, &self.threads, gate.len() / f, f, row);
        self.quantized(outcome, what, layer)
    }

    /// The residual stream plus a projection of the quantised input.
    pub(super) fn project_and_add(&mut self, linear: &TernaryLinear) {
        let job = TernaryJob { weights: linear, out: &mut self.buffers.x, add: true };
        ternary_matmul(self.kernels, &self.threads, &self.quantized, [job]);
    }

    /// RoPE on keys; keys and values into the cache.
    ///
    /// # Errors
    /// `ForwardPassError::NumericalInstability` for what the cache's format cannot keep.
    pub(super) fn rotate_and_store(
        &mut self,
        rope: &Rope,
        layer: usize,
        rows: &[Row],
        cache: &mut CpuCache,
    ) -> Result<()> {
        let kv = self.kv_heads * self.head_dim;
        let b = &mut self.buffers;
        for (r, row) in rows.iter().enumerate() {
            let angles = &b.angles[r * rope.head_dim()..(r + 1) * rope.head_dim()];
            let key = &mut b.k[r * kv..(r + 1) * kv];
            rope.apply(key, angles);
            if !cache.write(row.sequence, layer, row.position, key, &b.v[r * kv..(r + 1) * kv]) {
                return Err(cache.cannot_keep(layer, row.position));
            }
        }
        Ok(())
    }
}

fn unstable(what: &str, layer: Option<usize>) -> bitnet_contracts::InferenceError {
    let place = layer.map_or(String::new(), |n| format!(" of layer {n}"));
    ForwardPassError::NumericalInstability { details: format!("NaN or infinity in {what}{place}") }.into()
}
