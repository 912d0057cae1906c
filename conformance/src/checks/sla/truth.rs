//! SLA-3, SLA-7: what an engine says of its own times, counts and operations is what happened.
//!
//! An engine measures inside the call that the caller measures, so its figures fit into the caller's on any machine,
//! busy or idle; how much of the caller's time they own up to is judged by the median of many calls.

use super::clock::{Figures, accounted, differ};
use super::decide::percentile;
use super::noise::millis;
use crate::backend::CreateOptions;
use crate::case::{CheckResult, Context, Stop};
use crate::checks::support::{generate, greedy, ids, mix, plain, prompt};
use crate::model::ModelFacts;
use crate::tolerance;
use bitnet_contracts::{BitNetInference, FinishReason, GenerationConfig, GenerationResult, InferenceOutput, KVCache};
use std::time::{Duration, Instant};

/// Calls of each kind, and the least there are where they take long.
const ROUNDS: u64 = 12;
const LEAST_ROUNDS: u64 = 3;
/// What is long for all of them.
const LONG: Duration = Duration::from_secs(3);

/// Weights that each token is multiplied with.
fn weights_met(facts: &ModelFacts) -> f64 {
    let (h, kv, f) = (facts.hidden_size, facts.kv_heads * facts.head_dim, facts.intermediate_size);
    (facts.layers * (2 * h * h + 2 * h * kv + 3 * h * f) + facts.vocab_size * h) as f64
}

/// One timed forward pass.
struct Pass {
    output: InferenceOutput,
    wall: f64,
    /// Tokens given.
    tokens: usize,
    /// Positions that the tokens and those before them make.
    positions: usize,
}

impl Pass {
    fn total(&self) -> f64 {
        millis(self.output.metrics.total_time)
    }
}

/// The kinds of forward calls whose metrics are looked at.
const PASSES: [&str; 4] = ["one token", "many tokens", "a step with a cache", "a batch"];

/// Timed passes of every kind, in an order that does not repeat, so that the figures of another call do not fit.
fn passes(ctx: &Context<'_>, engine: &mut dyn BitNetInference) -> Result<Vec<Vec<Pass>>, Stop> {
    let facts = ctx.facts();
    let many = facts.max_positions.min(16);
    let mut cache = KVCache::new(many);
    let mut made: Vec<Vec<Pass>> = PASSES.iter().map(|_| Vec::new()).collect();
    let kinds = if ctx.capabilities().batch { PASSES.len() } else { PASSES.len() - 1 };
    let start = Instant::now();
    // Every round in an order of its own.
    let mut order: Vec<(u64, u64, usize)> = (0..ROUNDS)
        .flat_map(|round| (0..kinds).map(move |kind| (round, mix(round << 8 | kind as u64), kind)))
        .collect();
    order.sort_unstable();
    for (round, salt, kind) in order {
        if round >= LEAST_ROUNDS && start.elapsed() > LONG {
            break;
        }
        let (rows, length) = [(1, 1), (1, many), (1, 1), (2, many.div_ceil(2))][kind];
        if kind == 2 && cache.remaining() == 0 {
            cache = KVCache::new(many);
        }
        let tokens: Vec<Vec<u32>> = (0..rows).map(|row| prompt(facts, length, salt + row)).collect();
        let input = ids(&tokens, engine.device())?;
        let given = (kind == 2).then_some(&mut cache);
        let before = given.as_ref().map_or(0, |cache| cache.len());
        let clock = Instant::now();
        let output = engine.forward(&input, given)?;
        let wall = millis(clock.elapsed());
        made[kind].push(Pass { output, wall, tokens: rows as usize * length, positions: before + length });
    }
    Ok(made)
}

pub(super) fn metrics_are_true(ctx: &mut Context<'_>) -> CheckResult {
    let facts = ctx.facts().clone();
    let mut engine = ctx.engine()?;
    let made = passes(ctx, engine.as_mut())?;
    let mut owned = f64::INFINITY;
    for (kind, passes) in PASSES.into_iter().zip(&made).filter(|(_, passes)| !passes.is_empty()) {
        let mut totals = Figures::default();
        passes.iter().for_each(|pass| totals.add(pass.total(), pass.wall));
        let what = format!("total_time of {kind}");
        totals.fit(ctx, &what, "the caller's clock");
        totals.own_up(ctx, &what, "the caller's clock", &tolerance::TIME_OWNED);
        owned = owned.min(totals.share());
        operations(ctx, kind, passes, &facts);
    }
    ctx.timing("time_owned", owned);
    let all: Vec<&Pass> = made.iter().flatten().collect();
    let mut totals = Figures::default();
    all.iter().for_each(|pass| totals.add(pass.total(), pass.wall));
    totals.vary(ctx, "total_time");
    memory_and_traffic(ctx, &all, &facts);
    // Where parts may overlap because threads work side by side, they are looked at with one thread.
    if ctx.capabilities().threads {
        let mut single = ctx.engine_with(&CreateOptions::default().with_threads(1))?;
        let made = passes(ctx, single.as_mut())?;
        parts(ctx, &made.iter().flatten().collect::<Vec<_>>());
    } else {
        parts(ctx, &all);
    }
    Ok(())
}

