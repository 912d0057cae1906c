//! Finite numbers everywhere, right ones to the last position and for every token, and numbers that say something.

use super::support::{forward, logits_of, prompt};
use super::truth::{Subject, check_truth};
use crate::case::{Category, Check, CheckResult, Context, ModelSet};
use bitnet_contracts::KVCache;

const NUMERICS: Category = Category::Numerics;

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "NUM-1",
        "numerics/to_the_last_position",
        NUMERICS,
        "logits are finite, not constant, and on small models the oracle's, up to the end of the context",
        to_the_last_position,
    )
    .on(ModelSet::Every),
    Check::new(
        "NUM-2",
        "numerics/every_token",
        NUMERICS,
        "repeated and extreme tokens give finite logits, and on small models every token the oracle's",
        every_token,
    )
    .long()
    .on(ModelSet::Every),
];

/// The longest context that is filled and compared to its last position.
const SHORT_CONTEXT: usize = 64;

/// The largest vocabulary of which every token is tried.
const SMALL_VOCABULARY: usize = 256;

fn check_finite(ctx: &mut Context<'_>, what: &str, data: &[f32]) -> bool {
    let bad = data.iter().filter(|x| !x.is_finite()).count();
    let first = data.iter().position(|x| !x.is_finite());
    ctx.compared(data.len());
    let seen =
        first.map_or(String::new(), |i| format!("{bad} of {} are not, the first at {i}: {}", data.len(), data[i]));
    ctx.check(bad == 0, format!("{what}: all logits finite"), seen)
}

/// Checks that no row of logits is constant and that neighbouring rows differ.
fn check_says_something(ctx: &mut Context<'_>, data: &[f32]) {
    let rows: Vec<&[f32]> = data.chunks_exact(ctx.facts().vocab_size.max(1)).collect();
    let constant = rows.iter().position(|row| row.iter().all(|x| *x == row[0]));
    ctx.check(constant.is_none(), "logits of a position differ from each other", format!("not at {constant:?}"));
    let same = rows.windows(2).position(|pair| pair[0] == pair[1]);
    ctx.check(same.is_none(), "every position has logits of its own", format!("{same:?} has those of the next"));
}

fn to_the_last_position(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let positions = ctx.facts().max_positions;
    let short = positions <= SHORT_CONTEXT;
    let tokens = prompt(ctx.facts(), if short { positions } else { positions.min(24) }, 21);
    let whole = logits_of(engine.as_mut(), &tokens)?;
    check_finite(ctx, "prompt in one call", &whole.data);
    check_says_something(ctx, &whole.data);
    let mut cache = KVCache::new(tokens.len());
    for (position, &token) in tokens.iter().enumerate() {
        let step = forward(engine.as_mut(), &[vec![token]], Some(&mut cache))?;
        check_finite(ctx, &format!("decode step {position}"), &step.data);
    }
    if short {
        let truth = Subject::open(ctx, ctx.model().name(), ctx.model().dir())?.truth(&tokens)?;
        check_truth(ctx, "logits of the whole context", &whole.data, &truth);
    }
    Ok(())
}

fn every_token(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let facts = ctx.facts();
    let last = facts.vocab_size as u32 - 1;
    let length = facts.max_positions.min(16);
    let mut prompts: Vec<Vec<u32>> = vec![
        vec![0; length],
        vec![last; length],
        (0..length).map(|i| if i % 2 == 0 { 0 } else { last }).collect(),
        vec![last / 2; length],
    ];
    let small = facts.vocab_size <= SMALL_VOCABULARY && facts.max_positions <= SHORT_CONTEXT;
    if small {
        // All of the vocabulary, from its end, so that the last token is a first one; ends of text by themselves.
        let (ends, others): (Vec<u32>, Vec<u32>) = (0..=last).rev().partition(|token| facts.eos.contains(token));
        prompts.extend(others.chunks(length).map(<[u32]>::to_vec));
        prompts.extend(ends.into_iter().map(|end| vec![end]));
    }
    let subject = if small { Some(Subject::open(ctx, ctx.model().name(), ctx.model().dir())?) } else { None };
    for tokens in prompts {
        let logits = logits_of(engine.as_mut(), &tokens)?;
        let what = format!("{} tokens from {} to {}", tokens.len(), tokens[0], tokens[tokens.len() - 1]);
        check_finite(ctx, &what, &logits.data);
        if let Some(subject) = &subject {
            check_truth(ctx, format!("logits of {what}"), &logits.data, subject.truth(&tokens)?.as_ref());
        }
    }
    Ok(())
}
