//! The same input gives the same bits.

use super::support::{chunked, forward, generate, logits_of, mix, plain, prompt};
use crate::backend::CreateOptions;
use crate::case::{Applicability, Category, Check, CheckResult, Context, ModelSet, Stop};
use bitnet_contracts::{BitNetInference, GenerationConfig, KVCache};

const DETERMINISM: Category = Category::Determinism;

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "DET-1",
        "determinism/repeated_forward",
        DETERMINISM,
        "repeated calls give the same bits, whatever came between",
        repeated_forward,
    ),
    Check::new(
        "DET-2",
        "determinism/same_seed",
        DETERMINISM,
        "the same seed gives the same tokens and text, with or without reset()",
        same_seed,
    ),
    Check::new(
        "DET-3",
        "determinism/fresh_engine",
        DETERMINISM,
        "a fresh engine gives the same bits and tokens",
        fresh_engine,
    )
    .on(ModelSet::Every),
    Check::new("DET-4", "determinism/threads", DETERMINISM, "the number of threads does not show", threads)
        .needs(|c| if c.threads { Applicability::Run } else { Applicability::Unsupported("a choice of threads") }),
    Check::new("DET-5", "determinism/seeds_differ", DETERMINISM, "different seeds give different tokens", seeds_differ),
    Check::new(
        "DET-6",
        "determinism/sessions_apart",
        DETERMINISM,
        "forward calls and generations do not disturb each other",
        sessions_apart,
    ),
    Check::new(
        "DET-7",
        "determinism/generate_deterministic",
        DETERMINISM,
        "generate_deterministic is generate with the default configuration and that seed",
        generate_deterministic,
    ),
];

const SEEDS: [u64; 4] = [0, 1, 12345, u64::MAX];

fn repeated_forward(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let tokens = prompt(ctx.facts(), 9, 70);
    let other = prompt(ctx.facts(), 17, 71);
    let expected = logits_of(engine.as_mut(), &tokens)?;
    for round in 0..3 {
        logits_of(engine.as_mut(), &other[..5 * round + 2])?;
        let seen = logits_of(engine.as_mut(), &tokens)?;
        ctx.check_bits(format!("logits of call {}", round + 2), &seen.data, &expected.data);
    }
    let sizes = [4, 1, 1, 3];
    let expected = chunked(engine.as_mut(), &tokens, &sizes, &mut KVCache::new(9))?;
    let seen = chunked(engine.as_mut(), &tokens, &sizes, &mut KVCache::new(40))?;
    ctx.check_bits("logits of the same chunks with another cache", &seen, &expected);
    Ok(())
}

fn same_seed(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let tokens = prompt(ctx.facts(), 5, 72);
    for seed in SEEDS {
        let first = engine.generate_deterministic(&tokens, 10, seed)?;
        let again = engine.generate_deterministic(&tokens, 10, seed)?;
        engine.reset()?;
        let reset = engine.generate_deterministic(&tokens, 10, seed)?;
        for (what, result) in [("again", &again), ("after reset()", &reset)] {
            let what = format!("seed {seed} {what}");
            ctx.check_slices(format!("{what}: tokens"), &result.generated_tokens, &first.generated_tokens);
            ctx.check_eq(format!("{what}: text"), &result.generated_text, &first.generated_text);
            ctx.check_eq(format!("{what}: finish"), result.finish_reason, first.finish_reason);
        }
    }
    Ok(())
}

/// Tokens of a sampled generation that depends on every bit of the logits as much as any does.
fn sample(engine: &mut dyn BitNetInference, tokens: &[u32], seed: u64) -> Result<Vec<u32>, Stop> {
    Ok(generate(engine, tokens, 8, &plain(seed))?.generated_tokens)
}

