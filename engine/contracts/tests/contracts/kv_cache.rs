//! The cache handle: bookkeeping, ownership, and that a failed step changes nothing.

use std::any::Any;

use bitnet_contracts::*;
use proptest::prelude::*;

/// A backend's storage: one value a position.
#[derive(Debug, PartialEq)]
struct Rows(Vec<u32>);

impl CacheStorage for Rows {
    fn truncate(&mut self, len: usize) {
        self.0.truncate(len);
    }
    fn memory_bytes(&self) -> usize {
        self.0.len() * 4
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

/// Another backend's.
struct Blob;

impl CacheStorage for Blob {
    fn truncate(&mut self, _: usize) {}
    fn memory_bytes(&self) -> usize {
        1
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

fn owner(backend: &str, model: u64) -> CacheOwner {
    CacheOwner { backend: backend.to_string(), model }
}

/// What a forward pass does with a cache.
fn append(cache: &mut KVCache, owner: &CacheOwner, tokens: &[u32]) -> Result<()> {
    cache.check_room(tokens.len())?;
    let len = cache.len();
    let rows = cache.storage(owner, || Ok(Rows(Vec::new())))?;
    rows.0.truncate(len);
    rows.0.extend(tokens);
    cache.advance(tokens.len())
}

fn held(cache: &mut KVCache, owner: &CacheOwner) -> Vec<u32> {
    cache.storage::<Rows>(owner, || panic!("nothing is held")).unwrap().0.clone()
}

fn operation(result: Result<()>) -> String {
    match result {
        Err(InferenceError::ForwardPass(ForwardPassError::KVCacheError { operation, .. })) => operation,
        other => panic!("not a cache error: {other:?}"),
    }
}

#[test]
fn a_new_cache_holds_nothing() {
    let cache = KVCache::new(usize::MAX);
    assert_eq!((cache.len(), cache.capacity(), cache.remaining()), (0, usize::MAX, usize::MAX));
    assert!(cache.is_empty());
    assert_eq!(cache.memory_bytes(), 0);
    assert_eq!(cache.owner(), None);
}

#[test]
fn positions_fill_and_are_forgotten() {
    let mut cache = KVCache::new(5);
    let me = owner("cpu", 1);
    append(&mut cache, &me, &[1, 2, 3]).unwrap();
    assert_eq!((cache.len(), cache.remaining(), cache.memory_bytes()), (3, 2, 12));
    assert_eq!(cache.owner(), Some(&me));

    cache.truncate(3);
    cache.truncate(9);
    assert_eq!(cache.len(), 3, "truncation never adds positions");
    cache.truncate(1);
    assert_eq!(cache.len(), 1);
    assert_eq!(held(&mut cache, &me), [1]);

    append(&mut cache, &me, &[7, 8, 9, 10]).unwrap();
    assert_eq!(held(&mut cache, &me), [1, 7, 8, 9, 10]);
    cache.clear();
    assert!(cache.is_empty());
    assert_eq!(cache.owner(), Some(&me), "storage is kept for reuse");
}

#[test]
fn overflow_changes_nothing() {
    let mut cache = KVCache::new(4);
    let me = owner("cpu", 1);
    append(&mut cache, &me, &[1, 2, 3]).unwrap();
    assert_eq!(operation(append(&mut cache, &me, &[4, 5])), "append");
    assert_eq!(operation(cache.advance(2)), "append");
    assert_eq!(operation(cache.check_room(usize::MAX)), "append");
    assert_eq!(cache.len(), 3);
    assert_eq!(held(&mut cache, &me), [1, 2, 3]);
    append(&mut cache, &me, &[4]).unwrap();
    assert_eq!(cache.remaining(), 0);
}

#[test]
fn a_foreign_cache_is_refused_while_it_holds_positions() {
    let mut cache = KVCache::new(8);
    let me = owner("cpu", 1);
    append(&mut cache, &me, &[1, 2]).unwrap();

    for stranger in [owner("cpu", 2), owner("candle-fp32", 1)] {
        assert_eq!(operation(append(&mut cache, &stranger, &[3])), "attach");
    }
    assert_eq!(operation(cache.storage(&me, || Ok(Blob)).map(|_| ())), "attach", "another type of storage");
    assert_eq!(cache.owner(), Some(&me));
    assert_eq!(held(&mut cache, &me), [1, 2]);

    // Emptied, it may change hands, and the old storage is gone.
    cache.clear();
    let stranger = owner("candle-fp32", 1);
    append(&mut cache, &stranger, &[3]).unwrap();
    assert_eq!(cache.owner(), Some(&stranger));
    assert_eq!(held(&mut cache, &stranger), [3]);
}

#[test]
fn positions_of_a_backend_without_storage_are_not_taken_over() {
    let mut cache = KVCache::new(8);
    cache.advance(2).unwrap();
    assert_eq!(operation(append(&mut cache, &owner("cpu", 1), &[3])), "attach");
}

#[test]
fn storage_that_cannot_be_made_leaves_the_old_one() {
    let mut cache = KVCache::new(8);
    let me = owner("cpu", 1);
    append(&mut cache, &me, &[1]).unwrap();
    cache.clear();
    let failure = InferenceError::from(MemoryError::PoolExhausted { pool_type: "kv".to_string() });
    let result = cache.storage::<Rows>(&owner("cpu", 2), || Err(failure.clone()));
    assert_eq!(result.unwrap_err(), failure);
    assert_eq!(cache.owner(), Some(&me));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Any sequence of steps leaves the cache equal to a plain list of the same tokens.
    #[test]
    fn behaves_like_a_list(
        capacity in 0_usize..12,
        steps in proptest::collection::vec((0_u8..4, 0_usize..16), 0..40),
    ) {
        let me = owner("cpu", 1);
        let mut cache = KVCache::new(capacity);
        let mut list: Vec<u32> = Vec::new();
        for (index, (kind, n)) in steps.into_iter().enumerate() {
            match kind {
                0 | 1 => {
                    let tokens = vec![index as u32; n];
                    let fits = list.len() + n <= capacity;
                    prop_assert_eq!(append(&mut cache, &me, &tokens).is_ok(), fits);
                    if fits {
                        list.extend(tokens);
                    }
                }
                2 => {
                    cache.truncate(n);
                    list.truncate(n);
                }
                _ => {
                    cache.clear();
                    list.clear();
                }
            }
            prop_assert_eq!(cache.len(), list.len());
            prop_assert_eq!(cache.remaining(), capacity - list.len());
            prop_assert_eq!(cache.memory_bytes(), list.len() * 4);
            if cache.owner().is_some() {
                prop_assert_eq!(&held(&mut cache, &me), &list);
            }
        }
    }
}
