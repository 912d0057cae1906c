//! The cache is invisible in the logits, exact in its length, and untouched by errors.

mod refused;

use super::support::{
    EDIT_MODEL, Logits, SMALL_CONTEXT, chunked, forward, ids, is_cache_error, length, logits_of, prompt, same_logits,
    same_logits_of, try_forward,
};
use super::truth::{NARROW, Subject, synthetic};
use crate::backend::Capability;
use crate::case::{Category, Check, CheckResult, Context, ModelSet};
use crate::invariance::Axis;
use bitnet_contracts::{BitNetInference, DType, ForwardPassError, InferenceError, KVCache};
use fixtures::Spec;
use refused::{errors_change_nothing, failed_pass_changes_nothing, foreign_cache, other_batch};

const KV: Category = Category::KvCache;

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "KV-1",
        "kv_cache/chunked_is_whole",
        KV,
        "any split of a prompt into calls gives the logits of one call",
        chunked_is_whole,
    )
    .tests(Axis::Chunking)
    .on(ModelSet::Every),
    Check::new(
        "KV-1",
        "kv_cache/long_decode_is_whole",
        KV,
        "token by token over the whole context gives the logits of one call",
        long_decode_is_whole,
    )
    .tests(Axis::Chunking)
    .on(ModelSet::Where(|f| f.max_positions <= 64)),
    Check::new("KV-1", "kv_cache/chunked_batch_is_whole", KV, "the same for a batch", chunked_batch_is_whole)
        .needs(Capability::Batch)
        .tests(Axis::Chunking),
    Check::new(
        "KV-2",
        "kv_cache/no_cache_no_memory",
        KV,
        "without a cache nothing is remembered between calls",
        no_cache_no_memory,
    ),
    Check::new(
        "KV-3",
        "kv_cache/truncate_and_replay",
        KV,
        "truncate and go on is as if the rest had never been",
        truncate_and_replay,
    ),
    Check::new(
        "KV-4",
        "kv_cache/clear_and_reset",
        KV,
        "a cleared cache is as new, and reset() leaves the engine as new",
        clear_and_reset,
    ),
    Check::new(
        "KV-5",
        "kv_cache/overflow",
        KV,
        "more positions than fit are KVCacheError and change nothing",
        overflow,
    )
    .long(),
    Check::new(
        "KV-6",
        "kv_cache/errors_change_nothing",
        KV,
        "after any error the cache is exactly as before the call",
        errors_change_nothing,
    ),
    Check::new(
        "KV-6",
        "kv_cache/failed_pass_changes_nothing",
        KV,
        "the same where the pass itself fails on numbers",
        failed_pass_changes_nothing,
    )
    .on(ModelSet::Only(EDIT_MODEL)),
    Check::new(
        "KV-7",
        "kv_cache/foreign_cache",
        KV,
        "a cache filled on another model is KVCacheError and stays good for its owner",
        foreign_cache,
    )
    .on(ModelSet::Only(SMALL_CONTEXT)),
    Check::new(
        "KV-8",
        "kv_cache/last_position",
        KV,
        "the context can be filled to the last position and not beyond",
        last_position,
    )
    .on(ModelSet::Only(SMALL_CONTEXT)),
    Check::new(
        "KV-9",
        "kv_cache/other_batch",
        KV,
        "another batch size than the cache holds is an error and changes nothing",
        other_batch,
    )
    .needs(Capability::Batch),
    Check::new("KV-10", "kv_cache/two_caches", KV, "two caches on one engine do not see each other", two_caches),
];

/// Checks that the cache says it holds `len` positions.
#[track_caller]
fn check_len(ctx: &mut Context<'_>, what: &str, cache: &KVCache, len: usize) {
    ctx.check_eq(format!("cache.len() {what}"), cache.len(), len);
    ctx.check_eq(format!("cache.remaining() {what}"), cache.remaining(), cache.capacity() - len);
}

