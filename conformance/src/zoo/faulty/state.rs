//! Faults of what an engine keeps between calls: sessions, prompts and what `reset` makes of them.

use super::super::Fault;
use super::super::naive::{At, Deviation, Naive, Sequence, SplitMix};
use super::cache::{length, shape};
use super::determinism::last_bit_of;
use bitnet_contracts::{GenerationConfig, GenerationResult, InferenceOutput, KVCache, Result, Tensor};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub(super) const FAULTS: &[Fault] = &[
    Fault::new(
        "goes-on-without-a-cache",
        "a call without a cache goes on behind the session before it, where that is the longer one",
        "candle #2819; KV-2",
        "kv_cache/no_cache_no_memory",
        || Arc::new(GoesOn::default()),
    ),
    Fault::new(
        "reset-keeps-the-session",
        "the first session after reset() goes on behind the last one before",
        "candle PR #3381, #2819; llama.cpp #4902",
        "kv_cache/clear_and_reset",
        || Arc::new(ResetKeeps::default()),
    ),
    Fault::new(
        "reset-wipes-sessions",
        "reset() forgets the keys and values that callers hold in their own caches",
        "candle PR #3381; DET-6",
        "determinism/sessions_apart",
        || Arc::new(ResetWipes::default()),
    ),
    Fault::new(
        "slot-by-length",
        "a decode step reads the session that was last at this length: a graph that keeps an old pointer",
        "aprender PR #2030; llama.cpp #9727, #12420",
        "kv_cache/two_caches",
        || Arc::new(Slots::new(|engine, cache| Some((address(engine), cache.capacity(), cache.len())))),
    ),
    Fault::new(
        "slot-by-address",
        "a session is found by the address of its cache, and caches are moved",
        "llama.cpp #12420; T7",
        "kv_cache/two_caches",
        || Arc::new(Slots::new(|_, cache| Some((address(cache), 0, 0)))),
    ),
    Fault::new(
        "pool-of-eight-sessions",
        "eight sessions have a place, and the ninth takes that of the one that was idle longest",
        "llama.cpp #6681; KV-10",
        "kv_cache/two_caches",
        || Arc::new(PoolOfEight::default()),
    ),
    Fault::new(
        "answers-in-scratch",
        "logits are handed out in memory that the next call writes to",
        "llama.cpp #9727; DET-1",
        "determinism/repeated_forward",
        || Arc::new(AnswersInScratch::default()),
    ),
    Fault::new(
        "one-position-for-all",
        "the engine counts positions over all its sessions",
        "llama.cpp #12357; KV-10",
        "kv_cache/two_caches",
        || Arc::new(OnePosition::default()),
    ),
    Fault::new(
        "prompt-cache-weak-hash",
        "generation reuses the last prompt for one of the same length, beginning and end",
        "openvino.genai #3722; vllm PR #12621",
        "determinism/lookalikes",
        || Arc::new(PromptCacheWeakHash { least: 1, ends: 1 }),
    ),
    Fault::new(
        "prompt-cache-of-long-prompts",
        "generation reuses the last prompt for one of the same length whose first and last four tokens are its own, from 16 tokens on",
        "openvino.genai #3722; vllm PR #12621",
        "determinism/lookalikes",
        || Arc::new(PromptCacheWeakHash { least: 16, ends: 4 }),
    ),
    Fault::new(
        "prefix-one-too-many",
        "the part that a prompt shares with the last one is reused with one token more",
        "am17an/llama.cpp #38, llama.cpp #28527",
        "determinism/lookalikes",
        || Arc::new(PrefixOneTooMany::default()),
    ),
    Fault::new(
        "logits-cache-weak-hash",
        "forward reuses the logits of a sequence of the same length, beginning and end",
        "openvino.genai #3722; kvcached #446; vllm #5543",
        "determinism/lookalikes",
        || Arc::new(LogitsCacheWeakHash::default()),
    ),
    Fault::new(
        "stale-scratch",
        "a shorter call reads the rest of the longer one before it",
        "microsoft/BitNet #547, PR #580",
        "determinism/repeated_forward",
        || Arc::new(StaleScratch::default()),
    ),
    Fault::new(
        "generation-clobbers-sessions",
        "a generation writes its keys and values over the end of the session that was in use",
        "llama.cpp #17316; mlx-lm #965",
        "determinism/sessions_apart",
        || Arc::new(GenerationClobbers::default()),
    ),
    Fault::new(
        "reset-reseeds",
        "reset() moves the stream of generate_deterministic on",
        "tt-inference-server #4002; DET-2",
        "determinism/same_seed",
        || Arc::new(ResetReseeds::default()),
    ),
    Fault::new(
        "stream-goes-on",
        "the random stream of one generation goes on in the next",
        "llama.cpp #7381; DET-2",
        "determinism/same_seed",
        || Arc::new(StreamGoesOn),
    ),
];

