//! Memory figures that are true, growth that is understood, and nothing left behind.

use super::process::{handles, held, memory, need};
use super::slope::{Slope, slope};
use super::support::{forward, generate, ids, plain, prompt, try_forward};
use super::truth::{SMALL, Subject, synthetic};
use crate::backend::Capability;
use crate::case::{Category, Check, CheckResult, Context, Stop};
use crate::measure;
use crate::model::ModelFacts;
use crate::tolerance::{self, Tolerance};
use bitnet_contracts::{BitNetInference, GenerationConfig, InferenceOutput, KVCache, MemoryUsage};
use fixtures::Spec;
use std::time::{Duration, Instant};

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
    Check::new("MEM-3", "memory/resident", MEMORY, "the figures match what the process holds", resident)
        .fresh()
        .long()
        .within(180),
    Check::new(
        "MEM-4",
        "memory/nothing_left_by_calls",
        MEMORY,
        "calls and sessions leave no memory behind",
        nothing_left_by_calls,
    )
    .fresh()
    .within(180)
    .long(),
    Check::new(
        "MEM-5",
        "memory/nothing_left_by_engines",
        MEMORY,
        "a dropped engine leaves no memory behind",
        nothing_left_by_engines,
    )
    .fresh()
    .within(180),
    Check::new(
        "MEM-6",
        "memory/nothing_left_by_copies",
        MEMORY,
        "dropped thread-local copies and calls of generate_concurrent leave no memory behind",
        nothing_left_by_copies,
    )
    .needs(Capability::ThreadSafe)
    .fresh()
    .within(180)
    .long(),
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
    let parts = usage.total_footprint();
    let now = usage.current_usage.max(parts);
    ctx.check_at_least(format!("{what}: peak_usage, of what is held now,"), usage.peak_usage as f64, now as f64);
    ctx.check_at_least(format!("{what}: current_usage"), usage.current_usage as f64, usage.model_weights as f64);
    let ratio = f64::from(usage.fragmentation_ratio);
    ctx.check((0.0..=1.0).contains(&ratio), format!("{what}: fragmentation_ratio of 0 to 1"), ratio);
}

fn figures_fit_together(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let facts = ctx.facts().clone();
    let loaded = engine.memory_usage();
    check_usage(ctx, "after loading", &loaded);
    // 1.58 bits a trit is what information theory allows, and 4 bits are the least that an embedding is kept in; f64
    // for everything, and half as much again, is the other end.
    let low = ternary_parameters(&facts) * 1.58 / 8.0 + float_parameters(&facts) / 2.0;
    let high = (ternary_parameters(&facts) + float_parameters(&facts)) * 12.0;
    let weights = loaded.model_weights as f64;
    ctx.check((low..=high).contains(&weights), format!("model_weights of {low:.0} to {high:.0} bytes"), weights);
    let tokens = prompt(&facts, facts.max_positions.min(32), 900);
    let output = engine.forward(&ids(std::slice::from_ref(&tokens), engine.device())?, None)?;
    check_usage(ctx, "of a forward pass", &output.memory_usage);
    let result = generate(engine.as_mut(), &tokens[..tokens.len().min(8)], 4, &plain(1))?;
    check_usage(ctx, "of a generation", &result.memory_usage);
    let after = engine.memory_usage();
    check_usage(ctx, "after use", &after);
    ctx.check_eq("model_weights after use", after.model_weights, loaded.model_weights);
    let most = loaded.peak_usage.max(output.memory_usage.peak_usage).max(output.metrics.peak_memory_usage);
    ctx.check_at_least("peak_usage after use, of what was held so far,", after.peak_usage as f64, most as f64);
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
    // Of f64 values, and what is besides.
    let (full, rest) = (cache_values(&facts) * 8.0 * capacity as f64, tolerance::CACHE_REST.limit());
    let high = tolerance::CACHE_SLACK.limit() * full + rest;
    for piece in [1, 7, 8, 16] {
        let tokens = prompt(&facts, piece, 910 + piece as u64);
        let output = engine.forward(&ids(&[tokens], engine.device())?, Some(&mut cache))?;
        let bytes = cache.memory_bytes();
        // A backend may keep less than keys and values, the ids themselves at the least; that what it says is true of
        // what it keeps is the matter of MEM-3.
        let low = cache.len() as f64;
        let what = format!("bytes of a cache of {capacity} with {} positions", cache.len());
        ctx.check(bytes as f64 >= low, format!("{what}: at least {low:.0}"), bytes);
        let over = (bytes as f64 - rest) / full;
        ctx.check_within(
            format!("{what}: {bytes} over {full:.0} and {rest:.0} besides"),
            over,
            &tolerance::CACHE_SLACK,
        );
        ctx.check(bytes >= before, format!("{what}: at least the {before} of before"), bytes);
        told(ctx, &output, &cache, high);
        before = bytes;
    }
    cache.clear();
    ctx.check(cache.memory_bytes() <= before, "clear() does not make a cache larger", cache.memory_bytes());
    // All that one call takes, and not what was there before it.
    let capacity = facts.max_positions.min(300);
    let mut cache = KVCache::new(capacity);
    let output = engine.forward(&ids(&[prompt(&facts, capacity, 914)], engine.device())?, Some(&mut cache))?;
    told(ctx, &output, &cache, tolerance::CACHE_SLACK.limit() * cache_values(&facts) * 8.0 * capacity as f64 + rest);
    Ok(())
}

