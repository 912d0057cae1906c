//! Other ways to keep what is kept: caches, prompts, batches, locks, and next to nothing.

use super::super::HonestVariant;
use super::super::naive::{At, Deviation, Honest, Naive, Sequence};
use crate::backend::{Capabilities, Semantics};
use crate::invariance::Invariance;
use bitnet_contracts::{
    CacheStorage, ForwardPassError, GenerationConfig, GenerationResult, InferenceOutput, KVCache, Result, Tensor,
};
use std::any::Any;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

const A8: Semantics = Semantics::W158A8;

pub(super) const VARIANTS: &[HonestVariant] = &[
    HonestVariant {
        name: "no-keys-and-values",
        what: "a cache holds the ids alone, and every call computes all positions anew",
        declare: |c| c,
        semantics: A8,
        make: || Arc::new(IdsOnly),
    },
    HonestVariant {
        name: "paged-cache",
        what: "a cache grows by pages of 16 positions",
        declare: |c| c,
        semantics: A8,
        make: || Arc::new(Room(|positions, _| positions.next_multiple_of(16))),
    },
    HonestVariant {
        name: "whole-cache-at-once",
        what: "a cache takes the room of its capacity with its first position",
        declare: |c| c,
        semantics: A8,
        make: || Arc::new(Room(|_, capacity| capacity)),
    },
    HonestVariant {
        name: "prefix-reuse",
        what: "what a sequence shares with the one before is not computed again",
        declare: |c| c,
        semantics: A8,
        make: || Arc::new(PrefixReuse::default()),
    },
    HonestVariant {
        name: "batch-blocks",
        what: "batches are computed from the end, in blocks of two, the last one filled up",
        declare: |c| c,
        semantics: A8,
        make: || Arc::new(BatchBlocks),
    },
    HonestVariant {
        name: "uneven-sums",
        what: "chunks and batches round in another way each, and no bits are claimed",
        declare: |c| c.with_invariance(Invariance::default()),
        semantics: A8,
        make: || Arc::new(UnevenSums),
    },
    HonestVariant {
        name: "uneven-sums-fp32",
        what: "the same in fp32 semantics",
        declare: |c| c.with_invariance(Invariance::default()),
        semantics: Semantics::Fp32,
        make: || Arc::new(UnevenSums),
    },
    HonestVariant {
        name: "one-lock",
        what: "all callers and copies take turns behind one lock",
        declare: |c| c,
        semantics: A8,
        make: || Arc::new(OneLock::default()),
    },
    HonestVariant {
        name: "nothing-optional",
        what: "one sequence, one thread, one caller, no text, no optional output, all of it declared",
        declare: |c| Capabilities::new(c.semantics),
        semantics: A8,
        make: || Arc::new(Honest),
    },
];

/// A cache of ids.
#[derive(Default)]
struct Ids(Vec<Vec<u32>>);

impl CacheStorage for Ids {
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

fn cache_error(reason: String) -> bitnet_contracts::InferenceError {
    ForwardPassError::KVCacheError { operation: "append".to_string(), reason }.into()
}

struct IdsOnly;

impl Deviation for IdsOnly {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        let Some(cache) = cache else { return engine.honest_forward(ids, None) };
        let rows = engine.rows(ids)?;
        let (batch, seq, start) = (rows.len(), rows[0].len(), cache.len());
        cache.check_room(seq)?;
        if start + seq > engine.config.max_position_embeddings {
            return Err(cache_error(format!("{start} + {seq} positions")));
        }
        let held = cache.storage(&engine.shared.owner.clone(), || Ok(Ids::default()))?;
        if start == 0 {
            held.0 = vec![Vec::new(); batch];
        }
        if held.0.len() != batch {
            return Err(cache_error(format!("the cache holds {} sequences, the input {batch}", held.0.len())));
        }
        let all: Vec<u32> = held.0.iter().zip(&rows).flat_map(|(old, new)| [&old[..], new].concat()).collect();
        let mut output = engine.honest_forward(&Tensor::from_vec(all, (batch, start + seq), ids.device())?, None)?;
        held.0.iter_mut().zip(rows).for_each(|(old, new)| old.extend(new));
        let bytes = held.memory_bytes();
        cache.advance(seq)?;
        output.logits = output.logits.narrow(1, start, seq)?;
        output.hidden_states = output.hidden_states.map(|states| states.narrow(1, start, seq)).transpose()?;
        if let Some(layers) = &mut output.attention_weights {
            for weights in layers {
                *weights = weights.narrow(2, start, seq)?;
            }
        }
        output.metrics.cache_memory_usage = bytes;
        output.memory_usage.kv_cache = bytes;
        output.memory_usage.current_usage += bytes;
        output.memory_usage.peak_usage = output.memory_usage.peak_usage.max(output.memory_usage.current_usage);
        engine.peak = engine.peak.max(output.memory_usage.peak_usage);
        Ok(output)
    }

    fn generate(
        &self,
        engine: &mut Naive,
        prompt: &[u32],
        max_tokens: usize,
        config: &GenerationConfig,
    ) -> Result<GenerationResult> {
        engine.honest_generate(prompt, max_tokens, &GenerationConfig { use_cache: false, ..config.clone() })
    }
}

/// For so many positions in a cache of such a capacity, room for that many.
struct Room(fn(usize, usize) -> usize);

