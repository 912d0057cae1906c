//! The same input gives the same bits.

use super::probes::refuses_unknown_set;
use super::support::{
    Logits, chunked, forward, generate, greedy, logits_of, mix, other_token, plain, prompt, same_greedy, same_logits,
    same_logits_of, try_forward,
};
use super::truth::{NARROW, Subject, synthetic};
use crate::backend::{Capability, CreateOptions};
use crate::case::{Category, Check, CheckResult, Context, ModelSet, Stop};
use crate::invariance::{Axis, Level};
use bitnet_contracts::{BitNetInference, GenerationConfig, KVCache};
use fixtures::Spec;

const DETERMINISM: Category = Category::Determinism;

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "DET-1",
        "determinism/repeated_forward",
        DETERMINISM,
        "repeated calls give the same bits, whatever came between",
        repeated_forward,
    )
    .tests(Axis::Runs),
    Check::new(
        "DET-2",
        "determinism/same_seed",
        DETERMINISM,
        "the same seed gives the same tokens and text, with or without reset()",
        same_seed,
    )
    .tests(Axis::Runs),
    Check::new(
        "DET-3",
        "determinism/fresh_engine",
        DETERMINISM,
        "a fresh engine gives the same bits and tokens",
        fresh_engine,
    )
    .tests(Axis::Runs)
    .on(ModelSet::Every),
    Check::new("DET-4", "determinism/threads", DETERMINISM, "the number of threads does not show", threads)
        .long()
        .needs(Capability::Threads)
        .tests(Axis::Threads),
    Check::new("DET-5", "determinism/seeds_differ", DETERMINISM, "different seeds give different tokens", seeds_differ),
    Check::new(
        "DET-6",
        "determinism/sessions_apart",
        DETERMINISM,
        "forward calls and generations do not disturb each other",
        sessions_apart,
    )
    .tests(Axis::Runs),
    Check::new(
        "DET-7",
        "determinism/generate_deterministic",
        DETERMINISM,
        "generate_deterministic is generate with the default configuration and that seed",
        generate_deterministic,
    )
    .tests(Axis::Runs),
    Check::new(
        "DET-8",
        "determinism/instruction_sets",
        DETERMINISM,
        "the instruction set does not show, and one that does not exist is refused",
        instruction_sets,
    )
    .on(ModelSet::Every)
    .needs(Capability::InstructionSets)
    .tests(Axis::InstructionSet),
    Check::new("DET-9", "determinism/process", DETERMINISM, "another process does not show", process)
        .tests(Axis::Process)
        .twice(),
    Check::new(
        "DET-10",
        "determinism/lookalikes",
        DETERMINISM,
        "a prompt that resembles an earlier one is evaluated as itself",
        lookalikes,
    )
    .long()
    .tests(Axis::Runs),
];

const SEEDS: [u64; 5] = [0, 1, 12345, u64::MAX, u32::MAX as u64];

fn repeated_forward(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let tokens = prompt(ctx.facts(), 9, 70);
    let other = prompt(ctx.facts(), 17, 71);
    // The first answer is kept: later calls do not write into it.
    let kept = try_forward(engine.as_mut(), std::slice::from_ref(&tokens), None)??;
    let first = Logits::of(&kept)?;
    for round in 0..8 {
        // Shorter, equal and longer calls between, and sometimes none.
        if round % 4 != 3 {
            logits_of(engine.as_mut(), &other[..[2, 9, 12][round % 3]])?;
        }
        let seen = logits_of(engine.as_mut(), &tokens)?;
        ctx.check_bits(format!("logits of call {}", round + 2), &seen.data, &first.data);
    }
    let sizes = [4, 1, 1, 3];
    let expected = chunked(engine.as_mut(), &tokens, &sizes, &mut KVCache::new(9))?;
    for capacity in [40, 9, 64] {
        let seen = chunked(engine.as_mut(), &tokens, &sizes, &mut KVCache::new(capacity))?;
        ctx.check_bits(format!("logits of the same chunks with a cache of {capacity}"), &seen, &expected);
    }
    logits_of(engine.as_mut(), &other[..9])?;
    ctx.check_bits("logits of the first call, read after all others", &Logits::of(&kept)?.data, &first.data);
    let one = logits_of(engine.as_mut(), &tokens[..1])?;
    for call in 0..130 {
        let seen = logits_of(engine.as_mut(), &tokens[..1])?;
        ctx.check_bits(format!("logits of one token, call {call} of 130"), &seen.data, &one.data);
    }
    Ok(())
}

