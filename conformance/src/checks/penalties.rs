//! Penalties: their signs, what they count, and their order.

use super::sampling::{DRAWS, check, choice_margin, draw, hold, rate, warm};
use super::support::{generate, logits_of, plain, prompt};
use super::table::{Table, penalised, ranked};
use crate::case::{Check, CheckResult, Context, Stop};
use bitnet_contracts::{BitNetInference, GenerationConfig};

pub(super) const CHECKS: &[Check] = &[
    check(
        "SMP-6",
        "sampling/repetition_penalty",
        "the repetition penalty divides positive and multiplies negative logits",
        repetition_penalty,
    )
    .long(),
    check(
        "SMP-7",
        "sampling/penalty_scope",
        "penalties count prompt and generated tokens, at every step",
        penalty_scope,
    )
    .long(),
    check(
        "SMP-8",
        "sampling/frequency_and_presence",
        "frequency_penalty counts occurrences, presence_penalty does not",
        frequency_and_presence,
    )
    .long(),
];

/// A small model with a context of 128.
const LONG_MODEL: &str = "gqa4-tied-f16";
/// More tokens than the windows that engines are known to look back by (64), and nearly as many as the model has room for.
const FAR: usize = 110;

/// Of the prompts that a function makes of a number, the one whose first token is likeliest to come next, so that what is
/// done to that token shows in many draws; and the logits that follow it.
fn likely_first(
    engine: &mut dyn BitNetInference,
    make: impl Fn(u64) -> Vec<u32>,
) -> Result<(Vec<u32>, Vec<f32>), Stop> {
    let mut best: Option<(f32, Vec<u32>, Vec<f32>)> = None;
    for i in 0..16 {
        let tokens = make(i);
        let logits = logits_of(engine, &tokens)?.last(0).to_vec();
        let lead = logits[tokens[0] as usize] - logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if best.as_ref().is_none_or(|(kept, ..)| lead > *kept) {
            best = Some((lead, tokens, logits));
        }
    }
    best.map(|(_, tokens, logits)| (tokens, logits)).ok_or_else(|| Stop::Inconclusive("no prompt".to_string()))
}

/// A prompt, the logits behind it and a configuration, of some that are tried, for which a sampler that divides negative
/// logits too is furthest off, and how far that is.
fn telling_sign(
    ctx: &Context<'_>,
    engine: &mut dyn BitNetInference,
    penalty: f32,
    salt: u64,
) -> Result<(Vec<u32>, Vec<f32>, GenerationConfig, f64), Stop> {
    let mut best: Option<(Vec<u32>, Vec<f32>, GenerationConfig, f64)> = None;
    for i in 0..16 {
        let tokens = prompt(ctx.facts(), 12, salt + 100 + i);
        let logits = logits_of(engine, &tokens)?.last(0).to_vec();
        let seen = |t: usize| tokens.contains(&(t as u32));
        let divided: Vec<f32> =
            logits.iter().enumerate().map(|(t, &l)| if seen(t) { l / penalty } else { l }).collect();
        for share in [0.4, 0.12, 0.04] {
            let base = GenerationConfig { repetition_penalty: penalty, ..plain(0) };
            let config = GenerationConfig { temperature: warm(&logits, &tokens, &base, share), ..base };
            let neutral = GenerationConfig { repetition_penalty: 1.0, ..config.clone() };
            let table = Table::new(&logits, &tokens, &config);
            let wrong = table.distance(&Table::new(&divided, &tokens, &neutral));
            if best.as_ref().is_none_or(|(.., kept)| wrong > *kept) {
                best = Some((tokens.clone(), logits.clone(), config, wrong));
            }
        }
    }
    best.ok_or_else(|| Stop::Inconclusive("no prompt".to_string()))
}

