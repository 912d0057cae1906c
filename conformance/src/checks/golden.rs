//! Logits and tokens against the golden data, and model files that say the same thing in another way.

use super::edit::Model;
use super::stats::Rows;
use super::support::{
    EDIT_MODEL, check_lost, chunked, forward, generate, greedy, logits_of, own_margin, prompt, reach, until_eos,
};
use crate::backend::{Noise, Semantics};
use crate::case::{Category, Check, CheckResult, Context, ModelSet, Stop};
use crate::measure;
use crate::tolerance;
use bitnet_contracts::{BitNetInference, InferenceError, KVCache};
use golden::{Golden, Prompt};
use serde_json::{Value, json};

const GOLDEN: Category = Category::Golden;

const fn check(
    id: &'static str,
    name: &'static str,
    clause: &'static str,
    run: fn(&mut Context<'_>) -> CheckResult,
) -> Check {
    Check::new(id, name, GOLDEN, clause, run).on(ModelSet::Golden).within(120)
}

pub(super) const CHECKS: &[Check] = &[
    check("GLD-1", "golden/correlation", "every position correlates above 0.99 with the fp32 golden", correlation),
    check(
        "GLD-2",
        "golden/own_semantics",
        "logits are those of the declared semantics: error, correlation, slope and KL of every row",
        own_semantics,
    ),
    check("GLD-3", "golden/top1", "the top-1 token is the golden's wherever its margin is clear", top1),
    check("GLD-4", "golden/decode", "token by token with a cache the same golden holds", decode),
    check(
        "GLD-5",
        "golden/greedy_tokens",
        "greedy tokens are the golden's up to its first unclear step",
        greedy_tokens,
    ),
    check(
        "GLD-6",
        "golden/reproduced_rows",
        "w1.58a8 arithmetic reproduces the golden's rows but for rounding ties",
        reproduced_rows,
    )
    .on(ModelSet::Only(tolerance::A8_SHARE_MODELS[2])),
    check(
        "GLD-7",
        "golden/spellings",
        "RoPE base, tied head and scale have two spellings each, and mean the same in both",
        spellings,
    )
    .on(ModelSet::Only(EDIT_MODEL)),
    check(
        "GLD-8",
        "golden/facts_are_read",
        "RoPE base, epsilon, scales and linear_class are read from the model, not assumed",
        facts_are_read,
    )
    .on(ModelSet::Only(EDIT_MODEL)),
];

/// The golden logits of a prompt in one of the semantics: transformers', or the oracle's where there are no others.
fn golden_logits<'a>(golden: &Golden, prompt: &'a Prompt, semantics: Semantics) -> Result<&'a [f32], Stop> {
    let logits = prompt.logits(semantics.oracle(), golden.derivation());
    if logits.is_empty() {
        return Err(Stop::Inconclusive(format!("no golden {} logits for prompt {}", semantics.name(), prompt.name)));
    }
    Ok(logits)
}

/// The backend's logits of a prompt: as a batch where it takes batches, else sequence by sequence.
fn evaluate(ctx: &Context<'_>, engine: &mut dyn BitNetInference, prompt: &Prompt) -> Result<Vec<f32>, Stop> {
    if ctx.capabilities().batch || prompt.batch == 1 {
        return Ok(forward(engine, &prompt.input_ids, None)?.data);
    }
    let mut data = Vec::new();
    for row in &prompt.input_ids {
        data.extend(logits_of(engine, row)?.data);
    }
    Ok(data)
}

/// Every row of every prompt against the golden of the given semantics.
fn compare(ctx: &mut Context<'_>, golden: &Golden, semantics: Semantics) -> Result<(Rows, f64), Stop> {
    let mut engine = ctx.engine()?;
    let (mut rows, mut reach) = (Rows::default(), 0.0f64);
    for prompt in &golden.prompts {
        let expected = golden_logits(golden, prompt, semantics)?;
        let seen = evaluate(ctx, engine.as_mut(), prompt)?;
        ctx.require(
            seen.len() == expected.len(),
            format!("{} logits for prompt {}", expected.len(), prompt.name),
            seen.len(),
        )?;
        rows.add(&seen, expected, prompt.vocab);
        reach = expected.iter().fold(reach, |m, &x| m.max(f64::from(x).abs()));
        ctx.compared(expected.len());
    }
    Ok((rows, reach))
}