fn same_seed(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let tokens = prompt(ctx.facts(), 5, 72);
    for seed in SEEDS {
        let first = engine.generate_deterministic(&tokens, 20, seed)?;
        let again = engine.generate_deterministic(&tokens, 20, seed)?;
        engine.reset()?;
        let reset = engine.generate_deterministic(&tokens, 20, seed)?;
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
    let logits = logits_of(first.as_mut(), &tokens)?;
    let seen = logits_of(second.as_mut(), &tokens)?;
    ctx.check_bits("logits of a second engine", &seen.data, &logits.data);
    let expected = sample(first.as_mut(), &tokens, 7)?;
    drop(first);
    let seen = sample(second.as_mut(), &tokens, 7)?;
    ctx.check_slices("tokens of a second engine", &seen, &expected);
    let seen = logits_of(second.as_mut(), &tokens)?;
    ctx.check_bits("logits of the second engine without the first", &seen.data, &logits.data);
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

/// What an engine gives for one prompt: in one call, in decoding, by sampling and greedily.
struct Seen {
    whole: Vec<f32>,
    steps: Vec<f32>,
    sampled: Vec<u32>,
    greedy: Vec<u32>,
}

impl Seen {
    fn of(engine: &mut dyn BitNetInference, tokens: &[u32]) -> Result<Self, Stop> {
        Ok(Self {
            whole: logits_of(engine, tokens)?.data,
            steps: chunked(engine, &tokens[..4], &[3, 1], &mut KVCache::new(4))?,
            sampled: sample(engine, &tokens[..5], 74)?,
            greedy: generate(engine, &tokens[..5], 8, &greedy())?.generated_tokens,
        })
    }

    /// All of it as numbers that any file keeps to the bit.
    fn bits(&self) -> [Vec<u32>; 4] {
        let bits = |logits: &[f32]| logits.iter().map(|x| x.to_bits()).collect();
        [bits(&self.whole), bits(&self.steps), self.sampled.clone(), self.greedy.clone()]
    }

    fn of_bits([whole, steps, sampled, greedy]: [Vec<u32>; 4]) -> Self {
        let logits = |bits: Vec<u32>| bits.into_iter().map(f32::from_bits).collect();
        Self { whole: logits(whole), steps: logits(steps), sampled, greedy }
    }

    /// Holds this against what another engine gave for the same prompt, as exactly as is claimed along the axis.
    fn same(
        &self,
        ctx: &mut Context<'_>,
        axis: Axis,
        what: &str,
        engine: &mut dyn BitNetInference,
        tokens: &[u32],
        expected: &Self,
    ) -> CheckResult {
        same_logits(ctx, axis, format!("prompt logits {what}"), &self.whole, &expected.whole);
        same_logits(ctx, axis, format!("decode logits {what}"), &self.steps, &expected.steps);
        let greedy_tokens = format!("greedy tokens {what}");
        same_greedy(ctx, axis, greedy_tokens, engine, &tokens[..5], &self.greedy, &expected.greedy)?;
        // Logits that differ in their last bits may draw another token.
        if ctx.level(axis) == Level::Bitwise {
            ctx.check_slices(format!("sampled tokens {what}"), &self.sampled, &expected.sampled);
        }
        Ok(())
    }
}

fn threads(ctx: &mut Context<'_>) -> CheckResult {
    let tokens = prompt(ctx.facts(), ctx.facts().max_positions.min(33), 74);
    let mut expected: Option<Seen> = None;
    let by_default = CreateOptions::default();
    let chosen = [1, 2, 3, 7, 16].map(|threads| (threads.to_string(), by_default.clone().with_threads(threads)));
    for (threads, options) in chosen.into_iter().chain([("the default number of".to_string(), by_default)]) {
        let mut engine = ctx.engine_with(&options)?;
        let seen = Seen::of(engine.as_mut(), &tokens)?;
        match &expected {
            None => expected = Some(seen),
            Some(one) => {
                let what = format!("with {threads} threads against 1");
                seen.same(ctx, Axis::Threads, &what, engine.as_mut(), &tokens, one)?;
            }
        }
    }
    threads_far_out(ctx)
}

/// Positions of a long prompt: engines split attention between threads where there is enough of it.
const LONG: usize = 600;

fn threads_far_out(ctx: &mut Context<'_>) -> CheckResult {
    let subject = Subject::write(ctx, "long", &synthetic(ctx, "long", &Spec { context: LONG, ..NARROW })?)?;
    let tokens = prompt(subject.facts(), LONG, 67);
    let mut expected: Option<Vec<f32>> = None;
    for threads in [1, 2, 3, 8] {
        let options = CreateOptions::default().with_threads(threads);
        let mut engine = ctx.factory().create_with(&subject.fixture, &options)?;
        let whole = logits_of(engine.as_mut(), &tokens[..LONG - 2])?.data;
        let mut cache = KVCache::new(LONG);
        let steps = chunked(engine.as_mut(), &tokens, &[LONG - 2, 1, 1], &mut cache)?.split_off(whole.len());
        let seen = [whole, steps].concat();
        match &expected {
            None => expected = Some(seen),
            Some(one) => {
                let what = format!("logits of {LONG} positions and the last two as steps, {threads} threads against 1");
                same_logits_of(ctx, NARROW.vocab, Axis::Threads, what, &seen, one);
            }
        }
    }
    Ok(())
}

fn instruction_sets(ctx: &mut Context<'_>) -> CheckResult {
    let tokens = prompt(ctx.facts(), ctx.facts().max_positions.min(19), 78);
    let expected = Seen::of(ctx.engine()?.as_mut(), &tokens)?;
    for name in ctx.capabilities().instruction_sets.clone() {
        let mut engine = ctx.engine_with(&CreateOptions::default().with_isa(&name))?;
        let seen = Seen::of(engine.as_mut(), &tokens)?;
        let what = format!("with {name} against the backend's own choice");
        seen.same(ctx, Axis::InstructionSet, &what, engine.as_mut(), &tokens, &expected)?;
    }
    refuses_unknown_set(ctx);
    Ok(())
}

fn process(ctx: &mut Context<'_>) -> CheckResult {
    let tokens = prompt(ctx.facts(), ctx.facts().max_positions.min(19), 79);
    let mut engine = ctx.engine()?;
    let seen = Seen::of(engine.as_mut(), &tokens)?;
    let file = ctx.scratch().join("first-process.json");
    if !file.exists() {
        std::fs::write(&file, serde_json::to_vec(&seen.bits()).map_err(std::io::Error::other)?)?;
        return Err(Stop::Inconclusive("computed in one process only, and compared with nothing".to_string()));
    }
    let expected = Seen::of_bits(serde_json::from_slice(&std::fs::read(&file)?).map_err(std::io::Error::other)?);
    seen.same(ctx, Axis::Process, "of a second process against the first", engine.as_mut(), &tokens, &expected)
}

fn seeds_differ(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let tokens = prompt(ctx.facts(), 5, 75);
    // At this temperature a token is close to a fair draw from all: two sequences of 12 agree by chance about never.
    let mut drawn = Vec::new();
    // The others are what is left of a seed that loses its upper half, its sign or the bits that a double has no room for.
    for seed in (0..6).chain([u64::MAX, u64::MAX - 1, 1 << 31, 1 << 32, 1 << 53, (1 << 53) + 1, 1 << 63]) {
        let config = GenerationConfig { temperature: 20.0, ..plain(seed) };
        drawn.push((seed, generate(engine.as_mut(), &tokens, 12, &config)?.generated_tokens));
    }
    for (i, (seed, tokens)) in drawn.iter().enumerate() {
        for (other, others) in &drawn[..i] {
            ctx.check_chance(
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

/// A prompt and others that are like it by length, beginning, end, or the tokens they are made of.
fn alike(ctx: &Context<'_>) -> Vec<(&'static str, Vec<u32>)> {
    let base = prompt(ctx.facts(), 7, 69);
    let changed = |positions: &[usize]| {
        let mut tokens = base.clone();
        positions.iter().for_each(|&i| tokens[i] = other_token(ctx.facts(), tokens[i]));
        tokens
    };
    let mut swapped = base.clone();
    swapped.swap(2, 4);
    let longer = [&base[..], &prompt(ctx.facts(), 2, 68)].concat();
    vec![
        ("the prompt", base.clone()),
        ("another token in the middle", changed(&[3])),
        ("another beginning", changed(&[0])),
        ("another end", changed(&[6])),
        ("the same tokens in another order", swapped),
        ("another second half", changed(&[4, 5, 6])),
        ("the first half", base[..4].to_vec()),
        ("the prompt and more", longer),
    ]
}

fn lookalikes(ctx: &mut Context<'_>) -> CheckResult {
    fn answers(engine: &mut dyn BitNetInference, tokens: &[u32]) -> Result<([Vec<f32>; 2], Vec<u32>), Stop> {
        let cached = chunked(engine, tokens, &[tokens.len()], &mut KVCache::new(tokens.len()))?;
        let made = generate(engine, tokens, 5, &plain(69))?.generated_tokens;
        Ok(([logits_of(engine, tokens)?.data, cached], made))
    }
    let mut engine = ctx.engine()?;
    let prompts = alike(ctx);
    let base = prompts[0].1.clone();
    // Long ones, which may be worth keeping where short ones are not, and differ in the middle alone.
    let long = prompt(ctx.facts(), 24, 70);
    let other_at = |at: usize| {
        let mut tokens = long.clone();
        tokens[at] = other_token(ctx.facts(), tokens[at]);
        (format!("24 tokens with another at {at}"), tokens)
    };
    let longer: Vec<_> = [4, 12, 19].map(other_at).to_vec();
    let short = prompts.iter().map(|(what, tokens)| (what.to_string(), tokens.clone(), &base));
    for (what, tokens, before) in short.chain(longer.into_iter().map(|(what, tokens)| (what, tokens, &long))) {
        let ([logits, cached], made) = answers(ctx.engine()?.as_mut(), &tokens)?;
        // The prompt comes before each of the others, which then follow something like themselves.
        answers(engine.as_mut(), before)?;
        let (seen, drawn) = answers(engine.as_mut(), &tokens)?;
        ctx.check_bits(format!("logits of {what}, after the prompt"), &seen[0], &logits);
        ctx.check_bits(format!("logits of {what} with a cache, after the prompt"), &seen[1], &cached);
        ctx.check_slices(format!("tokens from {what}, after the prompt"), &drawn, &made);
    }
    // The same prompt and seed with another configuration is another question as well.
    let others = [
        ("greedily", greedy()),
        ("at another temperature", GenerationConfig { temperature: 0.4, ..plain(69) }),
        ("with another penalty", GenerationConfig { repetition_penalty: 2.0, ..plain(69) }),
        ("from the three most likely", GenerationConfig { top_k: Some(3), ..plain(69) }),
    ];
    let mut fresh = ctx.engine()?;
    for (what, config) in others {
        fresh.reset()?;
        let made = generate(fresh.as_mut(), &base, 5, &config)?.generated_tokens;
        generate(engine.as_mut(), &base, 5, &plain(69))?;
        let seen = generate(engine.as_mut(), &base, 5, &config)?.generated_tokens;
        ctx.check_slices(format!("tokens drawn {what}, after others from that prompt"), &seen, &made);
    }
    Ok(())
}
