//! Logits and tokens against the golden data.

use super::stats::Rows;
use super::support::{check_lost, chunked, forward, generate, greedy, logits_of, own_margin, reach, until_eos};
use crate::backend::{Noise, Semantics};
use crate::case::{Category, Check, CheckResult, Context, ModelSet, Stop};
use crate::measure;
use crate::tolerance;
use bitnet_contracts::{BitNetInference, KVCache, PerformanceContract, PerformanceMonitor};
use golden::{Golden, Prompt};

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
    check(
        "GLD-1",
        "golden/logits",
        "logits are the golden's, whole and in decoding: correlation, error, slope, KL and top-1 token of every row",
        logits,
    ),
    check(
        "GLD-5",
        "golden/greedy_tokens",
        "greedy tokens are the golden's up to its first unclear step",
        greedy_tokens,
    ),
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

fn logits(ctx: &mut Context<'_>) -> CheckResult {
    let golden = ctx.golden()?;
    let semantics = ctx.capabilities().semantics;
    let mut engine = ctx.engine()?;
    let (mut own, mut fp32, mut largest) = (Rows::default(), Rows::default(), 0.0f64);
    for prompt in &golden.prompts {
        let expected = golden_logits(&golden, prompt, semantics)?;
        let seen = evaluate(ctx, engine.as_mut(), prompt)?;
        ctx.require(
            seen.len() == expected.len(),
            format!("{} logits for prompt {}", expected.len(), prompt.name),
            seen.len(),
        )?;
        own.add(&seen, expected, prompt.vocab);
        fp32.add(&seen, golden_logits(&golden, prompt, Semantics::Fp32)?, prompt.vocab);
        largest = largest.max(reach(expected));
        ctx.compared(expected.len());
    }
    correlation(ctx, &fp32);
    own_semantics(ctx, &golden, &own, largest)?;
    check_lost(ctx, "against the golden", &own, largest);
    ctx.measure("top1_agreement", own.mean(|r| f64::from(u8::from(r.lost_margin == 0.0))));
    decode(ctx, &golden, engine.as_mut())
}

/// The contract's own clause: the worst row's correlation with the fp32 golden, here and through the monitor.
fn correlation(ctx: &mut Context<'_>, rows: &Rows) {
    let (row, worst) = rows.worst_pearson();
    let what = format!("1 - correlation with the fp32 golden, worst row (row {row} of {})", rows.len());
    ctx.check_within(what, 1.0 - worst, &tolerance::FP32_CORRELATION);
    let mut monitor = PerformanceMonitor::new(PerformanceContract::default());
    ctx.check_ok(format!("validate_accuracy({worst:.6})"), monitor.validate_accuracy(worst as f32));
    ctx.measure_min(measure::WORST_CORRELATION, worst);
    ctx.series(measure::SERIES_CORRELATION, rows.figures(|r| 1.0 - r.pearson));
    ctx.measure("mean_kl_fp32_nats", rows.mean(|r| r.kl));
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

fn own_semantics(ctx: &mut Context<'_>, golden: &Golden, rows: &Rows, reach: f64) -> CheckResult {
    ctx.series(measure::SERIES_MAX_ABS, rows.figures(|r| r.max_abs));
    if exact(ctx) {
        let (row, gap) = rows.worst_abs();
        let what = format!("largest difference of a logit from the fp32 golden (row {row} of {})", rows.len());
        ctx.check_within(what, gap / reach, &tolerance::FP32_LOGIT);
        ctx.measure("worst_abs_own_golden", gap);
        return Ok(());
    }
    let worst = check_correlation(ctx, rows);
    ctx.measure("worst_correlation_own_golden", worst);
    let gap = quantisation_gap(golden)?;
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

/// The longest prompt through a cache: half of it at once and the rest token by token, then all token by token.
fn decode(ctx: &mut Context<'_>, golden: &Golden, engine: &mut dyn BitNetInference) -> CheckResult {
    let capabilities = ctx.capabilities().clone();
    let longest = golden.prompts.iter().max_by_key(|p| p.seq);
    let longest = longest.ok_or_else(|| Stop::Inconclusive("no golden prompt".to_string()))?;
    let tokens = &longest.input_ids[0];
    let half = tokens.len() / 2;
    let sizes = [vec![half; usize::from(half > 0)], vec![1; tokens.len() - half]].concat();
    let mut seen = chunked(engine, tokens, &sizes, &mut KVCache::new(tokens.len()))?;
    let mut sessions = 1;
    if tokens.len() > 1 {
        seen.extend(chunked(engine, tokens, &vec![1; tokens.len()], &mut KVCache::new(tokens.len()))?);
        sessions = 2;
    }
    let expected = &golden_logits(golden, longest, capabilities.semantics)?[..tokens.len() * longest.vocab];
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