/// The gap between the two semantics of the model itself: its fp32 golden against its w1.58a8 golden.
fn quantisation_gap(golden: &Golden) -> Result<Rows, Stop> {
    let mut gap = Rows::default();
    for prompt in &golden.prompts {
        let fp32 = golden_logits(golden, prompt, Semantics::Fp32)?;
        let a8 = golden_logits(golden, prompt, Semantics::W158A8)?;
        gap.add(fp32, a8, prompt.vocab);
    }
    Ok(gap)
}

fn correlation(ctx: &mut Context<'_>) -> CheckResult {
    let golden = ctx.golden()?;
    let (rows, _) = compare(ctx, &golden, Semantics::Fp32)?;
    let (row, worst) = rows.worst_pearson();
    let what = format!("1 - correlation with the fp32 golden, worst row (row {row} of {})", rows.len());
    ctx.check_within(what, 1.0 - worst, &tolerance::FP32_CORRELATION);
    ctx.measure_min(measure::WORST_CORRELATION, worst);
    ctx.series(measure::SERIES_CORRELATION, rows.figures(|r| 1.0 - r.pearson));
    ctx.measure("mean_kl_fp32_nats", rows.mean(|r| r.kl));
    Ok(())
}

/// Whether a backend's logits can be held to single values: fp32 semantics in float32.
fn exact(ctx: &Context<'_>) -> bool {
    (ctx.capabilities().semantics, ctx.capabilities().noise) == (Semantics::Fp32, Noise::F32)
}

/// Holds the worst row's correlation with the golden of the declared semantics.
fn check_correlation(ctx: &mut Context<'_>, rows: &Rows) -> f64 {
    let (row, worst) = rows.worst_pearson();
    let tolerance = match ctx.capabilities().noise {
        Noise::F32 => &tolerance::A8_CORRELATION,
        Noise::Coarse => &tolerance::COARSE_CORRELATION,
    };
    let semantics = ctx.capabilities().semantics.name();
    let what = format!("1 - correlation with the {semantics} golden, worst row (row {row} of {})", rows.len());
    ctx.check_within(what, 1.0 - worst, tolerance);
    worst
}

fn own_semantics(ctx: &mut Context<'_>) -> CheckResult {
    let golden = ctx.golden()?;
    let (rows, reach) = compare(ctx, &golden, ctx.capabilities().semantics)?;
    ctx.series(measure::SERIES_MAX_ABS, rows.figures(|r| r.max_abs));
    if exact(ctx) {
        let (row, gap) = rows.worst_abs();
        let what = format!("largest difference of a logit from the fp32 golden (row {row} of {})", rows.len());
        ctx.check_within(what, gap / reach, &tolerance::FP32_LOGIT);
        ctx.measure("worst_abs_own_golden", gap);
        return Ok(());
    }
    let worst = check_correlation(ctx, &rows);
    ctx.measure("worst_correlation_own_golden", worst);
    let gap = quantisation_gap(&golden)?;
    let tolerance = match ctx.capabilities().noise {
        Noise::F32 => &tolerance::A8_GAP,
        Noise::Coarse => &tolerance::COARSE_GAP,
    };
    let kl = rows.mean(|r| r.kl) / gap.mean(|r| r.kl);
    ctx.check_within("mean KL from the golden, in units of the model's quantisation gap", kl, tolerance);
    let nmse = rows.mean(|r| r.nmse) / gap.mean(|r| r.nmse);
    ctx.check_within("mean NMSE from the golden, in units of the model's quantisation gap", nmse, tolerance);
    let (row, worst) = rows.worst_kl();
    let what = format!("KL of the worst row (row {row}), in units of the worst gap");
    ctx.check_within(what, worst / gap.worst_kl().1, &tolerance::GAP_WORST);
    let slope = rows.mean(|r| r.slope);
    let what = "distance of the mean slope of logits on golden logits from 1";
    ctx.check_within(what, (slope - 1.0).abs(), &tolerance::SLOPE_MEAN);
    let (row, slope) = rows.worst(|r| (r.slope - 1.0).abs(), |a, b| a > b);
    ctx.check_within(format!("distance of the slope of row {row} from 1"), slope, &tolerance::SLOPE_WORST);
    Ok(())
}

