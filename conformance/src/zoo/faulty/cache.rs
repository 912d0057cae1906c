//! Faults of a cache by itself: what it holds, for how long, how much fits and whose it is.

use super::super::Fault;
use super::super::naive::{At, Deviation, Honest, Naive, NaiveCache, Sequence, Weights};
use crate::model::ModelFixture;
use bitnet_contracts::{
    CacheOwner, ForwardPassError, InferenceError, InferenceOutput, KVCache, Result, Tensor, TokenizationError,
};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

pub(super) const FAULTS: &[Fault] = &[
    Fault::new(
        "cache-positions-off-by-one",
        "positions behind a cache begin one after its end",
        "llama.cpp #28368, PR #7745",
        "kv_cache/chunked_is_whole",
        || Arc::new(PositionsOffByOne),
    ),
    Fault::new(
        "prefill-after-decoding",
        "a chunk of 2 to 16 tokens after a decode step begins at the position of that step",
        "llama.cpp PR #4889; KV-1",
        "kv_cache/chunked_is_whole",
        || Arc::new(PrefillAfterDecoding::default()),
    ),
    Fault::new(
        "page-border-not-seen",
        "decoding in the second page of 32 positions does not see the last one of the first",
        "mistral.rs #246; KV-1",
        "kv_cache/long_decode_is_whole",
        || Arc::new(PageBorder),
    ),
    Fault::new(
        "third-sequence-of-the-cache",
        "three sequences are cached with the stride of two: the third one loses its first position",
        "candle PR #2073; KV-1",
        "kv_cache/chunked_batch_is_whole",
        || Arc::new(ThirdSequence),
    ),
    Fault::new(
        "length-counts-the-batch",
        "the length of a cache grows by the tokens of all sequences together",
        "llama.cpp #28368; T7",
        "kv_cache/chunked_batch_is_whole",
        || Arc::new(LengthCountsTheBatch),
    ),
    Fault::new(
        "truncates-whole-pages",
        "truncation keeps the rest of a page of four positions in sight",
        "llama.cpp #28527; KV-3",
        "kv_cache/truncate_and_replay",
        || Arc::new(Truncates(|sequences, len| sequences.iter_mut().for_each(|s| s.truncate(len.div_ceil(4) * 4)))),
    ),
    Fault::new(
        "truncates-first-sequence",
        "truncation forgets the positions of the first sequence of a batch only",
        "vllm #5543; KV-3",
        "kv_cache/truncate_and_replay",
        || Arc::new(Truncates(|sequences, len| sequences.iter_mut().take(1).for_each(|s| s.truncate(len)))),
    ),
    Fault::new(
        "clear-keeps-the-rest",
        "a cleared cache that is filled with a shorter prompt still sees the end of the longer one",
        "candle PR #3381, #2819; llama.cpp #4902",
        "kv_cache/clear_and_reset",
        || Arc::new(ClearKeepsTheRest),
    ),
    Fault::new(
        "full-cache-rolls-over",
        "a cache without room silently drops its latest positions to make some",
        "llama.cpp #3969, PR #6638",
        "kv_cache/overflow",
        || Arc::new(RollsOver),
    ),
    Fault::new(
        "overflow-leaves-pieces",
        "a long input is worked off in pieces of 16, and a full cache refuses the one that does not fit",
        "KV-5; B5",
        "kv_cache/overflow",
        || Arc::new(OverflowLeavesPieces),
    ),
    Fault::new(
        "full-cache-hangs",
        "a call with a cache that is exactly full waits for room for ever",
        "llama.cpp #3969, #2754",
        "kv_cache/overflow",
        || Arc::new(FullCacheHangs),
    ),
    Fault::new(
        "bad-id-leaves-tokens",
        "the tokens of a short piece before an id out of range stay in the cache",
        "KV-6; B5",
        "kv_cache/errors_change_nothing",
        || Arc::new(BadIdLeavesTokens),
    ),
    Fault::new(
        "instability-leaves-positions",
        "the cache is advanced before the pass, and not taken back when numbers overflow",
        "KV-6; B5",
        "kv_cache/failed_pass_changes_nothing",
        || Arc::new(InstabilityLeavesPositions),
    ),
    Fault::new(
        "cache-owned-by-backend",
        "a cache is anybody's of the same backend, whatever its model",
        "KV-7; T7",
        "kv_cache/foreign_cache",
        || Arc::new(Owner(|_| 0)),
    ),
    Fault::new(
        "cache-owned-by-shape",
        "a cache is taken from any model of the same shape",
        "vllm #7845; T7",
        "kv_cache/foreign_cache",
        || Arc::new(Owner(|w| (w.layers.len() * w.facts.hidden_size * w.facts.vocab_size) as u64)),
    ),
    Fault::new(
        "cache-owned-by-configuration",
        "models are told apart by the bytes of their config.json",
        "KV-7; T7",
        "kv_cache/foreign_cache",
        || Arc::new(OwnedByConfiguration::default()),
    ),
    Fault::new(
        "cache-owner-number-reused",
        "models are numbered by how many there are, so that a number comes back when one is dropped",
        "llama.cpp #12420; T7",
        "kv_cache/foreign_cache",
        || Arc::new(NumberReused::default()),
    ),
    Fault::new(
        "foreign-cache-emptied",
        "a cache of another model is emptied instead of refused",
        "KV-7; T7",
        "kv_cache/foreign_cache",
        || Arc::new(ForeignCacheEmptied),
    ),
    Fault::new(
        "context-as-long-as-the-cache",
        "a cache with room to spare makes the context longer",
        "llama.cpp #2754; KV-8",
        "kv_cache/last_position",
        || Arc::new(ContextAsLongAsTheCache),
    ),
    Fault::new(
        "last-position-refused",
        "with a cache the last position of the context is out of reach",
        "llama.cpp #28368; KV-8",
        "kv_cache/last_position",
        || Arc::new(LastPositionRefused),
    ),
    Fault::new(
        "other-batch-accepted",
        "a batch of another size goes on behind copies of the first sequence",
        "candle PR #1832; KV-9",
        "kv_cache/other_batch",
        || Arc::new(OtherBatchAccepted),
    ),
    Fault::new(
        "batch-kept-by-clear",
        "a cleared cache stays one for as many sequences as before",
        "KV-3, KV-9",
        "kv_cache/other_batch",
        || Arc::new(BatchKeptByClear),
    ),
];