/// What an output says of a cache, beside what the cache says. The engine's own session of up to `session` bytes may come on
/// top in `memory_usage`, but not instead.
fn told(ctx: &mut Context<'_>, output: &InferenceOutput, cache: &KVCache, session: f64) {
    let rest = tolerance::CACHE_TOLD_REST.limit();
    for (name, value, rest) in [
        ("metrics.cache_memory_usage", output.metrics.cache_memory_usage, rest),
        ("memory_usage.kv_cache", output.memory_usage.kv_cache, session + rest),
    ] {
        let (value, bytes) = (value as f64, cache.memory_bytes() as f64);
        let what = format!("{name} with {} positions, {value} where the cache has {bytes},", cache.len());
        let factor = ((value - rest) / bytes).max(bytes / value);
        ctx.check_within(format!("{what} up to {rest:.0} besides"), factor, &tolerance::CACHE_TOLD);
    }
}

/// What process memory says nothing about: a device with memory of its own.
fn needs_host(engine: &dyn BitNetInference) -> CheckResult {
    let on_host = engine.device().is_cpu();
    if on_host { Ok(()) } else { Err(Stop::Unsupported("memory of the device cannot be read".to_string())) }
}

fn resident(ctx: &mut Context<'_>) -> CheckResult {
    let _filled = fill_holes()?;
    let before = need(memory())?;
    let mut engine = ctx.engine()?;
    needs_host(engine.as_ref())?;
    let facts = ctx.facts();
    let positions = facts.max_positions.min(32);
    let fill = |engine: &mut dyn BitNetInference, salt: u64| -> Result<KVCache, Stop> {
        let mut cache = KVCache::new(positions);
        forward(engine, &[prompt(facts, positions, 921 + salt)], Some(&mut cache))?;
        Ok(cache)
    };
    // What a first call needs is there before anything is counted.
    drop((fill(engine.as_mut(), 0)?, fill(engine.as_mut(), 1)?));
    let after = need(memory())?;
    let usage = engine.memory_usage();
    ctx.timing("resident_growth_bytes", after.resident - before.resident);
    ctx.measure("model_weights_bytes", usage.model_weights as f64);
    // What is claimed is there.
    for (what, claimed, there) in [
        ("model_weights beyond the growth of resident memory", usage.model_weights, after.resident - before.resident),
        ("peak_usage beyond all resident memory", usage.peak_usage, after.peak_resident),
    ] {
        let what = format!("{what}: {claimed} where {there} are there");
        ctx.check_within(what, claimed as f64 - there, &tolerance::RESIDENT_SLACK);
    }
    // What is there is claimed: sessions grow the process by their caches and little else. There are enough of them
    // for 1 MiB of keys and values in 16 bits.
    let expected = cache_values(facts) * 2.0 * positions as f64;
    let count = ((1u64 << 20) as f64 / expected).ceil().clamp(4.0, 64.0) as u64;
    let before = need(held())?;
    let caches = (0..count).map(|session| fill(engine.as_mut(), 2 + session)).collect::<Result<Vec<_>, _>>()?;
    let grown = need(held())? - before;
    let claimed: usize = caches.iter().map(KVCache::memory_bytes).sum();
    ctx.measure("cache_bytes_per_position", claimed as f64 / (count as usize * positions) as f64);
    ctx.timing("sessions_growth_bytes", grown);
    let what = format!("{count} sessions of {positions} positions take {grown} bytes, their caches say {claimed}");
    let factor = (grown - tolerance::SESSION_SLACK.limit()) / claimed as f64;
    ctx.check_within(what, factor, &tolerance::SESSION_FACTOR);
    large_sessions(ctx)?;
    // Engines likewise, by what they say they hold.
    let tokenizer = facts.has_tokenizer && ctx.capabilities().tokenizer;
    let besides = if tokenizer { &tolerance::TOKENIZER_SLACK } else { &tolerance::ENGINE_SLACK };
    let series = engines(|| ctx.engine())?;
    engines_say_what_they_take(ctx, "another engine", besides, &series);
    // Where a head of its own is most of a model.
    let spec = Spec { vocab: 20_000, layers: 1, ..SMALL };
    let subject = Subject::write(ctx, "own-head", &synthetic(ctx, "own-head", &spec)?)?;
    let series = engines(|| subject.engine(ctx))?;
    engines_say_what_they_take(ctx, "another engine with a head of its own", &tolerance::ENGINE_SLACK, &series);
    Ok(())
}