fn top1(ctx: &mut Context<'_>) -> CheckResult {
    let golden = ctx.golden()?;
    let semantics = ctx.capabilities().semantics;
    let (rows, reach) = compare(ctx, &golden, semantics)?;
    check_lost(ctx, "against the golden", &rows, reach);
    ctx.measure("top1_agreement", rows.mean(|r| f64::from(u8::from(r.lost_margin == 0.0))));
    Ok(())
}

fn decode(ctx: &mut Context<'_>) -> CheckResult {
    let golden = ctx.golden()?;
    let capabilities = ctx.capabilities().clone();
    let longest = golden.prompts.iter().max_by_key(|p| p.seq);
    let longest = longest.ok_or_else(|| Stop::Inconclusive("no golden prompt".to_string()))?;
    let mut engine = ctx.engine()?;
    let tokens = &longest.input_ids[0];
    let half = tokens.len() / 2;
    let sizes = [vec![half; usize::from(half > 0)], vec![1; tokens.len() - half]].concat();
    let mut seen = chunked(engine.as_mut(), tokens, &sizes, &mut KVCache::new(tokens.len()))?;
    let mut sessions = 1;
    if tokens.len() > 1 {
        seen.extend(chunked(engine.as_mut(), tokens, &vec![1; tokens.len()], &mut KVCache::new(tokens.len()))?);
        sessions = 2;
    }
    let expected = &golden_logits(&golden, longest, capabilities.semantics)?[..tokens.len() * longest.vocab];
    let expected = expected.repeat(sessions);
    let mut rows = Rows::default();
    rows.add(&seen, &expected, longest.vocab);
    ctx.compared(seen.len());
    ctx.series(measure::SERIES_DECODING, rows.figures(|r| r.max_abs));
    let reach = reach(&expected);
    if exact(ctx) {
        let (row, gap) = rows.worst_abs();
        let what = format!("largest difference from the golden in decoding (row {row})");
        ctx.check_within(what, gap / reach, &tolerance::FP32_LOGIT);
    } else {
        check_correlation(ctx, &rows);
        check_lost(ctx, "in decoding", &rows, reach);
    }
    Ok(())
}

fn greedy_tokens(ctx: &mut Context<'_>) -> CheckResult {
    let golden = ctx.golden()?;
    let (semantics, derivation) = (ctx.capabilities().semantics, golden.derivation());
    let mut engine = ctx.engine()?;
    let mut compared = 0;
    for prompt in &golden.prompts {
        let margin = own_margin(ctx, golden_logits(&golden, prompt, semantics)?);
        let steps = prompt.greedy_of(semantics.oracle(), derivation);
        let margins = prompt.margins_of(semantics.oracle(), derivation);
        for (row, tokens) in prompt.input_ids.iter().enumerate() {
            let (Some(expected), Some(margins)) = (steps.get(row), margins.get(row)) else { continue };
            let clear = margins.iter().take_while(|&&m| f64::from(m) >= margin).count().min(expected.len());
            if clear == 0 {
                continue;
            }
            let result = generate(engine.as_mut(), tokens, clear, &greedy())?;
            let expected = until_eos(ctx.facts(), &result, &expected[..clear]);
            let what = format!("greedy tokens after {} row {row}", prompt.name);
            ctx.check_slices(what, &result.generated_tokens, &expected);
            compared += clear;
        }
    }
    if compared == 0 {
        // Nothing to compare is no fault of the backend: that one continuation exists and is in range is still asserted.
        let Some(first) = golden.prompts.first() else { return Ok(()) };
        let result = generate(engine.as_mut(), &first.input_ids[0], 1, &greedy())?;
        ctx.note("no golden continuation begins with a clear step");
        let vocab = ctx.facts().vocab_size as u32;
        ctx.check(result.generated_tokens.iter().all(|&t| t < vocab), "a token of the vocabulary", "one beyond");
    }
    ctx.measure("greedy_tokens_compared", compared as f64);
    Ok(())
}

