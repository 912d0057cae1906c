//! What one caller works with: kernels, threads, buffers that are allocated once, and the clock.

use std::time::{Duration, Instant};

use bitnet_contracts::{ForwardPassError, Result};

use super::cache::{CpuCache, PAGE};
use super::layer::TernaryLinear;
use super::rope::Rope;
use super::transformer::Transformer;
use crate::kernels::{AttendArgs, Kernels, QuantizedActivations, TernaryJob, Threads, head_matmul, ternary_matmul};
use crate::model::Activation;

/// Most rows that go through a layer together. Longer inputs are cut; where does not show in the results.
const MAX_ROWS: usize = 128;
/// Attention work (positions x width) below which threads are not worth their start.
const WORTH_ATTENTION: usize = 1 << 16;

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

/// Where the time went.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Times {
    pub(crate) embedding: Duration,
    pub(crate) attention: Duration,
    pub(crate) feed_forward: Duration,
    pub(crate) normalization: Duration,
    pub(crate) quantization: Duration,
    pub(crate) logits: Duration,
}

/// What a caller wants to see besides logits.
#[derive(Debug, Default)]
pub(crate) struct Observed {
    /// Attention probabilities.
    pub(crate) attention: Option<AttentionWeights>,
    /// Final normed states, `[rows, H]`.
    pub(crate) hidden: Option<Vec<f32>>,
}

/// Attention probabilities of one call.
#[derive(Debug)]
pub(crate) struct AttentionWeights {
    /// Positions before this call.
    pub(crate) start: usize,
    /// New positions of this call.
    pub(crate) new: usize,
    /// Query heads.
    pub(crate) heads: usize,
    /// `[layers]` of `[batch, heads, new, start + new]`, zero above the diagonal.
    pub(crate) layers: Vec<Vec<f32>>,
}

/// Buffers for up to [`MAX_ROWS`] rows, `[rows, width]` each.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    pub(super) x: Vec<f32>,
    pub(super) normed: Vec<f32>,
    pub(super) q: Vec<f32>,
    pub(super) k: Vec<f32>,
    pub(super) v: Vec<f32>,
    pub(super) attended: Vec<f32>,
    pub(super) gate: Vec<f32>,
    pub(super) up: Vec<f32>,
    pub(super) out: Vec<f32>,
    angles: Vec<f32>,
}

