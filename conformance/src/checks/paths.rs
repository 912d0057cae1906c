//! Options in combination, on every way to generate: what holds for `generate` alone and one option at a time holds for all.

use super::support::{EDIT_MODEL, exact, generate, greedy, plain, prompt};
use super::truth::{SMALL, Subject, synthetic};
use crate::case::{Category, Check, CheckResult, Context, ModelSet, Stop};
use bitnet_contracts::{
    BitNetInference, GenerationConfig, GenerationResult, InferenceError, Result as Contract, ThreadSafeInference,
    TokenizationError,
};
use std::sync::Arc;

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "GEN-14",
        "generation/every_path",
        Category::Generation,
        "stop rules, penalties and filters hold with and without a cache, in pieces, and on every way to generate",
        results,
    )
    .long()
    .on(ModelSet::Only(EDIT_MODEL)),
    Check::new(
        "ERR-10",
        "errors/every_path",
        Category::Errors,
        "what is refused is refused alike, with the same position, on every way to generate",
        errors,
    )
    .on(ModelSet::Only(EDIT_MODEL)),
];

/// An engine on a small model, and the one for many threads where the backend has it.
struct Paths {
    subject: Subject,
    engine: Box<dyn BitNetInference>,
    shared: Option<Arc<dyn ThreadSafeInference>>,
}

impl Paths {
    fn of(ctx: &Context<'_>) -> Result<Self, Stop> {
        let subject = Subject::write(ctx, "small", &synthetic(ctx, "small", &SMALL)?)?;
        let engine = subject.engine(ctx)?;
        let shared = if ctx.capabilities().thread_safe { Some(subject.thread_safe(ctx)?) } else { None };
        Ok(Self { subject, engine, shared })
    }

    /// The same generation on every way.
    fn all(
        &mut self,
        tokens: &[u32],
        most: usize,
        config: &GenerationConfig,
    ) -> Vec<(&'static str, Contract<GenerationResult>)> {
        let mut all = vec![("generate", self.engine.generate(tokens, most, config))];
        if let Some(shared) = &self.shared {
            all.push(("generate_concurrent", shared.generate_concurrent(tokens, most, config)));
            let copy = shared.thread_local_copy();
            all.push(("generate of a copy", copy.and_then(|mut copy| copy.generate(tokens, most, config))));
        }
        all
    }
}

/// A configuration with each setting that changes how a sequence is fed, but not what comes of it.
fn fed_otherwise(config: &GenerationConfig, sizes: &[usize]) -> Vec<(String, GenerationConfig)> {
    let mut all = Vec::new();
    for use_cache in [true, false] {
        for size in [None].into_iter().chain(sizes.iter().copied().map(Some)) {
            let fed = GenerationConfig { prefill_chunk_size: size, use_cache, ..config.clone() };
            all.push((format!("prefill_chunk_size {size:?}, use_cache {use_cache}"), fed));
        }
    }
    all
}

/// What of a result does not depend on the clock.
fn outcome(result: &GenerationResult) -> String {
    format!(
        "{:?}, {:?}, text {:?}, prompt {:?}, {} times",
        result.generated_tokens,
        result.finish_reason,
        result.generated_text,
        result.prompt_tokens,
        result.timing.per_token.len()
    )
}

