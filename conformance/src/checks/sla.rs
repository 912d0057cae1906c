//! Service levels, held with real measurements of verified output.

use super::support::{forward, generate, greedy, ids, logits_of, mix, prompt, same_greedy, same_logits, until_eos};
use crate::case::{Category, Check, CheckResult, Context, Stop};
use crate::measure;
use crate::model::ModelFacts;
use crate::tolerance;
use bitnet_contracts::{
    BitNetInference, ForwardPassMetrics, GenerationConfig, KVCache, PerformanceContract, PerformanceMonitor,
};
use std::time::{Duration, Instant};

const SLA: Category = Category::Sla;

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "SLA-1",
        "sla/gate",
        SLA,
        "decoding meets the default contract, with its output verified in the same run",
        gate,
    )
    .exclusive()
    .within(180),
    Check::new(
        "SLA-2",
        "sla/time_to_first_token",
        SLA,
        "the first token of a prompt comes within the contract's latency for its tokens",
        time_to_first_token,
    )
    .exclusive()
    .within(180),
    Check::new(
        "SLA-3",
        "sla/metrics_are_true",
        SLA,
        "times, operations and memory of a forward pass are what happened",
        metrics_are_true,
    )
    .exclusive(),
    Check::new(
        "SLA-4",
        "sla/determinism_is_free",
        SLA,
        "deterministic generation is no slower than sampling without a seed",
        determinism_is_free,
    )
    .exclusive()
    .within(180),
];

/// Decode steps that one measurement takes.
const STEPS: usize = 24;

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn gate(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let length = ctx.facts().max_positions.min(8 + STEPS);
    let tokens = prompt(ctx.facts(), length, 1000);
    let start = 8.min(length / 2);
    let expected = logits_of(engine.as_mut(), &tokens)?;
    let mut monitor = PerformanceMonitor::new(PerformanceContract::default());
    let (mut best, mut sum) = (Vec::new(), ForwardPassMetrics::default());
    for round in 0..3 {
        let mut cache = KVCache::new(length);
        forward(engine.as_mut(), &[tokens[..start].to_vec()], Some(&mut cache))?;
        let (mut seen, mut walls) = (Vec::new(), Vec::new());
        sum = ForwardPassMetrics::default();
        for &token in &tokens[start..] {
            let input = ids(&[vec![token]], engine.device())?;
            let clock = Instant::now();
            let output = engine.forward(&input, Some(&mut cache))?;
            walls.push(millis(clock.elapsed()));
            sum.total_time += output.metrics.total_time;
            sum.peak_memory_usage = sum.peak_memory_usage.max(output.metrics.peak_memory_usage);
            seen.extend(super::support::Logits::of(&output)?.data);
        }
        // Speed of wrong output is no speed.
        let right = same_logits(
            ctx,
            format!("logits of the timed steps, round {round}"),
            &seen,
            &expected.data[start * expected.vocab..],
        );
        ctx.require(right, "verified output: the measurement counts", "wrong output: the measurement is void")?;
        best.push(median(walls));
    }
    let latency = best.iter().copied().fold(f64::INFINITY, f64::min);
    ctx.timing(measure::TOKEN_LATENCY_MS, latency);
    ctx.timing(measure::THROUGHPUT_TPS, 1e3 / latency);
    ctx.timing(measure::PEAK_MEMORY_BYTES, sum.peak_memory_usage.max(engine.memory_usage().peak_usage) as f64);
    // The contract judges the caller's clock: what the engine says of itself is held against it in SLA-3.
    let steps = length - start;
    let metrics = ForwardPassMetrics { total_time: Duration::from_secs_f64(latency * steps as f64 / 1e3), ..sum };
    let verdict = monitor.validate_performance(&metrics, steps);
    ctx.check_ok(format!("PerformanceContract::default() at {latency:.3} ms a token"), verdict);
    let stats = monitor.get_performance_stats(Duration::from_secs(600));
    ctx.check_eq("violations", stats.violation_count, 0);
    let target =
        if engine.device().is_cpu() { PerformanceContract::cpu_target() } else { PerformanceContract::gpu_target() };
    // The distance to the target is reported, not gated: the target is stated for the 2B model.
    ctx.timing("target_latency_ratio", latency / f64::from(target.max_token_latency_ms));
    Ok(())
}

fn time_to_first_token(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let length = (ctx.facts().max_positions / 2).clamp(1, 64);
    let tokens = prompt(ctx.facts(), length, 1010);
    let (top, _) = super::stats::top_two(logits_of(engine.as_mut(), &tokens)?.last(0));
    let (mut told, mut walls) = (Vec::new(), Vec::new());
    for _ in 0..5 {
        let clock = Instant::now();
        let result = generate(engine.as_mut(), &tokens, 1, &greedy())?;
        walls.push(millis(clock.elapsed()));
        told.push(millis(result.timing.time_to_first_token));
        let expected = until_eos(ctx.facts(), &result, &[top as u32]);
        same_greedy(ctx, "the token that was timed", engine.as_mut(), &tokens, &result.generated_tokens, &expected)?;
    }
    let (told, wall) = (median(told), median(walls));
    ctx.timing(measure::TIME_TO_FIRST_TOKEN_MS, wall);
    ctx.timing("prefill_tokens_per_s", length as f64 * 1e3 / wall);
    let limit = f64::from(PerformanceContract::default().max_token_latency_ms) * length as f64;
    ctx.check_at_most(format!("milliseconds to the first token after {length}"), wall, limit);
    ctx.check_at_most("time_to_first_token that the engine reports, ms", told, wall * tolerance::CLOCK_SLACK + 1.0);
    Ok(())
}

