//! Service levels, held with real measurements of verified output. What the times mean is defined in SPEC.md.

mod clock;
mod decide;
mod latency;
mod noise;
mod truth;

use super::support::{mix, prompt};
use crate::case::{Category, Check, CheckResult, Context, Stop};
use crate::tolerance;
use bitnet_contracts::{BitNetInference, FinishReason, GenerationConfig};
use decide::{Claim, Ruling, Sample, percentile};
use noise::Stopwatch;
use std::time::Duration;

const SLA: Category = Category::Sla;

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "SLA-1",
        "sla/gate",
        SLA,
        "decoding meets the default contract, with its output verified in the same run",
        latency::gate,
    )
    .exclusive()
    .within(300),
    Check::new(
        "SLA-2",
        "sla/time_to_first_token",
        SLA,
        "the first token of a prompt comes within the contract's latency for its tokens",
        latency::time_to_first_token,
    )
    .exclusive()
    .within(300)
    .long(),
    Check::new(
        "SLA-3",
        "sla/metrics_are_true",
        SLA,
        "times, operations and memory of a forward pass are what happened",
        truth::metrics_are_true,
    ),
    Check::new(
        "SLA-4",
        "sla/determinism_is_free",
        SLA,
        "deterministic generation is no slower than sampling without a seed",
        determinism_is_free,
    )
    .exclusive()
    .within(300)
    .long(),
    Check::new(
        "SLA-6",
        "sla/time_per_output_token",
        SLA,
        "generation meets the default contract for each token after the first, counted from the ids returned",
        latency::generation,
    )
    .exclusive()
    .within(300)
    .long(),
    Check::new(
        "SLA-7",
        "sla/generation_times_are_true",
        SLA,
        "the times of a generation are what happened, one for each id returned",
        truth::generation_times_are_true,
    )
    .long(),
];

/// Leaves a set of samples in the report: the one place through which they all go.
fn report_samples(ctx: &mut Context<'_>, key: &str, samples: &[f64]) {
    for (name, share) in [("p50", 0.5), ("p95", 0.95), ("p99", 0.99)] {
        let value = percentile(samples, share);
        if value.is_finite() {
            ctx.timing(&format!("{key}_{name}"), value);
        }
    }
}

fn determinism_is_free(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let length = 4.min(ctx.facts().max_positions / 2).max(1);
    let count = 12.min(ctx.facts().max_positions - length);
    let free = GenerationConfig { seed: None, ..GenerationConfig::default() };
    let mut watch = Stopwatch::new(f64::INFINITY);
    // Milliseconds for each step of a generation, and its ids.
    let mut timed = |engine: &mut dyn BitNetInference, salt: u64, seed: Option<u64>| {
        let tokens = prompt(ctx.facts(), length, 1_030_000 + salt);
        let (result, sample) = watch.time(1, || match seed {
            Some(seed) => engine.generate_deterministic(&tokens, count, seed),
            None => engine.generate(&tokens, count, &free),
        });
        let result = result?;
        let last = usize::from(result.finish_reason == FinishReason::EndOfSequence);
        Ok::<_, Stop>((sample.wall / (result.generated_tokens.len() + last).max(1) as f64, result.generated_tokens))
    };
    let (mut fixed, mut sampled, mut wrong, mut pairs) = (Vec::new(), Vec::new(), None, 0u64);
    timed(engine.as_mut(), u64::MAX >> 32, Some(0))?;
    // The median pair decides: what disturbs the machine meets either side of a pair alike.
    let claim = Claim { share: 0.5, limit: tolerance::DETERMINISTIC_COST.limit() };
    let decision = claim.decide(Duration::from_secs(120), || {
        let seed = mix(pairs);
        let (one, other) = (3 * pairs, 3 * pairs + 1);
        // Either side goes first in turn, and no prompt comes twice.
        let (d, f) = if pairs.is_multiple_of(2) {
            let d = timed(engine.as_mut(), one, Some(seed))?;
            (d, timed(engine.as_mut(), other, None)?)
        } else {
            let f = timed(engine.as_mut(), other, None)?;
            (timed(engine.as_mut(), one, Some(seed))?, f)
        };
        pairs += 1;
        // The run is void if what was timed is not deterministic.
        let again = engine.generate_deterministic(&prompt(ctx.facts(), length, 1_030_000 + one), count, seed)?;
        if again.generated_tokens != d.1 {
            wrong = Some(format!("seed {seed}: {:?}, and not timed {:?}", d.1, again.generated_tokens));
            return Ok(None);
        }
        fixed.push(d.0);
        sampled.push(f.0);
        Ok(Some(Sample::plain(d.0 / f.0.max(1e-9))))
    })?;
    watch.report(ctx);
    let seen = wrong.as_deref().unwrap_or_default();
    ctx.require(wrong.is_none(), "the timed tokens of a seed are those of the seed", format!("void: {seen}"))?;
    let cost = percentile(&decision.walls(), 0.5);
    ctx.timing("deterministic_cost", cost);
    report_samples(ctx, "deterministic_step_ms", &fixed);
    report_samples(ctx, "sampling_step_ms", &sampled);
    let what = "time of deterministic over free sampling: the median pair, at 99 % confidence, at most";
    if decision.ruling == Ruling::Open {
        return Err(Stop::Inconclusive(format!("not decided: {what} {}: {}", claim.limit, decision.text())));
    }
    ctx.note_error(cost, &tolerance::DETERMINISTIC_COST);
    ctx.check(decision.ruling == Ruling::Holds, format!("{what} {}", claim.limit), decision.text());
    Ok(())
}
