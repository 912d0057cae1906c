//! Limits, stop rules and results of generation.

use super::support::{SMALL_CONTEXT, exact, generate, greedy, own_greedy, plain, prompt, same_greedy, until_eos};
use crate::case::{Category, Check, CheckResult, Context, ModelSet, Stop};
use crate::invariance::Axis;
use crate::tolerance;
use bitnet_contracts::{BitNetInference, FinishReason, GenerationConfig};
use std::time::{Duration, Instant};

const GENERATION: Category = Category::Generation;

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "GEN-1",
        "generation/two_limits",
        GENERATION,
        "the limit is min(max_tokens, max_new_tokens)",
        two_limits,
    )
    .on(ModelSet::Only(SMALL_CONTEXT)),
    Check::new(
        "GEN-2",
        "generation/context_full",
        GENERATION,
        "generation ends where the context or max_total_tokens does, and says so",
        context_full,
    )
    .on(ModelSet::Only(SMALL_CONTEXT)),
    Check::new(
        "GEN-3",
        "generation/stop_token",
        GENERATION,
        "a stop token ends generation and is not part of the output",
        stop_token,
    )
    .on(ModelSet::Only(SMALL_CONTEXT)),
    Check::new(
        "GEN-4",
        "generation/end_of_sequence",
        GENERATION,
        "eos_token_id ends generation likewise",
        end_of_sequence,
    )
    .on(ModelSet::Only(SMALL_CONTEXT)),
    Check::new(
        "GEN-4",
        "generation/own_end_of_sequence",
        GENERATION,
        "of the model's own end-of-sequence tokens all end generation, or none does",
        own_end_of_sequence,
    )
    .on(ModelSet::Where(|f| f.eos.len() > 1)),
    Check::new(
        "GEN-5",
        "generation/min_new_tokens",
        GENERATION,
        "no stop rule ends generation before min_new_tokens",
        min_new_tokens,
    )
    .on(ModelSet::Only(SMALL_CONTEXT)),
    Check::new(
        "GEN-7",
        "generation/result_is_true",
        GENERATION,
        "prompt, counts, text and timing of the result are what happened",
        result_is_true,
    ),
    Check::new(
        "GEN-8",
        "generation/greedy_is_argmax",
        GENERATION,
        "greedy takes the argmax of forward's logits at every step",
        greedy_is_argmax,
    )
    .long()
    .on(ModelSet::Every),
    Check::new("GEN-9", "generation/clean_state", GENERATION, "each call starts from a clean state", clean_state),
    Check::new(
        "GEN-10",
        "generation/cache_and_chunks_do_not_show",
        GENERATION,
        "use_cache and prefill_chunk_size do not change the tokens",
        cache_and_chunks,
    )
    .long()
    .tests(Axis::Chunking)
    .on(ModelSet::Where(|f| f.max_positions <= 64 || f.has_tokenizer)),
];

fn limited(max_new_tokens: usize) -> GenerationConfig {
    GenerationConfig { max_new_tokens, ..greedy() }
}

/// The greedy continuation that no stop rule ends: by the logits of `forward` where generation has the very same, else by
/// a generation without stop rules, which a later one must repeat.
fn free_continuation(
    ctx: &Context<'_>,
    engine: &mut dyn BitNetInference,
    tokens: &[u32],
    steps: usize,
) -> Result<Vec<u32>, Stop> {
    if exact(ctx) {
        return Ok(own_greedy(ctx, engine, tokens, steps)?.into_iter().map(|(token, _)| token).collect());
    }
    Ok(generate(engine, tokens, steps, &limited(steps))?.generated_tokens)
}

/// A prompt whose greedy continuation of `steps` tokens does not meet the model's own end of sequence, so that the
/// limits under test are what ends it.
fn endless_prompt(
    ctx: &Context<'_>,
    engine: &mut dyn BitNetInference,
    len: usize,
    steps: usize,
) -> Result<(Vec<u32>, Vec<u32>), Stop> {
    for salt in 0..40 {
        let tokens = prompt(ctx.facts(), len, 200 + salt);
        let out = free_continuation(ctx, engine, &tokens, steps)?;
        if out.len() == steps && !out.iter().any(|token| ctx.facts().eos.contains(token)) {
            return Ok((tokens, out));
        }
    }
    Err(Stop::Inconclusive(format!("no prompt of {len} tokens has a clear continuation of {steps}")))
}