/// The rows and columns of an input.
pub(super) fn shape(ids: &Tensor) -> (usize, usize) {
    ids.dims2().unwrap_or((0, 0))
}

/// The positions that a cache holds.
pub(super) fn length(cache: Option<&KVCache>) -> usize {
    cache.map_or(0, KVCache::len)
}

/// RoPE: every call behind a filled cache is one position late.
pub(super) struct PositionsOffByOne;

impl Deviation for PositionsOffByOne {
    fn rope_position(&self, at: &At<'_>, position: usize) -> usize {
        position + usize::from(at.call.start > 0)
    }
}

/// RoPE, one sequence: the flag that a session decodes is not taken back for the next prompt.
#[derive(Default)]
struct PrefillAfterDecoding {
    late: AtomicBool,
}

impl Deviation for PrefillAfterDecoding {
    fn rope_position(&self, at: &At<'_>, position: usize) -> usize {
        position - usize::from(!at.call.generating && at.call.start > 0 && self.late.load(Ordering::Relaxed))
    }

    fn forward(&self, engine: &mut Naive, ids: &Tensor, mut cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        let ((batch, seq), start) = (shape(ids), length(cache.as_deref()));
        let decoding = match cache.as_deref_mut() {
            Some(cache) if start > 0 => engine.held(cache).is_ok_and(|held| held.note > 0),
            _ => false,
        };
        self.late.store(decoding && batch == 1 && (2..=16).contains(&seq), Ordering::Relaxed);
        let output = engine.honest_forward(ids, cache.as_deref_mut())?;
        if let Some(cache) = cache {
            engine.held(cache)?.note = u64::from(decoding || start > 0 && seq == 1);
        }
        Ok(output)
    }
}

/// Attention, decoding: the border between two pages.
struct PageBorder;

impl Deviation for PageBorder {
    fn sees(&self, at: &At<'_>, other: usize) -> bool {
        let beyond = at.call.seq == 1 && (32..64).contains(&at.position) && !at.call.generating;
        other <= at.position && !(beyond && other == 31)
    }
}

