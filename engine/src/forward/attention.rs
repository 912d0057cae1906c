//! Attention of the rows of a batch, and how it is shared among threads. The sums of a head's output run over all positions in order,
//! whoever computes them.

use std::cell::RefCell;

use super::cache::CpuCache;
use super::rope::Rope;
use super::run::{Buffers, Observed, Row, Run};
use super::transformer::Transformer;
use crate::kernels::{AttendArgs, PAGE};

/// Attention work (positions x width) below which threads are not worth their start.
const WORTH: usize = 1 << 16;
/// Positions from which on the threads share the heads of a row.
const DEEP: usize = 256;
/// Pages of keys that one thread takes at a time.
const STRETCH: usize = 4;
/// Dimensions of values that one thread takes at a time: whole cache lines in every format, whole registers.
const SLICE: usize = 64;

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

impl Run {
    /// RoPE on queries, then attention of every row over its own sequence up to its own position: `buffers.attended`,
    /// `[KV heads, rows, width of a group]`.
    pub(super) fn attend(
        &mut self,
        rope: &Rope,
        layer: usize,
        rows: &[Row],
        cache: &CpuCache,
        observed: &mut Observed,
    ) {
        let pieces = rows.len() * self.kv_heads;
        let deep = rows.iter().all(|row| row.position >= DEEP);
        if deep && pieces < 4 * self.threads.count() && self.threads.count() > 1 && observed.attention.is_none() {
            return (0..rows.len()).for_each(|index| self.attend_together(rope, layer, rows, index, cache));
        }
        let (d, h, kernels) = (self.head_dim, self.hidden, self.kernels);
        let width = h / self.kv_heads;
        let Buffers { q, angles, attended, .. } = &mut self.buffers;
        // One piece of work is one KV head of one row: its group of query heads lies together. Rows of one head follow each other, so
        // that they find its keys and values in the cache.
        let piece = |i: usize, out: &mut [f32], scratch: &mut Scratch| {
            let (head, index) = (i / rows.len(), i % rows.len());
            let Scratch { queries, scores } = scratch;
            queries.clear();
            queries.extend_from_slice(&q[index * h + head * width..][..width]);
            rope.apply(queries, &angles[index * d..(index + 1) * d]);
            let args = HeadOfRow { cache, row: &rows[index], layer, head, d };
            args.with(queries, |args| {
                scores.resize(args.score_floats(), 0.0);
                kernels.attend(args, scores, out);
            });
        };
        if let Some(weights) = &mut observed.attention {
            let mut scratch = Scratch::default();
            for (i, out) in attended.chunks_exact_mut(width).enumerate() {
                piece(i, out, &mut scratch);
                weights.record(layer, &rows[i % rows.len()], i / rows.len(), &scratch.scores);
            }
        } else {
            let work: usize = rows.iter().map(|row| (row.position + 1) * self.hidden).sum();
            self.threads.for_each_chunk(attended, width, work >= WORTH, |i, out| {
                SCRATCH.with_borrow_mut(|scratch| piece(i, out, scratch))
            });
        }
    }

    /// One row behind many positions: its few heads would leave threads without work, so the positions are shared for the scores and
    /// the dimensions for the values.
    fn attend_together(&mut self, rope: &Rope, layer: usize, rows: &[Row], index: usize, cache: &CpuCache) {
        let (d, h, kv_heads, kernels) = (self.head_dim, self.hidden, self.kv_heads, self.kernels);
        let (width, group) = (h / kv_heads, h / kv_heads / d);
        let row = &rows[index];
        let Buffers { q, angles, attended, deep: [queries, scores, outputs], .. } = &mut self.buffers;
        queries.clear();
        queries.extend_from_slice(&q[index * h..(index + 1) * h]);
        rope.apply(queries, &angles[index * d..(index + 1) * d]);
        let of_head =
            |head: usize| (HeadOfRow { cache, row, layer, head, d }, &queries[head * width..(head + 1) * width]);

        // Whole stretches for every head; what is behind the last page is never read.
        let total = row.position + 1;
        let pages = total.div_ceil(PAGE);
        let stretches = pages.div_ceil(STRETCH);
        let (page, head) = (group * PAGE, stretches * STRETCH * group * PAGE);
        scores.resize(kv_heads * head, 0.0);
        self.threads.for_each_chunk(scores, STRETCH * page, true, |i, out| {
            let (args, queries) = of_head(i / stretches);
            let first = i % stretches * STRETCH;
            let out = &mut out[..STRETCH.min(pages - first) * page];
            args.with(queries, |args| kernels.scores(args, first, out));
        });
        self.threads.for_each_chunk(scores, head, true, |_, scores| {
            kernels.probabilities(&mut scores[..pages * page], total);
        });
        let slice = if d.is_multiple_of(SLICE) { SLICE } else { d };
        outputs.resize(h, 0.0);
        self.threads.for_each_chunk(outputs, group * slice, true, |i, out| {
            let (of, at) = (i / (d / slice), i % (d / slice) * slice);
            let (args, queries) = of_head(of);
            let probabilities = &scores[of * head..][..pages * page];
            args.with(queries, |args| kernels.weighted_values(args, probabilities, at, out));
        });
        // `[KV heads, slices, group, slice]` to `[KV heads, rows, group, slices, slice]`.
        for (i, part) in outputs.chunks_exact(slice).enumerate() {
            let (g, s, of) = (i % group, i / group % (d / slice), i / group / (d / slice));
            attended[(of * rows.len() + index) * width + g * d + s * slice..][..slice].copy_from_slice(part);
        }
    }
}

/// A KV head of one layer, as one row sees it.
struct HeadOfRow<'a> {
    cache: &'a CpuCache,
    row: &'a Row,
    layer: usize,
    head: usize,
    d: usize,
}

impl HeadOfRow<'_> {
    /// What the kernels want to know.
    fn with(&self, queries: &[f32], f: impl FnOnce(&AttendArgs<'_>)) {
        let Self { cache, row, layer, head, d } = *self;
        f(&AttendArgs {
            queries,
            keys: &|page| cache.keys(row.sequence, layer, head, page),
            values: &|page| cache.values(row.sequence, layer, head, page),
            total: row.position + 1,
            head_dim: d,
        });
    }
}

/// Working memory of one piece of attention.
#[derive(Default)]
struct Scratch {
    queries: Vec<f32>,
    scores: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = const { RefCell::new(Scratch { queries: Vec::new(), scores: Vec::new() }) };
}

impl AttentionWeights {
    /// Zeroes for `batch` sequences.
    pub(crate) fn new(model: &Transformer, batch: usize, start: usize, new: usize) -> Self {
        let heads = model.description.num_attention_heads;
        let layers = vec![vec![0.0; batch * heads * new * (start + new)]; model.description.num_layers];
        Self { start, new, heads, layers }
    }

    /// Copies one group's probabilities, `[pages, group, 64]`.
    fn record(&mut self, layer: usize, row: &Row, kv_head: usize, probabilities: &[f32]) {
        let (seen, total) = (row.position + 1, self.start + self.new);
        let group = probabilities.len() / PAGE / seen.div_ceil(PAGE);
        for (i, page) in probabilities.chunks_exact(PAGE).enumerate() {
            let (first, g) = (i / group * PAGE, i % group);
            let head = row.sequence * self.heads + kv_head * group + g;
            let at = (head * self.new + row.position - self.start) * total + first;
            let held = PAGE.min(seen - first);
            self.layers[layer][at..at + held].copy_from_slice(&page[..held]);
        }
    }
}