fn two_limits(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let (tokens, expected) = endless_prompt(ctx, engine.as_mut(), 4, 6)?;
    for (max_tokens, max_new, count) in
        [(1, 6, 1), (6, 1, 1), (5, 6, 5), (6, 5, 5), (6, 6, 6), (2, 128, 2), (usize::MAX, 3, 3)]
    {
        let result = generate(engine.as_mut(), &tokens, max_tokens, &limited(max_new))?;
        let what = format!("max_tokens {max_tokens}, max_new_tokens {max_new}");
        ctx.check_slices(format!("{what}: tokens"), &result.generated_tokens, &expected[..count]);
        ctx.check_eq(format!("{what}: finish reason"), result.finish_reason, FinishReason::MaxTokens);
    }
    Ok(())
}

fn context_full(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let positions = ctx.facts().max_positions;
    let (tokens, expected) = endless_prompt(ctx, engine.as_mut(), positions - 3, 3)?;
    let result = generate(engine.as_mut(), &tokens, 50, &limited(50))?;
    let what = format!("{} tokens of prompt in a context of {positions}", tokens.len());
    ctx.check_slices(format!("{what}: tokens"), &result.generated_tokens, &expected);
    ctx.check_eq(format!("{what}: finish reason"), result.finish_reason, FinishReason::ContextFull);
    let result = generate(engine.as_mut(), &tokens, usize::MAX, &limited(usize::MAX))?;
    ctx.check_slices(format!("{what} and no limit: tokens"), &result.generated_tokens, &expected);
    let result = generate(engine.as_mut(), &tokens, 2, &limited(50))?;
    ctx.check_slices("max_tokens before the context's end: tokens", &result.generated_tokens, &expected[..2]);
    ctx.check_eq("max_tokens before the context's end: finish", result.finish_reason, FinishReason::MaxTokens);

    // A full context: nothing fits, and an engine says so with a result or with an error, not with a token.
    let full = prompt(ctx.facts(), positions, 210);
    if let Ok(result) = engine.generate(&full, 5, &limited(5)) {
        ctx.check_slices("tokens after a full context", &result.generated_tokens, &[]);
        ctx.check_eq("finish reason of a full context", result.finish_reason, FinishReason::ContextFull);
    }

    let (tokens, expected) = endless_prompt(ctx, engine.as_mut(), 5, 4)?;
    for total in [6, 8, 9] {
        let config = GenerationConfig { max_total_tokens: total, ..limited(50) };
        let result = generate(engine.as_mut(), &tokens, 50, &config)?;
        let room = total - tokens.len();
        ctx.check_slices(format!("tokens with max_total_tokens {total}"), &result.generated_tokens, &expected[..room]);
        ctx.check(
            matches!(result.finish_reason, FinishReason::ContextFull | FinishReason::MaxTokens),
            format!("max_total_tokens {total} ends as ContextFull (or MaxTokens)"),
            format!("{:?}", result.finish_reason),
        );
    }
    for total in [5, 3] {
        let config = GenerationConfig { max_total_tokens: total, ..limited(50) };
        if let Ok(result) = engine.generate(&tokens, 50, &config) {
            let what = format!("tokens with max_total_tokens {total} and a prompt of 5");
            ctx.check_slices(what, &result.generated_tokens, &[]);
        }
    }
    Ok(())
}

/// A prompt with its greedy continuation and a step > 0 at which a token comes for the first time.
fn with_new_token(ctx: &Context<'_>, engine: &mut dyn BitNetInference) -> Result<(Vec<u32>, Vec<u32>, usize), Stop> {
    for salt in 0..40 {
        let tokens = prompt(ctx.facts(), 4, 220 + salt);
        let out = free_continuation(ctx, engine, &tokens, 8)?;
        if out.len() < 8 || out.iter().any(|t| ctx.facts().eos.contains(t)) {
            continue;
        }
        if let Some(step) = (2..7).find(|&i| !out[..i].contains(&out[i])) {
            return Ok((tokens, out, step));
        }
    }
    Err(Stop::Inconclusive("no prompt whose continuation brings a new token".to_string()))
}

