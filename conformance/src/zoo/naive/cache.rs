//! What the naive engine keeps in a `KVCache`: keys and values in f32, layer by layer.

use super::engine::Naive;
use bitnet_contracts::{CacheStorage, InferenceOutput, KVCache, Result, Tensor};
use std::any::Any;

/// Keys and values of one sequence.
#[derive(Debug, Clone, Default)]
pub struct Sequence {
    /// Of each layer, `[position × kv width]`, rotated.
    pub keys: Vec<Vec<f32>>,
    /// Of each layer, as the keys.
    pub values: Vec<Vec<f32>>,
    /// Positions held.
    pub len: usize,
}

impl Sequence {
    /// An empty sequence of a model with this many layers.
    pub fn new(layers: usize) -> Self {
        Self { keys: vec![Vec::new(); layers], values: vec![Vec::new(); layers], len: 0 }
    }

    /// Forgets the positions from `len` on.
    pub fn truncate(&mut self, len: usize) {
        if len < self.len {
            for rows in self.keys.iter_mut().chain(&mut self.values) {
                rows.truncate(rows.len() / self.len * len);
            }
            self.len = len;
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.keys.iter().chain(&self.values).map(|rows| rows.capacity() * size_of::<f32>()).sum()
    }
}

/// The sequences of a batch.
#[derive(Debug, Clone, Default)]
pub struct NaiveCache {
    /// One for each row of the batch.
    pub sequences: Vec<Sequence>,
    /// What a deviation keeps beside them.
    pub note: u64,
    /// A deviation counts the first sequence alone.
    pub counts_first_only: bool,
    /// Bytes that a deviation holds beside them and does not count.
    pub scratch: Vec<u8>,
    /// What truncation does instead, for deviations that truncate in another way.
    pub on_truncate: Option<fn(&mut [Sequence], usize)>,
}

impl CacheStorage for NaiveCache {
    fn truncate(&mut self, len: usize) {
        match self.on_truncate {
            Some(truncate) => truncate(&mut self.sequences, len),
            None => self.sequences.iter_mut().for_each(|s| s.truncate(len)),
        }
    }

    fn memory_bytes(&self) -> usize {
        let counted = if self.counts_first_only { 1 } else { self.sequences.len() };
        self.sequences.iter().take(counted).map(Sequence::bytes).sum()
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

impl Naive {
    /// What this engine keeps in a cache.
    ///
    /// # Errors
    /// `KVCacheError` for a cache that another one has filled.
    pub fn held<'c>(&self, cache: &'c mut KVCache) -> Result<&'c mut NaiveCache> {
        cache.storage(&self.shared.owner, || Ok(NaiveCache::default()))
    }

    /// `forward` behind sequences of which the caller knows nothing.
    ///
    /// # Errors
    /// As `forward`.
    pub fn forward_behind(&mut self, before: Vec<Sequence>, ids: &Tensor) -> Result<InferenceOutput> {
        let len = before.first().map_or(0, |s| s.len);
        let mut cache = KVCache::new(usize::MAX);
        self.held(&mut cache)?.sequences = before;
        cache.advance(len)?;
        self.honest_forward(ids, Some(&mut cache))
    }
}
