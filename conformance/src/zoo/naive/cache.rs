//! What the naive engine keeps in a `KVCache`: keys and values in f32, layer by layer.

use bitnet_contracts::CacheStorage;
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
    /// What truncation leaves, for deviations that forget to truncate.
    pub stubborn: bool,
}

impl CacheStorage for NaiveCache {
    fn truncate(&mut self, len: usize) {
        if !self.stubborn {
            self.sequences.iter_mut().for_each(|s| s.truncate(len));
        }
    }

    fn memory_bytes(&self) -> usize {
        self.sequences.iter().map(Sequence::bytes).sum()
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}