fn stop_token(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let (tokens, out, step) = with_new_token(ctx, engine.as_mut())?;
    let never = (0..ctx.facts().vocab_size as u32).find(|t| !out.contains(t)).unwrap_or(0);
    let cases: [(&str, Vec<u32>, usize); 4] = [
        ("one stop token", vec![out[step]], step),
        ("the second of two stop tokens", vec![never, out[step]], step),
        ("the first of two stop tokens", vec![out[step], never], step),
        ("a stop token as the very first", vec![out[0]], 0),
    ];
    for (what, stop_tokens, count) in cases {
        let config = GenerationConfig { stop_tokens, ..limited(8) };
        let result = generate(engine.as_mut(), &tokens, 8, &config)?;
        ctx.check_slices(format!("{what}: tokens"), &result.generated_tokens, &out[..count]);
        ctx.check_eq(format!("{what}: finish reason"), result.finish_reason, FinishReason::StopToken);
    }
    let config = GenerationConfig { stop_tokens: vec![never], ..limited(8) };
    let result = generate(engine.as_mut(), &tokens, 8, &config)?;
    ctx.check_slices("a stop token that does not come: tokens", &result.generated_tokens, &out);
    ctx.check_eq("a stop token that does not come: finish", result.finish_reason, FinishReason::MaxTokens);
    // However many there are.
    let others: Vec<u32> = (0..ctx.facts().vocab_size as u32).filter(|t| !out.contains(t)).collect();
    for place in [8, 16, others.len()] {
        let mut stop_tokens = others.clone();
        stop_tokens.insert(place.min(others.len()), out[step]);
        let config = GenerationConfig { stop_tokens, ..limited(8) };
        let result = generate(engine.as_mut(), &tokens, 8, &config)?;
        let what = format!("stop token {place} of {}: tokens", others.len() + 1);
        ctx.check_slices(what, &result.generated_tokens, &out[..step]);
    }
    // In the prompt it stops nothing.
    let config = GenerationConfig { stop_tokens: vec![tokens[3]], ..limited(1) };
    if tokens[3] != out[0] {
        let result = generate(engine.as_mut(), &tokens, 1, &config)?;
        ctx.check_slices("a stop token in the prompt: tokens", &result.generated_tokens, &out[..1]);
    }
    Ok(())
}

fn end_of_sequence(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let (tokens, out, step) = with_new_token(ctx, engine.as_mut())?;
    for (eos, count) in [(out[step], step), (out[0], 0)] {
        let config = GenerationConfig { eos_token_id: Some(eos), ..limited(8) };
        let result = generate(engine.as_mut(), &tokens, 8, &config)?;
        ctx.check_slices(format!("tokens with eos_token_id {eos}"), &result.generated_tokens, &out[..count]);
        ctx.check_eq("finish reason at eos_token_id", result.finish_reason, FinishReason::EndOfSequence);
    }
    if tokens[3] != out[0] {
        let config = GenerationConfig { eos_token_id: Some(tokens[3]), ..limited(1) };
        let result = generate(engine.as_mut(), &tokens, 1, &config)?;
        ctx.check_slices("eos_token_id in the prompt: tokens", &result.generated_tokens, &out[..1]);
    }
    Ok(())
}

fn own_end_of_sequence(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let other = prompt(ctx.facts(), 1, 295)[0];
    let mut ended = Vec::new();
    for &eos in &ctx.facts().eos {
        // Every time that a token was seen makes it likelier, until no other can come.
        let tokens = [other, eos, eos, eos];
        let config = GenerationConfig { frequency_penalty: -1000.0, ..limited(2) };
        let result = generate(engine.as_mut(), &tokens, 2, &config)?;
        let by_eos = result.finish_reason == FinishReason::EndOfSequence;
        let expected: &[u32] = if by_eos { &[] } else { &[eos, eos] };
        if !by_eos && result.generated_tokens != expected {
            return Err(Stop::Inconclusive(format!("token {eos} could not be made to come")));
        }
        ctx.check_slices(format!("tokens at the model's own token {eos}"), &result.generated_tokens, expected);
        ended.push(by_eos);
    }
    ctx.check(
        ended.windows(2).all(|pair| pair[0] == pair[1]),
        format!("each of {:?} ends the text, or none does", ctx.facts().eos),
        format!("{ended:?}"),
    );
    Ok(())
}

