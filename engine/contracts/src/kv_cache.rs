//! A backend-neutral handle on the keys and values of past positions.
//!
//! The contracts do not know how a backend lays out its keys and values, so a [`KVCache`] keeps the bookkeeping (how
//! many positions are filled, how many fit) and one type-erased slot in which the backend keeps its own storage. The
//! slot remembers its owner: a cache filled by one backend or model and handed to another is an error, never garbage.
//!
//! A backend's forward pass uses it in this order:
//! 1. [`check_room`](KVCache::check_room) for the new positions;
//! 2. [`storage`](KVCache::storage) to get at its own buffers, made on first use;
//! 3. compute, writing keys and values *after* the first `len()` positions;
//! 4. [`advance`](KVCache::advance) once nothing can fail any more.
//!
//! A pass that stops anywhere before step 4 leaves the cache as it was.

use std::any::Any;
use std::fmt;

use crate::{ForwardPassError, Result};

/// A backend's own storage of keys and values.
pub trait CacheStorage: Any + Send + Sync {
    /// Forgets the positions from `len` on. The memory may be kept for reuse.
    fn truncate(&mut self, len: usize);

    /// Bytes held.
    fn memory_bytes(&self) -> usize;

    /// The storage as a type that can be downcast.
    fn as_any(&self) -> &dyn Any;

    /// The storage as a mutable type that can be downcast.
    fn as_any_mut(&mut self) -> &mut dyn Any;
}

/// Who filled a cache.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct CacheOwner {
    /// Name of the backend.
    pub backend: String,
    /// Id of the loaded model, unique within the process.
    pub model: u64,
}

impl fmt::Display for CacheOwner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "backend {:?} (model {})", self.backend, self.model)
    }
}

struct Slot {
    owner: CacheOwner,
    storage: Box<dyn CacheStorage>,
}

/// Keys and values of past positions, with a fixed capacity.
pub struct KVCache {
    capacity: usize,
    len: usize,
    slot: Option<Slot>,
}

impl KVCache {
    /// An empty cache for `capacity` positions. Nothing is allocated until a backend uses it.
    pub fn new(capacity: usize) -> Self {
        Self { capacity, len: 0, slot: None }
    }

    /// Filled positions.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no position is filled.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The most positions it can hold.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Positions that still fit.
    pub fn remaining(&self) -> usize {
        self.capacity.saturating_sub(self.len)
    }

    /// Forgets all positions. The storage is kept for reuse.
    pub fn clear(&mut self) {
        self.truncate(0);
    }

    /// Forgets the positions from `n` on; does nothing when no more than `n` are filled.
    pub fn truncate(&mut self, n: usize) {
        if n < self.len {
            self.len = n;
            if let Some(slot) = &mut self.slot {
                slot.storage.truncate(n);
            }
        }
    }

    /// Bytes held by the backend's storage.
    pub fn memory_bytes(&self) -> usize {
        self.slot.as_ref().map_or(0, |slot| slot.storage.memory_bytes())
    }

    /// The backend and model whose storage this is; `None` before the first use.
    pub fn owner(&self) -> Option<&CacheOwner> {
        self.slot.as_ref().map(|slot| &slot.owner)
    }

    /// Checks that `new_positions` more positions fit. Nothing changes.
    ///
    /// # Errors
    /// `ForwardPassError::KVCacheError` with operation `append`.
    pub fn check_room(&self, new_positions: usize) -> Result<()> {
        if new_positions > self.remaining() {
            return Err(cache_error(
                "append",
                format!("{new_positions} new positions after {} exceed the capacity of {}", self.len, self.capacity),
            ));
        }
        Ok(())
    }

    /// The backend's own storage, made by `make` on first use.
    ///
    /// Storage left by a different owner is replaced when the cache is empty. When `make` fails nothing changes.
    ///
    /// # Errors
    /// `ForwardPassError::KVCacheError` with operation `attach` when the cache holds positions that are not
    /// `owner`'s, or holds `owner`'s positions in a storage of another type; otherwise the error of `make`.
    pub fn storage<S: CacheStorage>(&mut self, owner: &CacheOwner, make: impl FnOnce() -> Result<S>) -> Result<&mut S> {
        let ours = self.slot.as_ref().is_some_and(|slot| slot.owner == *owner && slot.storage.as_any().is::<S>());
        if !ours {
            if self.len > 0 {
                let held_by = match &self.slot {
                    Some(slot) if slot.owner == *owner => "the same owner in storage of another type".to_string(),
                    Some(slot) => slot.owner.to_string(),
                    None => "a backend that keeps no storage".to_string(),
                };
                return Err(cache_error(
                    "attach",
                    format!("the cache holds {} positions of {held_by}, asked for by {owner}", self.len),
                ));
            }
            let storage = Box::new(make()?);
            self.slot = Some(Slot { owner: owner.clone(), storage });
        }
        self.slot
            .as_mut()
            .and_then(|slot| slot.storage.as_any_mut().downcast_mut::<S>())
            .ok_or_else(|| cache_error("attach", format!("the storage of {owner} hides its own type")))
    }

    /// Commits `n` new positions, after the backend has written them.
    ///
    /// # Errors
    /// `ForwardPassError::KVCacheError` with operation `append` when they do not fit; nothing changes.
    pub fn advance(&mut self, n: usize) -> Result<()> {
        self.check_room(n)?;
        self.len += n;
        Ok(())
    }
}

impl fmt::Debug for KVCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KVCache")
            .field("len", &self.len)
            .field("capacity", &self.capacity)
            .field("owner", &self.owner())
            .field("memory_bytes", &self.memory_bytes())
            .finish()
    }
}

fn cache_error(operation: &str, reason: String) -> crate::InferenceError {
    ForwardPassError::KVCacheError { operation: operation.to_string(), reason }.into()
}