/// Operations are counted from the shapes: near twice the weights for each token, the same for the same shape.
fn operations(ctx: &mut Context<'_>, kind: &str, passes: &[Pass], facts: &ModelFacts) {
    let told = |pass: &Pass| pass.output.metrics.flops_estimate as f64;
    // An engine that keeps no keys and values computes the positions before as well.
    let factor = |pass: &Pass| {
        let rows = pass.tokens as f64;
        let most = if pass.positions > pass.tokens { pass.positions as f64 } else { rows };
        let flops = 2.0 * weights_met(facts);
        (flops * rows / told(pass)).max(told(pass) / (flops * most))
    };
    if let Some(odd) = passes.iter().max_by(|a, b| factor(a).total_cmp(&factor(b))) {
        let seen = format!("{} for {} tokens up to position {}", told(odd), odd.tokens, odd.positions);
        let what = format!("flops_estimate of {kind} off twice the {} weights for each token", weights_met(facts));
        ctx.check_within(format!("{what}: {seen}"), factor(odd), &tolerance::FLOPS_FACTOR);
    }
    let same = |a: &Pass, b: &Pass| (a.tokens, a.positions) != (b.tokens, b.positions) || told(a) == told(b);
    let differs = passes.iter().any(|a| passes.iter().any(|b| !same(a, b)));
    ctx.check(!differs, format!("flops_estimate of {kind}: the same for the same shape"), "different");
    if let Some(pass) = passes.first() {
        ctx.measure_max("flops_ratio", told(pass) / (2.0 * weights_met(facts) * pass.tokens as f64));
    }
}

fn memory_and_traffic(ctx: &mut Context<'_>, all: &[&Pass], facts: &ModelFacts) {
    let held = |pass: &&&Pass| {
        let output = &pass.output;
        output.memory_usage.model_weights.max(output.metrics.cache_memory_usage).max(1)
    };
    let low = all.iter().find(|pass| pass.output.metrics.peak_memory_usage < held(pass));
    ctx.check(
        low.is_none(),
        "peak_memory_usage at least the weights and the cache that were held",
        low.map(|pass| format!("{} < {}", pass.output.metrics.peak_memory_usage, held(&pass))).unwrap_or_default(),
    );
    let traffic = |pass: &&&Pass| pass.output.metrics.memory_bandwidth_usage;
    let bad = all.iter().find(|pass| !(traffic(pass).is_finite() && traffic(pass) >= 0.0));
    ctx.check(
        bad.is_none(),
        "memory_bandwidth_usage finite and not negative",
        bad.map(|pass| traffic(&pass)).unwrap_or_default(),
    );
    let parameters = weights_met(facts) + (facts.vocab_size * facts.hidden_size) as f64;
    let bytes = |pass: &&&Pass| traffic(pass) * 1e9 * pass.total() / 1e3;
    let moved = all.iter().map(|pass| bytes(&pass) / (parameters * (pass.tokens * pass.positions) as f64));
    ctx.check_within("memory_bandwidth_usage in GB/s", moved.fold(0.0, f64::max), &tolerance::TRAFFIC);
    let first = all.iter().map(|pass| pass.output.metrics.memory_bandwidth_usage).find(|&rate| rate != 0.0);
    let measured = first.is_none_or(|first| all.iter().any(|pass| traffic(&pass) != first));
    ctx.check(measured, "memory_bandwidth_usage that differs from call to call, or none", format!("always {first:?}"));
}