fn min_new_tokens(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let (tokens, out, step) = with_new_token(ctx, engine.as_mut())?;
    for by_eos in [false, true] {
        for min in [step, step + 1, 8] {
            let base = GenerationConfig { min_new_tokens: min, ..limited(8) };
            let config = match by_eos {
                true => GenerationConfig { eos_token_id: Some(out[step]), ..base },
                false => GenerationConfig { stop_tokens: vec![out[step]], ..base },
            };
            let result = generate(engine.as_mut(), &tokens, 8, &config)?;
            let what =
                format!("stop at step {step} by {}, min_new_tokens {min}", if by_eos { "eos" } else { "stop token" });
            ctx.check_at_least(format!("{what}: tokens"), result.generated_tokens.len() as f64, min as f64);
            // What comes before the forbidden stop is not touched by it.
            let shared = &result.generated_tokens[..step.min(result.generated_tokens.len())];
            ctx.check_slices(format!("{what}: tokens before the stop"), shared, &out[..step]);
            if min <= step {
                ctx.check_eq(format!("{what}: count"), result.generated_tokens.len(), step);
            }
        }
    }
    // Where the one token that the filters leave is held back, another one comes.
    let config = GenerationConfig { min_new_tokens: 2, stop_tokens: vec![out[0]], top_k: Some(1), ..plain(4) };
    let made = generate(engine.as_mut(), &tokens, 2, &config)?.generated_tokens;
    ctx.check_eq("tokens where the only candidate is held back", made.len(), 2);
    Ok(())
}

fn result_is_true(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let tokens = prompt(ctx.facts(), 5, 250);
    for count in [1, 6] {
        let start = Instant::now();
        let config = GenerationConfig { max_new_tokens: count, ..plain(9) };
        let result = generate(engine.as_mut(), &tokens, count, &config)?;
        let wall = start.elapsed();
        let made = result.generated_tokens.len();
        ctx.check_slices("prompt_tokens", &result.prompt_tokens, &tokens);
        let ended = made < count && result.finish_reason == FinishReason::EndOfSequence;
        ctx.check(made == count || ended, format!("{count} tokens"), format!("{made}, {:?}", result.finish_reason));
        let vocab = ctx.facts().vocab_size as u32;
        let beyond = result.generated_tokens.iter().find(|&&t| t >= vocab);
        ctx.check(beyond.is_none(), format!("tokens below {vocab}"), format!("{beyond:?}"));
        let timing = &result.timing;
        ctx.check_eq("per_token entries", timing.per_token.len(), made);
        ctx.check(timing.total > Duration::ZERO, "total time above 0", format!("{:?}", timing.total));
        let within = [
            ("total in the caller's wall time", timing.total, wall),
            ("prefill + decode in total", timing.prefill + timing.decode, timing.total),
            ("time_to_first_token in total", timing.time_to_first_token, timing.total),
            ("sum of per_token in total", timing.per_token.iter().sum(), timing.total),
        ];
        for (what, part, whole) in within {
            let what = format!("{what}: {part:?} in {whole:?}");
            ctx.check_within(what, part.as_secs_f64() / whole.as_secs_f64(), &tolerance::TIME_WITHIN);
        }
        if made > 0 {
            ctx.check(
                timing.time_to_first_token > Duration::ZERO,
                "time_to_first_token above 0",
                format!("{:?}", timing.time_to_first_token),
            );
            let rate = result.tokens_per_second();
            let expected = made as f64 / timing.total.as_secs_f64();
            ctx.check(
                // A rate is an f32, and is rounded once or twice.
                (rate - expected).abs() <= 2.0 * f64::from(f32::EPSILON) * expected,
                format!("tokens_per_second() = tokens / total = {expected}"),
                rate,
            );
        }
    }
    // The ends of the vocabulary are tokens like any other: each comes where it is made the likeliest by far.
    let facts = ctx.facts();
    let ends = [0, facts.vocab_size as u32 - 1];
    for token in ends.into_iter().filter(|t| facts.bos != Some(*t) && !facts.eos.contains(t)) {
        let config = GenerationConfig { frequency_penalty: -1000.0, ..limited(2) };
        let result = generate(engine.as_mut(), &[tokens[0], token, token, token], 2, &config)?;
        ctx.check_slices(format!("token {token}, made likely"), &result.generated_tokens, &[token, token]);
    }
    Ok(())
}

