//! What an engine holds in memory.

use serde::{Deserialize, Serialize};

/// Memory held by an engine, in bytes.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct MemoryUsage {
    /// Memory held now.
    pub current_usage: usize,

    /// Largest memory held so far.
    pub peak_usage: usize,

    /// Bytes of the weights.
    pub model_weights: usize,
    /// Bytes of cached keys and values.
    pub kv_cache: usize,
    /// Bytes of activations.
    pub activations: usize,
    /// Bytes of scratch buffers.
    pub temporary_buffers: usize,

    /// Requests for a buffer that the pool could serve.
    pub memory_pool_hits: usize,
    /// Requests for a buffer that needed a fresh allocation.
    pub memory_pool_misses: usize,
    /// Share of the held memory that is not in use, 0 to 1.
    pub fragmentation_ratio: f32,
}

impl MemoryUsage {
    /// The four parts together, in bytes, `usize::MAX` where the sum does not fit.
    pub fn total_footprint(&self) -> usize {
        self.model_weights
            .saturating_add(self.kv_cache)
            .saturating_add(self.activations)
            .saturating_add(self.temporary_buffers)
    }

    /// Share of the requests that the pool could serve, 0 to 1; 0 when there were none.
    pub fn pool_hit_rate(&self) -> f32 {
        // In f64 the sum of two counts cannot overflow.
        let hits = self.memory_pool_hits as f64;
        let requests = hits + self.memory_pool_misses as f64;
        if requests > 0.0 { (hits / requests) as f32 } else { 0.0 }
    }

    /// Whether the peak stayed within `max_memory` bytes.
    pub fn within_limits(&self, max_memory: usize) -> bool {
        self.peak_usage <= max_memory
    }
}