fn fresh_engine(ctx: &mut Context<'_>) -> CheckResult {
    let (mut first, mut second) = (ctx.engine()?, ctx.engine()?);
    let tokens = prompt(ctx.facts(), 6, 73);
    let expected = logits_of(first.as_mut(), &tokens)?;
    let seen = logits_of(second.as_mut(), &tokens)?;
    ctx.check_bits("logits of a second engine", &seen.data, &expected.data);
    let expected = sample(first.as_mut(), &tokens, 7)?;
    drop(first);
    let seen = sample(second.as_mut(), &tokens, 7)?;
    ctx.check_slices("tokens of a second engine", &seen, &expected);
    // Blocks of NaN of many sizes, freed again: whoever reads memory that it did not write reads NaN.
    let expected = logits_of(second.as_mut(), &tokens)?;
    for round in 0..3 {
        let blocks: Vec<Vec<f32>> = (6..18).map(|size| vec![f32::NAN; (1 << size) + round]).collect();
        drop(std::hint::black_box(blocks));
        let seen = logits_of(ctx.engine()?.as_mut(), &tokens)?;
        ctx.check_bits("logits of a fresh engine on used memory", &seen.data, &expected.data);
        let seen = logits_of(second.as_mut(), &tokens)?;
        ctx.check_bits("logits of the second engine on used memory", &seen.data, &expected.data);
    }
    Ok(())
}

fn threads(ctx: &mut Context<'_>) -> CheckResult {
    let tokens = prompt(ctx.facts(), ctx.facts().max_positions.min(33), 74);
    let mut expected: Option<(Vec<f32>, Vec<f32>, Vec<u32>)> = None;
    for threads in [1, 2, 3, 7] {
        let mut engine = ctx.engine_with(&CreateOptions::default().with_threads(threads))?;
        let whole = logits_of(engine.as_mut(), &tokens)?.data;
        let step = chunked(engine.as_mut(), &tokens[..4], &[3, 1], &mut KVCache::new(4))?;
        let drawn = sample(engine.as_mut(), &tokens[..5], 74)?;
        match &expected {
            None => expected = Some((whole, step, drawn)),
            Some((w, s, d)) => {
                ctx.check_bits(format!("prompt logits with {threads} threads against 1"), &whole, w);
                ctx.check_bits(format!("decode logits with {threads} threads against 1"), &step, s);
                ctx.check_slices(format!("tokens with {threads} threads against 1"), &drawn, d);
            }
        }
    }
    Ok(())
}

fn seeds_differ(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let tokens = prompt(ctx.facts(), 5, 75);
    // At this temperature a token is close to a fair draw from all: two sequences of 12 agree by chance about never.
    let mut drawn = Vec::new();
    for seed in (0..6).chain([u64::MAX, 1 << 32]) {
        let config = GenerationConfig { temperature: 20.0, ..plain(seed) };
        drawn.push((seed, generate(engine.as_mut(), &tokens, 12, &config)?.generated_tokens));
    }
    for (i, (seed, tokens)) in drawn.iter().enumerate() {
        for (other, others) in &drawn[..i] {
            ctx.check(
                tokens != others,
                format!("seeds {other} and {seed} give different tokens at temperature 20"),
                format!("both give {tokens:?}"),
            );
        }
    }
    Ok(())
}

fn sessions_apart(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let tokens = prompt(ctx.facts(), 8, 76);
    let sizes = [3, 1, 1, 1, 1, 1];
    let expected = chunked(engine.as_mut(), &tokens, &sizes, &mut KVCache::new(8))?;
    let text = sample(engine.as_mut(), &prompt(ctx.facts(), 4, 77), 3)?;
    let mut cache = KVCache::new(8);
    let (mut data, mut start) = (Vec::new(), 0);
    for (step, size) in sizes.into_iter().enumerate() {
        let between = sample(engine.as_mut(), &prompt(ctx.facts(), 4, 77), 3)?;
        ctx.check_slices(format!("generation beside a session at step {step}"), &between, &text);
        if step == 3 {
            engine.reset()?;
        }
        data.extend(forward(engine.as_mut(), &[tokens[start..start + size].to_vec()], Some(&mut cache))?.data);
        start += size;
        ctx.check_eq("cache.len() of the session", cache.len(), start);
    }
    ctx.check_bits("logits of a session with generations and a reset() in between", &data, &expected);
    Ok(())
}

fn generate_deterministic(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    for (i, seed) in SEEDS.into_iter().enumerate() {
        let tokens = prompt(ctx.facts(), 3 + i, mix(seed));
        let seen = engine.generate_deterministic(&tokens, 9, seed)?;
        let config = GenerationConfig { seed: Some(seed), ..GenerationConfig::default() };
        let expected = generate(engine.as_mut(), &tokens, 9, &config)?;
        ctx.check_slices(format!("tokens with seed {seed}"), &seen.generated_tokens, &expected.generated_tokens);
        ctx.check_eq("finish reason", seen.finish_reason, expected.finish_reason);
    }
    Ok(())
}