/// Attention, batches behind a filled cache: rows beyond the second.
struct ThirdSequence;

impl Deviation for ThirdSequence {
    fn sees(&self, at: &At<'_>, other: usize) -> bool {
        other <= at.position && !(at.call.batch == 3 && at.sequence == 2 && at.call.start > 0 && other == 0)
    }
}

/// The length after a call with a batch.
struct LengthCountsTheBatch;

impl Deviation for LengthCountsTheBatch {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, mut cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        let output = engine.honest_forward(ids, cache.as_deref_mut())?;
        let (batch, seq) = shape(ids);
        if let Some(cache) = cache {
            cache.advance((seq * (batch - 1)).min(cache.remaining()))?;
        }
        Ok(output)
    }
}

/// `truncate` of the storage.
struct Truncates(fn(&mut [Sequence], usize));

impl Deviation for Truncates {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, mut cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        let output = engine.honest_forward(ids, cache.as_deref_mut())?;
        if let Some(cache) = cache {
            engine.held(cache)?.on_truncate = Some(self.0);
        }
        Ok(output)
    }
}

/// `clear` of the storage sets a length to 0, and the mask goes by the longest prompt so far.
struct ClearKeepsTheRest;

impl Deviation for ClearKeepsTheRest {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, mut cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        let (batch, seq) = shape(ids);
        let owner = engine.shared.owner.clone();
        let cleared = cache.as_deref_mut().filter(|c| c.is_empty() && c.owner() == Some(&owner));
        let old = match cleared {
            Some(cache) => std::mem::take(&mut engine.held(cache)?.sequences),
            None => Vec::new(),
        };
        let output = engine.honest_forward(ids, cache.as_deref_mut())?;
        if let Some(cache) = cache {
            engine.held(cache)?.on_truncate = Some(|sequences, len| {
                if len > 0 {
                    sequences.iter_mut().for_each(|s| s.truncate(len));
                }
            });
        }
        if old.len() == batch && old.iter().all(|s| s.len > seq) {
            return engine.forward_behind(old, ids);
        }
        Ok(output)
    }
}

/// Room for new positions in a cache that has none.
struct RollsOver;

impl Deviation for RollsOver {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, mut cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        let (_, seq) = shape(ids);
        if let Some(cache) = cache.as_deref_mut().filter(|c| !c.is_empty() && seq <= c.capacity()) {
            cache.truncate(cache.capacity() - seq);
        }
        engine.honest_forward(ids, cache)
    }
}

/// Room is looked for piece by piece.
struct OverflowLeavesPieces;

impl Deviation for OverflowLeavesPieces {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, mut cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        const PIECE: usize = 16;
        let (_, seq) = shape(ids);
        if let Some(cache) = cache.as_deref_mut().filter(|c| seq > c.remaining()) {
            for piece in 0..cache.remaining() / PIECE {
                engine.honest_forward(&ids.narrow(1, piece * PIECE, PIECE)?, Some(cache))?;
            }
        }
        engine.honest_forward(ids, cache)
    }
}

/// The same: waiting for it.
struct FullCacheHangs;

impl Deviation for FullCacheHangs {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        while cache.as_ref().is_some_and(|c| !c.is_empty() && c.remaining() == 0) {
            std::thread::sleep(Duration::from_millis(100));
        }
        engine.honest_forward(ids, cache)
    }
}

/// Ids are checked one by one, as they are computed.
struct BadIdLeavesTokens;

impl Deviation for BadIdLeavesTokens {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, mut cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        let result = engine.honest_forward(ids, cache.as_deref_mut());
        let bad = match &result {
            Err(InferenceError::Tokenization(TokenizationError::InvalidToken { position, .. })) => *position,
            _ => 0,
        };
        if let Some(cache) = cache.filter(|_| (1..32).contains(&bad) && shape(ids).0 == 1) {
            engine.honest_forward(&ids.narrow(1, 0, bad)?, Some(cache))?;
        }
        result
    }
}

/// Positions are counted before the pass, and a failing pass does not take them back.
struct InstabilityLeavesPositions;