fn greedy_is_argmax(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let longest = ctx.facts().max_positions.min(40) - 3;
    let prompts = [
        (prompt(ctx.facts(), 5, 260), 8),
        (prompt(ctx.facts(), 5, 261), 8),
        (prompt(ctx.facts(), longest, 262), 3),
        (prompt(ctx.facts(), 1, 263), 3),
        // The first id is a token like any other.
        (vec![0, 3], 2),
    ];
    for (tokens, steps) in prompts {
        let expected: Vec<u32> =
            own_greedy(ctx, engine.as_mut(), &tokens, steps)?.into_iter().map(|(t, _)| t).collect();
        let configs = [
            ("GenerationConfig::greedy()", greedy()),
            ("do_sample false", GenerationConfig { do_sample: false, temperature: 1.7, ..plain(1) }),
            ("temperature 0", GenerationConfig { temperature: 0.0, ..plain(2) }),
        ];
        for (what, config) in configs {
            let result = generate(engine.as_mut(), &tokens, steps, &config)?;
            let expected = until_eos(ctx.facts(), &result, &expected);
            same_greedy(
                ctx,
                Axis::Chunking,
                format!("{what}: tokens"),
                engine.as_mut(),
                &tokens,
                &result.generated_tokens,
                &expected,
            )?;
        }
    }
    Ok(())
}

fn clean_state(ctx: &mut Context<'_>) -> CheckResult {
    let (mut engine, mut fresh) = (ctx.engine()?, ctx.engine()?);
    let (a, b) = (prompt(ctx.facts(), 7, 270), prompt(ctx.facts(), 4, 271));
    let config = GenerationConfig { repetition_penalty: 1.5, presence_penalty: 0.5, ..plain(11) };
    let expected = generate(fresh.as_mut(), &b, 8, &config)?;
    generate(engine.as_mut(), &a, 9, &config)?;
    let seen = generate(engine.as_mut(), &b, 8, &config)?;
    ctx.check_slices("tokens after another generation", &seen.generated_tokens, &expected.generated_tokens);
    // A failed call leaves nothing behind either.
    let refused = engine.generate(&[], 4, &config).is_err();
    ctx.check(refused, "an empty prompt is refused", "it was accepted");
    let seen = generate(engine.as_mut(), &b, 8, &config)?;
    ctx.check_slices("tokens after a refused generation", &seen.generated_tokens, &expected.generated_tokens);
    // Whatever an engine keeps of the last sequence for one that begins like it: the next turn of a conversation, a part
    // of the last turn, another end of it, and the same prompt once more.
    let turn = [b.as_slice(), &seen.generated_tokens].concat();
    let mut branch = turn.clone();
    branch[b.len()] = super::support::other_token(ctx.facts(), branch[b.len()]);
    for (what, tokens) in [
        ("the next turn", [turn.as_slice(), &a[..3]].concat()),
        ("a part of the last turn", turn[..turn.len() - 2].to_vec()),
        ("another end of the last turn", branch),
        ("the first prompt", b.clone()),
        ("the end of the last turn", turn[1..].to_vec()),
    ] {
        let expected = generate(ctx.engine()?.as_mut(), &tokens, 5, &config)?;
        let seen = generate(engine.as_mut(), &tokens, 5, &config)?;
        ctx.check_slices(format!("{what}: tokens"), &seen.generated_tokens, &expected.generated_tokens);
    }
    Ok(())
}

fn cache_and_chunks(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let tokens = prompt(ctx.facts(), 9, 280);
    for base in [greedy(), plain(5)] {
        let base = GenerationConfig { max_new_tokens: 6, ..base };
        let expected = generate(engine.as_mut(), &tokens, 6, &base)?.generated_tokens;
        let mut variants = vec![("use_cache false".to_string(), GenerationConfig { use_cache: false, ..base.clone() })];
        for size in [1, 2, 4, 9, 1000] {
            let config = GenerationConfig { prefill_chunk_size: Some(size), ..base.clone() };
            variants.push((format!("prefill_chunk_size {size}"), config.clone()));
            variants.push((
                format!("prefill_chunk_size {size}, use_cache false"),
                GenerationConfig { use_cache: false, ..config },
            ));
        }
        for (what, config) in variants {
            if config.do_sample && !exact(ctx) {
                // Logits that differ in their last bits may draw another token: only greedy choices can be compared.
                continue;
            }
            let seen = generate(engine.as_mut(), &tokens, 6, &config)?.generated_tokens;
            same_greedy(
                ctx,
                Axis::Chunking,
                format!("tokens with {what}"),
                engine.as_mut(),
                &tokens,
                &seen,
                &expected,
            )?;
        }
    }
    Ok(())
}