/// A model whose caches are large beside all that an allocator rounds: 512 KiB of keys and values in f32.
const WIDE_CACHES: Spec = Spec { hidden: 256, ffn: 32, layers: 1, kv_heads: 4, context: 256, ..SMALL };

/// Sessions so large that their pages can be counted: what is claimed is what is touched, not what is set aside.
fn large_sessions(ctx: &mut Context<'_>) -> CheckResult {
    let subject = Subject::write(ctx, "wide-caches", &synthetic(ctx, "wide-caches", &WIDE_CACHES)?)?;
    let mut engine = subject.engine(ctx)?;
    let mut caches = Vec::new();
    // As many positions in all: one sequence, and four side by side.
    for (rows, timing) in [(1, "growth_bytes_of_a_large_session"), (4, "growth_bytes_of_a_large_batch")] {
        if rows > 1 && !ctx.capabilities().batch {
            continue;
        }
        let positions = WIDE_CACHES.context / rows;
        let mut series = Vec::new();
        for session in 0..10 {
            let mut cache = KVCache::new(positions);
            let tokens = |row: usize| prompt(subject.facts(), positions, 925 + 10 * row as u64 + session);
            forward(engine.as_mut(), &(0..rows).map(tokens).collect::<Vec<_>>(), Some(&mut cache))?;
            caches.push(cache);
            series.push(need(memory())?.resident);
        }
        let claimed = caches.last().map_or(0, KVCache::memory_bytes) as f64;
        // The first ones fill what others left free.
        let taken = slope(&series[2..], 1.0);
        ctx.timing(timing, taken.middle);
        let what = format!(
            "a large session of {rows} sequences takes {} bytes, lower 99 % bound, and its cache says {claimed}",
            taken.low
        );
        ctx.check_within(what, taken.low / claimed, &tolerance::LARGE_SESSION_FACTOR);
    }
    Ok(())
}

/// What the process holds after each of some engines, and what the first of them says that it holds.
fn engines(make: impl Fn() -> Result<Box<dyn BitNetInference>, Stop>) -> Result<(Vec<f64>, f64), Stop> {
    let (mut engines, mut series) = (vec![make()?, make()?], vec![need(held())?]);
    for _ in 0..6 {
        engines.push(make()?);
        series.push(need(held())?);
    }
    Ok((series, engines[0].memory_usage().total_footprint() as f64))
}

