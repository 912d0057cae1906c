//! The CPU backend's keys and values, in blocks of 64 positions, so that a growing sequence is never copied.

use std::any::Any;

use bitnet_contracts::{CacheStorage, ForwardPassError, InferenceError, MemoryError, Result};

use crate::kernels::{KvFormat, KvPage, Order, PAGE, Pages, write_kv};
use crate::model::ModelDescription;

/// Keys and values of a batch of sequences, RoPE applied to the keys.
#[derive(Debug)]
pub(crate) struct CpuCache {
    /// Of each sequence its blocks of 64 positions: `[layers, keys and values, KV heads]` pages (`kernels/kv_page.rs`). A block of a large
    /// model fills large pages of memory.
    sequences: Vec<Vec<Pages>>,
    format: KvFormat,
    layers: usize,
    kv_heads: usize,
    head_dim: usize,
}

impl CpuCache {
    pub(crate) fn new(description: &ModelDescription, format: KvFormat) -> Self {
        Self {
            sequences: Vec::new(),
            format,
            layers: description.num_layers,
            kv_heads: description.num_key_value_heads,
            head_dim: description.head_dim(),
        }
    }

    /// Number of sequences held.
    pub(crate) fn batch(&self) -> usize {
        self.sequences.len()
    }

    fn block_bytes(&self) -> usize {
        self.layers * 2 * self.kv_heads * self.format.page_bytes(self.head_dim)
    }

    /// Makes room for `positions` positions in each of `batch` sequences. What is there stays.
    ///
    /// # Errors
    /// `MemoryError::AllocationFailed`; the positions that were there are still there.
    pub(crate) fn reserve(&mut self, batch: usize, positions: usize) -> Result<()> {
        let bytes = self.block_bytes();
        self.sequences.truncate(batch);
        self.sequences.resize_with(batch, Vec::new);
        for blocks in &mut self.sequences {
            let wanted = positions.div_ceil(PAGE);
            blocks.try_reserve(wanted.saturating_sub(blocks.len())).map_err(|e| MemoryError::AllocationFailed {
                size_bytes: wanted * size_of::<Pages>(),
                reason: e.to_string(),
            })?;
            while blocks.len() < wanted {
                blocks.push(Pages::zeroed(bytes)?);
            }
        }
        Ok(())
    }

    /// Writes one position's keys and values, each `[KV heads, head dimension]`. False when one of them cannot be kept in this format.
    #[must_use]
    pub(crate) fn write(&mut self, sequence: usize, layer: usize, position: usize, key: &[f32], value: &[f32]) -> bool {
        let (format, d, bytes) = (self.format, self.head_dim, self.format.page_bytes(self.head_dim));
        let first = 2 * layer * self.kv_heads * bytes;
        let pages = &mut self.sequences[sequence][position / PAGE][first..first + 2 * self.kv_heads * bytes];
        let (keys, values) = pages.split_at_mut(self.kv_heads * bytes);
        let mut kept = true;
        for (order, pages, x) in [(Order::Keys, keys, key), (Order::Values, values, value)] {
            for (page, x) in pages.chunks_exact_mut(bytes).zip(x.chunks_exact(d)) {
                kept &= write_kv(format, order, page, position % PAGE, x);
            }
        }
        kept
    }

    /// What to say when [`Self::write`] gave false.
    pub(crate) fn cannot_keep(&self, layer: usize, position: usize) -> InferenceError {
        let format = self.format;
        let details = format!("a key or value of layer {layer} at position {position} is beyond the cache's {format}");
        ForwardPassError::NumericalInstability { details }.into()
    }

    /// Page `page` of one KV head's keys, `[head dimension, 64]`.
    pub(crate) fn keys(&self, sequence: usize, layer: usize, head: usize, page: usize) -> KvPage<'_> {
        self.page(sequence, page, 2 * layer * self.kv_heads + head)
    }

    /// Page `page` of one KV head's values, `[64, head dimension]`.
    pub(crate) fn values(&self, sequence: usize, layer: usize, head: usize, page: usize) -> KvPage<'_> {
        self.page(sequence, page, (2 * layer + 1) * self.kv_heads + head)
    }

    fn page(&self, sequence: usize, block: usize, index: usize) -> KvPage<'_> {
        let bytes = self.format.page_bytes(self.head_dim);
        KvPage::read(self.format, &self.sequences[sequence][block][index * bytes..(index + 1) * bytes])
    }

    /// Bytes of all blocks.
    pub(crate) fn bytes(&self) -> usize {
        self.sequences.iter().map(Vec::len).sum::<usize>() * self.block_bytes()
    }

    /// Bytes of keys and values that attention reads at one position of one sequence.
    pub(crate) fn bytes_per_position(&self) -> usize {
        self.block_bytes() / PAGE
    }
}

impl CacheStorage for CpuCache {
    fn truncate(&mut self, len: usize) {
        for blocks in &mut self.sequences {
            blocks.truncate(len.div_ceil(PAGE));
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
