//! The packed weights of a model, loaded once (see `load.rs`) and shared.

use super::layer::Layer;
use super::rope::Rope;
use crate::kernels::HeadScreen;
use crate::model::{FloatTable, ModelDescription};

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