fn repetition_penalty(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    for (penalty, salt) in [(3.0f32, 3500), (0.4, 3600)] {
        // A token four times over: its penalty is the same however often it was seen.
        let (tokens, logits) = likely_first(engine.as_mut(), |i| {
            let words = prompt(ctx.facts(), 6, salt + i);
            [&[words[0]; 3], words.as_slice()].concat()
        })?;
        let base = GenerationConfig { repetition_penalty: penalty, ..plain(0) };
        let config = GenerationConfig { temperature: warm(&logits, &tokens, &base, 0.12), ..base };
        let table = Table::new(&logits, &tokens, &config);
        let drawn = draw(ctx, engine.as_mut(), &tokens, &config, 2 * DRAWS)?;
        hold(ctx, &format!("repetition_penalty {penalty} of a token seen four times"), &drawn, &table);

        // The sign: a prompt and a temperature at which most of the mass moves if negative logits are divided too.
        let (tokens, logits, config, wrong) = telling_sign(ctx, engine.as_mut(), penalty, salt)?;
        let table = Table::new(&logits, &tokens, &config);
        ctx.note(format!("penalty {penalty}: {wrong:.3} of the mass moves with the wrong sign"));
        let drawn = draw(ctx, engine.as_mut(), &tokens, &config, 2 * DRAWS)?;
        let what = format!("repetition_penalty {penalty}");
        hold(ctx, &what, &drawn, &table);
        for (name, positive) in [("negative", false), ("positive", true)] {
            let group: Vec<u32> = (0..logits.len() as u32)
                .filter(|t| tokens.contains(t) && (logits[*t as usize] > 0.0) == positive)
                .collect();
            let p = group.iter().map(|&t| table.probability(t)).sum::<f64>();
            let hits = drawn.iter().filter(|t| group.contains(t)).count();
            rate(ctx, &format!("{what}: draws of prompt tokens with {name} logits"), drawn.len(), hits, p);
        }
    }
    Ok(())
}

/// Checks a generation with one allowed token a step: each is the argmax of its own penalised logits.
fn follow(
    ctx: &mut Context<'_>,
    engine: &mut dyn BitNetInference,
    what: &str,
    tokens: &[u32],
    config: &GenerationConfig,
) -> Result<Vec<u32>, Stop> {
    let result = generate(engine, tokens, 12, config)?;
    let sequence = [tokens, &result.generated_tokens].concat();
    let logits = logits_of(engine, &sequence)?;
    for (step, &token) in result.generated_tokens.iter().enumerate() {
        let seen = tokens.len() + step;
        let row = logits.row(0, seen - 1);
        let values = penalised(row, &sequence[..seen], config);
        let order = ranked(&values);
        let margin = values[order[0] as usize] - values[order[1] as usize];
        if margin < choice_margin(ctx, row, values[order[0] as usize]) {
            break;
        }
        if !ctx.check_eq(format!("{what}: token of step {step}"), token, order[0]) {
            break;
        }
    }
    Ok(result.generated_tokens)
}

fn penalty_scope(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    // A prompt whose most likely next token is in it already, so that counting the prompt or not makes a difference.
    let mut chosen = None;
    for salt in 0..60 {
        let tokens = prompt(ctx.facts(), 20, 360 + salt);
        let (top, _) = super::stats::top_two(logits_of(engine.as_mut(), &tokens)?.last(0));
        if tokens.contains(&(top as u32)) {
            chosen = Some(tokens);
            break;
        }
    }
    let tokens = chosen.ok_or_else(|| Stop::Inconclusive("no prompt holds its own continuation".to_string()))?;
    let only = GenerationConfig { top_k: Some(1), ..plain(1) };
    let cases = [
        ("repetition_penalty 5", GenerationConfig { repetition_penalty: 5.0, ..only.clone() }),
        ("repetition_penalty 0.5", GenerationConfig { repetition_penalty: 0.5, ..only.clone() }),
        ("presence_penalty 4", GenerationConfig { presence_penalty: 4.0, ..only.clone() }),
        ("frequency_penalty 1.5", GenerationConfig { frequency_penalty: 1.5, ..only.clone() }),
        ("frequency_penalty -1", GenerationConfig { frequency_penalty: -1.0, ..only.clone() }),
        (
            "all three",
            GenerationConfig { repetition_penalty: 1.7, frequency_penalty: 0.7, presence_penalty: 0.9, ..only.clone() },
        ),
    ];
    for (what, config) in cases {
        follow(ctx, engine.as_mut(), what, &tokens, &config)?;
        let greedy = GenerationConfig { do_sample: false, top_k: None, ..config };
        follow(ctx, engine.as_mut(), &format!("greedy, {what}"), &tokens, &greedy)?;
    }
    let config = GenerationConfig { presence_penalty: 1e6, ..only };
    let made = follow(ctx, engine.as_mut(), "presence_penalty 1e6", &tokens, &config)?;
    let mut all = tokens;
    for token in made {
        ctx.check(!all.contains(&token), "a token that was not there before", format!("token {token} again"));
        all.push(token);
    }
    far_back(ctx)
}