/// What a deviation remembers.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where a thing lies: its name for those who take addresses for names.
pub(super) fn address<T>(thing: &T) -> usize {
    std::ptr::from_ref(thing) as usize
}

/// Keys and values of the session that was used last.
#[derive(Default)]
struct LastSession(Mutex<Vec<Sequence>>);

impl LastSession {
    fn keep(&self, engine: &Naive, cache: Option<&mut KVCache>) -> Result<()> {
        if let Some(cache) = cache {
            *lock(&self.0) = engine.held(cache)?.sequences.clone();
        }
        Ok(())
    }

    /// The session, where a call of this shape fits behind it.
    fn take(&self, engine: &Naive, ids: &Tensor) -> Option<Vec<Sequence>> {
        let (batch, seq) = shape(ids);
        let last = std::mem::take(&mut *lock(&self.0));
        let fits = last.len() == batch && last.iter().all(|s| s.len + seq <= engine.config.max_position_embeddings);
        fits.then_some(last)
    }
}

/// Calls without a cache.
#[derive(Default)]
struct GoesOn(LastSession);

impl Deviation for GoesOn {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, mut cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        let before = if cache.is_none() { self.0.take(engine, ids) } else { None };
        if let Some(before) = before.filter(|before| before.iter().all(|s| s.len > shape(ids).1)) {
            return engine.forward_behind(before, ids);
        }
        let output = engine.honest_forward(ids, cache.as_deref_mut())?;
        self.0.keep(engine, cache)?;
        Ok(output)
    }
}

/// The first call with an empty cache after `reset`.
#[derive(Default)]
struct ResetKeeps {
    last: LastSession,
    reset: AtomicBool,
}

impl Deviation for ResetKeeps {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, mut cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        let first = cache.as_ref().is_some_and(|c| c.is_empty()) && self.reset.swap(false, Ordering::Relaxed);
        let before = if first { self.last.take(engine, ids) } else { None };
        let output = engine.honest_forward(ids, cache.as_deref_mut())?;
        self.last.keep(engine, cache)?;
        match before {
            Some(before) => engine.forward_behind(before, ids),
            None => Ok(output),
        }
    }

    fn reset(&self, _: &mut Naive) -> Result<()> {
        self.reset.store(true, Ordering::Relaxed);
        Ok(())
    }
}

/// Caches filled before `reset`.
#[derive(Default)]
struct ResetWipes(AtomicU64);

impl Deviation for ResetWipes {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, mut cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        let (start, now) = (length(cache.as_deref()), self.0.load(Ordering::Relaxed));
        let filled = match cache.as_deref_mut() {
            Some(cache) if start > 0 => engine.held(cache)?.note,
            _ => now,
        };
        let output = engine.honest_forward(ids, cache.as_deref_mut())?;
        if let Some(cache) = cache {
            engine.held(cache)?.note = filled;
        }
        if filled == now { Ok(output) } else { engine.honest_forward(ids, None) }
    }

    fn reset(&self, _: &mut Naive) -> Result<()> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// What a session is found by, where it is found at all.
type Key = fn(&Naive, &KVCache) -> Option<(usize, usize, usize)>;

/// Keys and values by something that is not the session.
pub(super) struct Slots {
    key: Key,
    slots: Mutex<HashMap<(usize, usize, usize), Vec<Sequence>>>,
}

impl Slots {
    pub(super) fn new(key: Key) -> Self {
        Self { key, slots: Mutex::default() }
    }