fn results(ctx: &mut Context<'_>) -> CheckResult {
    const MOST: usize = 6;
    let (mut paths, exact) = (Paths::of(ctx)?, exact(ctx));
    let tokens = prompt(paths.subject.facts(), 9, 2000);
    let free = GenerationConfig { max_new_tokens: MOST, ..greedy() };
    let out = generate(paths.engine.as_mut(), &tokens, MOST, &free)?.generated_tokens;
    let Some(&last) = out.last() else {
        return Err(Stop::Inconclusive("the prompt is followed by the end of the sequence".to_string()));
    };
    let place = out.iter().position(|t| *t == last).unwrap_or(0);
    let penalties =
        GenerationConfig { repetition_penalty: 1.7, frequency_penalty: 0.4, presence_penalty: 0.3, ..free.clone() };
    let drawn = GenerationConfig {
        max_new_tokens: MOST,
        top_k: Some(30),
        top_p: Some(0.95),
        temperature: 1.3,
        ..plain(0xdead_beef_0000_0007)
    };
    let both =
        GenerationConfig { repetition_penalty: 0.8, frequency_penalty: -0.2, presence_penalty: 0.6, ..drawn.clone() };
    let bases = [
        ("no stop rule", free.clone()),
        ("a stop token", GenerationConfig { stop_tokens: vec![last], ..free.clone() }),
        ("eos_token_id", GenerationConfig { eos_token_id: Some(last), ..free.clone() }),
        ("min_new_tokens", GenerationConfig { min_new_tokens: place + 1, stop_tokens: vec![last], ..free.clone() }),
        ("max_total_tokens", GenerationConfig { max_total_tokens: tokens.len() + 4, ..free.clone() }),
        ("max_new_tokens", GenerationConfig { max_new_tokens: 3, ..free }),
        ("penalties", penalties),
        ("filters", drawn),
        ("penalties and filters", both),
    ];
    let mut fresh = paths.subject.engine(ctx)?;
    for ((what, base), size) in bases.into_iter().zip([4, 1, 1000].into_iter().cycle()) {
        let expected = outcome(&generate(fresh.as_mut(), &tokens, MOST, &base)?);
        // Draws turn on the last bits of logits, and penalties may bring close what was clear: what may change those bits is
        // tried where it is claimed not to. Callers get what one gets alone in any case.
        let all = fed_otherwise(&base, if exact { std::slice::from_ref(&size) } else { &[] });
        for (how, config) in all.into_iter().filter(|(_, config)| config.use_cache || exact) {
            for (way, result) in paths.all(&tokens, MOST, &config) {
                if let Some(result) = ctx.check_ok(format!("{what}, {how}: {way}"), result) {
                    ctx.check_eq(format!("{what}, {how}: {way}"), &outcome(&result), &expected);
                }
            }
        }
    }
    Ok(())
}

/// The source of an error and its name there.
fn name(error: &InferenceError) -> String {
    let all = format!("{error:?}");
    all.split([' ', '{']).next().unwrap_or_default().to_string()
}

fn errors(ctx: &mut Context<'_>) -> CheckResult {
    let mut paths = Paths::of(ctx)?;
    let (good, beyond) = (prompt(paths.subject.facts(), 9, 2010), paths.subject.facts().vocab_size as u32);
    let base = plain(1);
    for place in [0, 3, 4, 8] {
        let mut tokens = good.clone();
        tokens[place] = beyond;
        for (how, config) in fed_otherwise(&base, &[1, 3, 4, 1000]) {
            for (way, result) in paths.all(&tokens, 4, &config) {
                let told = match &result {
                    Err(InferenceError::Tokenization(TokenizationError::InvalidToken {
                        position, token_id, ..
                    })) => {
                        format!("InvalidToken {token_id} at {position}")
                    }
                    Err(other) => other.to_string(),
                    Ok(_) => "a result".to_string(),
                };
                ctx.check_eq(format!("{how}: {way}"), told, format!("InvalidToken {beyond} at {place}"));
            }
        }
    }
    let refused: [(&str, &[u32], usize, GenerationConfig); 6] = [
        ("an empty prompt", &[], 4, base.clone()),
        ("max_tokens 0", &good, 0, base.clone()),
        ("a temperature that is no number", &good, 4, GenerationConfig { temperature: f32::NAN, ..base.clone() }),
        ("top_k 0", &good, 4, GenerationConfig { top_k: Some(0), ..base.clone() }),
        ("a top_p above 1", &good, 4, GenerationConfig { top_p: Some(1.5), ..base.clone() }),
        ("a negative repetition_penalty", &good, 4, GenerationConfig { repetition_penalty: -1.0, ..base.clone() }),
    ];
    for (what, tokens, most, config) in refused {
        let expected = match paths.subject.engine(ctx)?.generate(tokens, most, &config) {
            Err(error) => name(&error),
            Ok(_) => return Err(Stop::Unexpected(format!("generate accepts {what}"))),
        };
        for (how, config) in fed_otherwise(&config, &[3]) {
            for (way, result) in paths.all(tokens, most, &config) {
                let told = result.as_ref().map_or_else(name, |_| "a result".to_string());
                ctx.check_eq(format!("{what}, {how}: {way}"), &told, &expected);
            }
        }
    }
    Ok(())
}
