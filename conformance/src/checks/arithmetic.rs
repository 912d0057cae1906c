//! The edges of integer arithmetic and of the activation quantiser, on models made for each.

use super::edit::Model;
use super::support::{EDIT_MODEL, logits_of};
use super::truth::{SMALL, Subject, check_truth_within, synthetic};
use crate::case::{Category, Check, CheckResult, Context, ModelSet};
use crate::tolerance::{self, Tolerance};
use fixtures::Spec;
use serde_json::json;

const NUMERICS: Category = Category::Numerics;

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "NUM-5",
        "numerics/saturated_sums",
        NUMERICS,
        "the largest sums that a projection can have are exact",
        saturated_sums,
    )
    .on(ModelSet::Only(EDIT_MODEL)),
    Check::new(
        "NUM-6",
        "numerics/small_inputs",
        NUMERICS,
        "activations that are all zero, or all below the quantiser's floor, are no special case",
        small_inputs,
    )
    .on(ModelSet::Only(EDIT_MODEL)),
    Check::new(
        "NUM-7",
        "numerics/rounding_ties",
        NUMERICS,
        "activations half way between two codes go to the even one",
        rounding_ties,
    )
    .on(ModelSet::Only(EDIT_MODEL)),
];

/// Writes a model and holds an engine on it to the oracle for each prompt.
fn hold(ctx: &mut Context<'_>, name: &str, model: &Model, prompts: &[&[u32]]) -> CheckResult {
    hold_within(ctx, name, model, prompts, &tolerance::FP32_LOGIT)
}

/// The same with another tolerance for `fp32` semantics.
fn hold_within(
    ctx: &mut Context<'_>,
    name: &str,
    model: &Model,
    prompts: &[&[u32]],
    fp32: &'static Tolerance,
) -> CheckResult {
    let subject = Subject::write(ctx, name, model)?;
    let mut engine = subject.engine(ctx)?;
    for tokens in prompts {
        let truth = subject.truth(tokens)?;
        let seen = logits_of(engine.as_mut(), tokens)?;
        check_truth_within(ctx, format!("logits of {tokens:?} on model {name}"), &seen.data, &truth, fp32);
    }
    Ok(())
}

/// Replaces the trits of every tensor whose name holds `part`.
fn set_trits(model: &mut Model, part: &str, trit: impl Fn(usize, usize) -> i8 + Copy) -> CheckResult {
    for (_, held) in model.tensors.iter_mut().filter(|(name, _)| name.contains(part) && name.ends_with("proj.weight")) {
        held.set_trits(trit)?;
    }
    Ok(())
}

/// Sets all values of every tensor whose name ends in `part`.
fn fill(model: &mut Model, part: &str, value: f32) -> CheckResult {
    model.tensors.iter_mut().filter(|(name, _)| name.ends_with(part)).try_for_each(|(_, held)| held.fill(value))
}

/// Every code 127, and rows of `down_proj` that are all one, all minus one, half and half, and alternating: sums of up to
/// 8704 × 127, far beyond 16 bits in any of 32 lanes, and sums that cancel only when they are whole.
fn saturated_sums(ctx: &mut Context<'_>) -> CheckResult {
    const WIDE: usize = 8704;
    let spec = Spec { ffn: WIDE, layers: 1, heads: 2, vocab: 16, ..SMALL };
    let mut model = synthetic(ctx, "with-codes-of-127", &spec)?;
    set_trits(&mut model, "proj", |_, _| 1)?;
    set_trits(&mut model, "down_proj", |row, column| match row % 4 {
        0 => 1,
        1 => -1,
        2 if column < WIDE / 2 => 1,
        2 => -1,
        _ => 1 - 2 * (column % 2) as i8,
    })?;
    fill(&mut model, "norm.weight", 1.0)?;
    fill(&mut model, "embed_tokens.weight", 1.0)?;
    // A sum of all ones comes out as one half, beside the 1 of the embedding and what attention adds.
    fill(&mut model, "o_proj.weight_scale", 0.25 / 32.0)?;
    fill(&mut model, "down_proj.weight_scale", 0.5 / WIDE as f32)?;
    hold_within(ctx, "with-codes-of-127", &model, &[&[0], &[5, 9, 3]], &tolerance::FP32_LONG_SUM)
}

/// Rows of the embedding that are zero, and so small that the quantiser's floor of 1e-5 decides their codes.
fn small_inputs(ctx: &mut Context<'_>) -> CheckResult {
    let mut model = synthetic(ctx, "small", &SMALL)?;
    let embedding = model.tensor("model.embed_tokens.weight")?;
    let mut values = embedding.floats()?;
    let rows: Vec<&mut [f32]> = values.chunks_exact_mut(SMALL.hidden).collect();
    for (token, row) in rows.into_iter().enumerate() {
        let factor = [1.0, 0.0, 1e-9, 3e-9][token % 4];
        row.iter_mut().for_each(|x| *x *= factor);
    }
    embedding.set_floats(&values)?;
    hold(ctx, "small", &model, &[&[5], &[6], &[7], &[9, 13], &[10, 11, 14], &[4, 5, 10, 8]])
}

/// A first norm that gives 127 and halves: the factor is exactly 1 however it is computed, and each half an exact tie.
/// Rows that add up all ties of one sign are twice as large where ties go away from zero.
fn rounding_ties(ctx: &mut Context<'_>) -> CheckResult {
    let spec = Spec { hidden: 128, ffn: 48, layers: 1, vocab: 16, ..SMALL };
    let mut model = synthetic(ctx, "ties", &spec)?;
    // So small that the norm of a row of ones is exactly that row.
    model.set("rms_norm_eps", json!(1e-12));
    let gains: Vec<f32> = (0..spec.hidden).map(|i| if i == 0 { 127.0 } else { [0.5, 2.5, 0.5, 4.5][i % 4] }).collect();
    model.tensor("model.layers.0.input_layernorm.weight")?.set_floats(&gains)?;
    let embedding = model.tensor("model.embed_tokens.weight")?;
    let signs = |token: usize, i: usize| if token.is_multiple_of(2) || (token % 4 == 1 && i == 0) { 1.0 } else { -1.0 };
    let values: Vec<f32> = (0..spec.vocab * spec.hidden).map(|at| signs(at / spec.hidden, at % spec.hidden)).collect();
    embedding.set_floats(&values)?;
    set_trits(&mut model, "v_proj", |row, column| match (row % 4, column) {
        (_, 0) => 1,
        (0, _) => 1,
        (1, _) => -1,
        (2, _) => 0,
        (_, column) => (column % 3) as i8 - 1,
    })?;
    hold(ctx, "ties", &model, &[&[4], &[5], &[7], &[6, 9, 11]])
}