    pub(super) fn run(&self, engine: &mut Naive, ids: &Tensor, cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        let Some(cache) = cache else { return engine.honest_forward(ids, None) };
        let start = cache.len();
        let found = (self.key)(engine, cache).and_then(|key| lock(&self.slots).get(&key).cloned());
        if let Some(mut found) = found.filter(|f| start > 0 && f.len() == shape(ids).0) {
            found.iter_mut().for_each(|s| s.truncate(start));
            if found.iter().all(|s| s.len == start) {
                engine.held(cache)?.sequences = found;
            }
        }
        let output = engine.honest_forward(ids, Some(&mut *cache))?;
        if let Some(key) = (self.key)(engine, cache) {
            lock(&self.slots).insert(key, engine.held(cache)?.sequences.clone());
        }
        Ok(output)
    }
}

impl Deviation for Slots {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        self.run(engine, ids, cache)
    }
}

/// Sessions by the number in their cache's storage, the one that was used last at the end.
#[derive(Default)]
struct PoolOfEight {
    next: AtomicU64,
    used: Mutex<Vec<u64>>,
}

impl Deviation for PoolOfEight {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        let Some(cache) = cache else { return engine.honest_forward(ids, None) };
        let begins = cache.is_empty();
        let mut session = if begins { 0 } else { engine.held(cache)?.note };
        let lost = !begins && !lock(&self.used).contains(&session);
        let output = engine.honest_forward(ids, Some(&mut *cache))?;
        if begins {
            session = self.next.fetch_add(1, Ordering::Relaxed) + 1;
            engine.held(cache)?.note = session;
        }
        let mut used = lock(&self.used);
        used.retain(|s| *s != session);
        used.push(session);
        if used.len() > 8 {
            used.remove(0);
        }
        drop(used);
        if lost { engine.honest_forward(ids, None) } else { Ok(output) }
    }
}

/// Logits by shape.
#[derive(Default)]
struct AnswersInScratch(Mutex<HashMap<Vec<usize>, Tensor>>);

impl Deviation for AnswersInScratch {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        let mut output = engine.honest_forward(ids, cache)?;
        let mut scratch = lock(&self.0);
        let shape = output.logits.dims().to_vec();
        let place = scratch.entry(shape).or_insert(output.logits.clone()).clone();
        drop(scratch);
        if place.id() != output.logits.id() {
            place.slice_set(&output.logits, 0, 0)?;
            output.logits = place;
        }
        Ok(output)
    }
}

/// RoPE: a counter of the engine's in place of the cache's length.
#[derive(Default)]
struct OnePosition {
    next: AtomicUsize,
    ahead: AtomicUsize,
}

impl Deviation for OnePosition {
    fn rope_position(&self, at: &At<'_>, position: usize) -> usize {
        position + if at.call.generating { 0 } else { self.ahead.load(Ordering::Relaxed) }
    }

    fn forward(&self, engine: &mut Naive, ids: &Tensor, cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        let start = length(cache.as_deref());
        if start == 0 {
            self.next.store(0, Ordering::Relaxed);
        }
        let here = self.next.fetch_add(shape(ids).1, Ordering::Relaxed);
        self.ahead.store(here.saturating_sub(start), Ordering::Relaxed);
        engine.honest_forward(ids, cache)
    }
}

/// The prompt of the last generation.
struct PromptCacheWeakHash {
    /// The shortest prompt that is kept.
    least: usize,
    /// Tokens at either end that are compared.
    ends: usize,
}

impl Deviation for PromptCacheWeakHash {
    fn generate(
        &self,
        engine: &mut Naive,
        prompt: &[u32],
        max_tokens: usize,
        config: &GenerationConfig,
    ) -> Result<GenerationResult> {
        let Self { least, ends } = *self;
        let same = |known: &[u32]| {
            let ends = ends.min(prompt.len());
            known.len() == prompt.len()
                && known[..ends] == prompt[..ends]
                && known[known.len() - ends..] == prompt[prompt.len() - ends..]
        };
        if let Some(known) = engine.last_prompt.as_mut().filter(|known| prompt.len() >= least && same(&known.tokens)) {
            known.tokens = prompt.to_vec();
        }
        engine.honest_generate(prompt, max_tokens, config)
    }
}

/// The prompt of the last generation, where the next one begins as it did.
#[derive(Default)]
struct PrefixOneTooMany(Mutex<Vec<u32>>);

