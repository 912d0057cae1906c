//! The CPU backend's keys and values: f32, in pages of 64 positions, so that a growing sequence is never copied.

use std::any::Any;

use bitnet_contracts::{CacheStorage, MemoryError, Result};

use crate::kernels::PAGE;
use crate::model::ModelDescription;

/// One layer of one sequence. A page of keys is `[KV heads, head dimension, 64 positions]`, one of values
/// `[KV heads, 64 positions, head dimension]`: see `kernels/attention.rs`.
#[derive(Debug, Default)]
struct LayerCache {
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
}

/// Keys and values of a batch of sequences, RoPE applied to the keys.
#[derive(Debug)]
pub(crate) struct CpuCache {
    /// `[sequences][layers]`.
    sequences: Vec<Vec<LayerCache>>,
    layers: usize,
    kv_heads: usize,
    head_dim: usize,
}

impl CpuCache {
    pub(crate) fn new(description: &ModelDescription) -> Self {
        Self {
            sequences: Vec::new(),
            layers: description.num_layers,
            kv_heads: description.num_key_value_heads,
            head_dim: description.head_dim(),
        }
    }

    /// Number of sequences held.
    pub(crate) fn batch(&self) -> usize {
        self.sequences.len()
    }

    /// Makes room for `positions` positions in each of `batch` sequences. What is there stays.
    ///
    /// # Errors
    /// `MemoryError::AllocationFailed`; the positions that were there are still there.
    pub(crate) fn reserve(&mut self, batch: usize, positions: usize) -> Result<()> {
        self.sequences.truncate(batch);
        let (layers, floats) = (self.layers, self.kv_heads * PAGE * self.head_dim);
        while self.sequences.len() < batch {
            self.sequences.push((0..layers).map(|_| LayerCache::default()).collect());
        }
        for layer in self.sequences.iter_mut().flatten() {
            for pages in [&mut layer.keys, &mut layer.values] {
                while pages.len() < positions.div_ceil(PAGE) {
                    let mut page = Vec::new();
                    page.try_reserve_exact(floats)
                        .map_err(|e| MemoryError::AllocationFailed { size_bytes: floats * 4, reason: e.to_string() })?;
                    page.resize(floats, 0.0);
                    pages.push(page);
                }
            }
        }
        Ok(())
    }

    /// Writes one position's keys and values, each `[KV heads, head dimension]`.
    pub(crate) fn write(&mut self, sequence: usize, layer: usize, position: usize, key: &[f32], value: &[f32]) {
        let d = self.head_dim;
        let layer = &mut self.sequences[sequence][layer];
        let (page, slot) = (position / PAGE, position % PAGE);
        for (head, key) in key.chunks_exact(d).enumerate() {
            let place = &mut layer.keys[page][head * PAGE * d..(head + 1) * PAGE * d];
            for (column, &k) in place.chunks_exact_mut(PAGE).zip(key) {
                column[slot] = k;
            }
        }
        for (head, value) in value.chunks_exact(d).enumerate() {
            let at = (head * PAGE + slot) * d;
            layer.values[page][at..at + d].copy_from_slice(value);
        }
    }

    /// Page `page` of one KV head's keys, `[head dimension, 64]`.
    pub(crate) fn keys(&self, sequence: usize, layer: usize, head: usize, page: usize) -> &[f32] {
        self.page(&self.sequences[sequence][layer].keys[page], head)
    }

    /// Page `page` of one KV head's values, `[64, head dimension]`.
    pub(crate) fn values(&self, sequence: usize, layer: usize, head: usize, page: usize) -> &[f32] {
        self.page(&self.sequences[sequence][layer].values[page], head)
    }

    fn page<'a>(&self, page: &'a [f32], head: usize) -> &'a [f32] {
        let floats = PAGE * self.head_dim;
        &page[head * floats..(head + 1) * floats]
    }

    /// Bytes of one position's keys and values in all layers.
    pub(crate) fn bytes_per_position(&self) -> usize {
        2 * self.layers * self.kv_heads * self.head_dim * size_of::<f32>()
    }

    /// Bytes of all pages.
    pub(crate) fn bytes(&self) -> usize {
        let pages: usize = self.sequences.iter().flatten().map(|l| l.keys.len() + l.values.len()).sum();
        pages * self.kv_heads * PAGE * self.head_dim * size_of::<f32>()
    }
}

impl CacheStorage for CpuCache {
    fn truncate(&mut self, len: usize) {
        for layer in self.sequences.iter_mut().flatten() {
            layer.keys.truncate(len.div_ceil(PAGE));
            layer.values.truncate(len.div_ceil(PAGE));
        }
    }

    fn memory_bytes(&self) -> usize {
        self.bytes()
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}
