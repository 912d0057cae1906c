//! The packed weights of a model, loaded once and shared.

use std::sync::atomic::{AtomicU64, Ordering};

use bitnet_contracts::Result;

use super::layer::{Layer, TernaryLinear};
use super::rope::Rope;
use crate::kernels::Threads;
use crate::model::{Checkpoint, FloatMatrix, ModelDescription};
use crate::ternary::InterleavedMatrix;

/// A BitNet b1.58 transformer, ready to run.
#[derive(Debug)]
pub(crate) struct Transformer {
    pub(crate) description: ModelDescription,
    pub(super) embedding: FloatMatrix,
    pub(super) layers: Vec<Layer>,
    pub(super) norm: Vec<f32>,
    /// None when the head is the embedding.
    pub(super) head: Option<FloatMatrix>,
    pub(super) rope: Rope,
    /// Tells this loaded model from every other of the process, for caches.
    pub(crate) id: u64,
}

impl Transformer {
    /// Packs the checkpoint's weights. The parts of a mapped file are let go as soon as they are packed.
    pub(crate) fn load(checkpoint: &Checkpoint, threads: &Threads) -> Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let d = checkpoint.description().clone();
        let (h, f, kv) = (d.hidden_size, d.intermediate_size, d.kv_size());
        let layers = (0..d.num_layers)
            .map(|n| {
                let name = |part: &str| format!("model.layers.{n}.{part}");
                let linear = |part: &str, rows, columns| load_linear(checkpoint, threads, &name(part), rows, columns);
                let norm = |part: &str, len| checkpoint.vector(&name(part), len);
                Ok(Layer {
                    input_norm: norm("input_layernorm.weight", h)?,
                    q: linear("self_attn.q_proj", h, h)?,
                    k: linear("self_attn.k_proj", kv, h)?,
                    v: linear("self_attn.v_proj", kv, h)?,
                    attention_sub_norm: norm("self_attn.attn_sub_norm.weight", h)?,
                    o: linear("self_attn.o_proj", h, h)?,
                    post_attention_norm: norm("post_attention_layernorm.weight", h)?,
                    gate: linear("mlp.gate_proj", f, h)?,
                    up: linear("mlp.up_proj", f, h)?,
                    ffn_sub_norm: norm("mlp.ffn_sub_norm.weight", f)?,
                    down: linear("mlp.down_proj", h, f)?,
                })
            })
            .collect::<Result<_>>()?;
        let head =
            if d.tie_word_embeddings { None } else { Some(checkpoint.matrix("lm_head.weight", d.vocab_size, h)?) };
        Ok(Self {
            embedding: checkpoint.matrix("model.embed_tokens.weight", d.vocab_size, h)?,
            layers,
            norm: checkpoint.vector("model.norm.weight", h)?,
            head,
            rope: Rope::new(d.rope_theta, d.head_dim()),
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            description: d,
        })
    }

    /// The matrix of the output head.
    pub(super) fn head(&self) -> &FloatMatrix {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// Bytes of all weights held.
    pub(crate) fn memory_bytes(&self) -> usize {
        let head = self.head.as_ref().map_or(0, FloatMatrix::memory_bytes);
        let layers: usize = self.layers.iter().map(Layer::memory_bytes).sum();
        self.embedding.memory_bytes() + head + layers + self.norm.capacity() * 4
    }

    /// Bytes that a decode step reads: every layer and the head once.
    pub(crate) fn bytes_per_pass(&self) -> usize {
        self.layers.iter().map(Layer::memory_bytes).sum::<usize>() + self.head().memory_bytes()
    }
}

fn load_linear(
    checkpoint: &Checkpoint,
    threads: &Threads,
    name: &str,
    rows: usize,
    columns: usize,
) -> Result<TernaryLinear> {
    let tensor = checkpoint.ternary(name, rows, columns)?;
    let packed = threads
        .enter(|| InterleavedMatrix::pack(rows, columns, tensor.scale(), threads, &|r, out| tensor.row(r, out)))?;
    checkpoint.release(&format!("{name}.weight"));
    Ok(packed)
}