impl Deviation for InstabilityLeavesPositions {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, mut cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        let result = engine.honest_forward(ids, cache.as_deref_mut());
        if let (Err(InferenceError::ForwardPass(ForwardPassError::NumericalInstability { .. })), Some(cache)) =
            (&result, cache)
        {
            cache.advance(shape(ids).1)?;
        }
        result
    }
}

/// The owner's number.
struct Owner(fn(&Weights) -> u64);

impl Deviation for Owner {
    fn owner(&self, owner: CacheOwner, weights: &Weights) -> CacheOwner {
        CacheOwner { model: (self.0)(weights), ..owner }
    }
}

/// The owner's number: a hash of the folder's `config.json`.
#[derive(Default)]
struct OwnedByConfiguration(AtomicU64);

impl Deviation for OwnedByConfiguration {
    fn load(&self, model: &ModelFixture) -> Result<Weights> {
        let mut hasher = DefaultHasher::new();
        std::fs::read(model.dir().join("config.json")).unwrap_or_default().hash(&mut hasher);
        self.0.store(hasher.finish(), Ordering::SeqCst);
        Honest.load(model)
    }

    fn owner(&self, owner: CacheOwner, _: &Weights) -> CacheOwner {
        CacheOwner { model: self.0.load(Ordering::SeqCst), ..owner }
    }
}

/// The owner's number: engines alive, this one included.
#[derive(Default)]
struct NumberReused(AtomicBool);

static ALIVE: AtomicU64 = AtomicU64::new(0);

impl Deviation for NumberReused {
    fn owner(&self, owner: CacheOwner, _: &Weights) -> CacheOwner {
        self.0.store(true, Ordering::SeqCst);
        CacheOwner { model: ALIVE.fetch_add(1, Ordering::SeqCst), ..owner }
    }
}

impl Drop for NumberReused {
    fn drop(&mut self) {
        if self.0.load(Ordering::SeqCst) {
            ALIVE.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

/// A cache of another owner.
struct ForeignCacheEmptied;

impl Deviation for ForeignCacheEmptied {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, mut cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        let owner = engine.shared.owner.clone();
        if let Some(cache) = cache.as_deref_mut().filter(|c| c.owner() != Some(&owner)) {
            cache.clear();
        }
        engine.honest_forward(ids, cache)
    }
}

/// The end of the context, in a cache that is larger.
struct ContextAsLongAsTheCache;

impl Deviation for ContextAsLongAsTheCache {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        let positions = engine.config.max_position_embeddings;
        engine.config.max_position_embeddings = positions.max(cache.as_ref().map_or(0, |c| c.capacity()));
        let result = engine.honest_forward(ids, cache);
        engine.config.max_position_embeddings = positions;
        result
    }
}

/// The end of the context, one position early.
struct LastPositionRefused;

impl Deviation for LastPositionRefused {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        let end = length(cache.as_deref()) + shape(ids).1;
        if cache.is_some() && end == engine.config.max_position_embeddings {
            let reason = format!("position {end} is the last");
            return Err(ForwardPassError::KVCacheError { operation: "append".to_string(), reason }.into());
        }
        engine.honest_forward(ids, cache)
    }
}

/// The batch of a cache is fixed by its first use.
struct BatchKeptByClear;

impl Deviation for BatchKeptByClear {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, mut cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        let (batch, _) = shape(ids);
        if let Some(cache) = cache.as_deref_mut().filter(|cache| cache.is_empty()) {
            let before = engine.held(cache)?.sequences.len();
            if before != 0 && before != batch {
                let reason = format!("a cache of {before} sequences, and {batch} are given");
                return Err(ForwardPassError::KVCacheError { operation: "append".to_string(), reason }.into());
            }
        }
        engine.honest_forward(ids, cache)
    }
}

/// A batch of another size than the cache's.
struct OtherBatchAccepted;

impl Deviation for OtherBatchAccepted {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, mut cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        let (batch, _) = shape(ids);
        if let Some(cache) = cache.as_deref_mut().filter(|c| !c.is_empty()) {
            let NaiveCache { sequences, .. } = engine.held(cache)?;
            if let Some(first) = sequences.first().cloned() {
                sequences.resize(batch, first);
            }
        }
        engine.honest_forward(ids, cache)
    }
}
