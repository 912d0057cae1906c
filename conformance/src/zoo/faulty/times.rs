//! Faults of speed and of what is said about it: latencies beyond the contract, times and counts that did not happen.

use super::super::Fault;
use super::super::naive::{Call, Deviation, Naive};
use crate::case::Category;
use bitnet_contracts::{
    BitNetInference, ForwardPassMetrics, GenerationConfig, GenerationResult, InferenceOutput, KVCache, Result, Tensor,
};
use std::sync::Arc;
use std::time::Duration;

/// Slow engines are right in everything else, and take long to show it.
const SLOW: &[Category] = &[Category::Sla];

pub(super) const FAULTS: &[Fault] = &[
    Fault::new(
        "slow-deep-decode",
        "a decode step behind 20 positions takes 150 ms",
        "SLA-1; llama.cpp #6002 (decoding slows with the context)",
        "sla/gate",
        || Arc::new(SlowDecode),
    )
    .only(SLOW),
    Fault::new(
        "slow-first-token",
        "a greedy generation first waits 600 ms",
        "SLA-2",
        "sla/time_to_first_token",
        || Arc::new(SlowStart),
    )
    .only(SLOW),
    Fault::new(
        "slow-late-tokens",
        "tokens after the sixteenth of a generation take 150 ms",
        "SLA-6",
        "sla/time_per_output_token",
        || Arc::new(SlowLateTokens),
    )
    .only(SLOW),
    Fault::new(
        "deterministic-is-slow",
        "a fixed seed costs 4 ms a call more",
        "Thinking Machines, batch_invariant_ops: determinism bought with speed",
        "sla/determinism_is_free",
        || Arc::new(SlowDeterminism),
    )
    .only(SLOW),
    metrics("flops-by-multiply-adds", "a multiply-add counts as one operation", "SLA-3", |m, _| m.flops_estimate /= 2),
    metrics("flops-constant", "flops_estimate is a constant", "SLA-3", |m, _| m.flops_estimate = 300_000),
    metrics("flops-of-one-row", "operations of one row of the batch", "SLA-3", |m, call| {
        m.flops_estimate /= call.batch as u64;
    }),
    metrics("bandwidth-nan", "memory_bandwidth_usage is NaN", "SLA-3", |m, _| m.memory_bandwidth_usage = f64::NAN),
    metrics("bandwidth-in-bytes", "bandwidth in bytes a second, not GB/s", "SLA-3", |m, _| {
        m.memory_bandwidth_usage *= 1e9;
    }),
    metrics("total-time-halved", "total_time leaves out half of the pass", "SLA-3", |m, _| m.total_time /= 2),
    metrics("total-time-zero", "total_time is zero", "MLPerf #1593: times that were never defined", |m, _| {
        m.total_time = Duration::ZERO;
    }),
    metrics("total-time-inflated", "total_time is longer than the call", "SLA-3", |m, _| m.total_time *= 2),
    metrics("components-overlap", "the components add up to more than the pass", "SLA-3", |m, _| {
        m.attention_time = m.total_time;
        m.feedforward_time = m.total_time;
    }),
    metrics("metrics-peak-zero", "peak_memory_usage of a pass is zero", "SLA-3", |m, _| m.peak_memory_usage = 0),
    result("tokens-timed-short", "the last token has no time of its own", "MLPerf PR #1556", |r| {
        r.timing.per_token.pop();
    }),
    result("first-token-time-zero", "time_to_first_token is zero", "MLPerf #1593, #1596", |r| {
        r.timing.time_to_first_token = Duration::ZERO;
    }),
    result("first-token-time-is-total", "time_to_first_token is the time of the whole call", "MLPerf #1593", |r| {
        r.timing.time_to_first_token = r.timing.total;
    }),
    result("generation-time-doubled", "the whole time is told twice over", "SLA-7", |r| r.timing.total *= 2),
    result("generation-time-halved", "half of every time is kept back", "SLA-7", |r| {
        let t = &mut r.timing;
        for time in [&mut t.total, &mut t.prefill, &mut t.decode, &mut t.time_to_first_token] {
            *time /= 2;
        }
        t.per_token.iter_mut().for_each(|time| *time /= 2);
    }),
    result("prefill-time-zero", "prefill takes no time", "SLA-7", |r| r.timing.prefill = Duration::ZERO),
    Fault::new(
        "prefill-time-of-the-last-piece",
        "with prefill_chunk_size the time of the last piece is told for that of all",
        "SLA-7: a clock that is started anew for each piece",
        "sla/generation_times_are_true",
        || Arc::new(TimeOfTheLastPiece),
    ),
    result("token-times-even", "every token is given the same share of the whole", "SLA-7", |r| {
        let even = r.timing.total / r.timing.per_token.len().max(1) as u32;
        r.timing.per_token.iter_mut().for_each(|time| *time = even);
    }),
];

