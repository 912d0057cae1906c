//! What shows at size only: positions, pieces, batches, prompts and ids beyond the tables, pages, slots and types that
//! engines have for them.

use super::edit::Model;
use super::stats::{Rows, top_two};
use super::support::{
    EDIT_MODEL, Logits, chunked, exact, forward, generate, greedy, logits_of, own_greedy, own_margin, plain, prompt,
    same_logits_of, try_forward, until_eos,
};
use super::truth::{NARROW, SMALL, Subject, check_truth, synthetic};
use crate::backend::Capability;
use crate::case::{Category, Check, CheckResult, Context, ModelSet, Stop};
use crate::invariance::Axis;
use crate::tolerance;
use bitnet_contracts::{BitNetInference, FinishReason, GenerationConfig, InferenceError, KVCache, TokenizationError};
use fixtures::{Eos, Spec, Storage};
use std::sync::Barrier;

const fn check(
    id: &'static str,
    name: &'static str,
    category: Category,
    clause: &'static str,
    run: fn(&mut Context<'_>) -> CheckResult,
) -> Check {
    Check::new(id, name, category, clause, run).on(ModelSet::Only(EDIT_MODEL)).within(120)
}

pub(super) const CHECKS: &[Check] = &[
    check(
        "NUM-8",
        "numerics/large_vocabulary",
        Category::Numerics,
        "ids beyond 16 bits are read, scored, generated and stopped at like any other",
        large_vocabulary,
    )
    .long(),
    check(
        "GLD-9",
        "golden/far_positions",
        Category::Golden,
        "positions far into the context are as exact as the first",
        far_positions,
    )
    .long(),
    check(
        "KV-11",
        "kv_cache/far_pieces",
        Category::KvCache,
        "in a long sequence, alone or in a batch, it does not show where pieces begin, end, are truncated or refused",
        far_pieces,
    )
    .long(),
    check(
        "BAT-4",
        "batch/many_rows",
        Category::Batch,
        "each of many rows is alone, with a cache and without",
        many_rows,
    )
    .needs(Capability::Batch),
    check(
        "DET-11",
        "determinism/many_calls",
        Category::Determinism,
        "hundreds of calls give what the first one did",
        many_calls,
    ),
    check("GEN-12", "generation/long_prompt", Category::Generation, "all of a long prompt counts", long_prompt).long(),
    check(
        "GEN-13",
        "generation/long_generation",
        Category::Generation,
        "hundreds of tokens are each the argmax of what came before",
        long_generation,
    ),
    check(
        "CON-5",
        "concurrency/many_callers",
        Category::Concurrency,
        "each of many callers at once gets what it would get alone",
        many_callers,
    )
    .needs(Capability::ThreadSafe),
];

/// Positions: bf16 counts to 256 and f16 to 2048, and tables of angles often end there.
const FAR: usize = 2112;

/// Rows that are looked at together.
const WINDOW: usize = 64;

/// Of many rows the best three of four are judged: far out the last bits of an angle move some activation of some rows to
/// another code, and positions that are others move at least every second row.
fn far_positions(ctx: &mut Context<'_>) -> CheckResult {
    let spec = Spec { context: FAR, ..NARROW };
    let subject = Subject::write(ctx, "far", &synthetic(ctx, "far", &spec)?)?;
    let truth = subject.truth(&prompt(subject.facts(), FAR, 920))?;
    let seen = logits_of(subject.engine(ctx)?.as_mut(), &truth.tokens)?;
    let mut rows = Rows::default();
    rows.add(&seen.data, &truth.logits, seen.vocab);
    let errors: Vec<f64> = rows.figures(|row| 1.0 - row.pearson).collect();
    for start in [256, 512, 1024, FAR - WINDOW] {
        let mut window = errors[start..start + WINDOW].to_vec();
        window.sort_by(f64::total_cmp);
        ctx.compared(WINDOW * seen.vocab);
        let what =
            format!("1 - correlation with the oracle, the third quartile of positions {start}..{}", start + WINDOW);
        ctx.check_within(what, window[WINDOW * 3 / 4], &tolerance::FAR_POSITIONS);
    }
    Ok(())
}

/// Tokens of a long sequence: more than a page of any usual size.
const LONG: usize = 300;

/// The same with room for a long sequence.
const ROOMY: Spec = Spec { context: 320, ..NARROW };

fn far_pieces(ctx: &mut Context<'_>) -> CheckResult {
    let subject = Subject::write(ctx, "roomy", &synthetic(ctx, "roomy", &ROOMY)?)?;
    let mut engine = subject.engine(ctx)?;
    let tokens = prompt(subject.facts(), LONG, 930);
    let whole = logits_of(engine.as_mut(), &tokens)?;
    // Borders between, at and beside the multiples of 16 to 256.
    let splits: [&[usize]; 3] = [&[40, 60, 92, 65, 43], &[63, 65, 127, 45], &[15, 19, 29, 66, 128, 43]];
    for sizes in splits {
        let seen = chunked(engine.as_mut(), &tokens, sizes, &mut KVCache::new(ROOMY.context))?;
        same_logits_of(ctx, ROOMY.vocab, Axis::Chunking, format!("logits in pieces of {sizes:?}"), &seen, &whole.data);
    }
    // Back into the middle of a page or to its border, and on with the right tokens.
    let wrong = prompt(subject.facts(), LONG, 931);
    for (kept, wrongly, piece) in [(130, 150, 100), (64, 65, 70)] {
        let mut cache = KVCache::new(ROOMY.context);
        chunked(engine.as_mut(), &tokens, &[kept], &mut cache)?;
        chunked(engine.as_mut(), &wrong[kept..], &[wrongly], &mut cache)?;
        cache.truncate(kept);
        let seen = chunked(engine.as_mut(), &tokens[kept..], &[piece], &mut cache)?;
        let what = format!("logits of {piece} positions behind {kept} that are left of {}", kept + wrongly);
        let vocab = whole.vocab;
        same_logits_of(
            ctx,
            ROOMY.vocab,
            Axis::Chunking,
            what,
            &seen,
            &whole.data[kept * vocab..(kept + piece) * vocab],
        );
    }
    refused_far_out(ctx, engine.as_mut(), &tokens, &whole)?;
    if ctx.capabilities().batch { batch_in_pieces(ctx, engine.as_mut(), &tokens, &whole) } else { Ok(()) }
}

/// A long piece that is refused because of one of its last ids leaves nothing of itself.
fn refused_far_out(
    ctx: &mut Context<'_>,
    engine: &mut dyn BitNetInference,
    tokens: &[u32],
    whole: &Logits,
) -> CheckResult {
    for kept in [0, 10, 70] {
        let mut cache = KVCache::new(ROOMY.context);
        if kept > 0 {
            chunked(engine, tokens, &[kept], &mut cache)?;
        }
        for at in [70, 140, 220] {
            let mut piece = tokens[kept..].to_vec();
            piece[at] = ROOMY.vocab as u32;
            let result = try_forward(engine, &[piece], Some(&mut cache))?;
            let what = format!("{} ids behind {kept}, of which number {at} is beyond the vocabulary", LONG - kept);
            let name = "InvalidToken with its position in the call";
            ctx.expect_error(&what, result, |error| invalid_at(error, at), name);
            ctx.check_eq(format!("cache.len() after {what}"), cache.len(), kept);
        }
        let seen = chunked(engine, &tokens[kept..], &[100], &mut cache)?;
        let expected = &whole.data[kept * whole.vocab..(kept + 100) * whole.vocab];
        same_logits_of(
            ctx,
            ROOMY.vocab,
            Axis::Chunking,
            format!("logits behind {kept} after long calls were refused"),
            &seen,
            expected,
        );
    }
    Ok(())
}

fn invalid_at(error: &InferenceError, at: usize) -> bool {
    let InferenceError::Tokenization(TokenizationError::InvalidToken { position, .. }) = error else { return false };
    *position == at
}

/// Four rows through one cache, in pieces that make it grow with something in it.
fn batch_in_pieces(
    ctx: &mut Context<'_>,
    engine: &mut dyn BitNetInference,
    tokens: &[u32],
    whole: &Logits,
) -> CheckResult {
    let vocab = ROOMY.vocab as u32;
    // The other rows are the first one with its ids moved round.
    let moved = |by: u32| -> Vec<u32> { tokens.iter().map(|t| 3 + (t + by) % (vocab - 3)).collect() };
    let rows = [tokens.to_vec(), moved(5), moved(11), moved(17)];
    let mut alone = vec![whole.data.clone()];
    for row in &rows[1..] {
        alone.push(logits_of(engine, row)?.data);
    }
    let (mut cache, mut seen, mut start) = (KVCache::new(ROOMY.context), vec![Vec::new(); rows.len()], 0);
    for size in [40, 60, 1, 92, 64, 43] {
        let pieces: Vec<Vec<u32>> = rows.iter().map(|row| row[start..start + size].to_vec()).collect();
        let logits = forward(engine, &pieces, Some(&mut cache))?;
        seen.iter_mut().enumerate().for_each(|(row, seen)| seen.extend(logits.sequence(row)));
        start += size;
    }
    for (row, (seen, alone)) in seen.iter().zip(&alone).enumerate() {
        same_logits_of(
            ctx,
            ROOMY.vocab,
            Axis::Batch,
            format!("logits of row {row} of four, in pieces, up to {LONG}"),
            seen,
            alone,
        );
    }
    Ok(())
}

/// Rows beyond the eight that BAT-1 looks at.
const BEYOND: std::ops::Range<usize> = 8..20;

fn many_rows(ctx: &mut Context<'_>) -> CheckResult {
    let subject = Subject::write(ctx, "small", &synthetic(ctx, "small", &SMALL)?)?;
    let mut engine = subject.engine(ctx)?;
    // No two rows end in the same token.
    let ends = (0..subject.facts().vocab_size as u32).filter(|token| *token > 2);
    let row = |(salt, end): (u64, u32)| [prompt(subject.facts(), 2, 940 + salt), vec![end]].concat();
    let rows: Vec<Vec<u32>> = (0..BEYOND.end as u64).zip(ends).map(row).collect();
    let mut alone = Vec::new();
    for row in &rows {
        alone.push(logits_of(engine.as_mut(), row)?.data);
    }
    for size in [9, 16, 17, BEYOND.end] {
        let whole = forward(engine.as_mut(), &rows[..size], None)?;
        let mut cache = KVCache::new(4);
        let begins: Vec<Vec<u32>> = rows[..size].iter().map(|row| row[..2].to_vec()).collect();
        let ends: Vec<Vec<u32>> = rows[..size].iter().map(|row| row[2..].to_vec()).collect();
        let begin = forward(engine.as_mut(), &begins, Some(&mut cache))?;
        let end = forward(engine.as_mut(), &ends, Some(&mut cache))?;
        for (i, expected) in alone.iter().enumerate().take(size).skip(BEYOND.start) {
            let what = format!("logits of row {i} of {size}");
            same_logits_of(ctx, SMALL.vocab, Axis::Batch, &what, whole.sequence(i), expected);
            let steps = [begin.sequence(i), end.sequence(i)].concat();
            same_logits_of(ctx, SMALL.vocab, Axis::Batch, format!("{what} with a cache"), &steps, expected);
        }
    }
    Ok(())
}

/// A model whose scores are many times their usual size: a position attends to few others, and each of them counts.
fn sharp(ctx: &Context<'_>, spec: &Spec) -> Result<Subject, Stop> {
    let mut model = synthetic(ctx, "sharp", spec)?;
    for part in ["q_proj", "k_proj"] {
        let scale = model.tensor(&format!("model.layers.0.self_attn.{part}.weight_scale"))?;
        let larger: Vec<f32> = scale.floats()?.iter().map(|s| 4.0 * s).collect();
        scale.set_floats(&larger)?;
    }
    Subject::write(ctx, "sharp", &model)
}

fn long_prompt(ctx: &mut Context<'_>) -> CheckResult {
    let subject = sharp(ctx, &ROOMY)?;
    let mut engine = subject.engine(ctx)?;
    for salt in 0..12 {
        let tokens = prompt(subject.facts(), LONG - 10, 950 + salt);
        let own = own_greedy(ctx, engine.as_mut(), &tokens, 1)?;
        let expected: Vec<u32> = own.iter().take_while(|(_, leads)| *leads).map(|(token, _)| *token).collect();
        let made = generate(engine.as_mut(), &tokens, 1, &greedy())?;
        let due = until_eos(subject.facts(), &made, &expected);
        let seen = &made.generated_tokens[..due.len().min(made.generated_tokens.len())];
        ctx.check_eq(format!("the token after prompt {salt} of {}", tokens.len()), seen, &due[..]);
    }
    Ok(())
}

/// A model without an end-of-sequence token, so that nothing ends but by request.
const ENDLESS: Spec = Spec { eos: Eos::Nothing, ..ROOMY };

fn long_generation(ctx: &mut Context<'_>) -> CheckResult {
    let subject = sharp(ctx, &ENDLESS)?;
    let mut engine = subject.engine(ctx)?;
    let tokens = prompt(subject.facts(), 5, 960);
    let made = generate(engine.as_mut(), &tokens, LONG, &greedy_for(LONG))?.generated_tokens;
    ctx.check_eq("tokens made", made.len(), LONG);
    let sequence = [&tokens[..], &made].concat();
    let logits = logits_of(engine.as_mut(), &sequence)?;
    let mut wrong = None;
    for (step, &token) in made.iter().enumerate() {
        let row = logits.row(0, tokens.len() + step - 1);
        let (top, margin) = top_two(row);
        let sure = exact(ctx) || margin > own_margin(ctx, row);
        if sure && token as usize != top {
            wrong.get_or_insert(format!("token {step} is {token}, and {top} leads by {margin}"));
        }
    }
    ctx.compared(made.len());
    ctx.check(wrong.is_none(), format!("{LONG} tokens that lead"), wrong.unwrap_or_default());
    Ok(())
}

/// Greedy generation of so many tokens.
fn greedy_for(count: usize) -> GenerationConfig {
    GenerationConfig { max_new_tokens: count, ..greedy() }
}

fn many_calls(ctx: &mut Context<'_>) -> CheckResult {
    let subject = Subject::write(ctx, "roomy", &synthetic(ctx, "roomy", &ROOMY)?)?;
    let mut engine = subject.engine(ctx)?;
    let tokens = prompt(subject.facts(), 2, 980);
    let logits = logits_of(engine.as_mut(), &tokens)?.data;
    let made = generate(engine.as_mut(), &tokens, 2, &plain(5))?.generated_tokens;
    let (mut other, mut drawn_otherwise) = (None, None);
    for call in 1..=700 {
        let seen = logits_of(engine.as_mut(), &tokens)?.data;
        if !seen.iter().zip(&logits).all(|(a, b)| a.to_bits() == b.to_bits()) {
            other.get_or_insert(call);
        }
        if call % 2 == 0 && generate(engine.as_mut(), &tokens, 2, &plain(5))?.generated_tokens != made {
            drawn_otherwise.get_or_insert(call / 2);
        }
    }
    ctx.compared(700 * logits.len());
    ctx.check(other.is_none(), "the same logits in each of 700 calls", format!("others in call {other:?}"));
    let otherwise = format!("others in generation {drawn_otherwise:?}");
    ctx.check(drawn_otherwise.is_none(), "the same tokens in each of 350 generations", otherwise);
    Ok(())
}

fn many_callers(ctx: &mut Context<'_>) -> CheckResult {
    const CALLERS: usize = 24;
    let subject = Subject::write(ctx, "roomy", &synthetic(ctx, "roomy", &ROOMY)?)?;
    let mut engine = subject.engine(ctx)?;
    let shared = subject.thread_safe(ctx)?;
    let asked: Vec<_> = (0..CALLERS as u64).map(|i| (prompt(subject.facts(), 3, 990 + i / 2), plain(i / 2))).collect();
    let mut alone = Vec::new();
    for (tokens, config) in &asked {
        alone.push(generate(engine.as_mut(), tokens, 12, config)?.generated_tokens);
    }
    // What is refused gives back what it was given, at whatever point it is refused.
    let beyond = [subject.facts().vocab_size as u32];
    let wrong = GenerationConfig { temperature: f32::NAN, ..plain(0) };
    let none = GenerationConfig { max_new_tokens: 0, ..plain(0) };
    let kinds: [(&str, &[u32], &GenerationConfig); 4] = [
        ("an id beyond the vocabulary", &beyond, &plain(0)),
        ("no ids", &[], &plain(0)),
        ("no tokens to make", &[3], &none),
        ("a temperature that is no number", &[3], &wrong),
    ];
    for (what, tokens, config) in kinds {
        for call in 1..=CALLERS {
            let refused = shared.generate_concurrent(tokens, 1, config).is_err();
            ctx.check(refused, format!("call {call} with {what} fails"), "it did not");
        }
    }
    let start = Barrier::new(CALLERS);
    let ask = |(tokens, config): &(Vec<u32>, GenerationConfig)| {
        start.wait();
        // Half of the answers by copies that all live at the same time.
        let mut copy = shared.thread_local_copy()?;
        let own = copy.generate(tokens, 12, config)?.generated_tokens;
        Ok((own, shared.generate_concurrent(tokens, 12, config)?.generated_tokens))
    };
    let answers: Vec<std::thread::Result<Result<_, InferenceError>>> = std::thread::scope(|scope| {
        let callers: Vec<_> = asked.iter().map(|asked| scope.spawn(|| ask(asked))).collect();
        callers.into_iter().map(std::thread::ScopedJoinHandle::join).collect()
    });
    for (i, answer) in answers.into_iter().enumerate() {
        let Ok(answer) = answer else {
            ctx.check(false, format!("an answer for caller {i} of {CALLERS}"), "it panicked");
            continue;
        };
        if let Some((copy, concurrent)) = ctx.check_ok(format!("caller {i} of {CALLERS}"), answer) {
            ctx.check_eq(format!("tokens of copy {i} of {CALLERS}"), &copy, &alone[i]);
            ctx.check_eq(format!("tokens of caller {i} of {CALLERS}"), &concurrent, &alone[i]);
        }
    }
    Ok(())
}

/// The first id that 16 bits do not hold.
const WIDE: u32 = 1 << 16;

fn large_vocabulary(ctx: &mut Context<'_>) -> CheckResult {
    let spec = Spec { vocab: WIDE as usize + 40, storage: Storage::Bf16, ..NARROW };
    let mut model: Model = synthetic(ctx, "wide", &spec)?;
    // Two opposite rows score far above or below all others: one of them is what is generated.
    let head = model.tensor("lm_head.weight")?;
    let mut values = head.floats()?;
    let (others, last) = values.split_at_mut((WIDE as usize + 38) * spec.hidden);
    others.iter_mut().for_each(|x| *x *= 1.0 / 16.0);
    let (one, other) = last.split_at_mut(spec.hidden);
    one.iter_mut().zip(other).for_each(|(a, b)| (*a, *b) = (4.0 * *a, -4.0 * *a));
    head.set_floats(&values)?;
    let subject = Subject::write(ctx, "wide", &model)?;
    let mut engine = subject.engine(ctx)?;
    let mut truth = subject.truth(&[WIDE + 5, 3, WIDE + 39, 5])?;
    for i in 1..12 {
        if !truth.clear {
            truth = subject.truth(&[WIDE + 5 + i, 3 + i, WIDE + 39, 5])?;
        }
    }
    let tokens = &truth.tokens;
    let seen = logits_of(engine.as_mut(), tokens)?;
    check_truth(ctx, format!("logits of {tokens:?}"), &seen.data, &truth);

    let own = own_greedy(ctx, engine.as_mut(), tokens, 1)?;
    let first = match own[..] {
        [(first, true)] if first > WIDE => first,
        _ => return Err(Stop::Inconclusive(format!("the next id is not one of the two that lead: {own:?}"))),
    };
    let made = generate(engine.as_mut(), tokens, 1, &greedy())?;
    ctx.check_eq("the id that is generated", &made.generated_tokens[..], &[first][..]);
    let stopping = |id: u32| GenerationConfig { stop_tokens: vec![id], ..greedy() };
    let made = generate(engine.as_mut(), tokens, 2, &stopping(first))?;
    ctx.check_eq("ids before a stop at that one", made.generated_tokens.len(), 0);
    ctx.check_eq("the reason", made.finish_reason, FinishReason::StopToken);
    let made = generate(engine.as_mut(), tokens, 1, &stopping(first - WIDE))?;
    ctx.check_eq("the ids with a stop at its lower half", &made.generated_tokens[..], &[first][..]);
    Ok(())
}
