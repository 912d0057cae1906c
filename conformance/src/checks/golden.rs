//! Logits and tokens against the golden data.

use super::stats::Rows;
use super::support::{chunked, forward, generate, greedy, logits_of, own_margin, until_eos};
use super::truth::{fp32_limit, reach};
use crate::backend::{Noise, Semantics};
use crate::case::{Category, Check, CheckResult, Context, ModelSet, Stop};
use crate::measure;
use crate::tolerance;
use bitnet_contracts::{BitNetInference, KVCache, PerformanceContract, PerformanceMonitor};
use golden::{Derivation, Golden, Prompt};

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

/// The golden logits of a prompt in one of the semantics, as transformers gives them.
fn golden_logits(prompt: &Prompt, semantics: Semantics) -> Result<&[f32], Stop> {
    let logits = prompt.logits(semantics.oracle(), Derivation::Transformers);
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
        let (fp32, a8) = (golden_logits(prompt, Semantics::Fp32)?, golden_logits(prompt, Semantics::W158A8)?);
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
        let expected = golden_logits(prompt, semantics)?;
        let seen = evaluate(ctx, engine.as_mut(), prompt)?;
        ctx.require(
            seen.len() == expected.len(),
            format!("{} logits for prompt {}", expected.len(), prompt.name),
            seen.len(),
        )?;
        own.add(&seen, expected, prompt.vocab);
        fp32.add(&seen, golden_logits(prompt, Semantics::Fp32)?, prompt.vocab);
        largest = largest.max(reach(expected));
        ctx.compared(expected.len());
    }
    correlation(ctx, &fp32);
    own_semantics(ctx, &golden, &own, largest)?;
    top1(ctx, &own);
    decode(ctx, &golden, engine.as_mut())
}

/// The contract's own clause: the worst row's correlation with the fp32 golden, here and through the monitor.
fn correlation(ctx: &mut Context<'_>, rows: &Rows) {
    let (row, worst) = rows.worst_pearson();
    ctx.check(
        worst > tolerance::MIN_CORRELATION,
        format!(
            "Pearson correlation with the fp32 golden above {} in all {} rows",
            tolerance::MIN_CORRELATION,
            rows.len()
        ),
        format!("{worst:.6} in row {row}"),
    );
    let mut monitor = PerformanceMonitor::new(PerformanceContract::default());
    ctx.check_ok(format!("validate_accuracy({worst:.6})"), monitor.validate_accuracy(worst as f32));
    ctx.measure_min(measure::WORST_CORRELATION, worst);
    ctx.measure("mean_kl_fp32_nats", rows.mean(|r| r.kl));
}

fn own_semantics(ctx: &mut Context<'_>, golden: &Golden, rows: &Rows, reach: f64) -> CheckResult {
    let (semantics, noise) = (ctx.capabilities().semantics, ctx.capabilities().noise);
    let (row, pearson) = rows.worst_pearson();
    if (semantics, noise) == (Semantics::Fp32, Noise::F32) {
        let (row, gap) = rows.worst_abs();
        let what = format!("largest difference of a logit from the fp32 golden (row {row} of {})", rows.len());
        ctx.check_at_most(what, gap, fp32_limit(reach));
        ctx.measure("worst_abs_own_golden", gap);
    } else {
        let limit = match noise {
            Noise::F32 => tolerance::A8_ROW_CORRELATION,
            Noise::Coarse => tolerance::COARSE_ROW_CORRELATION,
        };
        ctx.check_at_least(
            format!("correlation of the worst row (row {row}) with the {} golden", semantics.name()),
            pearson,
            limit,
        );
        let gap = quantisation_gap(golden)?;
        let limit = match noise {
            Noise::F32 => tolerance::A8_GAP_MEAN,
            Noise::Coarse => tolerance::COARSE_GAP_MEAN,
        };
        let ratio = rows.mean(|r| r.kl) / gap.mean(|r| r.kl);
        ctx.check_at_most("mean KL from the golden, in units of the model's quantisation gap", ratio, limit);
        ctx.measure("mean_kl_in_gaps", ratio);
        let ratio = rows.mean(|r| r.nmse) / gap.mean(|r| r.nmse);
        ctx.check_at_most("mean NMSE from the golden, in units of the model's quantisation gap", ratio, limit);
        ctx.measure("mean_nmse_in_gaps", ratio);
        let (row, worst) = rows.worst_kl();
        let ratio = worst / gap.worst_kl().1;
        ctx.check_at_most(
            format!("KL of the worst row (row {row}), in units of the worst gap"),
            ratio,
            tolerance::GAP_WORST,
        );
    }
    ctx.measure("worst_correlation_own_golden", pearson);
    let slope = rows.mean(|r| r.slope);
    ctx.check_at_most(
        "distance of the mean slope of logits on golden logits from 1",
        (slope - 1.0).abs(),
        tolerance::SLOPE_MEAN,
    );
    let (row, slope) = rows.worst(|r| (r.slope - 1.0).abs(), |a, b| a > b);
    ctx.check_at_most(format!("distance of the slope of row {row} from 1"), slope, tolerance::SLOPE_WORST);
    Ok(())
}

fn top1(ctx: &mut Context<'_>, rows: &Rows) {
    let (row, lost) = rows.worst(|r| r.lost_margin, |a, b| a > b);
    ctx.check(
        lost < own_margin(ctx),
        format!("the golden's top-1 token wherever it leads by {} or more", own_margin(ctx)),
        format!("another token in row {row}, where it leads by {lost:.3}"),
    );
    ctx.measure("top1_agreement", rows.mean(|r| f64::from(u8::from(r.lost_margin == 0.0))));
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
    let expected = &golden_logits(longest, capabilities.semantics)?[..tokens.len() * longest.vocab];
    let expected = expected.repeat(sessions);
    let mut rows = Rows::default();
    rows.add(&seen, &expected, longest.vocab);
    ctx.compared(seen.len());
    if (capabilities.semantics, capabilities.noise) == (Semantics::Fp32, Noise::F32) {
        let (row, gap) = rows.worst_abs();
        ctx.check_at_most(
            format!("largest difference from the golden in decoding (row {row})"),
            gap,
            fp32_limit(reach(&expected)),
        );
    } else {
        let (row, worst) = rows.worst_pearson();
        let what = format!("correlation of the worst row (row {row}) with the golden in decoding");
        ctx.check_at_least(what, worst, tolerance::MIN_CORRELATION);
        let (row, lost) = rows.worst(|r| r.lost_margin, |a, b| a > b);
        let what = format!("golden margin lost in decoding (row {row})");
        ctx.check_at_most(what, lost, own_margin(ctx));
    }
    Ok(())
}

fn greedy_tokens(ctx: &mut Context<'_>) -> CheckResult {
    let golden = ctx.golden()?;
    let semantics = ctx.capabilities().semantics.oracle();
    let mut engine = ctx.engine()?;
    let mut compared = 0;
    for prompt in &golden.prompts {
        for (row, tokens) in prompt.input_ids.iter().enumerate() {
            let (Some(expected), Some(margins)) =
                (prompt.greedy(semantics).get(row), prompt.margins(semantics).get(row))
            else {
                continue;
            };
            let clear = margins.iter().take_while(|&&m| f64::from(m) >= own_margin(ctx)).count().min(expected.len());
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