fn engines_say_what_they_take(
    ctx: &mut Context<'_>,
    what: &str,
    besides: &tolerance::Tolerance,
    (series, claimed): &(Vec<f64>, f64),
) {
    let taken = slope(series, 1.0);
    ctx.timing(&format!("growth_bytes_of_{}", what.replace(' ', "_")), taken.middle);
    let what = format!("{what} takes {} bytes, lower 99 % bound, and says {claimed}", taken.low);
    ctx.check_within(what, (taken.low - besides.limit()) / claimed, &tolerance::ENGINE_FACTOR);
}

/// The time that the calls of one slope may take.
const SLOPE_TIME: Duration = Duration::from_secs(4);

/// Takes what the allocator holds free, block by block, until it has to ask for fresh pages: what is left behind would
/// hide in there, for loading a model leaves holes of many megabytes.
fn fill_holes() -> Result<Vec<Vec<u8>>, Stop> {
    const STEP: usize = 256;
    const MOST: usize = 1 << 18;
    let (mut blocks, mut fresh) = (Vec::with_capacity(MOST), 0);
    let mut before = need(held())?;
    while fresh < 3 && blocks.len() < MOST {
        blocks.extend((0..STEP).map(|_| std::hint::black_box(vec![1u8; 240])));
        let now = need(held())?;
        fresh = if now - before >= 0.8 * (STEP * 240) as f64 { fresh + 1 } else { 0 };
        before = now;
    }
    Ok(blocks)
}

/// How the memory of the process grows with calls, in bytes a call: a slope over `readings` with `between` calls
/// between two of them.
///
/// A pool that fills and an allocator that gives back late grow for a while, a leak grows on: up to three slopes in a
/// row are taken until one does not grow by more than `limit` a call. Slow calls are made less often.
fn growth(limit: f64, readings: usize, between: u64, mut call: impl FnMut(u64) -> CheckResult) -> Result<Slope, Stop> {
    let mut serial = 0;
    let mut calls = |count: u64| -> CheckResult {
        for _ in 0..count {
            serial += 1;
            call(serial)?;
        }
        Ok(())
    };
    let clock = Instant::now();
    calls(4)?;
    let affordable = SLOPE_TIME.as_secs_f64() / readings as f64 / (clock.elapsed().as_secs_f64() / 4.0).max(1e-9);
    let between = between.min(affordable as u64).max(1);
    calls(4 * between)?;
    let _filled = fill_holes()?;
    calls(between)?;
    let mut seen = None;
    for _ in 0..3 {
        let mut series = vec![need(held())?];
        while series.len() < readings {
            calls(between)?;
            series.push(need(held())?);
        }
        let found = slope(&series, between as f64);
        seen = Some(found);
        if found.low <= limit {
            break;
        }
    }
    seen.ok_or(Stop::Failed)
}

/// Asserts that a growth is none, as far as can be told with 99 % confidence. The tolerance is in so many `bytes`.
#[track_caller]
fn no_growth(ctx: &mut Context<'_>, key: &str, what: &str, seen: Slope, (tolerance, bytes): (&Tolerance, f64)) {
    ctx.timing(&format!("left_by_{key}"), seen.middle);
    ctx.timing(&format!("left_by_{key}_at_most"), seen.high);
    let what = format!("{what} leaves {} bytes, lower 99 % bound", seen.low);
    ctx.check_within(what, seen.low / bytes, tolerance);
}