impl Deviation for Room {
    fn make_room(&self, sequence: &mut Sequence, width: usize, positions: usize, capacity: usize) {
        let wanted = (self.0)(sequence.len + positions, capacity) * width;
        for rows in sequence.keys.iter_mut().chain(&mut sequence.values) {
            rows.reserve_exact(wanted.saturating_sub(rows.len()));
        }
    }
}

/// The last sequence that was computed without a cache.
#[derive(Default)]
struct Known {
    tokens: Vec<u32>,
    logits: Vec<f32>,
    sequence: Sequence,
}

#[derive(Default)]
struct PrefixReuse(Mutex<Known>);

impl Deviation for PrefixReuse {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        let options = &engine.shared.options;
        if cache.is_some() || options.output_attentions || options.output_hidden_states || ids.dims2().is_err() {
            return engine.honest_forward(ids, cache);
        }
        let rows = engine.rows(ids)?;
        let [tokens] = &rows[..] else { return engine.honest_forward(ids, None) };
        let begin = Instant::now();
        let mut known = lock(&self.0);
        let shared = tokens.iter().zip(&known.tokens).take_while(|(a, b)| a == b).count().min(tokens.len() - 1);
        let mut own = KVCache::new(tokens.len());
        if shared > 0 {
            let mut sequence = known.sequence.clone();
            sequence.truncate(shared);
            engine.held(&mut own)?.sequences = vec![sequence];
            own.advance(shared)?;
        }
        let rest = ids.narrow(1, shared, tokens.len() - shared)?;
        let mut output = engine.honest_forward(&rest, Some(&mut own))?;
        let (_, fresh, vocab) = output.logits.dims3()?;
        let mut logits = known.logits.get(..shared * vocab).unwrap_or_default().to_vec();
        logits.extend(output.logits.flatten_all()?.to_vec1::<f32>()?);
        output.logits = Tensor::from_vec(logits.clone(), (1, tokens.len(), vocab), ids.device())?;
        output.metrics.flops_estimate = output.metrics.flops_estimate / fresh as u64 * tokens.len() as u64;
        output.metrics.total_time = begin.elapsed();
        let sequence = std::mem::take(&mut engine.held(&mut own)?.sequences).swap_remove(0);
        *known = Known { tokens: tokens.clone(), logits, sequence };
        Ok(output)
    }

    fn reset(&self, _: &mut Naive) -> Result<()> {
        *lock(&self.0) = Known::default();
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct BatchBlocks;

impl Deviation for BatchBlocks {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        let rows = engine.rows(ids)?;
        if cache.is_some() || rows.len() < 2 {
            return engine.honest_forward(ids, cache);
        }
        let (begin, batch) = (Instant::now(), rows.len());
        let mut made = Vec::new();
        for first in (0..batch).step_by(2).rev() {
            let second = (first + 1).min(batch - 1);
            let block = Tensor::cat(&[ids.narrow(0, first, 1)?, ids.narrow(0, second, 1)?], 0)?;
            made.push(engine.honest_forward(&block, None)?);
        }
        made.reverse();
        let whole = |of: &dyn Fn(&InferenceOutput) -> Option<Tensor>| -> Result<Option<Tensor>> {
            let parts: Option<Vec<Tensor>> = made.iter().map(of).collect();
            Ok(parts.map(|parts| Tensor::cat(&parts, 0)?.narrow(0, 0, batch)).transpose()?)
        };
        let (logits, hidden_states) = (whole(&|o| Some(o.logits.clone()))?, whole(&|o| o.hidden_states.clone())?);
        let layers = made[0].attention_weights.as_ref().map_or(0, Vec::len);
        let attention: Vec<Tensor> = (0..layers)
            .filter_map(|i| whole(&|o| o.attention_weights.as_ref().map(|l| l[i].clone())).transpose())
            .collect::<Result<_>>()?;
        let (blocks, flops) = (made.len(), made[0].metrics.flops_estimate);
        let mut output = made.swap_remove(0);
        output.logits = logits.unwrap_or(output.logits);
        output.hidden_states = hidden_states;
        output.attention_weights = (layers > 0).then_some(attention);
        output.metrics.flops_estimate = flops / 2 * batch as u64;
        output.metrics.attention_time *= blocks as u32;
        output.metrics.feedforward_time *= blocks as u32;
        output.metrics.total_time = begin.elapsed();
        Ok(output)
    }
}

struct UnevenSums;

impl Deviation for UnevenSums {
    fn projected(&self, at: &At<'_>, values: &mut [f32]) {
        let shape = at.call.seq * 31 + at.call.batch * 17 + at.call.start * 7;
        for (i, value) in values.iter_mut().enumerate() {
            *value = (f64::from(*value) * (1.0 + 1e-7 * ((shape + i) % 3) as f64 - 1e-7)) as f32;
        }
    }
}

#[derive(Default)]
struct OneLock(Mutex<()>);

impl Deviation for OneLock {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        let _turn = lock(&self.0);
        engine.honest_forward(ids, cache)
    }

    fn generate(
        &self,
        engine: &mut Naive,
        prompt: &[u32],
        max_tokens: usize,
        config: &GenerationConfig,
    ) -> Result<GenerationResult> {
        let _turn = lock(&self.0);
        engine.honest_generate(prompt, max_tokens, config)
    }
}
