//! Many callers are each alone.

use super::support::{forward, generate, plain, prompt};
use crate::backend::Capability;
use crate::case::{Category, Check, CheckResult, Context, Stop};
use bitnet_contracts::{
    BitNetInference, ConcurrentInferenceEngine, Device, GenerationConfig, GenerationResult, InferenceError,
    InferenceOutput, KVCache, MemoryUsage, ModelConfig, QuantizationType, Tensor, ThreadSafeInference,
};
use std::sync::{Arc, Barrier};
use std::thread;

const CONCURRENCY: Category = Category::Concurrency;

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "CON-1",
        "concurrency/callers_are_alone",
        CONCURRENCY,
        "N callers at once get what each gets alone, bit for bit",
        callers_are_alone,
    )
    .needs(Capability::ThreadSafe)
    .within(120),
    Check::new(
        "CON-1",
        "concurrency/wrapped_callers_are_alone",
        CONCURRENCY,
        "the same through ConcurrentInferenceEngine around any engine",
        wrapped_callers_are_alone,
    )
    .within(120),
    Check::new(
        "CON-2",
        "concurrency/copies_are_apart",
        CONCURRENCY,
        "thread-local copies share no state",
        copies_are_apart,
    )
    .needs(Capability::ThreadSafe),
    Check::new(
        "CON-3",
        "concurrency/workers",
        CONCURRENCY,
        "workers compute in parallel what one computes alone",
        workers,
    )
    .within(120),
    Check::new(
        "CON-4",
        "concurrency/panicking_caller",
        CONCURRENCY,
        "a caller that panics does not stop the others",
        panicking_caller,
    )
    .long(),
];

const CALLERS: usize = 4;

/// What each caller asks: its own seed, length and penalty, and its own prompt but for the last, who has that of the one
/// before.
fn question(ctx: &Context<'_>, caller: usize) -> (Vec<u32>, GenerationConfig) {
    let config = GenerationConfig {
        repetition_penalty: 1.2 + caller as f32 / 8.0,
        top_k: Some(40),
        max_new_tokens: TOKENS - caller,
        ..plain(caller as u64)
    };
    let prompt_of = caller.min(CALLERS - 2);
    (prompt(ctx.facts(), 3 + prompt_of, 800 + prompt_of as u64), config)
}

/// The most tokens that a caller asks for.
const TOKENS: usize = 8;

/// The answers that one engine gives to the callers, one after the other.
fn alone(ctx: &Context<'_>) -> Result<Vec<Vec<u32>>, Stop> {
    let mut engine = ctx.engine()?;
    let ask = |caller| {
        let (tokens, config) = question(ctx, caller);
        Ok(generate(engine.as_mut(), &tokens, TOKENS, &config)?.generated_tokens)
    };
    (0..CALLERS).map(ask).collect()
}