/// A component time and its name.
type Part = (&'static str, fn(&Pass) -> Duration);

/// The times of the parts of a pass fit into the whole, and those that are given are measured.
fn parts(ctx: &mut Context<'_>, all: &[&Pass]) {
    let fields: [Part; 7] = [
        ("embedding_time", |p| p.output.metrics.embedding_time),
        ("attention_time", |p| p.output.metrics.attention_time),
        ("feedforward_time", |p| p.output.metrics.feedforward_time),
        ("normalization_time", |p| p.output.metrics.normalization_time),
        ("logits_time", |p| p.output.metrics.logits_time),
        ("quantization_time", |p| p.output.metrics.quantization_time),
        ("dequantization_time", |p| p.output.metrics.dequantization_time),
    ];
    // Calls of one size together, so that a part of a long call does not hide in another long one.
    for (size, few) in [("short", true), ("long", false)] {
        let (mut five, mut quantization) = (Figures::default(), Figures::default());
        for pass in all.iter().filter(|pass| (pass.tokens == 1) == few) {
            let sum = |range: &[Part]| range.iter().map(|(_, f)| millis(f(pass))).sum::<f64>();
            five.add(sum(&fields[..5]), pass.total());
            quantization.add(sum(&fields[5..]), pass.total());
        }
        five.fit(ctx, &format!("the five component times of {size} calls"), "total_time");
        quantization.fit(ctx, &format!("the quantisation times of {size} calls"), "total_time");
    }
    for (name, field) in fields {
        let shares: Vec<f64> = all.iter().map(|pass| millis(field(pass)) / pass.total().max(1e-9)).collect();
        let low = shares.iter().copied().fold(f64::INFINITY, f64::min);
        let high = shares.iter().copied().fold(0.0, f64::max);
        let same = if high == 0.0 { 0.0 } else { low / high };
        let what = format!("{name}: least over largest share of total_time, {high} the largest");
        ctx.check_within(what, same, &tolerance::SHARE_SAME);
    }
}

/// One timed generation.
struct Made {
    result: GenerationResult,
    wall: f64,
}

/// The kinds of generations whose times are looked at.
const KINDS: [&str; 9] = [
    "many ids after a short prompt",
    "one id after a short prompt",
    "few ids after a long prompt",
    "one id after a long prompt",
    "sampled ids",
    "generate_deterministic",
    "ids up to an end-of-sequence token",
    "generate_concurrent",
    "few ids after a long prompt in pieces",
];

/// Timed generations of every kind that the backend has, one of each after the other.
fn generations(ctx: &Context<'_>) -> Result<Vec<Vec<Made>>, Stop> {
    let facts = ctx.facts();
    let mut engine = ctx.engine()?;
    let shared = if ctx.capabilities().thread_safe { Some(ctx.thread_safe()?) } else { None };
    let short = 4.min(facts.max_positions / 2).max(1);
    let long = (facts.max_positions * 3 / 4).clamp(1, 24);
    let many = 16.min(facts.max_positions - short);
    let few = 3.min(facts.max_positions - long).max(1);
    let exactly = |count: usize| GenerationConfig { min_new_tokens: count, ..GenerationConfig::greedy() };
    let mut made: Vec<Vec<Made>> = KINDS.iter().map(|_| Vec::new()).collect();
    let start = Instant::now();
    for round in (0..ROUNDS).take_while(|&round| round < LEAST_ROUNDS || start.elapsed() < LONG) {
        for (kind, made) in made.iter_mut().enumerate() {
            let salt = 1_060_000 + round * KINDS.len() as u64 + kind as u64;
            let tokens = prompt(facts, if matches!(kind, 2 | 3 | 8) { long } else { short }, salt);
            let (count, config) = match kind {
                0 | 7 => (many, exactly(many)),
                1 | 3 => (1, exactly(1)),
                2 => (few, exactly(few)),
                8 => (few, GenerationConfig { prefill_chunk_size: Some(long.div_ceil(4)), ..exactly(few) }),
                4 | 5 => (many, plain(salt)),
                _ => (many, ending(engine.as_mut(), &tokens, many)?),
            };
            let clock = Instant::now();
            let result = match (kind, &shared) {
                (7, None) => continue,
                (7, Some(shared)) => shared.generate_concurrent(&tokens, count, &config)?,
                (5, _) => engine.generate_deterministic(&tokens, count, salt)?,
                _ => generate(engine.as_mut(), &tokens, count, &config)?,
            };
            made.push(Made { result, wall: millis(clock.elapsed()) });
        }
    }
    Ok(made)
}

/// A configuration whose end-of-sequence token is the last id of the greedy continuation that did not come before.
fn ending(engine: &mut dyn BitNetInference, tokens: &[u32], count: usize) -> Result<GenerationConfig, Stop> {
    let made = generate(engine, tokens, count, &greedy())?.generated_tokens;
    let last = (0..made.len()).rev().find(|&at| !made[..at].contains(&made[at]));
    Ok(GenerationConfig { eos_token_id: last.map(|at| made[at]), ..greedy() })
}

pub(super) fn generation_times_are_true(ctx: &mut Context<'_>) -> CheckResult {
    let made = generations(ctx)?;
    for (kind, runs) in KINDS.into_iter().zip(&made).filter(|(_, runs)| !runs.is_empty()) {
        times_of(ctx, kind, runs);
    }
    let mut totals = Figures::default();
    made.iter().flatten().for_each(|m| totals.add(millis(m.result.timing.total), m.wall));
    totals.vary(ctx, "timing.total");
    beside_each_other(ctx, "a short prompt", &made[0], &made[1]);
    beside_each_other(ctx, "a long prompt", &made[2], &made[3]);
    Ok(())
}

/// The times of one kind of generation against the caller's clock and against each other.
fn times_of(ctx: &mut Context<'_>, kind: &str, runs: &[Made]) {
    let miscounted = runs.iter().find(|m| m.result.timing.per_token.len() != m.result.generated_tokens.len());
    ctx.check(
        miscounted.is_none(),
        format!("{kind}: one time for each returned id"),
        miscounted
            .map(|m| format!("{} for {}", m.result.timing.per_token.len(), m.result.generated_tokens.len()))
            .unwrap_or_default(),
    );
    let [mut total, mut ids, mut whole, mut stages, mut prefill, mut first] = [(); 6].map(|()| Figures::default());
    for Made { result, wall } in runs {
        let timing = &result.timing;
        total.add(millis(timing.total), *wall);
        // A step that ends a generation is nobody's time: it gave no id.
        if result.finish_reason == FinishReason::MaxTokens {
            whole.add(accounted(result), millis(timing.total));
        }
        ids.add(accounted(result), millis(timing.total));
        stages.add(millis(timing.prefill + timing.decode), millis(timing.total));
        if !result.generated_tokens.is_empty() {
            prefill.add(millis(timing.prefill), millis(timing.time_to_first_token));
            first.add(millis(timing.time_to_first_token), millis(timing.total));
        }
    }
    total.fit(ctx, &format!("{kind}: timing.total"), "the caller's clock");
    total.own_up(ctx, &format!("{kind}: timing.total"), "the caller's clock", &tolerance::TIME_OWNED);
    ids.fit(ctx, &format!("{kind}: time_to_first_token and the ids after it"), "timing.total");
    first.fit(ctx, &format!("{kind}: time_to_first_token"), "timing.total");
    stages.fit(ctx, &format!("{kind}: prefill and decode"), "timing.total");
    prefill.fit(ctx, &format!("{kind}: prefill"), "time_to_first_token");
    let what = format!("{kind}: time_to_first_token and the ids after it");
    whole.own_up(ctx, &what, "timing.total", &tolerance::TIME_OWNED);
    stages.own_up(ctx, &format!("{kind}: prefill and decode"), "timing.total", &tolerance::STAGES_OWNED);
    if kind.contains("long prompt") {
        let what = format!("{kind}: prefill");
        prefill.own_up(ctx, &what, "time_to_first_token", &tolerance::PREFILL_OWNED);
    }
    let measured = runs.iter().any(|m| differ(m.result.timing.per_token.get(1..).unwrap_or_default()));
    ctx.check(measured, format!("{kind}: times of the ids that differ"), "all the same in every call");
}

/// Generations of many ids beside those of one id, each with its neighbour in time: where the engine says that the
/// first of many came, a call for one id returns, or nearly so. A quarter of the pairs on the right side is enough,
/// for a busy machine disturbs either side of a pair, and an engine that moves the first id does so every time.
fn beside_each_other(ctx: &mut Context<'_>, what: &str, many: &[Made], one: &[Made]) {
    let first = |made: &Made| millis(made.result.timing.time_to_first_token);
    let ratios: Vec<f64> = many.iter().zip(one).map(|(many, one)| first(many) / one.wall).collect();
    let what = format!("time_to_first_token of many ids after {what} over the time of a call for one id");
    ctx.check_within(format!("{what}, lower quartile"), percentile(&ratios, 0.25), &tolerance::FIRST_TOKEN);
    let what = format!("the other way round: {what}, upper quartile");
    ctx.check_within(what, 1.0 / percentile(&ratios, 0.75), &tolerance::FIRST_TOKEN);
}
