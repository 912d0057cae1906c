//! Rows that the oracle knows exactly, reached through a cache, in pieces and in batches.
//!
//! An engine that claims no more than statistical agreement between a whole call and its pieces, or between a batch and
//! its rows, is held to nothing finer by those comparisons. Here each way is held to the oracle by itself: what another
//! order of sums may change is a few units in the last place, whatever is claimed.

use super::stats::Rows;
use super::support::{EDIT_MODEL, chunked, forward, mix, reach};
use super::truth::{NARROW, SMALL, Subject, Truth, check_truth, synthetic};
use crate::backend::{Capability, Noise};
use crate::case::{Category, Check, CheckResult, Context, ModelSet, Stop};
use crate::tolerance;
use bitnet_contracts::{BitNetInference, KVCache};
use fixtures::Spec;
use std::ops::Range;
use std::sync::Arc;

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "GLD-10",
        "golden/cached_rows",
        Category::Golden,
        "through a cache, in pieces and in steps, near and far into the context, every logit is the oracle's",
        cached_rows,
    )
    .on(ModelSet::Only(EDIT_MODEL)),
    Check::new(
        "GLD-11",
        "golden/batched_rows",
        Category::Golden,
        "in batches, whole and in steps with a cache, every logit is the oracle's",
        batched_rows,
    )
    .on(ModelSet::Only(EDIT_MODEL))
    .needs(Capability::Batch),
];

/// Prompts without an activation near a rounding tie, as far as there are any.
fn clear_prompts(subject: &Subject, length: usize, count: u64) -> Result<Vec<Arc<Truth>>, Stop> {
    (0..count).map(|salt| subject.clear_prompt(length, 800 + salt)).collect()
}

/// One layer: what a token leaves for those behind it depends on nothing before it.
const ONE_LAYER: Spec = Spec { context: 640, ..NARROW };

/// The pieces of a long sequence, and which of its positions are judged together: all of the first piece, pieces behind
/// it, steps, and a piece behind those.
const PIECES: [usize; 3] = [64, 300, 148];
const STEPS: usize = 40;
const LAST: usize = 48;
const WINDOWS: [(&str, Range<usize>); 4] = [
    ("the first piece", 0..64),
    ("the third piece", 364..512),
    ("steps behind 512 positions", 512..552),
    ("a piece behind 552 positions", 552..600),
];

fn cached_rows(ctx: &mut Context<'_>) -> CheckResult {
    let subject = Subject::write(ctx, "small", &synthetic(ctx, "small", &SMALL)?)?;
    let mut engine = subject.engine(ctx)?;
    for truth in clear_prompts(&subject, 6, 4)? {
        for sizes in [&[2, 3, 1][..], &[1; 6], &[5, 1]] {
            let seen = chunked(engine.as_mut(), &truth.tokens, sizes, &mut KVCache::new(8))?;
            check_truth(ctx, format!("logits of {:?} in pieces of {sizes:?}", truth.tokens), &seen, &truth);
        }
    }
    let subject = Subject::write(ctx, "one-layer", &synthetic(ctx, "one-layer", &ONE_LAYER)?)?;
    far(ctx, &subject)
}

/// Tokens that alone have no activation near a tie: in one layer they leave clear keys and values wherever they stand.
fn clear_tokens(subject: &Subject) -> Result<Vec<u32>, Stop> {
    let mut clear = Vec::new();
    for token in 0..subject.facts().vocab_size as u32 {
        if subject.truth(&[token])?.clear {
            clear.push(token);
        }
    }
    if clear.is_empty() { Err(Stop::Inconclusive("every token is near a rounding tie".to_string())) } else { Ok(clear) }
}