fn chunked_is_whole(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let tokens = prompt(ctx.facts(), 12, 40);
    let whole = logits_of(engine.as_mut(), &tokens)?;
    let splits: [&[usize]; 6] = [&[12], &[1, 11], &[11, 1], &[6, 6], &[1; 12], &[5, 1, 4, 2]];
    for sizes in splits {
        let mut cache = KVCache::new(16);
        let (mut data, mut done) = (Vec::new(), 0);
        for &size in sizes {
            data.extend(forward(engine.as_mut(), &[tokens[done..done + size].to_vec()], Some(&mut cache))?.data);
            done += size;
            check_len(ctx, &format!("after {done} tokens in chunks {sizes:?}"), &cache, done);
        }
        same_logits(ctx, Axis::Chunking, format!("logits in chunks {sizes:?}"), &data, &whole.data);
    }
    // The other type of ids goes the same way.
    let (mut cache, mut data) = (KVCache::new(16), Vec::new());
    for piece in [&tokens[..4], &tokens[4..5], &tokens[5..]] {
        let wide = ids(&[piece.to_vec()], &engine.device().clone())?.to_dtype(DType::I64)?;
        data.extend(Logits::of(&engine.forward(&wide, Some(&mut cache))?)?.data);
    }
    same_logits(ctx, Axis::Chunking, "logits of i64 ids in chunks", &data, &whole.data);
    Ok(())
}

fn long_decode_is_whole(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let positions = length(ctx.facts(), ctx.facts().max_positions);
    let tokens = prompt(ctx.facts(), positions, 41);
    let whole = logits_of(engine.as_mut(), &tokens)?;
    let mut cache = KVCache::new(positions);
    let steps = chunked(engine.as_mut(), &tokens, &vec![1; positions], &mut cache)?;
    same_logits(ctx, Axis::Chunking, "logits token by token", &steps, &whole.data);
    check_len(ctx, "at the end", &cache, positions);
    // In pieces as well, the borders of which are no multiples of anything.
    let (mut sizes, mut left) = (Vec::new(), positions);
    for size in [7, 9, 15, 3, positions] {
        sizes.extend((left > 0).then(|| size.min(left)));
        left -= size.min(left);
    }
    let pieces = chunked(engine.as_mut(), &tokens, &sizes, &mut KVCache::new(positions))?;
    same_logits(ctx, Axis::Chunking, format!("logits in pieces of {sizes:?}"), &pieces, &whole.data);
    Ok(())
}

fn chunked_batch_is_whole(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let rows = [prompt(ctx.facts(), 7, 42), prompt(ctx.facts(), 7, 43), prompt(ctx.facts(), 7, 44)];
    let whole = forward(engine.as_mut(), &rows, None)?;
    let mut cache = KVCache::new(8);
    let mut done = 0;
    for size in [3, 1, 2, 1] {
        let piece: Vec<Vec<u32>> = rows.iter().map(|row| row[done..done + size].to_vec()).collect();
        let seen = forward(engine.as_mut(), &piece, Some(&mut cache))?;
        for row in 0..rows.len() {
            let expected: Vec<f32> = (done..done + size).flat_map(|t| whole.row(row, t).to_vec()).collect();
            let what = format!("logits of sequence {row}, positions {done}..{}", done + size);
            same_logits(ctx, Axis::Chunking, what, seen.sequence(row), &expected);
        }
        done += size;
        // Positions of each sequence, not of the batch together.
        check_len(ctx, &format!("after {done} positions of 3 sequences"), &cache, done);
    }
    Ok(())
}

fn no_cache_no_memory(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let (a, b) = (prompt(ctx.facts(), 5, 45), prompt(ctx.facts(), 3, 46));
    let expected = logits_of(engine.as_mut(), &b)?;
    logits_of(engine.as_mut(), &a)?;
    let seen = logits_of(engine.as_mut(), &b)?;
    ctx.check_bits("logits after another call without a cache", &seen.data, &expected.data);
    let mut cache = KVCache::new(8);
    forward(engine.as_mut(), std::slice::from_ref(&a), Some(&mut cache))?;
    let seen = logits_of(engine.as_mut(), &b)?;
    ctx.check_bits("logits without a cache after a call with one", &seen.data, &expected.data);
    check_len(ctx, "after a call without it", &cache, a.len());
    Ok(())
}

