//! Sampling against exact tables: the allowed set, every likely token of it, and the frequencies.
//!
//! The tables come from the backend's own logits, so these checks judge the sampler alone. Each draw is one
//! `generate` call for one token with its own seed. Settings are chosen so that a fault of one token more or less, a
//! wrong order or a wrong sign moves many draws; how unlikely a false alarm is, is [`tolerance::FALSE_ALARM`].

use super::stats::surprise;
use super::support::{TABLE_MODEL, generate, logits_of, mix, plain, prompt};
use super::table::{Table, ranked};
use crate::case::{Category, Check, CheckResult, Context, ModelSet, Stop};
use crate::tolerance;
use bitnet_contracts::{BitNetInference, FinishReason, GenerationConfig};

const SAMPLING: Category = Category::Sampling;

pub(super) const fn check(
    id: &'static str,
    name: &'static str,
    clause: &'static str,
    run: fn(&mut Context<'_>) -> CheckResult,
) -> Check {
    Check::new(id, name, SAMPLING, clause, run).on(ModelSet::Only(TABLE_MODEL)).within(300)
}

pub(super) const CHECKS: &[Check] = &[
    check(
        "SMP-1",
        "sampling/plain_frequencies",
        "without filters every token comes as often as its softmax says",
        plain_frequencies,
    ),
    check("SMP-2", "sampling/temperature", "temperature divides the logits", temperature),
    check("SMP-3", "sampling/top_k", "top_k keeps exactly the k most likely tokens", top_k),
    check("SMP-4", "sampling/top_p", "top_p keeps exactly the smallest set whose mass reaches p", top_p),
    check(
        "SMP-5",
        "sampling/order_of_filters",
        "temperature, then top-k, then top-p of what top-k left",
        order_of_filters,
    ),
    check("SMP-9", "sampling/defaults_sample", "the default configuration samples", defaults_sample),
    check(
        "SMP-10",
        "sampling/every_step",
        "every token of a generation is drawn anew, by the rules, from its own logits",
        every_step,
    )
    .long(),
    check(
        "SMP-11",
        "sampling/extreme_temperature",
        "the smallest and the largest temperatures do what they say",
        extreme_temperature,
    ),
    check("SMP-12", "sampling/ties", "greedy takes the lowest id among equal maxima", ties),
];

/// Draws of one table: enough that a token of 6 % which never comes has a probability below the budget.
pub(super) const DRAWS: usize = 400;

/// Draws after which a token of probability `p` has come, but for a probability within the budget.
fn draws_to_see(p: f64) -> usize {
    (tolerance::FALSE_ALARM.ln() / (1.0 - p).ln()).ceil() as usize
}

/// Draws one token `draws` times with different seeds.
pub(super) fn draw(
    ctx: &Context<'_>,
    engine: &mut dyn BitNetInference,
    tokens: &[u32],
    config: &GenerationConfig,
    draws: usize,
) -> Result<Vec<u32>, Stop> {
    let mut drawn = Vec::with_capacity(draws);
    for i in 0..draws {
        let config = GenerationConfig { seed: Some(mix(i as u64)), min_new_tokens: 0, ..config.clone() };
        let result = generate(engine, tokens, 1, &config)?;
        let ended = result.finish_reason == FinishReason::EndOfSequence;
        match (result.generated_tokens.as_slice(), ctx.facts().eos.as_slice()) {
            (&[token], _) => drawn.push(token),
            // An engine may end at the model's own end-of-sequence token, which it then drew.
            (&[], &[eos]) if ended => drawn.push(eos),
            (seen, _) => {
                let seen = format!("{seen:?}, {:?}", result.finish_reason);
                return Err(Stop::Unexpected(format!("one token was due from generate, and it gave {seen}")));
            }
        }
    }
    Ok(drawn)
}

/// Holds draws against a table: nothing outside it, everything likely in it, and the right frequencies of every token
/// and of every set of most likely tokens.
pub(super) fn hold(ctx: &mut Context<'_>, what: &str, drawn: &[u32], table: &Table) {
    let n = drawn.len();
    let outside = drawn.iter().copied().find(|&t| table.probability(t) == 0.0);
    ctx.compared(n);
    ctx.check(
        outside.is_none(),
        format!("{what}: only tokens of {}", brief(&table.tokens())),
        outside.map_or(String::new(), |t| format!("token {t}")),
    );
    let mut group = Vec::new();
    for &(token, p) in &table.allowed {
        let hits = drawn.iter().filter(|&&t| t == token).count();
        rate(ctx, &format!("{what}: draws of token {token}"), n, hits, p);
        group.push(token);
        if group.len() < table.allowed.len() {
            let p: f64 = table.allowed[..group.len()].iter().map(|(_, p)| p).sum();
            let hits = drawn.iter().filter(|t| group.contains(t)).count();
            rate(ctx, &format!("{what}: draws of the {} most likely tokens", group.len()), n, hits, p);
        }
    }
}

/// Asserts that `hits` of `n` draws are believable where each has probability `p`.
pub(super) fn rate(ctx: &mut Context<'_>, what: &str, n: usize, hits: usize, p: f64) {
    let limit = (2.0 / tolerance::FALSE_ALARM).ln();
    let surprise = surprise(n, hits, p.min(1.0 - 1e-12));
    ctx.check_chance(
        surprise <= limit,
        format!("{what}: about {:.1} of {n} draws", p * n as f64),
        format!("{hits} of them, which has a probability below e^-{surprise:.1}"),
    );
}

fn brief(tokens: &[u32]) -> String {
    if tokens.len() <= 12 { format!("{tokens:?}") } else { format!("a set of {}", tokens.len()) }
}

/// A temperature at which the most likely token has about the given probability.
pub(super) fn warm(logits: &[f32], history: &[u32], config: &GenerationConfig, share: f64) -> f32 {
    let (mut low, mut high) = (0.05f32, 200.0f32);
    for _ in 0..40 {
        let middle = (low * high).sqrt();
        let config = GenerationConfig { temperature: middle, ..config.clone() };
        let top = Table::new(logits, history, &config).allowed[0].1;
        *(if top > share { &mut low } else { &mut high }) = middle;
    }
    // Four digits are enough, and the same on every platform.
    (high * 1e4).round() / 1e4
}

/// An engine, a prompt, and the logits that follow it.
pub(super) type Start = (Box<dyn BitNetInference>, Vec<u32>, Vec<f32>);

/// Makes an engine and a prompt of `len` tokens, and evaluates it.
pub(super) fn start(ctx: &Context<'_>, len: usize, salt: u64) -> Result<Start, Stop> {
    let mut engine = ctx.engine()?;
    let tokens = prompt(ctx.facts(), len, salt);
    let logits = logits_of(engine.as_mut(), &tokens)?.last(0).to_vec();
    Ok((engine, tokens, logits))
}

/// How many tokens to keep, of 3 to 6, so that the border between the last kept and the first dropped is widest.
fn widest_border(table: &Table) -> usize {
    let gap = |keep: &usize| table.allowed[keep - 1].1 - table.allowed[*keep].1;
    (3..=6).max_by(|a, b| gap(a).total_cmp(&gap(b))).unwrap_or(3)
}

fn plain_frequencies(ctx: &mut Context<'_>) -> CheckResult {
    for (salt, top_p, top_k) in [(300, None, None), (301, Some(1.0), None), (302, None, Some(10_000))] {
        let (mut engine, tokens, logits) = start(ctx, 3, salt)?;
        let base = GenerationConfig { top_p, top_k, ..plain(0) };
        let config = GenerationConfig { temperature: warm(&logits, &tokens, &base, 0.2), ..base };
        // Enough to see a tail of 5 % that never comes.
        let drawn = draw(ctx, engine.as_mut(), &tokens, &config, 2 * DRAWS)?;
        let what = format!("top_p {top_p:?}, top_k {top_k:?}");
        hold(ctx, &what, &drawn, &Table::new(&logits, &tokens, &config));
    }
    Ok(())
}

fn temperature(ctx: &mut Context<'_>) -> CheckResult {
    let (mut engine, mut tokens, mut logits) = start(ctx, 3, 310)?;
    // Low temperatures show something where the first tokens are close to each other.
    for salt in 311..330 {
        let other = prompt(ctx.facts(), 3, salt);
        let row = logits_of(engine.as_mut(), &other)?.last(0).to_vec();
        if super::stats::top_two(&row).1 < super::stats::top_two(&logits).1 {
            (tokens, logits) = (other, row);
        }
    }
    for temperature in [0.2, 0.5, 1.0, 2.0, 4.0] {
        let config = GenerationConfig { temperature, ..plain(0) };
        let drawn = draw(ctx, engine.as_mut(), &tokens, &config, DRAWS)?;
        hold(ctx, &format!("temperature {temperature}"), &drawn, &Table::new(&logits, &tokens, &config));
    }
    Ok(())
}

fn top_k(ctx: &mut Context<'_>) -> CheckResult {
    let (mut engine, tokens, logits) = start(ctx, 3, 320)?;
    let warm = GenerationConfig { temperature: warm(&logits, &tokens, &plain(0), 0.2), ..plain(0) };
    let border = widest_border(&Table::new(&logits, &tokens, &warm));
    for k in [1, border] {
        let config = GenerationConfig { top_k: Some(k), ..warm.clone() };
        let table = Table::new(&logits, &tokens, &config);
        ctx.check_eq("tokens in the table", table.allowed.len(), k);
        let drawn = draw(ctx, engine.as_mut(), &tokens, &config, if k == 1 { 20 } else { DRAWS })?;
        hold(ctx, &format!("top_k {k}"), &drawn, &table);
    }
    // More than fits into a fixed number of places.
    let hot = GenerationConfig { temperature: 1e4, ..plain(0) };
    let k = logits.len() - 10;
    let config = GenerationConfig { top_k: Some(k), ..hot };
    let drawn = draw(ctx, engine.as_mut(), &tokens, &config, DRAWS)?;
    hold(ctx, &format!("top_k {k}"), &drawn, &Table::new(&logits, &tokens, &config));
    // Of equal logits too only k are kept; which of them is open.
    for salt in 0..10 {
        let Some((mut tied, tokens, equal)) = tied(ctx, engine.as_mut(), salt)? else { continue };
        for k in [1, 2] {
            let config = GenerationConfig { top_k: Some(k), ..plain(0) };
            let drawn = draw(ctx, tied.as_mut(), &tokens, &config, 60)?;
            let outside = drawn.iter().find(|&&t| !equal.contains(&t));
            ctx.check(outside.is_none(), format!("top_k {k} of equal maxima: {equal:?}"), format!("{outside:?}"));
            // One of two equal tokens that never comes in 60 draws has a probability of 2^-59.
            let distinct = drawn.iter().collect::<std::collections::BTreeSet<_>>().len();
            ctx.check_chance(distinct == k, format!("top_k {k} of equal maxima keeps {k}"), distinct);
        }
        break;
    }
    Ok(())
}

fn top_p(ctx: &mut Context<'_>) -> CheckResult {
    let (mut engine, tokens, logits) = start(ctx, 3, 330)?;
    let warm = GenerationConfig { temperature: warm(&logits, &tokens, &plain(0), 0.2), ..plain(0) };
    let all = Table::new(&logits, &tokens, &warm);
    let border = widest_border(&all);
    // One token too many or too few must be seen: both at the border have mass enough for hundreds of draws.
    let (kept, dropped) = (all.allowed[border - 1].1, all.allowed[border].1);
    ctx.note(format!("nucleus of {border}: the last kept has {kept:.3}, the first dropped {dropped:.3}"));
    let mass: f64 = all.allowed[..=border].iter().map(|(_, p)| p).sum();
    let draws = draws_to_see(dropped / mass).max(DRAWS);
    if draws > 10 * DRAWS {
        return Err(Stop::Inconclusive(format!("the first token outside the nucleus has only {dropped:.4}")));
    }
    for keep in [1, 2, border] {
        let config = GenerationConfig { top_p: Some(all.nucleus_of(keep)), ..warm.clone() };
        let table = Table::new(&logits, &tokens, &config);
        ctx.check_eq("tokens in the table", table.allowed.len(), keep);
        let drawn = draw(ctx, engine.as_mut(), &tokens, &config, if keep == 1 { 100 } else { draws })?;
        hold(ctx, &format!("top_p {:?} (a nucleus of {keep})", config.top_p), &drawn, &table);
    }
    // However small p is, one token is kept.
    let config = GenerationConfig { top_p: Some(1e-6), ..warm };
    let drawn = draw(ctx, engine.as_mut(), &tokens, &config, 20)?;
    hold(ctx, "top_p 1e-6", &drawn, &Table::new(&logits, &tokens, &config));
    Ok(())
}

fn order_of_filters(ctx: &mut Context<'_>) -> CheckResult {
    let (mut engine, tokens, logits) = start(ctx, 3, 340)?;
    let warm = GenerationConfig { temperature: warm(&logits, &tokens, &plain(0), 0.18), ..plain(0) };
    let k = 7;
    let top = Table::new(&logits, &tokens, &GenerationConfig { top_k: Some(k), ..warm.clone() });
    let keep = (2..=4).find(|&keep| {
        // The mass left by top-k is what p refers to: with the whole mass the nucleus would be larger.
        let wrong = GenerationConfig { top_p: Some(top.nucleus_of(keep)), ..warm.clone() };
        Table::new(&logits, &tokens, &wrong).allowed.len() > keep
    });
    let Some(keep) = keep else {
        return Err(Stop::Inconclusive("the order of filters makes no difference on these logits".to_string()));
    };
    let config = GenerationConfig { top_k: Some(k), top_p: Some(top.nucleus_of(keep)), ..warm.clone() };
    let table = Table::new(&logits, &tokens, &config);
    ctx.check_eq("tokens in the table of top-k, then top-p", table.allowed.len(), keep);
    let drawn = draw(ctx, engine.as_mut(), &tokens, &config, DRAWS)?;
    hold(ctx, &format!("top_k {k}, then top_p {:?} of the mass that is left", config.top_p), &drawn, &table);

    // The nucleus is taken at the temperature, not before it.
    let hot = GenerationConfig { temperature: 2.0 * warm.temperature, ..warm.clone() };
    let all = Table::new(&logits, &tokens, &hot);
    let config = GenerationConfig { top_p: Some(all.nucleus_of(6)), ..hot };
    let table = Table::new(&logits, &tokens, &config);
    ctx.check_eq("tokens in the table of temperature, then top-p", table.allowed.len(), 6);
    let drawn = draw(ctx, engine.as_mut(), &tokens, &config, DRAWS)?;
    let what = format!("temperature {}, then top_p {:?}", config.temperature, config.top_p);
    hold(ctx, &what, &drawn, &table);
    Ok(())
}

/// How far apart two penalised logits must be for a sampler's f32 arithmetic, and for noise of the backend that its own
/// decoding may add, not to swap them.
pub(super) fn choice_margin(ctx: &Context<'_>, row: &[f32], penalised: f64) -> f64 {
    let noise = if super::support::exact(ctx) { 0.0 } else { super::support::own_margin(ctx, row) };
    // A penalty divides or multiplies, then subtracts twice: a rounding each, on either of the two.
    noise + 6.0 * f64::from(f32::EPSILON) * super::support::reach(row).max(penalised.abs())
}

fn defaults_sample(ctx: &mut Context<'_>) -> CheckResult {
    let (mut engine, tokens, logits) = start(ctx, 3, 380)?;
    let config = GenerationConfig { min_new_tokens: 0, ..GenerationConfig::default() };
    let drawn = draw(ctx, engine.as_mut(), &tokens, &config, DRAWS)?;
    hold(ctx, "default configuration", &drawn, &Table::new(&logits, &tokens, &config));
    let mut texts = std::collections::BTreeSet::new();
    for seed in 0..8 {
        texts.insert(engine.generate_deterministic(&tokens, 16, seed)?.generated_tokens);
    }
    ctx.check_chance(texts.len() > 1, "eight seeds of generate_deterministic give more than one text", "all are equal");
    // Without a seed anything allowed may come, and nothing else.
    let table = Table::new(&logits, &tokens, &GenerationConfig { top_k: Some(3), ..plain(0) });
    for _ in 0..8 {
        let config = GenerationConfig { top_k: Some(3), seed: None, ..plain(0) };
        let result = generate(engine.as_mut(), &tokens, 1, &config)?;
        let outside = result.generated_tokens.iter().find(|&&t| table.probability(t) == 0.0);
        ctx.check(outside.is_none(), format!("without a seed, one of {:?}", table.tokens()), format!("{outside:?}"));
    }
    // Each takes a seed of its own: four texts of 20 fair choices are all equal with a probability of 2^-60.
    let config = GenerationConfig { top_k: Some(2), temperature: 1000.0, seed: None, ..plain(0) };
    let mut texts = std::collections::BTreeSet::new();
    for _ in 0..4 {
        texts.insert(generate(engine.as_mut(), &tokens, 20, &config)?.generated_tokens);
    }
    ctx.check_chance(texts.len() > 1, "generations without a seed differ", "all are equal");
    Ok(())
}

fn every_step(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    // Two allowed tokens at every step, close to a fair coin: the choices must be right and must vary along the text.
    let config = |seed| GenerationConfig { top_k: Some(2), temperature: 1000.0, ..plain(seed) };
    let (mut first, mut total, mut alike, mut pairs) = (0, 0, 0, 0);
    for seed in 0..8 {
        let tokens = prompt(ctx.facts(), 4, 390 + seed);
        let result = generate(engine.as_mut(), &tokens, 40, &config(seed))?;
        let made = &result.generated_tokens;
        let sequence = [tokens.as_slice(), made].concat();
        let logits = logits_of(engine.as_mut(), &sequence)?;
        let (mut by_rank, mut by_id) = (Vec::new(), Vec::new());
        for (step, &token) in made.iter().enumerate() {
            let logits = logits.row(0, tokens.len() + step - 1);
            let row: Vec<f64> = logits.iter().map(|&x| f64::from(x)).collect();
            let order = ranked(&row);
            let near = row[order[1] as usize] - row[order[2] as usize] < choice_margin(ctx, logits, 0.0);
            let allowed = &order[..2];
            ctx.check(
                near || allowed.contains(&token),
                format!("seed {seed}, step {step}: one of {allowed:?}"),
                format!("token {token}"),
            );
            by_rank.push(token == allowed[0]);
            by_id.push(token == allowed[0].min(allowed[1]));
        }
        if 2.0 * 0.5f64.powi(made.len() as i32) < tolerance::FALSE_ALARM {
            for (what, choices) in [("likelier", by_rank.as_slice()), ("lower", by_id.as_slice())] {
                let alike = choices.iter().all(|&c| c == choices[0]);
                // 35 more fair choices like the first have a probability of 2^-35.
                ctx.check_chance(
                    !alike,
                    format!("seed {seed}: now the {what} token, now the other, over {} fair steps", choices.len()),
                    "the same choice at every step",
                );
            }
        }
        alike += by_rank.windows(2).filter(|pair| pair[0] == pair[1]).count();
        pairs += by_rank.len().saturating_sub(1);
        first += by_rank.iter().filter(|&&c| c).count();
        total += by_rank.len();
    }
    ctx.check_at_least("steps drawn", total as f64, 100.0);
    rate(ctx, "the likelier of two equally likely tokens", total, first, 0.5);
    rate(ctx, "the same choice as one step before", pairs, alike, 0.5);
    Ok(())
}

fn extreme_temperature(ctx: &mut Context<'_>) -> CheckResult {
    let (mut engine, tokens, logits) = start(ctx, 3, 400)?;
    let (top, _) = super::stats::top_two(&logits);
    for temperature in [1e-3f32, 1e-20, f32::MIN_POSITIVE, 1e-45] {
        let config = GenerationConfig { temperature, ..plain(0) };
        let drawn = draw(ctx, engine.as_mut(), &tokens, &config, 10)?;
        let other = drawn.iter().find(|&&t| t as usize != top);
        ctx.check(other.is_none(), format!("temperature {temperature:e}: always token {top}"), format!("{other:?}"));
    }
    let config = GenerationConfig { temperature: f32::MAX, ..plain(0) };
    let drawn = draw(ctx, engine.as_mut(), &tokens, &config, DRAWS)?;
    hold(ctx, "temperature f32::MAX", &drawn, &Table::new(&logits, &tokens, &config));
    Ok(())
}

/// An engine with three equal maxima after a prompt, and their ids in order. `None` where a salt gives none.
type Tied = Option<(Box<dyn BitNetInference>, Vec<u32>, [u32; 3])>;

/// Gives the head's row of the most likely token to a lower and to a higher id as well.
fn tied(ctx: &Context<'_>, engine: &mut dyn BitNetInference, salt: u64) -> Result<Tied, Stop> {
    let hidden = ctx.facts().hidden_size;
    let tokens = prompt(ctx.facts(), 3, 410 + salt);
    let (top, _) = super::stats::top_two(logits_of(engine, &tokens)?.last(0));
    let free = |t: &usize| !tokens.contains(&(*t as u32)) && !ctx.facts().eos.contains(&(*t as u32)) && *t != top;
    let (Some(low), Some(high)) = ((0..top).find(free), (top + 1..ctx.facts().vocab_size).rfind(free)) else {
        return Ok(None);
    };
    if ctx.facts().eos.contains(&(top as u32)) {
        return Ok(None);
    }
    let mut model = super::edit::Model::read(ctx.model().dir())?;
    let name = model.head_name();
    let mut values = model.tensor(name)?.floats()?;
    for id in [low, high] {
        values.copy_within(top * hidden..(top + 1) * hidden, id * hidden);
    }
    model.tensor(name)?.set_floats(&values)?;
    let dir = ctx.scratch().join(format!("ties-{salt}"));
    model.write(&dir)?;
    let mut tied = ctx.factory().create(&ctx.model().relocated(&dir))?;
    let logits = logits_of(tied.as_mut(), &tokens)?.last(0).to_vec();
    let equal = logits[low] == logits[top] && logits[high] == logits[top];
    let maximal = super::stats::top_two(&logits).0 == low;
    Ok((equal && maximal).then(|| (tied, tokens, [low, top, high].map(|t| t as u32))))
}

fn ties(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let mut decided = 0;
    for salt in 0..10 {
        let Some((mut tied, tokens, equal)) = tied(ctx, engine.as_mut(), salt)? else { continue };
        decided += 1;
        for config in [super::support::greedy(), GenerationConfig { temperature: 0.0, ..plain(3) }] {
            let result = generate(tied.as_mut(), &tokens, 1, &config)?;
            ctx.check_slices(
                format!("greedy token with equal maxima at {equal:?}"),
                &result.generated_tokens,
                &equal[..1],
            );
        }
        if decided == 3 {
            break;
        }
    }
    if decided == 0 {
        return Err(Stop::Inconclusive(
            "this backend gives equal head rows unequal logits: no tie can be made".to_string(),
        ));
    }
    Ok(())
}