/// Asks all questions at once, each `rounds` times, and holds every answer against the one given alone.
fn all_at_once<E>(ctx: &mut Context<'_>, what: &str, engine: &E, rounds: usize) -> CheckResult
where
    E: ThreadSafeInference + ?Sized,
{
    let expected = alone(ctx)?;
    let questions: Vec<_> = (0..CALLERS).map(|caller| question(ctx, caller)).collect();
    // One more caller draws without a seed and asks what must be refused; what it gets is no matter, nor what it does.
    let (other, free) = (prompt(ctx.facts(), 4, 805), GenerationConfig { seed: None, ..plain(0) });
    let beyond = [ctx.facts().vocab_size as u32];
    let start = Barrier::new(CALLERS + 1);
    let (answers, noise): (Vec<_>, _) = thread::scope(|scope| {
        let noise = scope.spawn(|| {
            start.wait();
            let free = engine.generate_concurrent(&other, TOKENS, &free).map(drop);
            free.and(match engine.generate_concurrent(&beyond, 1, &plain(0)) {
                Err(InferenceError::Tokenization(_)) => Ok(()),
                refused_otherwise => refused_otherwise.map(drop),
            })
        });
        let callers: Vec<_> = questions
            .iter()
            .map(|(tokens, config)| {
                let start = &start;
                scope.spawn(move || {
                    start.wait();
                    (0..rounds).map(|_| engine.generate_concurrent(tokens, TOKENS, config)).collect::<Vec<_>>()
                })
            })
            .collect();
        let answers = callers.into_iter().map(thread::ScopedJoinHandle::join).collect();
        (answers, noise.join())
    });
    match noise {
        Ok(result) => ctx.check_ok(format!("{what}: a caller without a seed"), result).is_some(),
        Err(_) => ctx.check(false, format!("{what}: an answer for a caller without a seed"), "it panicked"),
    };
    for (caller, answer) in answers.into_iter().enumerate() {
        let Ok(results) = answer else {
            ctx.check(false, format!("{what}: an answer for caller {caller}"), "it panicked");
            continue;
        };
        for (round, result) in results.into_iter().enumerate() {
            if let Some(result) = ctx.check_ok(format!("{what}: caller {caller}, round {round}"), result) {
                let what = format!("{what}: tokens of caller {caller}, round {round}");
                ctx.check_slices(what, &result.generated_tokens, &expected[caller]);
            }
        }
    }
    Ok(())
}

fn callers_are_alone(ctx: &mut Context<'_>) -> CheckResult {
    let engine = ctx.thread_safe()?;
    ctx.check_eq("supports_concurrent_generation()", engine.supports_concurrent_generation(), true);
    all_at_once(ctx, "the engine's own generate_concurrent", engine.as_ref(), 3)?;
    let wrapped = ConcurrentInferenceEngine::from_thread_safe(engine);
    all_at_once(ctx, "ConcurrentInferenceEngine::from_thread_safe", &wrapped, 2)
}

fn wrapped_callers_are_alone(ctx: &mut Context<'_>) -> CheckResult {
    let wrapped = ConcurrentInferenceEngine::new(ctx.engine()?);
    ctx.check_eq("supports_concurrent_generation of the wrapper", wrapped.supports_concurrent_generation(), true);
    ctx.check_eq("config of the wrapper", wrapped.config().vocab_size, ctx.facts().vocab_size);
    all_at_once(ctx, "ConcurrentInferenceEngine::new", &wrapped, 2)
}

/// The logits of a sequence fed token by token.
fn steps(engine: &mut dyn BitNetInference, tokens: &[u32], cache: &mut KVCache) -> Result<Vec<f32>, Stop> {
    super::support::chunked(engine, tokens, &vec![1; tokens.len()], cache)
}

fn copies_are_apart(ctx: &mut Context<'_>) -> CheckResult {
    let engine = ctx.thread_safe()?;
    let mut own = ctx.engine()?;
    let (a, b) = (prompt(ctx.facts(), 6, 810), prompt(ctx.facts(), 6, 811));
    let expected = [steps(own.as_mut(), &a, &mut KVCache::new(6))?, steps(own.as_mut(), &b, &mut KVCache::new(6))?];
    let mut copies = [engine.thread_local_copy()?, engine.thread_local_copy()?];
    let mut caches = [KVCache::new(6), KVCache::new(6)];
    let mut seen = [Vec::new(), Vec::new()];
    for step in 0..6 {
        for (i, tokens) in [&a, &b].into_iter().enumerate() {
            seen[i].extend(forward(copies[i].as_mut(), &[vec![tokens[step]]], Some(&mut caches[i]))?.data);
        }
        if step == 2 {
            copies[0].reset()?;
        }
    }
    for i in 0..2 {
        ctx.check_bits(format!("logits of copy {i}, step by step beside the other"), &seen[i], &expected[i]);
    }
    let [mut first, second] = copies;
    drop(second);
    drop(engine);
    let alive = steps(first.as_mut(), &a, &mut KVCache::new(6))?;
    ctx.check_bits("logits of a copy that outlives its engine", &alive, &expected[0]);
    Ok(())
}

fn workers(ctx: &mut Context<'_>) -> CheckResult {
    let expected = alone(ctx)?;
    let mut single = ctx.engine()?;
    let sequences: Vec<Vec<u32>> = (0..CALLERS as u64).map(|caller| prompt(ctx.facts(), 5, 815 + caller)).collect();
    let mut logits = Vec::new();
    for tokens in &sequences {
        logits.push(steps(single.as_mut(), tokens, &mut KVCache::new(5))?);
    }
    drop(single);
    let mut engines = vec![("new", ConcurrentInferenceEngine::new(ctx.engine()?))];
    if ctx.capabilities().thread_safe {
        engines.push(("from_thread_safe", ConcurrentInferenceEngine::from_thread_safe(ctx.thread_safe()?)));
    }
    for (what, engine) in engines {
        let workers = engine.create_workers(CALLERS)?;
        ctx.check_eq(format!("{what}: workers made"), workers.len(), CALLERS);
        let questions: Vec<_> = (0..CALLERS).map(|caller| question(ctx, caller)).collect();
        let start = Arc::new(Barrier::new(CALLERS));
        let threads: Vec<_> = workers
            .into_iter()
            .zip(questions)
            .zip(&sequences)
            .map(|((mut worker, (tokens, config)), sequence)| {
                let (sequence, start) = (sequence.clone(), start.clone());
                thread::spawn(move || {
                    start.wait();
                    let logits = steps(worker.as_mut(), &sequence, &mut KVCache::new(5));
                    // A stop holds no more than a text, and says nothing that the text does not.
                    (logits.map_err(|stop| format!("{stop:?}")), worker.generate(&tokens, TOKENS, &config))
                })
            })
            .collect();
        for (caller, thread) in threads.into_iter().enumerate() {
            match thread.join() {
                Ok((seen, result)) => {
                    if let Some(seen) = ctx.check_ok(format!("{what}: forward of worker {caller}"), seen) {
                        ctx.check_bits(format!("{what}: logits of worker {caller}"), &seen, &logits[caller]);
                    }
                    if let Some(result) = ctx.check_ok(format!("{what}: worker {caller}"), result) {
                        let what = format!("{what}: tokens of worker {caller}");
                        ctx.check_slices(what, &result.generated_tokens, &expected[caller]);
                    }
                }
                Err(_) => {
                    ctx.check(false, format!("{what}: an answer of worker {caller}"), "it panicked");
                }
            }
        }
    }
    Ok(())
}

/// An engine that panics in the middle of a generation from one particular prompt.
struct PanicsOn {
    inner: Box<dyn BitNetInference>,
    prompt: Vec<u32>,
}

impl BitNetInference for PanicsOn {
    fn forward(
        &mut self,
        input_ids: &Tensor,
        kv_cache: Option<&mut KVCache>,
    ) -> bitnet_contracts::Result<InferenceOutput> {
        self.inner.forward(input_ids, kv_cache)
    }

    fn generate(
        &mut self,
        prompt_tokens: &[u32],
        max_tokens: usize,
        config: &GenerationConfig,
    ) -> bitnet_contracts::Result<GenerationResult> {
        let result = self.inner.generate(prompt_tokens, max_tokens, config);
        if prompt_tokens == self.prompt {
            // Without the panic hook: the message is part of the check, not of anybody's log.
            std::panic::resume_unwind(Box::new("a caller that panics"));
        }
        result
    }

    fn generate_deterministic(
        &mut self,
        prompt_tokens: &[u32],
        max_tokens: usize,
        seed: u64,
    ) -> bitnet_contracts::Result<GenerationResult> {
        self.inner.generate_deterministic(prompt_tokens, max_tokens, seed)
    }

    fn config(&self) -> &ModelConfig {
        self.inner.config()
    }

    fn device(&self) -> &Device {
        self.inner.device()
    }

    fn supports_quantization(&self, qtype: QuantizationType) -> bool {
        self.inner.supports_quantization(qtype)
    }

    fn memory_usage(&self) -> MemoryUsage {
        self.inner.memory_usage()
    }

    fn reset(&mut self) -> bitnet_contracts::Result<()> {
        self.inner.reset()
    }
}

fn panicking_caller(ctx: &mut Context<'_>) -> CheckResult {
    let expected = alone(ctx)?;
    let fatal = prompt(ctx.facts(), 9, 820);
    let inside = PanicsOn { inner: ctx.engine()?, prompt: fatal.clone() };
    let mut engines: Vec<(&str, Arc<ConcurrentInferenceEngine>)> =
        vec![("a panic inside the engine", Arc::new(ConcurrentInferenceEngine::new(Box::new(inside))))];
    if ctx.capabilities().thread_safe {
        let engine = ConcurrentInferenceEngine::from_thread_safe(ctx.thread_safe()?);
        engines.push(("a panic of a thread that holds a handle", Arc::new(engine)));
    }
    for (what, engine) in engines {
        let (handle, prompt) = (engine.as_ref().clone(), fatal.clone());
        let caller = thread::spawn(move || {
            let result = handle.generate_concurrent(&prompt, 2, &plain(1));
            std::panic::resume_unwind(Box::new(format!("a caller that panics, with {result:?}")));
        });
        ctx.check(caller.join().is_err(), format!("{what}: that caller is gone"), "it returned");
        all_at_once(ctx, &format!("after {what}"), engine.as_ref(), 1)?;
        let (tokens, config) = question(ctx, 0);
        let mut handle = engine.as_ref().clone();
        let result = handle.generate(&tokens, TOKENS, &config);
        if let Some(result) = ctx.check_ok(format!("generate after {what}"), result) {
            ctx.check_slices(format!("tokens after {what}"), &result.generated_tokens, &expected[0]);
        }
    }
    Ok(())
}