fn truncate_and_replay(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let tokens = prompt(ctx.facts(), 10, 47);
    let wrong = prompt(ctx.facts(), 10, 48);
    let straight = logits_of(engine.as_mut(), &tokens)?;
    for kept in [0, 1, 4, 9] {
        let mut cache = KVCache::new(10);
        let mut first = tokens[..kept].to_vec();
        first.extend(&wrong[kept..]);
        forward(engine.as_mut(), &[first], Some(&mut cache))?;
        cache.truncate(kept);
        check_len(ctx, &format!("after truncate({kept})"), &cache, kept);
        let rest = forward(engine.as_mut(), &[tokens[kept..].to_vec()], Some(&mut cache))?;
        let expected: Vec<f32> = (kept..10).flat_map(|t| straight.row(0, t).to_vec()).collect();
        same_logits(ctx, Axis::Chunking, format!("logits after truncate({kept})"), &rest.data, &expected);
    }
    // Twice in one session, with a step between; to its own length and beyond nothing happens.
    let mut cache = KVCache::new(10);
    forward(engine.as_mut(), &[[&tokens[..3], &wrong[3..8]].concat()], Some(&mut cache))?;
    for (len, left) in [(20, 8), (8, 8), (6, 6)] {
        cache.truncate(len);
        check_len(ctx, &format!("of 8 after truncate({len})"), &cache, left);
    }
    forward(engine.as_mut(), &[vec![wrong[9]]], Some(&mut cache))?;
    cache.truncate(3);
    let rest = chunked(engine.as_mut(), &tokens[3..], &[1; 7], &mut cache)?;
    same_logits(ctx, Axis::Chunking, "logits after two truncations", &rest, &straight.data[3 * straight.vocab..]);
    if ctx.capabilities().batch {
        truncated_batch(ctx, engine.as_mut(), &[tokens, wrong])?;
    }
    Ok(())
}

/// Two sequences, each with the other's end, truncated to 4 positions and replayed with its own.
fn truncated_batch(ctx: &mut Context<'_>, engine: &mut dyn BitNetInference, rows: &[Vec<u32>; 2]) -> CheckResult {
    let whole = forward(engine, rows, None)?;
    let mut cache = KVCache::new(10);
    let crossed = [[&rows[0][..4], &rows[1][4..]].concat(), [&rows[1][..4], &rows[0][4..]].concat()];
    forward(engine, &crossed, Some(&mut cache))?;
    cache.truncate(4);
    let seen = forward(engine, &[rows[0][4..].to_vec(), rows[1][4..].to_vec()], Some(&mut cache))?;
    for row in 0..2 {
        let expected = &whole.sequence(row)[4 * whole.vocab..];
        let what = format!("logits of sequence {row} of two after truncate(4)");
        same_logits(ctx, Axis::Chunking, what, seen.sequence(row), expected);
    }
    check_len(ctx, "of two sequences", &cache, 10);
    Ok(())
}

fn clear_and_reset(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let (a, b) = (prompt(ctx.facts(), 7, 49), prompt(ctx.facts(), 5, 50));
    // There is nothing to forget yet, and nothing goes wrong.
    engine.reset()?;
    let mut fresh = KVCache::new(8);
    let expected = forward(engine.as_mut(), std::slice::from_ref(&b), Some(&mut fresh))?;
    let mut cache = KVCache::new(8);
    forward(engine.as_mut(), &[a], Some(&mut cache))?;
    cache.clear();
    check_len(ctx, "after clear()", &cache, 0);
    let seen = forward(engine.as_mut(), std::slice::from_ref(&b), Some(&mut cache))?;
    ctx.check_bits("logits with a cleared cache", &seen.data, &expected.data);
    engine.reset()?;
    let seen = forward(engine.as_mut(), std::slice::from_ref(&b), Some(&mut KVCache::new(8)))?;
    ctx.check_bits("logits after reset()", &seen.data, &expected.data);
    engine.reset()?;
    let mut after_reset = KVCache::new(8);
    let first = forward(engine.as_mut(), &[b[..2].to_vec()], Some(&mut after_reset))?;
    same_logits(ctx, Axis::Chunking, "positions start at 0 after reset()", &first.data, expected.prefix(0, 2));
    Ok(())
}

