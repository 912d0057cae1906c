//! What this backend keeps in a `KVCache`: token ids.

use bitnet_contracts::CacheStorage;
use std::any::Any;

/// The ids that went through the cache, one list a sequence of the batch.
pub struct SeenIds(pub Vec<Vec<u32>>);

impl CacheStorage for SeenIds {
    fn truncate(&mut self, len: usize) {
        self.0.iter_mut().for_each(|row| row.truncate(len));
    }

    fn memory_bytes(&self) -> usize {
        self.0.iter().map(|row| row.capacity() * size_of::<u32>()).sum()
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}
