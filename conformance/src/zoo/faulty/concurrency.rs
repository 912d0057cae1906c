//! Faults between callers: slots, copies, threads.

use super::super::Fault;
use super::super::naive::{At, Deviation, Naive, Weights};
use super::determinism::last_bit;
use super::state::{Slots, address, lock};
use bitnet_contracts::{
    BitNetInference, DeviceError, ForwardPassError, GenerationConfig, GenerationResult, InferenceOutput, KVCache,
    MemoryError, Result, Tensor,
};
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{self, ThreadId};
use std::time::Duration;

pub(super) const FAULTS: &[Fault] = &[
    Fault::new(
        "slots-never-freed",
        "eight requests have slots of their own, and the ninth goes on in that of the first",
        "llama.cpp #6681, #17316",
        "concurrency/callers_are_alone",
        || Arc::new(SlotsNeverFreed::default()),
    ),
    Fault::new(
        "one-request-slot",
        "requests at the same time share one slot: all are answered by the configuration that came last",
        "llama.cpp #10072, #28286; ik_llama #2411",
        "concurrency/callers_are_alone",
        || Arc::new(OneRequestSlot::default()),
    ),
    Fault::new(
        "answers-by-prompt",
        "an answer is kept for the next caller with the same prompt, whatever the configuration",
        "tt-metal #11061; mlx-lm #983",
        "concurrency/callers_are_alone",
        || Arc::new(AnswersByPrompt::default()),
    ),
    Fault::new(
        "early-finish-corrupts-neighbour",
        "a request that finishes moves the slots of those that are still running",
        "maclocal-api #140; mlx-lm #965",
        "concurrency/callers_are_alone",
        || Arc::new(EarlyFinish::default()),
    ),
    Fault::new(
        "seed-lost-beside-unseeded",
        "a seed is lost while a request without one is running",
        "vllm #51226, PR #2514",
        "concurrency/callers_are_alone",
        || Arc::new(SeedLost::default()),
    ),
    Fault::new(
        "second-caller-refused",
        "a request is refused while another one is running",
        "llama.cpp #6681; CON-1",
        "concurrency/callers_are_alone",
        || Arc::new(SecondCallerRefused::default()),
    ),
    Fault::new(
        "says-it-cannot",
        "an engine that is thread safe says that it does not support concurrent generation",
        "CON-1",
        "concurrency/callers_are_alone",
        || Arc::new(SaysItCannot),
    ),
    Fault::new(
        "session-of-the-thread",
        "a session belongs to the thread: the second request from a thread goes on behind its first",
        "llama.cpp #10072; CON-1",
        "concurrency/wrapped_callers_are_alone",
        || Arc::new(SessionOfTheThread::default()),
    ),
    Fault::new(
        "copy-dies-with-its-engine",
        "a thread-local copy holds no part of its engine, and fails when that is gone",
        "CON-2; T9",
        "concurrency/copies_are_apart",
        || Arc::new(CopyDies::default()),
    ),
    Fault::new(
        "copies-share-sessions",
        "copies find the keys and values of a session in one table, by its length",
        "mlx-lm #965, #983; ik_llama #2411",
        "concurrency/copies_are_apart",
        || Arc::new(CopiesShare::default()),
    ),
    Fault::new(
        "two-copies-only",
        "there is room for two copies, and a third is refused",
        "llama.cpp #6681; CON-3",
        "concurrency/workers",
        || Arc::new(TwoCopiesOnly),
    ),
    Fault::new(
        "workers-share-scratch",
        "forward passes at the same time share their activations",
        "llama.cpp #28286; ik_llama #2411",
        "concurrency/workers",
        || Arc::new(WorkersShareScratch::default()),
    ),
    Fault::new(
        "reset-needs-its-thread",
        "reset() fails on any thread but the one that made the engine",
        "CON-4; T9",
        "concurrency/panicking_caller",
        || Arc::new(ResetNeedsItsThread::default()),
    ),
];

/// How long a request waits for the others, so that they really are at work at the same time.
const A_MOMENT: Duration = Duration::from_millis(6);

/// Slots of requests, by turns.
#[derive(Default)]
struct SlotsNeverFreed(Mutex<Vec<Vec<u32>>>);

impl Deviation for SlotsNeverFreed {
    fn generate_concurrent(
        &self,
        engine: &Naive,
        prompt: &[u32],
        max_tokens: usize,
        config: &GenerationConfig,
    ) -> Result<GenerationResult> {
        let mut slots = lock(&self.0);
        let left = if slots.len() < 8 { Vec::new() } else { slots.remove(0) };
        slots.push(prompt.to_vec());
        drop(slots);
        let mut result = engine.copy().honest_generate(&[&left, prompt].concat(), max_tokens, config)?;
        result.prompt_tokens = prompt.to_vec();
        Ok(result)
    }
}