fn reproduced_rows(ctx: &mut Context<'_>) -> CheckResult {
    if (ctx.capabilities().semantics, ctx.capabilities().noise) != (Semantics::W158A8, Noise::F32) {
        return Err(Stop::Unsupported("w1.58a8 semantics in float32 arithmetic".to_string()));
    }
    let mut shares = Vec::new();
    for case in tolerance::A8_SHARE_MODELS {
        let model = ctx.other_model(case)?;
        let golden = golden::load(case)?;
        let mut engine = ctx.factory().create(&model)?;
        let mut rows = Rows::default();
        for prompt in &golden.prompts {
            let expected = golden_logits(&golden, prompt, Semantics::W158A8)?;
            rows.add(&evaluate(ctx, engine.as_mut(), prompt)?, expected, prompt.vocab);
            ctx.compared(expected.len());
        }
        let (within, share) = rows.share_within(tolerance::A8_ROW.limit());
        ctx.note_error(within, &tolerance::A8_ROW);
        ctx.note(format!("{case}: {share:.3} of {} rows within {}", rows.len(), tolerance::A8_ROW.limit()));
        shares.push(share);
    }
    let mean = shares.iter().sum::<f64>() / shares.len() as f64;
    ctx.measure("reproduced_rows", mean);
    let what = format!(
        "share of rows beyond {} of the golden, mean of {:?}",
        tolerance::A8_ROW.limit(),
        tolerance::A8_SHARE_MODELS
    );
    ctx.check_within(what, 1.0 - mean, &tolerance::A8_ROWS_LOST);
    Ok(())
}

/// The logits of a prompt by an engine on an edited model.
fn edited(ctx: &Context<'_>, name: &str, model: &Model, tokens: &[u32]) -> Result<Vec<f32>, Stop> {
    let dir = ctx.scratch().join(name);
    model.write(&dir)?;
    let fixture = ctx.model().relocated(&dir);
    let created = ctx.factory().create(&fixture);
    let mut engine =
        created.map_err(|e: InferenceError| Stop::Unexpected(format!("model {name}: create failed: {e}")))?;
    Ok(logits_of(engine.as_mut(), tokens)?.data)
}

/// A change to a model.
type Edit = fn(&mut Model) -> CheckResult;

/// The scales of a model, each replaced by its reciprocal rounded to f32.
fn invert_scales(model: &mut Model) -> CheckResult {
    for held in model.tensors.iter_mut().filter(|(name, _)| name.ends_with("weight_scale")).map(|(_, held)| held) {
        let inverted: Vec<f32> = held.floats()?.iter().map(|s| 1.0 / s).collect();
        held.set_floats(&inverted)?;
    }
    Ok(())
}

fn linear_class(model: &mut Model, class: Option<&str>) {
    let mut quantization = json!({"quant_method": "bitnet", "quantization_mode": "offline"});
    if let Some(class) = class {
        quantization["linear_class"] = json!(class);
    }
    model.set("quantization_config", quantization);
}