fn overflow(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let capacity = 6;
    let tokens = prompt(ctx.facts(), capacity + 1, 51);
    let whole = logits_of(engine.as_mut(), &tokens[..capacity])?;
    for filled in [0, 1, capacity - 1, capacity] {
        let mut cache = KVCache::new(capacity);
        if filled > 0 {
            forward(engine.as_mut(), &[tokens[..filled].to_vec()], Some(&mut cache))?;
        }
        let result = try_forward(engine.as_mut(), &[tokens[filled..].to_vec()], Some(&mut cache))?;
        let what = format!("{} tokens into a cache with {filled} of {capacity} filled", tokens.len() - filled);
        ctx.expect_error(&what, result, is_cache_error, "ForwardPassError::KVCacheError");
        check_len(ctx, &format!("after refusing {what}"), &cache, filled);
        if filled < capacity {
            let rest = forward(engine.as_mut(), &[tokens[filled..capacity].to_vec()], Some(&mut cache))?;
            let expected: Vec<f32> = (filled..capacity).flat_map(|t| whole.row(0, t).to_vec()).collect();
            same_logits(
                ctx,
                Axis::Chunking,
                format!("logits of what does fit, after refusing {what}"),
                &rest.data,
                &expected,
            );
            check_len(ctx, "when exactly full", &cache, capacity);
        }
    }
    let result = try_forward(engine.as_mut(), &[tokens[..1].to_vec()], Some(&mut KVCache::new(0)))?;
    ctx.expect_error("one token into a cache for none", result, is_cache_error, "ForwardPassError::KVCacheError");
    long_overflow(ctx)
}

/// The same with so many tokens that an engine may work them off in pieces, of which the first ones fit.
fn long_overflow(ctx: &mut Context<'_>) -> CheckResult {
    const POSITIONS: usize = 320;
    let subject = Subject::write(ctx, "roomy", &synthetic(ctx, "roomy", &Spec { context: POSITIONS, ..NARROW })?)?;
    let mut engine = subject.engine(ctx)?;
    let tokens = prompt(subject.facts(), POSITIONS, 57);
    let whole = logits_of(engine.as_mut(), &tokens)?;
    for capacity in [20, 70, 262] {
        for filled in [0, 5] {
            let mut cache = KVCache::new(capacity);
            chunked(engine.as_mut(), &tokens, &vec![filled; filled.min(1)], &mut cache)?;
            let result = try_forward(engine.as_mut(), &[tokens[filled..capacity + 9].to_vec()], Some(&mut cache))?;
            let what = format!("{} tokens into a cache with {filled} of {capacity} filled", capacity + 9 - filled);
            ctx.expect_error(&what, result, is_cache_error, "ForwardPassError::KVCacheError");
            check_len(ctx, &format!("after refusing {what}"), &cache, filled);
            let rest = forward(engine.as_mut(), &[tokens[filled..capacity].to_vec()], Some(&mut cache))?;
            let what = format!("logits of what does fit, after refusing {what}");
            same_logits_of(
                ctx,
                NARROW.vocab,
                Axis::Chunking,
                what,
                &rest.data,
                &whole.data[filled * whole.vocab..capacity * whole.vocab],
            );
        }
    }
    if ctx.capabilities().batch {
        let mut cache = KVCache::new(POSITIONS / 2);
        let rows = vec![tokens[..POSITIONS / 2 + 9].to_vec(); 2];
        let result = try_forward(engine.as_mut(), &rows, Some(&mut cache))?;
        ctx.expect_error("two rows that do not fit", result, is_cache_error, "ForwardPassError::KVCacheError");
        check_len(ctx, "after refusing two rows", &cache, 0);
    }
    Ok(())
}

