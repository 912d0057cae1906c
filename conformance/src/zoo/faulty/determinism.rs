//! Faults by which the same question has two answers: threads, seeds, calls, engines, processes.

use super::super::Fault;
use super::super::naive::{At, Deviation, Naive, Site, Weights};
use super::cache::{length, shape};
use super::state::lock;
use crate::backend::{Capabilities, CreateOptions};
use bitnet_contracts::{DType, Device, GenerationConfig, GenerationResult, InferenceOutput, KVCache, Result, Tensor};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};

pub(super) const FAULTS: &[Fault] = &[
    Fault::new(
        "threads-split-sums",
        "sums are split by thread, so that their rounding depends on the number of threads",
        "llama.cpp #95, #163, #22956; openvino PR #30482",
        "determinism/threads",
        || Arc::new(ThreadsSplitSums),
    ),
    Fault::new(
        "threads-leave-rows",
        "the rows that are left when threads share a matrix evenly are not computed",
        "llama.cpp #163; DET-4",
        "determinism/threads",
        || Arc::new(ThreadsLeaveRows),
    ),
    Fault::new(
        "splits-by-capacity",
        "a cache whose capacity is no multiple of 16 takes a path of its own for chunks, which rounds in another way",
        "vllm #5898, #7779; DET-1",
        "determinism/repeated_forward",
        || Arc::new(SplitsByCapacity::default()),
    ),
    Fault::new(
        "order-of-additions",
        "every other call adds in another order",
        "llama.cpp #22956; DET-1",
        "determinism/repeated_forward",
        || Arc::new(Calls(|serial| serial % 2 == 1)),
    ),
    Fault::new(
        "tuned-while-running",
        "after some calls another kernel, which rounds in another way, is found to be faster",
        "vllm #23138; DET-1",
        "determinism/repeated_forward",
        || Arc::new(Calls(|serial| serial >= 12)),
    ),
    Fault::new(
        "borrows-from-the-first-engine",
        "an engine uses tables of an older one on the same model, and goes on when that is gone",
        "microsoft/BitNet #547; DET-3",
        "determinism/fresh_engine",
        || Arc::new(Borrows::default()),
    ),
    Fault::new(
        "seed-of-32-bits",
        "only the lower half of a seed counts",
        "llama.cpp #3460; vllm #51226",
        "determinism/seeds_differ",
        || Arc::new(Seed(|seed| Some(seed & 0xffff_ffff))),
    ),
    Fault::new(
        "seed-as-double",
        "a seed passes through a float, which rounds large ones to each other",
        "llama.cpp #3460; DET-5",
        "determinism/seeds_differ",
        || Arc::new(Seed(|seed| Some(seed as f64 as u64))),
    ),
    Fault::new(
        "seed-0-is-random",
        "seed 0 means that there is none",
        "llama.cpp #7381; vllm PR #2514",
        "determinism/same_seed",
        || Arc::new(Seed(|seed| Some(seed).filter(|s| *s != 0))),
    ),
    Fault::new(
        "largest-seed-is-random",
        "the seed whose bits are all 1 means that there is none",
        "llama.cpp #3460, whose default seed it is",
        "determinism/same_seed",
        || Arc::new(Seed(|seed| Some(seed).filter(|s| *s != u64::MAX))),
    ),
    Fault::new(
        "deterministic-is-greedy",
        "generate_deterministic takes the most likely token",
        "tpu-inference #1386; DET-7",
        "determinism/generate_deterministic",
        || Arc::new(Deterministic(|config| GenerationConfig { do_sample: false, ..config })),
    ),
    Fault::new(
        "deterministic-without-penalty",
        "generate_deterministic leaves out the repetition penalty of the default configuration",
        "tpu-inference #1386; DET-7",
        "determinism/generate_deterministic",
        || Arc::new(Deterministic(|config| GenerationConfig { repetition_penalty: 1.0, ..config })),
    ),
    Fault::new(
        "any-instruction-set",
        "an instruction set that does not exist is taken and ignored",
        "candle #3707; DET-8",
        "determinism/instruction_sets",
        || Arc::new(AnyInstructionSet),
    ),
    Fault::new(
        "order-of-a-hash-map",
        "additions go by a hash map, whose order is another one in every process",
        "llama.cpp #19981; DET-9",
        "determinism/process",
        || Arc::new(OrderOfAHashMap),
    ),
];

/// Other rounding: the last bit of every value.
pub(super) fn last_bit(values: &mut [f32]) {
    values.iter_mut().for_each(|x| *x = f32::from_bits(x.to_bits() ^ 1));
}