/// The whole context counts, not its end: a token that came twice, [`FAR`] - 2 tokens ago, and no other one twice.
fn far_back(ctx: &mut Context<'_>) -> CheckResult {
    let other = ctx.other_model(LONG_MODEL)?;
    let mut engine = ctx.factory().create(&other)?;
    let mut tokens = Vec::new();
    for token in prompt(&other.config, 2 * FAR, 379) {
        if !tokens.contains(&token) && tokens.len() < FAR {
            tokens.push(token);
        }
    }
    let twice = tokens[0];
    tokens[1] = twice;
    let config = GenerationConfig { frequency_penalty: -1000.0, ..super::support::greedy() };
    let seen = generate(engine.as_mut(), &tokens, 1, &config)?.generated_tokens;
    ctx.check_slices(
        format!("frequency_penalty -1000 of a token seen twice, {} tokens ago: the token", FAR - 2),
        &seen,
        &[twice],
    );
    Ok(())
}

fn frequency_and_presence(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    // The first word four times, the second twice, the others once.
    let (tokens, logits) = likely_first(engine.as_mut(), |i| {
        let words = prompt(ctx.facts(), 6, 3700 + i);
        [words.as_slice(), &[words[0]; 3], &[words[1]], &words[5..]].concat()
    })?;
    let words = &tokens[..6];
    let cases = [
        ("frequency_penalty 2", GenerationConfig { frequency_penalty: 2.0, ..plain(0) }),
        ("presence_penalty 3", GenerationConfig { presence_penalty: 3.0, ..plain(0) }),
        ("frequency_penalty -1.5", GenerationConfig { frequency_penalty: -1.5, ..plain(0) }),
        ("presence_penalty -4", GenerationConfig { presence_penalty: -4.0, ..plain(0) }),
        (
            "all three penalties",
            GenerationConfig { repetition_penalty: 0.5, frequency_penalty: 0.5, presence_penalty: 2.0, ..plain(0) },
        ),
    ];
    for (what, base) in cases {
        // What is lifted must stand out; what is pushed down, be missed among many.
        let share = if base.frequency_penalty + base.presence_penalty < 0.0 { 0.5 } else { 0.15 };
        let config = GenerationConfig { temperature: warm(&logits, &tokens, &base, share), ..base };
        let table = Table::new(&logits, &tokens, &config);
        let drawn = draw(ctx, engine.as_mut(), &tokens, &config, DRAWS)?;
        hold(ctx, what, &drawn, &table);
        let p =
            words.iter().collect::<std::collections::BTreeSet<_>>().into_iter().map(|&t| table.probability(t)).sum();
        let hits = drawn.iter().filter(|t| words.contains(t)).count();
        rate(ctx, &format!("{what}: draws of prompt tokens"), drawn.len(), hits, p);
    }
    // Filters see the penalised logits.
    let base = GenerationConfig { frequency_penalty: 1.5, ..plain(0) };
    let hot = GenerationConfig { temperature: warm(&logits, &tokens, &base, 0.2), ..base };
    let top_p = Some(Table::new(&logits, &tokens, &hot).nucleus_of(4));
    for (what, config) in [
        ("top_p behind a penalty", GenerationConfig { top_p, ..hot.clone() }),
        ("top_k behind a penalty", GenerationConfig { top_k: Some(4), ..hot.clone() }),
    ] {
        let drawn = draw(ctx, engine.as_mut(), &tokens, &config, DRAWS)?;
        hold(ctx, what, &drawn, &Table::new(&logits, &tokens, &config));
    }
    Ok(())
}
