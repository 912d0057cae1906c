//! Memory figures that are true, growth that is understood, and nothing left behind.

use super::support::{forward, generate, greedy, plain, prompt};
use crate::case::{Category, Check, CheckResult, Context, Stop};
use crate::measure;
use crate::model::ModelFacts;
use crate::tolerance;
use bitnet_contracts::{KVCache, MemoryUsage};

const MEMORY: Category = Category::Memory;

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "MEM-1",
        "memory/figures_fit_together",
        MEMORY,
        "memory_usage() is consistent, and its weights are plausible",
        figures_fit_together,
    ),
    Check::new(
        "MEM-2",
        "memory/cache_growth",
        MEMORY,
        "a cache holds what its positions need, and reports it",
        cache_growth,
    ),
    Check::new("MEM-3", "memory/resident", MEMORY, "the figures match what the process holds", resident).exclusive(),
    Check::new(
        "MEM-4",
        "memory/nothing_left_by_calls",
        MEMORY,
        "calls and sessions leave no memory behind",
        nothing_left_by_calls,
    )
    .exclusive()
    .within(180),
    Check::new(
        "MEM-5",
        "memory/nothing_left_by_engines",
        MEMORY,
        "a dropped engine leaves no memory behind",
        nothing_left_by_engines,
    )
    .exclusive()
    .within(180),
];

/// Ternary parameters of a model.
fn ternary_parameters(facts: &ModelFacts) -> f64 {
    let (h, kv, f) = (facts.hidden_size, facts.kv_heads * facts.head_dim, facts.intermediate_size);
    (facts.layers * (2 * h * h + 2 * h * kv + 3 * h * f)) as f64
}

/// All other parameters: embedding, own head, norms.
fn float_parameters(facts: &ModelFacts) -> f64 {
    let (h, f) = (facts.hidden_size, facts.intermediate_size);
    let heads = if facts.tied { 1 } else { 2 };
    (heads * facts.vocab_size * h + facts.layers * (3 * h + f) + h) as f64
}

/// Values that a cache keeps for one position.
fn cache_values(facts: &ModelFacts) -> f64 {
    (2 * facts.layers * facts.kv_heads * facts.head_dim) as f64
}

fn check_usage(ctx: &mut Context<'_>, what: &str, usage: &MemoryUsage) {
    let parts = usage.model_weights + usage.kv_cache + usage.activations + usage.temporary_buffers;
    ctx.check_eq(format!("{what}: total_footprint()"), usage.total_footprint(), parts);
    ctx.check_at_least(format!("{what}: peak_usage"), usage.peak_usage as f64, usage.current_usage as f64);
    ctx.check_at_least(format!("{what}: current_usage"), usage.current_usage as f64, usage.model_weights as f64);
    let ratio = f64::from(usage.fragmentation_ratio);
    ctx.check((0.0..=1.0).contains(&ratio), format!("{what}: fragmentation_ratio of 0 to 1"), ratio);
    ctx.check(usage.within_limits(usage.peak_usage), format!("{what}: within_limits(peak_usage)"), "not within");
}

fn figures_fit_together(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let facts = ctx.facts().clone();
    let loaded = engine.memory_usage();
    check_usage(ctx, "after loading", &loaded);
    // 1.58 bits a trit is what information theory allows; f64 for everything, and half as much again, is the other end.
    let low = ternary_parameters(&facts) * 1.58 / 8.0;
    let high = (ternary_parameters(&facts) + float_parameters(&facts)) * 12.0;
    let weights = loaded.model_weights as f64;
    ctx.check((low..=high).contains(&weights), format!("model_weights of {low:.0} to {high:.0} bytes"), weights);
    let tokens = prompt(&facts, 8, 900);
    let output = engine.forward(&super::support::ids(std::slice::from_ref(&tokens), engine.device())?, None)?;
    check_usage(ctx, "of a forward pass", &output.memory_usage);
    let result = generate(engine.as_mut(), &tokens, 4, &plain(1))?;
    check_usage(ctx, "of a generation", &result.memory_usage);
    let after = engine.memory_usage();
    check_usage(ctx, "after use", &after);
    ctx.check_eq("model_weights after use", after.model_weights, loaded.model_weights);
    ctx.check_at_least("peak_usage after use", after.peak_usage as f64, loaded.peak_usage as f64);
    ctx.measure(measure::PEAK_MEMORY_BYTES, after.peak_usage.max(output.metrics.peak_memory_usage) as f64);
    Ok(())
}

fn cache_growth(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let facts = ctx.facts().clone();
    let capacity = facts.max_positions.min(128);
    let mut cache = KVCache::new(capacity);
    ctx.check_eq("bytes of a cache that was never used", cache.memory_bytes(), 0);
    let mut before = 0;
    let high = cache_values(&facts) * 8.0 * capacity as f64 * tolerance::CACHE_SLACK + 4096.0;
    for piece in [1, 7, 8, 16] {
        let tokens = prompt(&facts, piece, 910 + piece as u64);
        let output = engine.forward(&super::support::ids(&[tokens], engine.device())?, Some(&mut cache))?;
        let bytes = cache.memory_bytes();
        // A backend may keep less than keys and values, the ids themselves at the least; that what it says is true of
        // what it keeps is the matter of MEM-3.
        let low = cache.len() as f64;
        let what = format!("bytes of a cache of {capacity} with {} positions", cache.len());
        ctx.check((low..=high).contains(&(bytes as f64)), format!("{what}: {low:.0} to {high:.0}"), bytes);
        ctx.check(bytes >= before, format!("{what}: at least the {before} of before"), bytes);
        let told = [
            ("metrics.cache_memory_usage", output.metrics.cache_memory_usage),
            ("memory_usage.kv_cache", output.memory_usage.kv_cache),
        ];
        for (name, value) in told {
            let value = value as f64;
            ctx.check(
                value >= low && value <= high,
                format!("{name} with {} positions: {low:.0} to {high:.0}", cache.len()),
                value,
            );
        }
        before = bytes;
    }
    cache.clear();
    ctx.check(cache.memory_bytes() <= before, "clear() does not make a cache larger", cache.memory_bytes());
    Ok(())
}