/// Weights that each token is multiplied with.
fn weights_met(facts: &ModelFacts) -> f64 {
    let (h, kv, f) = (facts.hidden_size, facts.kv_heads * facts.head_dim, facts.intermediate_size);
    (facts.layers * (2 * h * h + 2 * h * kv + 3 * h * f) + facts.vocab_size * h) as f64
}

fn metrics_are_true(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let facts = ctx.facts().clone();
    let mut owned = 0.0f64;
    for (round, length) in [1, 16, 16, 1, 8].into_iter().enumerate() {
        let length = length.min(facts.max_positions);
        let input = ids(&[prompt(&facts, length, 1020 + round as u64)], engine.device())?;
        let clock = Instant::now();
        let output = engine.forward(&input, None)?;
        let wall = clock.elapsed();
        let m = output.metrics;
        let total = millis(m.total_time);
        ctx.check(total > 0.0, "total_time above 0", total);
        ctx.check_at_most(
            "total_time in ms, against the caller's clock",
            total,
            millis(wall) * tolerance::CLOCK_SLACK + 1.0,
        );
        owned = owned.max(total / millis(wall));
        let parts = m.embedding_time + m.attention_time + m.feedforward_time + m.normalization_time + m.logits_time;
        ctx.check_at_most("sum of the component times in ms", millis(parts), total * tolerance::CLOCK_SLACK + 0.5);
        let quantisation = m.quantization_time + m.dequantization_time;
        ctx.check_at_most("quantisation times in ms", millis(quantisation), total * tolerance::CLOCK_SLACK + 0.5);
        let rate = f64::from(m.throughput(length));
        let expected = length as f64 / m.total_time.as_secs_f64();
        ctx.check((rate - expected).abs() <= 0.01 * expected, format!("throughput({length}) = {expected}"), rate);
        let flops = 2.0 * weights_met(&facts) * length as f64;
        let ratio = m.flops_estimate as f64 / flops;
        ctx.measure_max("flops_ratio", ratio);
        ctx.check(
            (1.0 / tolerance::FLOPS_FACTOR..=tolerance::FLOPS_FACTOR).contains(&ratio),
            format!("flops_estimate near {flops:.0} for {length} tokens"),
            m.flops_estimate,
        );
        ctx.check(m.peak_memory_usage > 0, "peak_memory_usage above 0", m.peak_memory_usage);
        let bandwidth = m.memory_bandwidth_usage;
        ctx.check(
            bandwidth.is_finite() && bandwidth >= 0.0,
            "memory_bandwidth_usage finite and not negative",
            bandwidth,
        );
        let efficiency = m.efficiency_metrics();
        for (what, value) in [
            ("compute_utilization", efficiency.compute_utilization),
            ("memory_efficiency", efficiency.memory_efficiency),
        ] {
            ctx.check((0.0..=1.05).contains(&value), format!("{what} of 0 to 1"), value);
        }
    }
    ctx.timing("time_owned", owned);
    ctx.check_at_least("share of the caller's time that total_time owns up to, at best", owned, tolerance::TIME_OWNED);
    Ok(())
}

fn determinism_is_free(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let tokens = prompt(ctx.facts(), 8, 1030);
    let count = 16.min(ctx.facts().max_positions.saturating_sub(9)).max(1);
    let free = GenerationConfig { seed: None, ..GenerationConfig::default() };
    let timed = |engine: &mut dyn BitNetInference, seed: Option<u64>| -> Result<(f64, Vec<u32>), Stop> {
        let clock = Instant::now();
        let result = match seed {
            Some(seed) => engine.generate_deterministic(&tokens, count, seed)?,
            None => engine.generate(&tokens, count, &free)?,
        };
        let made = result.generated_tokens.len().max(1) as f64;
        Ok((millis(clock.elapsed()) / made, result.generated_tokens))
    };
    timed(engine.as_mut(), Some(0))?;
    let (mut fixed, mut sampled) = (Vec::new(), Vec::new());
    for round in 0..7 {
        let seed = mix(round);
        let (time, first) = timed(engine.as_mut(), Some(seed))?;
        fixed.push(time);
        sampled.push(timed(engine.as_mut(), None)?.0);
        // The run is void if what was timed is not deterministic.
        let again = timed(engine.as_mut(), Some(seed))?;
        fixed.push(again.0);
        ctx.check_slices(format!("tokens with seed {seed}, timed twice"), &again.1, &first);
        sampled.push(timed(engine.as_mut(), None)?.0);
    }
    // The best of many on either side: what disturbs a measurement only ever adds to it.
    let best = |times: &[f64]| times.iter().copied().fold(f64::INFINITY, f64::min);
    let ratio = best(&fixed) / best(&sampled);
    ctx.timing("deterministic_cost", ratio);
    ctx.check_at_most("time of deterministic over free sampling", ratio, tolerance::DETERMINISTIC_COST);
    Ok(())
}