fn far(ctx: &mut Context<'_>, subject: &Subject) -> CheckResult {
    let from = clear_tokens(subject)?;
    let length = PIECES.iter().sum::<usize>() + STEPS + LAST;
    let tokens: Vec<u32> =
        (0..length as u64).map(|i| from[(mix(810 << 16 | i) % from.len() as u64) as usize]).collect();
    let truth = subject.truth(&tokens)?;
    let sizes = [&PIECES[..], &[1; STEPS], &[LAST]].concat();
    let mut engine = subject.engine(ctx)?;
    let seen = chunked(engine.as_mut(), &tokens, &sizes, &mut KVCache::new(ONE_LAYER.context))?;
    let vocab = subject.facts().vocab_size;
    ctx.require(seen.len() == truth.logits.len(), format!("{} logits", truth.logits.len()), seen.len())?;
    for (what, positions) in WINDOWS {
        let rows: Vec<usize> = positions.filter(|position| truth.clear_rows[*position]).collect();
        let row = |position: usize| &seen[position * vocab..(position + 1) * vocab];
        ctx.compared(rows.len() * vocab);
        let mut errors = Vec::new();
        for &position in &rows {
            errors.push(distance(ctx, row(position), truth.row(position)));
        }
        errors.sort_by(f64::total_cmp);
        let Some(&median) = errors.get(errors.len() / 2) else {
            return Err(Stop::Inconclusive(format!("no clear row in {what}")));
        };
        let limit = match ctx.capabilities().noise {
            Noise::F32 => &tolerance::FAR_ROW,
            Noise::Coarse => &tolerance::FAR_POSITIONS,
        };
        ctx.check_within(format!("the middle error of {} rows in {what}", rows.len()), median, limit);
    }
    Ok(())
}

/// The largest difference of a logit over their reach; in 16-bit floats what is missing from a correlation of 1.
fn distance(ctx: &Context<'_>, seen: &[f32], truth: &[f32]) -> f64 {
    match ctx.capabilities().noise {
        Noise::F32 => {
            let worst = seen.iter().zip(truth).map(|(s, t)| f64::from((s - t).abs()));
            // What is no number is as far off as can be.
            let worst = worst.fold(0.0, |a: f64, b| if b.is_nan() { f64::INFINITY } else { a.max(b) });
            worst / reach(truth).max(tolerance::SMALL_REACH.limit())
        }
        Noise::Coarse => {
            let mut rows = Rows::default();
            rows.add(seen, truth, truth.len());
            1.0 - rows.worst_pearson().1
        }
    }
}

fn batched_rows(ctx: &mut Context<'_>) -> CheckResult {
    let subject = Subject::write(ctx, "small", &synthetic(ctx, "small", &SMALL)?)?;
    let mut engine = subject.engine(ctx)?;
    let truths = clear_prompts(&subject, 4, 6)?;
    for size in [2, 6] {
        let truths = &truths[..size];
        let rows: Vec<Vec<u32>> = truths.iter().map(|truth| truth.tokens.clone()).collect();
        let whole = forward(engine.as_mut(), &rows, None)?;
        let steps = in_steps(engine.as_mut(), &rows)?;
        for (i, truth) in truths.iter().enumerate() {
            let what = format!("logits of row {i} of {size}");
            check_truth(ctx, &what, whole.sequence(i), truth);
            check_truth(ctx, format!("{what}, a piece and two steps"), &steps[i], truth);
        }
    }
    Ok(())
}

/// The logits of each row of four tokens: two at once, then one after the other, with a cache.
fn in_steps(engine: &mut dyn BitNetInference, rows: &[Vec<u32>]) -> Result<Vec<Vec<f32>>, Stop> {
    let (mut cache, mut seen) = (KVCache::new(4), vec![Vec::new(); rows.len()]);
    for piece in [0..2, 2..3, 3..4] {
        let rows: Vec<Vec<u32>> = rows.iter().map(|row| row[piece.clone()].to_vec()).collect();
        let logits = forward(engine, &rows, Some(&mut cache))?;
        seen.iter_mut().enumerate().for_each(|(i, seen)| seen.extend(logits.sequence(i)));
    }
    Ok(seen)
}