/// Anonymous and all resident memory of this process, in bytes; `None` where the platform does not say.
fn resident_now() -> Option<(f64, f64)> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let field = |name: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(name))?;
        line.split_whitespace().next()?.parse::<f64>().ok().map(|kb| kb * 1024.0)
    };
    Some((field("RssAnon:")?, field("VmRSS:")?))
}

fn need_resident() -> Result<(f64, f64), Stop> {
    resident_now().ok_or_else(|| Stop::Unsupported("resident memory can be read on Linux only".to_string()))
}

fn resident(ctx: &mut Context<'_>) -> CheckResult {
    let (_, before) = need_resident()?;
    let mut engine = ctx.engine()?;
    let tokens = prompt(ctx.facts(), 16, 920);
    generate(engine.as_mut(), &tokens, 8, &greedy())?;
    let (_, after) = need_resident()?;
    let usage = engine.memory_usage();
    ctx.timing("resident_growth_bytes", after - before);
    ctx.measure("model_weights_bytes", usage.model_weights as f64);
    // What is claimed is there.
    let slack = 4.0 * 1024.0 * 1024.0;
    ctx.check_at_most(
        "model_weights, against the growth of resident memory and 4 MiB",
        usage.model_weights as f64,
        after - before + slack,
    );
    ctx.check_at_most("peak_usage, against all resident memory and 4 MiB", usage.peak_usage as f64, after + slack);
    // What is there is claimed: a long session grows the process by its cache and little else.
    let mut cache = KVCache::new(ctx.facts().max_positions);
    let (before, _) = need_resident()?;
    while cache.remaining() >= 16 && cache.len() < 2048 {
        let tokens = prompt(ctx.facts(), 16, 921 + cache.len() as u64);
        forward(engine.as_mut(), &[tokens], Some(&mut cache))?;
    }
    let (after, _) = need_resident()?;
    ctx.measure("cache_bytes_per_position", cache.memory_bytes() as f64 / cache.len().max(1) as f64);
    let claimed = cache.memory_bytes() as f64;
    let what =
        format!("growth of the process over {} cached positions, against four times what the cache says", cache.len());
    ctx.check_at_most(what, after - before, tolerance::SESSION_FACTOR * claimed + tolerance::SESSION_SLACK);
    Ok(())
}

/// The lowest average growth of anonymous memory per call over three windows of calls.
fn growth(calls: usize, mut call: impl FnMut() -> CheckResult) -> Result<f64, Stop> {
    for _ in 0..calls / 2 {
        call()?;
    }
    let mut lowest = f64::INFINITY;
    for _ in 0..3 {
        let (before, _) = need_resident()?;
        for _ in 0..calls {
            call()?;
        }
        let (after, _) = need_resident()?;
        lowest = lowest.min((after - before) / calls as f64);
    }
    Ok(lowest)
}

fn nothing_left_by_calls(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let tokens = prompt(ctx.facts(), 8, 930);
    let last = tokens[7];
    let steps = growth(100, || {
        forward(engine.as_mut(), &[vec![last]], None)?;
        Ok(())
    })?;
    ctx.timing("left_by_forward_call", steps);
    ctx.check_at_most("bytes left by a forward call", steps, tolerance::LEAK_PER_CALL);
    let sessions = growth(100, || {
        let mut cache = KVCache::new(16);
        forward(engine.as_mut(), &[tokens[..4].to_vec()], Some(&mut cache))?;
        forward(engine.as_mut(), &[vec![last]], Some(&mut cache))?;
        Ok(())
    })?;
    ctx.timing("left_by_session_with_a_cache", sessions);
    ctx.check_at_most("bytes left by a session with a cache", sessions, tolerance::LEAK_PER_CALL);
    let generations = growth(50, || {
        generate(engine.as_mut(), &tokens[..3], 2, &plain(1))?;
        Ok(())
    })?;
    ctx.timing("left_by_generation", generations);
    ctx.check_at_most("bytes left by a generation", generations, tolerance::LEAK_PER_CALL);
    let vocab = ctx.facts().vocab_size as u32;
    let refused = growth(100, || {
        let _ = super::support::try_forward(engine.as_mut(), &[vec![vocab]], None)?;
        Ok(())
    })?;
    ctx.timing("left_by_refused_call", refused);
    ctx.check_at_most("bytes left by a refused call", refused, tolerance::LEAK_PER_CALL);
    Ok(())
}

fn nothing_left_by_engines(ctx: &mut Context<'_>) -> CheckResult {
    let weights = ctx.engine()?.memory_usage().model_weights as f64;
    let left = growth(6, || {
        let mut engine = ctx.engine()?;
        forward(engine.as_mut(), &[prompt(ctx.facts(), 2, 940)], None)?;
        Ok(())
    })?;
    ctx.timing("left_by_engine", left);
    let limit = (tolerance::LEAK_PER_ENGINE * weights).max(256.0 * 1024.0);
    ctx.check_at_most("bytes left by an engine that was dropped", left, limit);
    Ok(())
}
