//! Faults of memory: figures that are not true, and what is left behind.

use super::super::Fault;
use super::super::naive::{Deviation, Naive, Sequence, Weights};
use bitnet_contracts::{
    BitNetInference, GenerationConfig, GenerationResult, InferenceOutput, KVCache, MemoryUsage, Result, Tensor,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

pub(super) const FAULTS: &[Fault] = &[
    memory("peak-below-current", "the peak is less than what is held", "memory/figures_fit_together", |u| {
        u.peak_usage = u.current_usage / 2;
    }),
    memory("weights-not-counted", "model_weights is a fortieth of the weights", "memory/figures_fit_together", |u| {
        u.model_weights /= 40;
    }),
    memory("fragmentation-in-percent", "fragmentation_ratio is a percentage", "memory/figures_fit_together", |u| {
        u.fragmentation_ratio = 12.5;
    }),
    memory("usage-zero", "memory_usage() is zero", "memory/figures_fit_together", |u| *u = MemoryUsage::default()),
    memory("usage-inflated", "ten megabytes are claimed that nobody holds", "memory/resident", |u| {
        for bytes in [&mut u.model_weights, &mut u.current_usage, &mut u.peak_usage] {
            *bytes += 10 << 20;
        }
    }),
    Fault::new(
        "session-scratch-not-counted",
        "every session holds 128 KiB of scratch that no figure counts",
        "MEM-3",
        "memory/resident",
        || Arc::new(SessionScratch),
    ),
    Fault::new(
        "cache-kept-twice",
        "keys and values are held twice and counted once",
        "MEM-3: a transposed copy of the keys beside them",
        "memory/resident",
        || Arc::new(CacheKeptTwice),
    ),
    Fault::new(
        "cache-of-the-first-row",
        "a cache of several sequences tells the bytes of the first",
        "MEM-3: bytes of a slot, where there are as many as the batch has rows",
        "memory/resident",
        || Arc::new(CacheOfTheFirstRow),
    ),
    Fault::with(
        "cache-told-by-its-first-page",
        "the metrics of a pass count the first 64 positions of a cache only",
        "MEM-2: bytes that are read before the cache grows",
        "memory/cache_growth",
        super::super::Build::Metrics(|m, call| {
            let positions = call.start + call.seq;
            m.cache_memory_usage = m.cache_memory_usage * positions.min(64) / positions.max(1);
        }),
    )
    .on("tiny"),
    Fault::new(
        "own-head-not-counted",
        "the weights that are told leave out a head that is not the embedding",
        "MEM-3",
        "memory/resident",
        || Arc::new(OwnHeadNotCounted::default()),
    ),
    Fault::with(
        "cache-not-reported",
        "the metrics of a pass never count the cache",
        "MEM-2",
        "memory/cache_growth",
        super::super::Build::Metrics(|m, _| m.cache_memory_usage = 0),
    ),
    memory("cache-constant", "the cache is always two thousand bytes", "memory/cache_growth", |u| u.kv_cache = 2000),
    Fault::new(
        "leak-per-token",
        "every forward call leaves a row of logits behind",
        "llama.cpp #25953, ollama #18106",
        "memory/nothing_left_by_calls",
        || Arc::new(LeakPerCall),
    ),
    Fault::new(
        "leak-per-refusal",
        "a refused call leaves its buffers behind",
        "llama.cpp #27725",
        "memory/nothing_left_by_calls",
        || Arc::new(LeakPerRefusal),
    ),
    Fault::new(
        "leak-per-generation",
        "every generation leaves its sequence behind",
        "llama.cpp #25953",
        "memory/nothing_left_by_calls",
        || Arc::new(LeakPerGeneration),
    ),
    Fault::new(
        "leak-per-engine",
        "a dropped engine leaves its weights behind",
        "llama.cpp #27725",
        "memory/nothing_left_by_engines",
        || Arc::new(LeakPerEngine(vec![7; 200_000])),
    ),
    Fault::new(
        "leak-per-copy",
        "a dropped thread-local copy leaves its session behind",
        "llama.cpp #27725",
        "memory/nothing_left_by_copies",
        || Arc::new(LeakPerCopy),
    ),
];

/// A lie in the memory figures.
const fn memory(name: &'static str, what: &'static str, killer: &'static str, change: fn(&mut MemoryUsage)) -> Fault {
    Fault::with(name, what, "MEM-1 to MEM-3: figures that are constants", killer, super::super::Build::Memory(change))
}

/// Bytes that nobody will ever free.
fn leak(bytes: usize) {
    std::mem::forget(std::hint::black_box(vec![1u8; bytes]));
}

struct SessionScratch;

impl Deviation for SessionScratch {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, mut cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        let output = engine.honest_forward(ids, cache.as_deref_mut());
        if let (Ok(_), Some(cache)) = (&output, cache) {
            engine.held(cache)?.scratch = vec![1; 1 << 17];
        }
        output
    }
}

struct CacheKeptTwice;

impl Deviation for CacheKeptTwice {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, mut cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        let output = engine.honest_forward(ids, cache.as_deref_mut());
        if let (Ok(_), Some(cache)) = (&output, cache) {
            let held = engine.held(cache)?;
            held.scratch = vec![1; held.sequences.iter().map(Sequence::bytes).sum()];
        }
        output
    }
}

struct CacheOfTheFirstRow;

impl Deviation for CacheOfTheFirstRow {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, mut cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        let output = engine.honest_forward(ids, cache.as_deref_mut());
        if let (Ok(_), Some(cache)) = (&output, cache) {
            engine.held(cache)?.counts_first_only = true;
        }
        output
    }
}

/// Bytes of the model's own head.
#[derive(Default)]
struct OwnHeadNotCounted(AtomicUsize);

impl Deviation for OwnHeadNotCounted {
    fn weights(&self, weights: &mut Weights) {
        self.0.store(4 * weights.head.as_ref().map_or(0, Vec::len), Ordering::Relaxed);
    }

    fn memory(&self, usage: &mut MemoryUsage) {
        let head = self.0.load(Ordering::Relaxed);
        usage.model_weights -= head;
        usage.current_usage -= head;
    }
}

struct LeakPerCall;

impl Deviation for LeakPerCall {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        leak(4 * engine.config.vocab_size);
        engine.honest_forward(ids, cache)
    }
}

struct LeakPerRefusal;

impl Deviation for LeakPerRefusal {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        let result = engine.honest_forward(ids, cache);
        if result.is_err() {
            leak(1500);
        }
        result
    }
}

struct LeakPerGeneration;

impl Deviation for LeakPerGeneration {
    fn generate(
        &self,
        engine: &mut Naive,
        prompt: &[u32],
        max_tokens: usize,
        config: &GenerationConfig,
    ) -> Result<GenerationResult> {
        leak(600);
        engine.honest_generate(prompt, max_tokens, config)
    }
}

/// Holds a ballast that goes the way of the engine, and does not.
struct LeakPerEngine(Vec<u8>);

impl Deviation for LeakPerEngine {}

impl Drop for LeakPerEngine {
    fn drop(&mut self) {
        std::mem::forget(std::mem::take(&mut self.0));
    }
}

struct LeakPerCopy;

impl Deviation for LeakPerCopy {
    fn thread_local_copy(&self, engine: &Naive) -> Result<Box<dyn BitNetInference>> {
        leak(1200);
        Ok(Box::new(engine.copy()))
    }
}
