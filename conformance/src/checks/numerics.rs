//! Finite numbers everywhere, and numbers that say something.

use super::support::{SMALL_CONTEXT, forward, length, logits_of, prompt};
use crate::case::{Category, Check, CheckResult, Context, ModelSet};
use bitnet_contracts::KVCache;

const NUMERICS: Category = Category::Numerics;

pub(super) const CHECKS: &[Check] = &[
    Check::new("NUM-1", "numerics/finite", NUMERICS, "every logit of every position is finite", finite)
        .on(ModelSet::Every),
    Check::new(
        "NUM-1",
        "numerics/finite_to_the_last_position",
        NUMERICS,
        "every logit is finite up to the end of the context",
        finite_to_the_last_position,
    )
    .on(ModelSet::Where(|f| f.max_positions <= 128)),
    Check::new(
        "NUM-2",
        "numerics/extreme_prompts",
        NUMERICS,
        "repeated and extreme tokens give finite logits",
        extreme_prompts,
    )
    .on(ModelSet::Every),
    Check::new(
        "NUM-3",
        "numerics/rows_say_something",
        NUMERICS,
        "logits are not constant, and depend on the token",
        rows_say_something,
    )
    .on(ModelSet::Every),
    Check::new(
        "NUM-4",
        "numerics/poisoned_memory",
        NUMERICS,
        "results do not depend on what was in memory before",
        poisoned_memory,
    )
    .on(ModelSet::Only(SMALL_CONTEXT)),
];

fn check_finite(ctx: &mut Context<'_>, what: &str, data: &[f32]) -> bool {
    let bad = data.iter().filter(|x| !x.is_finite()).count();
    let first = data.iter().position(|x| !x.is_finite());
    ctx.compared(data.len());
    let seen =
        first.map_or(String::new(), |i| format!("{bad} of {} are not, the first at {i}: {}", data.len(), data[i]));
    ctx.check(bad == 0, format!("{what}: all logits finite"), seen)
}

fn finite(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let length = length(ctx.facts(), ctx.facts().max_positions.min(24));
    let tokens = prompt(ctx.facts(), length, 20);
    let logits = logits_of(engine.as_mut(), &tokens)?;
    check_finite(ctx, "prompt", &logits.data);
    Ok(())
}

fn finite_to_the_last_position(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let positions = ctx.facts().max_positions;
    let tokens = prompt(ctx.facts(), positions, 21);
    let whole = logits_of(engine.as_mut(), &tokens)?;
    check_finite(ctx, "whole context in one call", &whole.data);
    let mut cache = KVCache::new(positions);
    for (position, &token) in tokens.iter().enumerate() {
        let step = forward(engine.as_mut(), &[vec![token]], Some(&mut cache))?;
        check_finite(ctx, &format!("decode step {position}"), &step.data);
    }
    Ok(())
}

fn extreme_prompts(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let last = ctx.facts().vocab_size as u32 - 1;
    let length = ctx.facts().max_positions.min(16);
    let prompts: [Vec<u32>; 4] = [
        vec![0; length],
        vec![last; length],
        (0..length).map(|i| if i % 2 == 0 { 0 } else { last }).collect(),
        vec![last / 2; length],
    ];
    for tokens in prompts {
        let logits = logits_of(engine.as_mut(), &tokens)?;
        check_finite(ctx, &format!("prompt of {} and {}", tokens[0], tokens[1]), &logits.data);
    }
    Ok(())
}

fn rows_say_something(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let (a, b) = (prompt(ctx.facts(), 4, 22), prompt(ctx.facts(), 4, 23));
    let first = logits_of(engine.as_mut(), &a)?;
    for position in 0..4 {
        let row = first.row(0, position);
        let (low, high) = row.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(l, h), &x| (l.min(x), h.max(x)));
        ctx.check(
            high > low,
            format!("logits of position {position} differ from each other"),
            format!("all are {low}"),
        );
    }
    let second = logits_of(engine.as_mut(), &b)?;
    ctx.check(first.last(0) != second.last(0), "two prompts give two rows of logits", "the rows are equal");
    Ok(())
}

fn poisoned_memory(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let tokens = prompt(ctx.facts(), 9, 24);
    let expected = logits_of(engine.as_mut(), &tokens)?;
    // Blocks of NaN of many sizes, freed again: whoever reads memory that it did not write reads NaN.
    for round in 0..3 {
        let blocks: Vec<Vec<f32>> = (6..18).map(|size| vec![f32::NAN; (1 << size) + round]).collect();
        drop(std::hint::black_box(blocks));
        let mut again = ctx.engine()?;
        let seen = logits_of(again.as_mut(), &tokens)?;
        ctx.check_bits("logits of a fresh engine on used memory", &seen.data, &expected.data);
        let seen = logits_of(engine.as_mut(), &tokens)?;
        ctx.check_bits("logits of the first engine on used memory", &seen.data, &expected.data);
    }
    Ok(())
}
