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
    let rows: Vec<Vec<u32>> = (0..5).map(|b| prompt(ctx.facts(), 6, 80 + b)).collect();
    let mut alone = Vec::new();
    for row in &rows {
        alone.push(logits_of(engine.as_mut(), row)?.data);
    }
    for size in [1, 2, 3, 5] {
        let logits = forward(engine.as_mut(), &rows[..size], None)?;
        for (i, expected) in alone[..size].iter().enumerate() {
            same_logits(
                ctx,
                Axis::Batch,
                format!("logits of row {i} in a batch of {size}"),
                logits.sequence(i),
                expected,
            );
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
    Ok(())
}

fn loud_neighbour(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let row = prompt(ctx.facts(), 4, 95);
    let mut expected: Option<Vec<f32>> = None;
    for salt in 0..6 {
        let rows = [prompt(ctx.facts(), 4, 100 + salt), row.clone(), vec![salt as u32; 4]];
        let logits = forward(engine.as_mut(), &rows, None)?;
        match &expected {
            None => expected = Some(logits.sequence(1).to_vec()),
            Some(expected) => {
                same_logits(ctx, Axis::Batch, format!("logits beside neighbours {salt}"), logits.sequence(1), expected);
            }
        }
    }
    Ok(())
}