/// A lie in the metrics of a forward pass.
const fn metrics(
    name: &'static str,
    what: &'static str,
    source: &'static str,
    change: fn(&mut ForwardPassMetrics, &Call),
) -> Fault {
    Fault::with(name, what, source, "sla/metrics_are_true", super::super::Build::Metrics(change))
}

/// A lie in the times of a generation.
const fn result(
    name: &'static str,
    what: &'static str,
    source: &'static str,
    change: fn(&mut GenerationResult),
) -> Fault {
    Fault::with(name, what, source, "sla/generation_times_are_true", super::super::Build::Result(change))
}

struct SlowDecode;

impl Deviation for SlowDecode {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        if ids.dims().get(1) == Some(&1) && cache.as_ref().is_some_and(|c| c.len() >= 20) {
            std::thread::sleep(Duration::from_millis(150));
        }
        engine.honest_forward(ids, cache)
    }
}

struct SlowStart;

impl Deviation for SlowStart {
    fn generate(
        &self,
        engine: &mut Naive,
        prompt: &[u32],
        max_tokens: usize,
        config: &GenerationConfig,
    ) -> Result<GenerationResult> {
        let wait = Duration::from_millis(if config.do_sample { 0 } else { 600 });
        std::thread::sleep(wait);
        let mut result = engine.honest_generate(prompt, max_tokens, config)?;
        for time in [&mut result.timing.total, &mut result.timing.prefill, &mut result.timing.time_to_first_token] {
            *time += wait;
        }
        if let Some(first) = result.timing.per_token.first_mut() {
            *first += wait;
        }
        Ok(result)
    }
}

struct SlowLateTokens;

impl Deviation for SlowLateTokens {
    fn generate(
        &self,
        engine: &mut Naive,
        prompt: &[u32],
        max_tokens: usize,
        config: &GenerationConfig,
    ) -> Result<GenerationResult> {
        let wait = Duration::from_millis(150);
        let mut result = engine.honest_generate(prompt, max_tokens, config)?;
        for time in result.timing.per_token.iter_mut().skip(16) {
            std::thread::sleep(wait);
            *time += wait;
            result.timing.total += wait;
            result.timing.decode += wait;
        }
        Ok(result)
    }
}

struct SlowDeterminism;

impl Deviation for SlowDeterminism {
    fn generate_deterministic(
        &self,
        engine: &mut Naive,
        prompt: &[u32],
        max_tokens: usize,
        seed: u64,
    ) -> Result<GenerationResult> {
        let wait = Duration::from_millis(4);
        std::thread::sleep(wait);
        let config = GenerationConfig { seed: Some(seed), ..GenerationConfig::default() };
        let mut result = engine.generate(prompt, max_tokens, &config)?;
        for time in [&mut result.timing.total, &mut result.timing.prefill, &mut result.timing.time_to_first_token] {
            *time += wait;
        }
        if let Some(first) = result.timing.per_token.first_mut() {
            *first += wait;
        }
        Ok(result)
    }
}

struct TimeOfTheLastPiece;

impl Deviation for TimeOfTheLastPiece {
    fn result(&self, result: &mut GenerationResult, config: &GenerationConfig) {
        let pieces = config.prefill_chunk_size.map_or(1, |size| result.prompt_tokens.len().div_ceil(size.max(1)));
        result.timing.prefill /= pieces.max(1) as u32;
    }
}
