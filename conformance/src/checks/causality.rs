//! No position sees a later one, and every position sees the earlier ones.

use super::support::{forward, length, logits_of, other_token, prompt, same_logits};
use crate::case::{Category, Check, CheckResult, Context, ModelSet};
use crate::invariance::Axis;
use crate::model::ModelFacts;
use bitnet_contracts::KVCache;

const CAUSALITY: Category = Category::Causality;

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "CAU-1",
        "causality/later_tokens_do_not_show",
        CAUSALITY,
        "a token has no influence on logits before it",
        later_tokens_do_not_show,
    )
    .on(ModelSet::Every),
    Check::new(
        "CAU-1",
        "causality/later_tokens_do_not_show_with_a_cache",
        CAUSALITY,
        "the same within a chunk behind a filled cache",
        later_tokens_with_a_cache,
    ),
    Check::new(
        "CAU-2",
        "causality/earlier_tokens_show",
        CAUSALITY,
        "every earlier token and the order of tokens have an influence",
        earlier_tokens_show,
    )
    .on(ModelSet::Every),
];

const LENGTH: usize = 10;

/// What later tokens are changed to: other ordinary tokens, and every token that ends or begins a text or that readers
/// take for padding. To the model each is a token like any other, whatever mask an engine might build from it.
fn other_endings(facts: &ModelFacts, tokens: &[u32]) -> Vec<(String, Vec<u32>)> {
    let others = tokens.iter().map(|&token| other_token(facts, token)).collect();
    let mut endings = vec![("other tokens".to_string(), others)];
    // Of the special ones two lengths are enough.
    if [2, 5].contains(&tokens.len()) {
        let last = facts.vocab_size as u32 - 1;
        let special = facts.eos.iter().copied().chain(facts.bos).chain([0, last]);
        endings.extend(special.map(|token| (format!("token {token}"), vec![token; tokens.len()])));
    }
    endings
}

fn later_tokens_do_not_show(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let length = length(ctx.facts(), LENGTH);
    let tokens = prompt(ctx.facts(), length, 30);
    let base = logits_of(engine.as_mut(), &tokens)?;
    for kept in 1..length {
        for (what, ending) in other_endings(ctx.facts(), &tokens[kept..]) {
            let changed = [&tokens[..kept], &ending[..]].concat();
            let seen = logits_of(engine.as_mut(), &changed)?;
            let what = format!("logits of positions 0..{kept} with {what} behind them");
            same_logits(ctx, Axis::Chunking, what, seen.prefix(0, kept), base.prefix(0, kept));
        }
    }
    Ok(())
}

fn later_tokens_with_a_cache(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let tokens = prompt(ctx.facts(), LENGTH, 31);
    let past = 4;
    let mut cache = KVCache::new(LENGTH);
    forward(engine.as_mut(), &[tokens[..past].to_vec()], Some(&mut cache))?;
    let base = forward(engine.as_mut(), &[tokens[past..].to_vec()], Some(&mut cache))?;
    for kept in 1..LENGTH - past {
        for (what, ending) in other_endings(ctx.facts(), &tokens[past + kept..]) {
            let changed = [&tokens[past..past + kept], &ending[..]].concat();
            cache.truncate(past);
            let seen = forward(engine.as_mut(), &[changed], Some(&mut cache))?;
            let what = format!("logits of {kept} new positions behind {past} cached, with {what} after them");
            same_logits(ctx, Axis::Chunking, what, seen.prefix(0, kept), base.prefix(0, kept));
        }
    }
    Ok(())
}

fn earlier_tokens_show(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let tokens = prompt(ctx.facts(), 6, 32);
    let base = logits_of(engine.as_mut(), &tokens)?;
    for position in 0..tokens.len() - 1 {
        let mut changed = tokens.clone();
        changed[position] = other_token(ctx.facts(), changed[position]);
        let seen = logits_of(engine.as_mut(), &changed)?;
        let differs = seen.last(0) != base.last(0);
        ctx.check(
            differs,
            format!("another token at position {position} shows in the last row"),
            "the row is the same",
        );
    }
    // Behind a token that ends or begins a text, too: a prompt is one sequence, whatever is in it.
    for special in ctx.facts().eos.iter().copied().chain(ctx.facts().bos).chain([0]) {
        let mut cut = tokens.clone();
        cut[2] = special;
        let base = logits_of(engine.as_mut(), &cut)?;
        cut[0] = other_token(ctx.facts(), cut[0]);
        let seen = logits_of(engine.as_mut(), &cut)?;
        let what = format!("a token before token {special} shows in the last row");
        ctx.check(seen.last(0) != base.last(0), what, "the row is the same");
    }
    let mut swapped = tokens.clone();
    swapped.swap(0, 2);
    if swapped != tokens {
        let seen = logits_of(engine.as_mut(), &swapped)?;
        ctx.check(seen.last(0) != base.last(0), "the order of tokens shows in the last row", "the row is the same");
    }
    Ok(())
}