fn last_position(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let positions = ctx.facts().max_positions;
    let tokens = prompt(ctx.facts(), positions + 1, 54);
    let whole = logits_of(engine.as_mut(), &tokens[..positions])?;
    ctx.check_eq("positions evaluated in one call", whole.seq, positions);
    let too_long = |e: &InferenceError| {
        matches!(
            e,
            InferenceError::ForwardPass(ForwardPassError::InvalidInput { .. } | ForwardPassError::KVCacheError { .. })
        )
    };
    let result = try_forward(engine.as_mut(), std::slice::from_ref(&tokens), None)?;
    ctx.expect_error("one token more than the context", result, too_long, "ForwardPassError::InvalidInput");

    // A cache with room to spare does not make the context longer.
    let mut cache = KVCache::new(positions + 8);
    forward(engine.as_mut(), &[tokens[..positions - 1].to_vec()], Some(&mut cache))?;
    let last = forward(engine.as_mut(), &[vec![tokens[positions - 1]]], Some(&mut cache))?;
    same_logits(ctx, Axis::Chunking, "logits of the last position", &last.data, whole.last(0));
    let result = try_forward(engine.as_mut(), &[vec![tokens[positions]]], Some(&mut cache))?;
    let name = "ForwardPassError::KVCacheError or InvalidInput";
    ctx.expect_error("a position beyond the context", result, too_long, name);
    check_len(ctx, "after the position beyond the context", &cache, positions);
    Ok(())
}

fn two_caches(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let tokens = [prompt(ctx.facts(), 6, 60), prompt(ctx.facts(), 6, 61)];
    let mut alone = Vec::new();
    for sequence in &tokens {
        alone.push(steps(engine.as_mut(), sequence)?);
    }
    let mut caches = [KVCache::new(6), KVCache::new(6)];
    let mut places = [0, 1];
    let mut together = [Vec::new(), Vec::new()];
    for (step, (&a, &b)) in tokens[0].iter().zip(&tokens[1]).enumerate() {
        if step == 3 {
            // A session is in its cache, wherever that lies.
            caches.swap(0, 1);
            places.swap(0, 1);
        }
        for (session, token) in [a, b].into_iter().enumerate() {
            let cache = &mut caches[places[session]];
            together[session].extend(forward(engine.as_mut(), &[vec![token]], Some(cache))?.data);
        }
    }
    for session in 0..2 {
        let what = format!("logits of session {session} beside the other");
        ctx.check_bits(what, &together[session], &alone[session]);
    }
    many_sessions(ctx, engine.as_mut())
}

/// Nine sessions at once, each begun before any goes on: more than a pool for eight keeps.
fn many_sessions(ctx: &mut Context<'_>, engine: &mut dyn BitNetInference) -> CheckResult {
    let tokens: Vec<Vec<u32>> = (0..9).map(|session| prompt(ctx.facts(), 4, 62 + session)).collect();
    let mut alone = Vec::new();
    for tokens in &tokens {
        alone.push(chunked(engine, tokens, &[3, 1], &mut KVCache::new(4))?);
    }
    let mut sessions = Vec::new();
    for tokens in &tokens {
        let mut cache = KVCache::new(4);
        let begun = forward(engine, &[tokens[..3].to_vec()], Some(&mut cache))?.data;
        sessions.push((cache, begun));
    }
    for (session, (mut cache, mut seen)) in sessions.into_iter().enumerate() {
        seen.extend(forward(engine, &[vec![tokens[session][3]]], Some(&mut cache))?.data);
        ctx.check_bits(format!("logits of session {session} of nine"), &seen, &alone[session]);
    }
    Ok(())
}

/// The logits of a sequence fed token by token with a cache of its own.
fn steps(engine: &mut dyn BitNetInference, tokens: &[u32]) -> Result<Vec<f32>, crate::case::Stop> {
    chunked(engine, tokens, &vec![1; tokens.len()], &mut KVCache::new(tokens.len()))
}