/// The configuration of the request.
#[derive(Default)]
struct OneRequestSlot(Mutex<GenerationConfig>);

impl Deviation for OneRequestSlot {
    fn generate_concurrent(
        &self,
        engine: &Naive,
        prompt: &[u32],
        max_tokens: usize,
        config: &GenerationConfig,
    ) -> Result<GenerationResult> {
        *lock(&self.0) = config.clone();
        thread::sleep(A_MOMENT);
        let config = lock(&self.0).clone();
        engine.copy().generate(prompt, max_tokens, &config)
    }
}

/// The last eight answers.
#[derive(Default)]
struct AnswersByPrompt(Mutex<Vec<GenerationResult>>);

impl Deviation for AnswersByPrompt {
    fn generate_concurrent(
        &self,
        engine: &Naive,
        prompt: &[u32],
        max_tokens: usize,
        config: &GenerationConfig,
    ) -> Result<GenerationResult> {
        let mut known = lock(&self.0);
        if let Some(answer) = known.iter().find(|answer| answer.prompt_tokens == prompt) {
            return Ok(answer.clone());
        }
        let result = engine.copy().generate(prompt, max_tokens, config)?;
        if known.len() == 8 {
            known.remove(0);
        }
        known.push(result.clone());
        Ok(result)
    }
}

/// The last token of a request during which another one finished.
#[derive(Default)]
struct EarlyFinish(AtomicU64);

impl Deviation for EarlyFinish {
    fn generate_concurrent(
        &self,
        engine: &Naive,
        prompt: &[u32],
        max_tokens: usize,
        config: &GenerationConfig,
    ) -> Result<GenerationResult> {
        let before = self.0.load(Ordering::SeqCst);
        thread::sleep(A_MOMENT);
        let mut result = engine.copy().generate(prompt, max_tokens, config)?;
        let alone = self.0.fetch_add(1, Ordering::SeqCst) == before;
        if let Some(last) = result.generated_tokens.last_mut().filter(|_| !alone) {
            *last = (*last + 1) % engine.config.vocab_size as u32;
        }
        Ok(result)
    }
}

/// Seeds beside a request without one.
#[derive(Default)]
struct SeedLost(AtomicUsize);

impl Deviation for SeedLost {
    fn generate_concurrent(
        &self,
        engine: &Naive,
        prompt: &[u32],
        max_tokens: usize,
        config: &GenerationConfig,
    ) -> Result<GenerationResult> {
        let without = usize::from(config.seed.is_none());
        self.0.fetch_add(without, Ordering::SeqCst);
        thread::sleep(A_MOMENT * (1 + 4 * without as u32));
        let seed = config.seed.filter(|_| self.0.load(Ordering::SeqCst) == 0);
        let result = engine.copy().generate(prompt, max_tokens, &GenerationConfig { seed, ..config.clone() });
        self.0.fetch_sub(without, Ordering::SeqCst);
        result
    }
}

/// A request beside another one.
#[derive(Default)]
struct SecondCallerRefused(AtomicBool);

impl Deviation for SecondCallerRefused {
    fn generate_concurrent(
        &self,
        engine: &Naive,
        prompt: &[u32],
        max_tokens: usize,
        config: &GenerationConfig,
    ) -> Result<GenerationResult> {
        if self.0.swap(true, Ordering::SeqCst) {
            let (component, reason) = ("scheduler".to_string(), "another request is running".to_string());
            return Err(ForwardPassError::ComputationFailed { component, reason }.into());
        }
        thread::sleep(A_MOMENT);
        let result = engine.copy().generate(prompt, max_tokens, config);
        self.0.store(false, Ordering::SeqCst);
        result
    }
}

/// What the engine says of itself.
struct SaysItCannot;

impl Deviation for SaysItCannot {
    fn supports_concurrent_generation(&self) -> bool {
        false
    }
}

thread_local! {
    /// By engine, the prompt that this thread asked last.
    static LAST: RefCell<Vec<(usize, Vec<u32>)>> = const { RefCell::new(Vec::new()) };
    /// Whether a copy is at work that was made for this one request.
    static IN_A_COPY: Cell<bool> = const { Cell::new(false) };
}

/// The session of a thread that did not make the engine.
#[derive(Default)]
struct SessionOfTheThread(OnceLock<ThreadId>);

impl Deviation for SessionOfTheThread {
    fn weights(&self, _: &mut Weights) {
        self.0.get_or_init(|| thread::current().id());
    }