/// One caller's state. Results never depend on what ran before.
pub(crate) struct Run {
    pub(super) kernels: &'static Kernels,
    pub(super) threads: Threads,
    pub(super) quantized: QuantizedActivations,
    pub(super) buffers: Buffers,
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
        let floats = [&b.x, &b.normed, &b.q, &b.k, &b.v, &b.attended, &b.gate, &b.up, &b.out, &b.angles];
        (floats.iter().map(|v| v.capacity() * 4).sum(), self.quantized.memory_bytes())
    }

    /// Runs `rows` through `model`. `cache` must have room for every row's position; rows of one sequence come in order.
    ///
    /// `logits` takes the logits of every row, `[rows, vocabulary]`, or of the last row only when it has the size for one.
    ///
    /// # Errors
    /// `ForwardPassError::NumericalInstability` naming the place where NaN or infinity first shows.
    pub(crate) fn forward(
        &mut self,
        model: &Transformer,
        rows: &[Row],
        cache: &mut CpuCache,
        logits: &mut [f32],
        observed: &mut Observed,
    ) -> Result<()> {
        let threads = self.threads.clone();
        threads.enter(|| {
            let vocabulary = model.description.vocab_size;
            let every_row = logits.len() == rows.len() * vocabulary;
            let mut done = 0;
            for chunk in rows.chunks(MAX_ROWS) {
                self.layers(model, chunk, cache, observed)?;
                done += chunk.len();
                if every_row {
                    self.logits(model, 0, &mut logits[(done - chunk.len()) * vocabulary..done * vocabulary])?;
                } else if done == rows.len() {
                    self.logits(model, chunk.len() - 1, logits)?;
                }
            }
            Ok(())
        })
    }

    /// Embedding rows into the residual stream, RoPE angles of the rows' positions.
    fn embed(&mut self, model: &Transformer, rows: &[Row]) {
        self.clock = Instant::now();
        self.resize(rows.len(), model);
        for (row, x) in rows.iter().zip(self.buffers.x.chunks_exact_mut(self.hidden)) {
            model.embedding.row(row.token as usize, x);
        }
        self.buffers.angles.clear();
        for row in rows {
            model.rope.angles(row.position, &mut self.buffers.angles);
        }
        self.lap(|t| &mut t.embedding);
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
        self.embed(model, rows);
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
        self.embed(model, rows);
        for (index, layer) in model.layers.iter().enumerate() {
            layer.forward(index, self, &model.rope, rows, cache, observed)?;
        }
        norm(self.kernels, &self.buffers.x, &model.norm, self.eps, &mut self.buffers.normed, "final norm", None)?;
        self.lap(|t| &mut t.normalization);
        if let Some(hidden) = &mut observed.hidden {
            hidden.extend_from_slice(&self.buffers.normed);
        }
        Ok(())
    }

    /// Logits of the rows from `first` on.
    fn logits(&mut self, model: &Transformer, first: usize, out: &mut [f32]) -> Result<()> {
        let hidden = &self.buffers.normed[first * self.hidden..];
        head_matmul(self.kernels, &self.threads, model.head(), hidden, out);
        let finite = self.kernels.all_finite(out);
        self.lap(|t| &mut t.logits);
        if finite { Ok(()) } else { Err(unstable("the logits", None)) }
    }

    fn resize(&mut self, rows: usize, model: &Transformer) {
        let d = &model.description;
        let b = &mut self.buffers;
        for buffer in [&mut b.x, &mut b.normed, &mut b.q, &mut b.attended, &mut b.out] {
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

    fn quantize(&mut self, source: Source, what: &str, layer: usize) -> Result<()> {
        self.lap(|t| &mut t.normalization);
        let (x, columns) = match source {
            Source::Normed => (&self.buffers.normed, self.hidden),
            Source::Up => (&self.buffers.up, self.intermediate),
        };
        self.quantized.quantize(self.kernels, x, columns, &|| format!("the output of the {what} of layer {layer}"))?;
        self.lap(|t| &mut t.quantization);
        Ok(())
    }

    /// RMSNorm of the residual stream, then int8.
    pub(super) fn norm_and_quantize(&mut self, gain: &[f32], what: &str, layer: usize) -> Result<()> {
        norm(self.kernels, &self.buffers.x, gain, self.eps, &mut self.buffers.normed, what, Some(layer))?;
        self.quantize(Source::Normed, what, layer)
    }

    /// RMSNorm of the heads' outputs, then int8.
    pub(super) fn sub_norm_and_quantize(&mut self, gain: &[f32], what: &str, layer: usize) -> Result<()> {
        norm(self.kernels, &self.buffers.attended, gain, self.eps, &mut self.buffers.normed, what, Some(layer))?;
        self.quantize(Source::Normed, what, layer)
    }

    /// RMSNorm of the gated values, in `gate`'s place to save a buffer, then int8.
    pub(super) fn ffn_norm_and_quantize(&mut self, gain: &[f32], what: &str, layer: usize) -> Result<()> {
        let b = &mut self.buffers;
        norm(self.kernels, &b.up, gain, self.eps, &mut b.gate, what, Some(layer))?;
        std::mem::swap(&mut b.up, &mut b.gate);
        self.quantize(Source::Up, what, layer)
    }

    /// `up = activation(gate) * up`.
    pub(super) fn gate(&mut self) {
        match self.activation {
            Activation::Relu2 => self.kernels.relu2_gate(&self.buffers.gate, &mut self.buffers.up),
            Activation::Silu => self.kernels.silu_gate(&self.buffers.gate, &mut self.buffers.up),
        }
    }

    /// The residual stream plus a projection of the quantised input.
    pub(super) fn project_and_add(&mut self, linear: &TernaryLinear) {
        let b = &mut self.buffers;
        ternary_matmul(
            self.kernels,
            &self.threads,
            &self.quantized,
            &mut [TernaryJob { weights: linear, out: &mut b.out }],
        );
        self.kernels.add(&mut b.x, &b.out);
    }

    /// RoPE on queries and keys; keys and values into the cache.
    pub(super) fn rotate_and_store(&mut self, rope: &Rope, layer: usize, rows: &[Row], cache: &mut CpuCache) {
        let kv = self.kv_heads * self.head_dim;
        let b = &mut self.buffers;
        for (r, row) in rows.iter().enumerate() {
            let angles = &b.angles[r * rope.head_dim()..(r + 1) * rope.head_dim()];
            rope.apply(&mut b.q[r * self.hidden..(r + 1) * self.hidden], angles);
            let key = &mut b.k[r * kv..(r + 1) * kv];
            rope.apply(key, angles);
            cache.write(row.sequence, layer, row.position, key, &b.v[r * kv..(r + 1) * kv]);
        }
    }

    /// Attention of every row over its own sequence up to its own position.
    pub(super) fn attend(&mut self, layer: usize, rows: &[Row], cache: &CpuCache, observed: &mut Observed) {
        let (d, kv_heads, kernels) = (self.head_dim, self.kv_heads, self.kernels);
        let width = self.hidden / kv_heads;
        let queries = &self.buffers.q;
        // One piece of work is one KV head of one row: its group of query heads lies together.
        let piece = |i: usize, out: &mut [f32], scores: &mut Vec<f32>| {
            let (row, head) = (&rows[i / kv_heads], i % kv_heads);
            let total = row.position + 1;
            scores.resize(width / d * total, 0.0);
            let args = AttendArgs {
                queries: &queries[i * width..(i + 1) * width],
                keys: &|page| cache.keys(row.sequence, layer, head, page),
                values: &|page| cache.values(row.sequence, layer, head, page),
                page: PAGE,
                total,
                head_dim: d,
            };
            kernels.attend(&args, scores, out);
        };
        let out = &mut self.buffers.attended;
        if let Some(weights) = &mut observed.attention {
            let mut scores = Vec::new();
            for (i, out) in out.chunks_exact_mut(width).enumerate() {
                piece(i, out, &mut scores);
                weights.record(layer, &rows[i / kv_heads], i % kv_heads, &scores);
            }
        } else {
            let work: usize = rows.iter().map(|row| (row.position + 1) * self.hidden).sum();
            self.threads.for_each_chunk(out, width, work >= WORTH_ATTENTION, Vec::new, piece);
        }
    }
}

enum Source {
    Normed,
    Up,
}

impl AttentionWeights {
    /// Zeroes for `batch` sequences.
    pub(crate) fn new(model: &Transformer, batch: usize, start: usize, new: usize) -> Self {
        let heads = model.description.num_attention_heads;
        let layers = vec![vec![0.0; batch * heads * new * (start + new)]; model.description.num_layers];
        Self { start, new, heads, layers }
    }

    /// Copies one group's probabilities, `[group, position + 1]`.
    fn record(&mut self, layer: usize, row: &Row, kv_head: usize, scores: &[f32]) {
        let (seen, total) = (row.position + 1, self.start + self.new);
        let group = scores.len() / seen;
        for (g, probabilities) in scores.chunks_exact(seen).enumerate() {
            let head = row.sequence * self.heads + kv_head * group + g;
            let at = (head * self.new + row.position - self.start) * total;
            self.layers[layer][at..at + seen].copy_from_slice(probabilities);
        }
    }
}

/// RMSNorm of every row.
fn norm(
    kernels: &Kernels,
    x: &[f32],
    gain: &[f32],
    eps: f32,
    out: &mut [f32],
    what: &str,
    layer: Option<usize>,
) -> Result<()> {
    for (x, out) in x.chunks_exact(gain.len()).zip(out.chunks_exact_mut(gain.len())) {
        if !kernels.rms_norm(x, gain, eps, out) {
            return Err(unstable(&format!("the input of the {what}"), layer));
        }
    }
    Ok(())
}

fn unstable(what: &str, layer: Option<usize>) -> bitnet_contracts::InferenceError {
    let place = layer.map_or(String::new(), |n| format!(" of layer {n}"));
    ForwardPassError::NumericalInstability { details: format!("NaN or infinity in {what}{place}") }.into()
}
