//! The packed weights of a model, loaded once and shared.

use std::sync::atomic::{AtomicU64, Ordering};

use bitnet_contracts::{MemoryError, Result};

use super::layer::Layer;
use super::rope::Rope;
use crate::kernels::{HeadScreen, Kernels, Threads};
use crate::model::{Checkpoint, FloatTable, ModelDescription};
use crate::ternary::interleaved::{Packer, TritSource};

/// A BitNet b1.58 transformer, ready to run.
#[derive(Debug)]
pub(crate) struct Transformer {
    pub(crate) description: ModelDescription,
    pub(super) embedding: FloatTable,
    pub(super) layers: Vec<Layer>,
    pub(super) norm: Vec<f32>,
    /// None when the head is the embedding.
    pub(super) head: Option<FloatTable>,
    pub(super) screen: HeadScreen,
    pub(super) rope: Rope,
    /// Tells this loaded model from every other of the process, for caches.
    pub(crate) id: u64,
}

impl Transformer {
    /// Packs the checkpoint's weights. The parts of a mapped file are let go as soon as they are packed. A large embedding or head stays
    /// in its file unless `in_memory`.
    pub(crate) fn load(checkpoint: &Checkpoint, kernels: &Kernels, threads: &Threads, in_memory: bool) -> Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let d = checkpoint.description().clone();
        let h = d.hidden_size;
        let layers = (0..d.num_layers).map(|n| load_layer(checkpoint, kernels, threads, n)).collect::<Result<_>>()?;
        let table = |name| checkpoint.table(name, d.vocab_size, h, in_memory, threads);
        let head = if d.tie_word_embeddings { None } else { Some(table("lm_head.weight")?) };
        let embedding = table("model.embed_tokens.weight")?;
        let screen = HeadScreen::new(head.as_ref().unwrap_or(&embedding), kernels, threads)?;
        Ok(Self {
            embedding,
            screen,
            layers,
            norm: checkpoint.vector("model.norm.weight", h)?,
            head,
            rope: Rope::new(d.rope_theta, d.head_dim()),
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            description: d,
        })
    }

    /// The matrix of the output head.
    pub(super) fn head(&self) -> &FloatTable {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// Bytes of all weights held.
    pub(crate) fn memory_bytes(&self) -> usize {
        let head = self.head.as_ref().map_or(0, FloatTable::memory_bytes);
        let layers: usize = self.layers.iter().map(Layer::memory_bytes).sum();
        self.embedding.memory_bytes() + head + self.screen.memory_bytes() + layers + self.norm.capacity() * 4
    }

    /// Bytes that a pass with all logits reads: every layer and the head once.
    pub(crate) fn bytes_per_pass(&self) -> usize {
        self.layers.iter().map(Layer::memory_bytes).sum::<usize>() + self.head().value_bytes()
    }

    /// Bytes of every layer's weights and of the head's screen: what a decode step reads of weights at least.
    pub(crate) fn bytes_per_step(&self) -> (usize, usize) {
        (self.layers.iter().map(Layer::memory_bytes).sum(), self.screen.memory_bytes())
    }

    /// Ternary weights of all layers.
    pub(crate) fn ternary_weights(&self) -> usize {
        self.layers.iter().map(Layer::ternary_weights).sum()
    }
}

/// Packs layer `n`, its matrices in the order in which they are read.
fn load_layer(checkpoint: &Checkpoint, kernels: &Kernels, threads: &Threads, n: usize) -> Result<Layer> {
    let d = checkpoint.description();
    let (h, f, kv) = (d.hidden_size, d.intermediate_size, d.kv_size());
    let name = |part: &str| format!("model.layers.{n}.{part}");
    let norm = |part: &str, len| checkpoint.vector(&name(part), len);
    let linears = [
        ("self_attn.q_proj", h, h),
        ("self_attn.k_proj", kv, h),
        ("self_attn.v_proj", kv, h),
        ("self_attn.o_proj", h, h),
        ("mlp.gate_proj", f, h),
        ("mlp.up_proj", f, h),
        ("mlp.down_proj", h, f),
    ];
    // Every tensor is held against the file before room is made for any.
    let tensors = linears.map(|(part, rows, columns)| checkpoint.ternary(&name(part), rows, columns));
    let tensors = tensors.into_iter().collect::<Result<Vec<_>>>()?;
    let mut packer = Packer::new(kernels, linears.map(|(_, rows, columns)| (rows, columns)))?;
    for (tensor, (part, rows, columns)) in tensors.into_iter().zip(linears) {
        let row = |r: usize, out: &mut [i8]| tensor.row(r, out);
        let source = TritSource { rows, columns, scale: tensor.scale(), row: &row };
        packer.add(&source, threads)?;
        checkpoint.release(&format!("{}.weight", name(part)));
    }
    let mut packed = packer.finish().into_iter();
    let mut next =
        || packed.next().ok_or_else(|| MemoryError::PoolExhausted { pool_type: "packed matrices".to_string() });
    Ok(Layer {
        q: next()?,
        k: next()?,
        v: next()?,
        o: next()?,
        gate: next()?,
        up: next()?,
        down: next()?,
        input_norm: norm("input_layernorm.weight", h)?,
        attention_sub_norm: norm("self_attn.attn_sub_norm.weight", h)?,
        post_attention_norm: norm("post_attention_layernorm.weight", h)?,
        ffn_sub_norm: norm("mlp.ffn_sub_norm.weight", f)?,
    })
}