fn nothing_left_by_calls(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let (facts, held_to) = (ctx.facts(), (&tolerance::LEAK_PER_CALL, 1.0));
    let limit = tolerance::LEAK_PER_CALL.limit();
    let room = facts.max_positions;
    // No two calls are alike: an engine that keeps answers keeps one more each time.
    let tokens = |length: usize, serial: u64| prompt(facts, length.min(room), 1_100_000 + serial);
    let seen = growth(limit, 21, 10, |serial| {
        forward(engine.as_mut(), &[tokens(2, serial)], None)?;
        Ok(())
    })?;
    no_growth(ctx, "forward_call", "a forward call", seen, held_to);
    let seen = growth(limit, 21, 10, |serial| {
        let mut cache = KVCache::new(4);
        forward(engine.as_mut(), &[tokens(2, serial)], Some(&mut cache))?;
        forward(engine.as_mut(), &[tokens(1, serial + 1)], Some(&mut cache))?;
        cache.truncate(1);
        forward(engine.as_mut(), &[tokens(1, serial + 2)], Some(&mut cache))?;
        Ok(engine.reset()?)
    })?;
    no_growth(ctx, "session_with_a_cache", "a session with a cache", seen, held_to);
    let seen = growth(limit, 21, 10, |serial| {
        generate(engine.as_mut(), &tokens(3, serial), 2, &plain(serial))?;
        Ok(())
    })?;
    no_growth(ctx, "generation", "a generation", seen, held_to);
    let mut kept = KVCache::new(2);
    forward(engine.as_mut(), &[tokens(1, 0)], Some(&mut kept))?;
    let seen = growth(limit, 21, 10, |serial| {
        let invalid = vec![facts.vocab_size as u32];
        let none = GenerationConfig { max_new_tokens: 0, ..GenerationConfig::default() };
        // That they are refused is the matter of the ERR clauses.
        let _ = try_forward(engine.as_mut(), &[invalid], None)?;
        let _ = try_forward(engine.as_mut(), &[tokens(3, serial)], Some(&mut kept))?;
        let _ = engine.generate(&[], 2, &plain(serial));
        let _ = engine.generate(&tokens(2, serial), 2, &none);
        Ok(())
    })?;
    no_growth(ctx, "refused_call", "a refused call", seen, held_to);
    Ok(())
}

fn nothing_left_by_engines(ctx: &mut Context<'_>) -> CheckResult {
    let weights = (ctx.engine()?.memory_usage().model_weights as f64).max(tolerance::LEAK_FEW_WEIGHTS.limit());
    let mut counts = Vec::new();
    let seen = growth(tolerance::LEAK_PER_ENGINE.limit() * weights, 12, 1, |serial| {
        let mut engine = ctx.engine()?;
        forward(engine.as_mut(), &[prompt(ctx.facts(), 2, 1_200_000 + serial)], None)?;
        generate(engine.as_mut(), &prompt(ctx.facts(), 2, 1_300_000 + serial), 2, &plain(serial))?;
        drop(engine);
        counts.push(need(handles())?);
        Ok(())
    })?;
    no_growth(ctx, "engine", "an engine that was dropped", seen, (&tolerance::LEAK_PER_ENGINE, weights));
    for (which, what) in ["threads", "open files"].into_iter().enumerate() {
        let series: Vec<f64> = counts.iter().map(|count| count[which]).collect();
        // Threads of a pool end in their own time, so one more or less means nothing.
        let grown = slope(&series[series.len().min(4)..], 1.0).low;
        let what = format!("{what} that an engine leaves behind, lower 99 % bound");
        ctx.check_within(what, grown, &tolerance::LEAK_HANDLES);
    }
    Ok(())
}

fn nothing_left_by_copies(ctx: &mut Context<'_>) -> CheckResult {
    let shared = ctx.thread_safe()?;
    let seen = growth(tolerance::LEAK_PER_COPY.limit(), 21, 10, |serial| {
        let tokens = prompt(ctx.facts(), 2, 1_400_000 + serial);
        let mut copy = shared.thread_local_copy()?;
        forward(copy.as_mut(), std::slice::from_ref(&tokens), None)?;
        generate(copy.as_mut(), &tokens, 1, &plain(serial))?;
        Ok(())
    })?;
    no_growth(ctx, "copy", "a thread-local copy that was dropped", seen, (&tolerance::LEAK_PER_COPY, 1.0));
    let seen = growth(tolerance::LEAK_PER_COPY.limit(), 21, 10, |serial| {
        shared.generate_concurrent(&prompt(ctx.facts(), 2, 1_500_000 + serial), 1, &plain(serial))?;
        Ok(())
    })?;
    no_growth(ctx, "concurrent_call", "a call of generate_concurrent", seen, (&tolerance::LEAK_PER_COPY, 1.0));
    Ok(())
}