/// The same for the logits of a finished call.
pub(super) fn last_bit_of(mut output: InferenceOutput) -> Result<InferenceOutput> {
    let shape = output.logits.shape().clone();
    let mut values = output.logits.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    last_bit(&mut values);
    output.logits = Tensor::from_vec(values, shape, &Device::Cpu)?;
    Ok(output)
}

/// Logits with more than one thread.
struct ThreadsSplitSums;

impl Deviation for ThreadsSplitSums {
    fn logits(&self, at: &At<'_>, _: u32, logits: &mut [f32]) {
        if at.call.options.threads.is_some_and(|threads| threads > 1) {
            last_bit(logits);
        }
    }
}

/// Projections with a number of threads that does not divide their rows.
struct ThreadsLeaveRows;

impl Deviation for ThreadsLeaveRows {
    fn projected(&self, at: &At<'_>, values: &mut [f32]) {
        let left = values.len() % at.call.options.threads.unwrap_or(1);
        if at.site == Site::Up {
            values.iter_mut().rev().take(left).for_each(|v| *v = 0.0);
        }
    }
}

/// Chunks of several tokens behind a filled cache.
#[derive(Default)]
struct SplitsByCapacity {
    wide: AtomicBool,
}

impl Deviation for SplitsByCapacity {
    fn logits(&self, at: &At<'_>, _: u32, logits: &mut [f32]) {
        if !at.call.generating && self.wide.load(Ordering::Relaxed) {
            last_bit(logits);
        }
    }

    fn forward(&self, engine: &mut Naive, ids: &Tensor, cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        let wide = cache.as_ref().is_some_and(|c| c.capacity() > 32 && !c.capacity().is_multiple_of(16));
        self.wide.store(wide && length(cache.as_deref()) > 0 && shape(ids).1 > 1, Ordering::Relaxed);
        engine.honest_forward(ids, cache)
    }
}

/// Logits by the number of calls before.
struct Calls(fn(u64) -> bool);

impl Deviation for Calls {
    fn logits(&self, at: &At<'_>, _: u32, logits: &mut [f32]) {
        if (self.0)(at.call.serial) {
            last_bit(logits);
        }
    }
}

/// The head's rows for several tokens at once, which the oldest engine of the process owns.
#[derive(Default)]
struct Borrows {
    own: Arc<()>,
    older: OnceLock<Weak<()>>,
}

static OWNERS: Mutex<Vec<Weak<()>>> = Mutex::new(Vec::new());

impl Deviation for Borrows {
    fn weights(&self, _: &mut Weights) {
        let mut owners = lock(&OWNERS);
        owners.retain(|owner| owner.strong_count() > 0);
        if let Some(oldest) = owners.first() {
            self.older.get_or_init(|| oldest.clone());
        }
        owners.push(Arc::downgrade(&self.own));
    }

    fn logits(&self, at: &At<'_>, _: u32, logits: &mut [f32]) {
        let gone = self.older.get().is_some_and(|older| older.strong_count() == 0);
        if gone && !at.call.generating && at.call.seq > 1 {
            logits.rotate_left(1);
        }
    }
}

/// The seed of a generation; `None` for another one each time.
struct Seed(fn(u64) -> Option<u64>);

impl Deviation for Seed {
    fn seed(&self, config: &GenerationConfig, serial: u64) -> u64 {
        let seed = config.seed.and_then(self.0);
        super::super::naive::Honest.seed(&GenerationConfig { seed, ..config.clone() }, serial)
    }
}

/// The configuration of `generate_deterministic`.
struct Deterministic(fn(GenerationConfig) -> GenerationConfig);

impl Deviation for Deterministic {
    fn generate_deterministic(
        &self,
        engine: &mut Naive,
        prompt: &[u32],
        max_tokens: usize,
        seed: u64,
    ) -> Result<GenerationResult> {
        let config = GenerationConfig { seed: Some(seed), ..GenerationConfig::default() };
        engine.honest_generate(prompt, max_tokens, &(self.0)(config))
    }
}

/// The option of an instruction set.
struct AnyInstructionSet;

impl Deviation for AnyInstructionSet {
    fn options(&self, options: &CreateOptions, _: &Capabilities) -> Result<CreateOptions> {
        Ok(CreateOptions { isa: None, ..options.clone() })
    }
}

/// Logits: one bit of the process's number each.
struct OrderOfAHashMap;

impl Deviation for OrderOfAHashMap {
    fn logits(&self, _: &At<'_>, _: u32, logits: &mut [f32]) {
        let number = std::process::id();
        for (bit, logit) in logits.iter_mut().take(32).enumerate() {
            *logit = f32::from_bits(logit.to_bits() ^ (number >> bit & 1));
        }
    }
}