    fn generate(
        &self,
        engine: &mut Naive,
        prompt: &[u32],
        max_tokens: usize,
        config: &GenerationConfig,
    ) -> Result<GenerationResult> {
        if IN_A_COPY.get() || self.0.get() == Some(&thread::current().id()) {
            return engine.honest_generate(prompt, max_tokens, config);
        }
        let name = address(engine);
        let left = LAST.with_borrow_mut(|last| {
            let left = last.iter().find(|(of, _)| *of == name).map(|(_, prompt)| prompt.clone());
            last.retain(|(of, _)| *of != name);
            last.push((name, prompt.to_vec()));
            left.unwrap_or_default()
        });
        let mut result = engine.honest_generate(&[&left, prompt].concat(), max_tokens, config)?;
        result.prompt_tokens = prompt.to_vec();
        Ok(result)
    }

    fn generate_concurrent(
        &self,
        engine: &Naive,
        prompt: &[u32],
        max_tokens: usize,
        config: &GenerationConfig,
    ) -> Result<GenerationResult> {
        IN_A_COPY.set(true);
        let result = engine.copy().generate(prompt, max_tokens, config);
        IN_A_COPY.set(false);
        result
    }
}

/// Copies without their engine.
#[derive(Default)]
struct CopyDies(AtomicBool);

impl Deviation for CopyDies {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        if self.0.load(Ordering::SeqCst) && Arc::strong_count(&engine.shared) == 1 {
            let (component, reason) = ("weights".to_string(), "the engine is gone".to_string());
            return Err(ForwardPassError::ComputationFailed { component, reason }.into());
        }
        engine.honest_forward(ids, cache)
    }

    fn thread_local_copy(&self, engine: &Naive) -> Result<Box<dyn BitNetInference>> {
        self.0.store(true, Ordering::SeqCst);
        Ok(Box::new(engine.copy()))
    }
}

/// Sessions of copies.
struct CopiesShare {
    copies: Mutex<BTreeSet<usize>>,
    slots: Slots,
}

impl Default for CopiesShare {
    fn default() -> Self {
        Self { copies: Mutex::default(), slots: Slots::new(|_, cache| Some((0, cache.capacity(), cache.len()))) }
    }
}

impl Deviation for CopiesShare {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        let copy = lock(&self.copies).contains(&address(engine));
        if copy { self.slots.run(engine, ids, cache) } else { engine.honest_forward(ids, cache) }
    }

    fn thread_local_copy(&self, engine: &Naive) -> Result<Box<dyn BitNetInference>> {
        let copy = Box::new(engine.copy());
        lock(&self.copies).insert(address(&*copy));
        Ok(copy)
    }
}

/// Copies by number.
struct TwoCopiesOnly;

impl Deviation for TwoCopiesOnly {
    fn thread_local_copy(&self, engine: &Naive) -> Result<Box<dyn BitNetInference>> {
        if Arc::strong_count(&engine.shared) > 2 {
            return Err(MemoryError::OutOfMemory { requested_mb: 1, available_mb: 0 }.into());
        }
        Ok(Box::new(engine.copy()))
    }
}

/// Logits of forward passes that run beside others.
#[derive(Default)]
struct WorkersShareScratch {
    running: AtomicUsize,
    clash: AtomicBool,
}

impl Deviation for WorkersShareScratch {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        if self.running.fetch_add(1, Ordering::SeqCst) > 0 {
            self.clash.store(true, Ordering::SeqCst);
        }
        // One caller alone waits for nobody.
        if Arc::strong_count(&engine.shared) > 2 {
            thread::sleep(A_MOMENT);
        }
        let result = engine.honest_forward(ids, cache);
        if self.running.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.clash.store(false, Ordering::SeqCst);
        }
        result
    }

    fn logits(&self, at: &At<'_>, _: u32, logits: &mut [f32]) {
        if !at.call.generating && self.clash.load(Ordering::SeqCst) {
            last_bit(logits);
        }
    }
}

/// `reset` on another thread.
#[derive(Default)]
struct ResetNeedsItsThread(OnceLock<ThreadId>);

impl Deviation for ResetNeedsItsThread {
    fn weights(&self, _: &mut Weights) {
        self.0.get_or_init(|| thread::current().id());
    }

    fn reset(&self, _: &mut Naive) -> Result<()> {
        if self.0.get() == Some(&thread::current().id()) {
            return Ok(());
        }
        let (device, details) = ("cpu".to_string(), "the context belongs to another thread".to_string());
        Err(DeviceError::DeviceMemoryError { device, details }.into())
    }
}