fn spellings(ctx: &mut Context<'_>) -> CheckResult {
    let tokens = prompt(ctx.facts(), 9, 700);
    let original = Model::read(ctx.model().dir())?;
    let base = edited(ctx, "as-it-was", &original, &tokens)?;
    let theta = ctx.facts().rope_theta;

    let mut model = original.clone();
    model.set("rope_theta", Value::Null);
    model.set("rope_parameters", json!({"rope_theta": theta, "rope_type": "default"}));
    let seen = edited(ctx, "rope-parameters", &model, &tokens)?;
    ctx.check_bits("logits with rope_parameters in place of rope_theta", &seen, &base);
    model.set("rope_parameters", Value::Null);
    model.set("rope_theta", json!(theta));
    let seen = edited(ctx, "rope-theta", &model, &tokens)?;
    ctx.check_bits("logits with rope_theta at the top", &seen, &base);

    // An own head that is the embedding, against a tied one.
    let embedding = original.clone().tensor("model.embed_tokens.weight")?.clone();
    let mut own = original.clone();
    own.tensors.insert("lm_head.weight".to_string(), embedding);
    own.set("tie_word_embeddings", json!(false));
    let mut tied = own.clone();
    tied.tensors.remove("lm_head.weight");
    tied.set("tie_word_embeddings", json!(true));
    let (own, tied) = (edited(ctx, "own-head", &own, &tokens)?, edited(ctx, "tied-head", &tied, &tokens)?);
    super::support::same_logits(
        ctx,
        crate::invariance::Axis::Chunking,
        "logits of a tied head and of the same head untied",
        &tied,
        &own,
    );
    ctx.check(own != base, "the head that is in the file is the one that is used", "another head, the same logits");

    // Powers of two as scales: 1/s is exact, so that multiplying and dividing by them is the same.
    let mut multiplied = original.clone();
    for (i, held) in
        multiplied.tensors.iter_mut().filter(|(n, _)| n.ends_with("weight_scale")).map(|(_, h)| h).enumerate()
    {
        held.fill(if i % 2 == 0 { 0.125 } else { 0.0625 })?;
    }
    linear_class(&mut multiplied, Some("autobitlinear"));
    let mut divided = multiplied.clone();
    invert_scales(&mut divided)?;
    linear_class(&mut divided, Some("bitlinear"));
    let multiplied = edited(ctx, "scale-multiplied", &multiplied, &tokens)?;
    let seen = edited(ctx, "scale-divided", &divided, &tokens)?;
    super::support::same_logits(
        ctx,
        crate::invariance::Axis::Chunking,
        "logits of bitlinear with reciprocal scales",
        &seen,
        &multiplied,
    );
    linear_class(&mut divided, None);
    let by_default = edited(ctx, "scale-divided-by-default", &divided, &tokens)?;
    ctx.check_bits("logits with linear_class left out, which means bitlinear", &by_default, &seen);
    Ok(())
}

fn facts_are_read(ctx: &mut Context<'_>) -> CheckResult {
    let tokens = prompt(ctx.facts(), 9, 710);
    let original = Model::read(ctx.model().dir())?;
    let base = edited(ctx, "as-it-was", &original, &tokens)?;
    let changes: [(&str, Edit); 6] = [
        ("another RoPE base", |m| {
            m.set("rope_theta", json!(100.0));
            m.set("rope_parameters", Value::Null);
            Ok(())
        }),
        ("another epsilon", |m| {
            m.set("rms_norm_eps", json!(0.5));
            Ok(())
        }),
        ("the other linear_class", |m| {
            linear_class(m, Some("bitlinear"));
            Ok(())
        }),
        ("another scale of o_proj", |m| m.tensor("model.layers.0.self_attn.o_proj.weight_scale")?.fill(3.0)),
        ("another final norm", |m| m.tensor("model.norm.weight")?.put(0, 9.0)),
        ("another attention sub-norm", |m| m.tensor("model.layers.0.self_attn.attn_sub_norm.weight")?.put(1, 30.0)),
    ];
    for (what, change) in changes {
        let mut model = original.clone();
        change(&mut model)?;
        let seen = edited(ctx, &what.replace(' ', "-"), &model, &tokens)?;
        // The same computation on the same numbers gives the same bits (DET-3), so any difference is the change's.
        let last = seen.len().saturating_sub(ctx.facts().vocab_size);
        ctx.check(seen[last..] != base[last..], format!("{what} moves the last logits"), "they are the same");
    }
    Ok(())
}
