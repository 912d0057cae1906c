//! A sequence in a batch is the sequence alone.

use super::support::{forward, logits_of, prompt, same_logits};
use crate::backend::Capability;
use crate::case::{Category, Check, CheckResult, Context, ModelSet};
use crate::invariance::Axis;

const BATCH: Category = Category::Batch;

pub(super) const CHECKS: &[Check] = &[
    Check::new("BAT-1", "batch/row_is_alone", BATCH, "every row of a batch has the logits it has alone", row_is_alone)
        .needs(Capability::Batch)
        .tests(Axis::Batch)
        .on(ModelSet::Every),
    Check::new(
        "BAT-2",
        "batch/order_of_rows",
        BATCH,
        "the order of rows does not show, and equal rows are equal",
        order_of_rows,
    )
    .needs(Capability::Batch)
    .tests(Axis::Batch),
    Check::new("BAT-3", "batch/loud_neighbour", BATCH, "the contents of a neighbour do not show", loud_neighbour)
        .needs(Capability::Batch)
        .tests(Axis::Batch),
];

fn row_is_alone(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    // Prompts and single tokens: the kernels for one and for many rows may be two.
    for (length, sizes) in [(6, &[1, 2, 3, 5, 8][..]), (1, &[2, 4, 7])] {
        let rows: Vec<Vec<u32>> = (0..8).map(|b| prompt(ctx.facts(), length, 80 + b)).collect();
        let mut alone = Vec::new();
        for row in &rows {
            alone.push(logits_of(engine.as_mut(), row)?.data);
        }
        for &size in sizes {
            let logits = forward(engine.as_mut(), &rows[..size], None)?;
            for (i, expected) in alone[..size].iter().enumerate() {
                let what = format!("logits of row {i} in a batch of {size} rows of {length}");
                same_logits(ctx, Axis::Batch, what, logits.sequence(i), expected);
            }
        }
    }
    Ok(())
}

fn order_of_rows(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let rows: Vec<Vec<u32>> = (0..3).map(|b| prompt(ctx.facts(), 5, 90 + b)).collect();
    let logits = forward(engine.as_mut(), &rows, None)?;
    let order = [2, 0, 1, 0];
    let shuffled: Vec<Vec<u32>> = order.iter().map(|&i| rows[i].clone()).collect();
    let seen = forward(engine.as_mut(), &shuffled, None)?;
    for (place, &row) in order.iter().enumerate() {
        same_logits(
            ctx,
            Axis::Batch,
            format!("logits of row {row} at place {place}"),
            seen.sequence(place),
            logits.sequence(row),
        );
    }
    same_logits(ctx, Axis::Batch, "logits of two equal rows", seen.sequence(3), seen.sequence(1));
    let seen = forward(engine.as_mut(), &vec![rows[1].clone(); 3], None)?;
    for place in 0..3 {
        let what = format!("logits of row 1 at place {place} of three equal rows");
        same_logits(ctx, Axis::Batch, what, seen.sequence(place), logits.sequence(1));
    }
    Ok(())
}

fn loud_neighbour(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let row = prompt(ctx.facts(), 4, 95);
    let mut expected: Option<Vec<f32>> = None;
    for salt in 0..9 {
        let place = (salt as usize + 1) % 3;
        let mut rows = vec![prompt(ctx.facts(), 4, 100 + salt), vec![salt as u32; 4]];
        rows.insert(place, row.clone());
        let logits = forward(engine.as_mut(), &rows, None)?;
        match &expected {
            None => expected = Some(logits.sequence(place).to_vec()),
            Some(expected) => {
                let what = format!("logits at place {place} beside neighbours {salt}");
                same_logits(ctx, Axis::Batch, what, logits.sequence(place), expected);
            }
        }
    }
    Ok(())
}