impl Deviation for PrefixOneTooMany {
    fn generate(
        &self,
        engine: &mut Naive,
        prompt: &[u32],
        max_tokens: usize,
        config: &GenerationConfig,
    ) -> Result<GenerationResult> {
        let last = std::mem::replace(&mut *lock(&self.0), prompt.to_vec());
        let shared = prompt.iter().zip(&last).take_while(|(a, b)| a == b).count();
        let mut read = prompt.to_vec();
        // The last token is always evaluated: its logits are wanted.
        if shared >= 2 && shared + 1 < prompt.len().min(last.len()) {
            read[shared] = last[shared];
        }
        let mut result = engine.honest_generate(&read, max_tokens, config)?;
        result.prompt_tokens = prompt.to_vec();
        Ok(result)
    }
}

/// The sequence of the last call without a cache.
#[derive(Default)]
struct LogitsCacheWeakHash(Mutex<Vec<u32>>);

impl Deviation for LogitsCacheWeakHash {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        let rows = engine.rows(ids)?;
        if cache.is_some() || rows.len() != 1 {
            return engine.honest_forward(ids, cache);
        }
        let tokens = &rows[0];
        let hash = |tokens: &[u32]| (tokens.len(), tokens.first().copied(), tokens.last().copied());
        let mut last = lock(&self.0);
        if hash(&last) != hash(tokens) {
            last.clone_from(tokens);
        }
        let (read, len) = (last.clone(), last.len());
        drop(last);
        engine.honest_forward(&Tensor::from_vec(read, (1, len), ids.device())?, None)
    }
}

/// Scratch memory of calls without a cache.
#[derive(Default)]
struct StaleScratch(AtomicUsize);

impl Deviation for StaleScratch {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        let tokens = ids.elem_count();
        let before = if cache.is_none() { self.0.swap(tokens, Ordering::Relaxed) } else { 0 };
        let output = engine.honest_forward(ids, cache)?;
        if before > tokens { last_bit_of(output) } else { Ok(output) }
    }
}

/// A session that began with a single token, and has no page that a generation might take.
const UNPAGED: u64 = u64::MAX;

/// The end of a session at the first decode step after a generation of the same engine.
#[derive(Default)]
struct GenerationClobbers(Mutex<HashMap<usize, u64>>);

impl Deviation for GenerationClobbers {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, mut cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        let made = lock(&self.0).get(&address(engine)).copied().unwrap_or(0);
        if let Some(cache) = cache.as_deref_mut().filter(|c| !c.is_empty() && shape(ids).1 == 1) {
            let held = engine.held(cache)?;
            if held.note != made && held.note != UNPAGED {
                for values in held.sequences.iter_mut().filter_map(|s| s.values.first_mut()) {
                    values.iter_mut().rev().take(8).for_each(|v| *v = 0.0);
                }
            }
        }
        let begins = length(cache.as_deref()) == 0;
        let output = engine.honest_forward(ids, cache.as_deref_mut())?;
        if let Some(cache) = cache {
            let held = engine.held(cache)?;
            let unpaged = if begins { shape(ids).1 == 1 } else { held.note == UNPAGED };
            held.note = if unpaged { UNPAGED } else { made };
        }
        Ok(output)
    }

    fn generate(
        &self,
        engine: &mut Naive,
        prompt: &[u32],
        max_tokens: usize,
        config: &GenerationConfig,
    ) -> Result<GenerationResult> {
        *lock(&self.0).entry(address(engine)).or_default() += 1;
        engine.honest_generate(prompt, max_tokens, config)
    }
}

/// The seeds of `generate_deterministic`.
#[derive(Default)]
struct ResetReseeds(AtomicU64);

impl Deviation for ResetReseeds {
    fn generate_deterministic(
        &self,
        engine: &mut Naive,
        prompt: &[u32],
        max_tokens: usize,
        seed: u64,
    ) -> Result<GenerationResult> {
        let mut seed = SplitMix(seed);
        for _ in 0..self.0.load(Ordering::Relaxed) {
            seed.uniform();
        }
        let config = GenerationConfig { seed: Some(seed.0), ..GenerationConfig::default() };
        engine.honest_generate(prompt, max_tokens, &config)
    }

    fn reset(&self, _: &mut Naive) -> Result<()> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// The seeds of all generations.
struct StreamGoesOn;

impl Deviation for StreamGoesOn {
    fn seed(&self, config: &GenerationConfig, serial: u64) -> u64 {
        config.seed.unwrap_or(0).wrapping_add(serial)
    }
}
