//! Calls that are refused: the cache is as it was, and whoever may use it goes on.

use super::super::edit::Model;
use super::super::support::{
    EDIT_MODEL, Logits, forward, ids, is_cache_error, is_instability, is_invalid_token, logits_of, prompt, same_logits,
    try_forward,
};
use super::check_len;
use crate::case::{CheckResult, Context};
use crate::invariance::Axis;
use bitnet_contracts::{DType, ForwardPassError, InferenceError, KVCache, Tensor};

pub(super) fn errors_change_nothing(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let tokens = prompt(ctx.facts(), 8, 52);
    let whole = logits_of(engine.as_mut(), &tokens)?;
    let vocab = ctx.facts().vocab_size as u32;
    let device = engine.device().clone();
    let mut cache = KVCache::new(8);
    forward(engine.as_mut(), &[tokens[..3].to_vec()], Some(&mut cache))?;

    let result = try_forward(engine.as_mut(), &[vec![tokens[3], vocab, tokens[4]]], Some(&mut cache))?;
    ctx.expect_error("an id beyond the vocabulary", result, is_invalid_token, "TokenizationError::InvalidToken");
    check_len(ctx, "after a bad id", &cache, 3);

    let floats = ids(&[tokens[3..5].to_vec()], &device)?.to_dtype(DType::F32)?;
    let result = engine.forward(&floats, Some(&mut cache));
    let invalid_input =
        |e: &InferenceError| matches!(e, InferenceError::ForwardPass(ForwardPassError::InvalidInput { .. }));
    ctx.expect_error("f32 ids", result, invalid_input, "ForwardPassError::InvalidInput");
    check_len(ctx, "after f32 ids", &cache, 3);

    let flat = ids(&[tokens[3..5].to_vec()], &device)?.flatten_all()?;
    let result = engine.forward(&flat, Some(&mut cache));
    ctx.check(result.is_err(), "ids of rank 1 are refused", "they were accepted");
    check_len(ctx, "after ids of rank 1", &cache, 3);

    let negative = Tensor::from_vec(vec![i64::from(tokens[3]), -1], (1, 2), &device)?;
    let result = engine.forward(&negative, Some(&mut cache));
    ctx.expect_error("a negative id", result, is_invalid_token, "TokenizationError::InvalidToken");
    check_len(ctx, "after a negative id", &cache, 3);
    let nothing = Tensor::zeros((1, 0), DType::U32, &device)?;
    ctx.check(engine.forward(&nothing, Some(&mut cache)).is_err(), "no ids are refused", "they were accepted");
    check_len(ctx, "after no ids", &cache, 3);

    let rest = forward(engine.as_mut(), &[tokens[3..].to_vec()], Some(&mut cache))?;
    let expected: Vec<f32> = (3..8).flat_map(|t| whole.row(0, t).to_vec()).collect();
    same_logits(ctx, Axis::Chunking, "logits after five refused calls", &rest.data, &expected);

    // The first call may be the one that is refused.
    let mut cache = KVCache::new(8);
    let result = try_forward(engine.as_mut(), &[vec![tokens[0], tokens[1], vocab]], Some(&mut cache))?;
    ctx.expect_error("a bad id in the first call", result, is_invalid_token, "TokenizationError::InvalidToken");
    check_len(ctx, "after a bad id in the first call", &cache, 0);
    let first = forward(engine.as_mut(), std::slice::from_ref(&tokens), Some(&mut cache))?;
    same_logits(ctx, Axis::Chunking, "logits of the first call that is not refused", &first.data, &whole.data);
    if ctx.capabilities().batch {
        let rows = [tokens.clone(), prompt(ctx.facts(), 8, 59)];
        let whole = forward(engine.as_mut(), &rows, None)?;
        let mut cache = KVCache::new(8);
        forward(engine.as_mut(), &rows.each_ref().map(|row| row[..3].to_vec()), Some(&mut cache))?;
        let bad = [tokens[3..5].to_vec(), vec![tokens[3], vocab]];
        let result = try_forward(engine.as_mut(), &bad, Some(&mut cache))?;
        ctx.expect_error("a bad id in the second row", result, is_invalid_token, "TokenizationError::InvalidToken");
        check_len(ctx, "after a bad id in the second row", &cache, 3);
        let rest = forward(engine.as_mut(), &rows.each_ref().map(|row| row[3..].to_vec()), Some(&mut cache))?;
        for row in 0..2 {
            let what = format!("logits of row {row} after a bad id in the second");
            let expected = &whole.sequence(row)[3 * whole.vocab..];
            same_logits(ctx, Axis::Chunking, what, rest.sequence(row), expected);
        }
    }
    Ok(())
}

pub(super) fn failed_pass_changes_nothing(ctx: &mut Context<'_>) -> CheckResult {
    // Behind the final norm nothing scales down again: the logits leave the range of a float.
    let mut model = Model::read(ctx.model().dir())?;
    model.tensor("model.norm.weight")?.fill(3e38)?;
    let head = model.head_name();
    let values: Vec<f32> = model.tensor(head)?.floats()?.iter().map(|v| v * 1e3).collect();
    model.tensor(head)?.set_floats(&values)?;
    let dir = ctx.scratch().join("overflow");
    model.write(&dir)?;
    let Ok(mut broken) = ctx.factory().create(&ctx.model().relocated(&dir)) else {
        ctx.check(true, "refused at loading", "");
        return Ok(());
    };
    let tokens = prompt(ctx.facts(), 5, 58);
    let mut cache = KVCache::new(8);
    for piece in [&tokens[..3], &tokens[..1]] {
        let result = try_forward(broken.as_mut(), &[piece.to_vec()], Some(&mut cache))?;
        ctx.expect_error("logits that overflow", result, is_instability, "NumericalInstability");
        check_len(ctx, "after a pass that failed", &cache, 0);
    }
    // What the pass left is nobody's.
    let mut engine = ctx.engine()?;
    let expected = forward(engine.as_mut(), std::slice::from_ref(&tokens), Some(&mut KVCache::new(8)))?;
    let seen = forward(engine.as_mut(), &[tokens], Some(&mut cache))?;
    ctx.check_bits("logits of a sound engine with that cache", &seen.data, &expected.data);
    Ok(())
}

pub(super) fn foreign_cache(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let other_model = ctx.other_model(EDIT_MODEL)?;
    let mut other = ctx.factory().create(&other_model)?;
    let tokens = prompt(ctx.facts(), 6, 53);
    let whole = logits_of(engine.as_mut(), &tokens)?;
    let mut cache = KVCache::new(8);
    forward(engine.as_mut(), &[tokens[..4].to_vec()], Some(&mut cache))?;

    let result = try_forward(other.as_mut(), &[tokens[4..].to_vec()], Some(&mut cache))?;
    ctx.expect_error("a cache of another model", result, is_cache_error, "ForwardPassError::KVCacheError");
    check_len(ctx, "after the other model refused it", &cache, 4);

    // The same shapes do not make it the same model, nor does the same configuration, byte for byte: a model and what it was
    // tuned to have one.
    let mut like = Model::read(ctx.model().dir())?;
    like.tensor("model.layers.0.self_attn.k_proj.weight_scale")?.fill(3.0)?;
    let dir = ctx.scratch().join("same-shape");
    like.write(&dir)?;
    std::fs::copy(ctx.model().dir().join("config.json"), dir.join("config.json"))?;
    let mut like = ctx.factory().create(&ctx.model().relocated(&dir))?;
    let result = try_forward(like.as_mut(), &[tokens[4..].to_vec()], Some(&mut cache))?;
    ctx.expect_error("a cache of a model of the same shape", result, is_cache_error, "ForwardPassError::KVCacheError");
    check_len(ctx, "after the model of the same shape refused it", &cache, 4);

    // Another engine on the same model may take it or not, and if it does it goes on where the first one was.
    let mut twin = ctx.engine()?;
    match try_forward(twin.as_mut(), &[vec![tokens[4]]], Some(&mut cache))? {
        Ok(output) => {
            let seen = Logits::of(&output)?;
            let what = "logits of another engine with the cache of the first";
            same_logits(ctx, Axis::Chunking, what, &seen.data, whole.row(0, 4));
            check_len(ctx, "after another engine took it", &cache, 5);
            cache.truncate(4);
        }
        Err(error) => {
            ctx.check(is_cache_error(&error), "KVCacheError of another engine", format!("{error:?}"));
            check_len(ctx, "after another engine refused it", &cache, 4);
        }
    }
    let rest = forward(engine.as_mut(), &[tokens[4..].to_vec()], Some(&mut cache))?;
    let expected: Vec<f32> = (4..6).flat_map(|t| whole.row(0, t).to_vec()).collect();
    same_logits(ctx, Axis::Chunking, "logits of the owner afterwards", &rest.data, &expected);

    // Emptied, it belongs to nobody, and anybody may fill it.
    cache.clear();
    let expected = forward(other.as_mut(), &[tokens[..3].to_vec()], Some(&mut KVCache::new(8)))?;
    let seen = forward(other.as_mut(), &[tokens[..3].to_vec()], Some(&mut cache))?;
    ctx.check_eq("cache.len() with its new owner", cache.len(), 3);
    ctx.check_bits("logits of the new owner with an emptied and with a new cache", &seen.data, &expected.data);

    // Nor is a cache anybody's whose owner is gone.
    let mut cache = KVCache::new(8);
    forward(engine.as_mut(), &[tokens[..4].to_vec()], Some(&mut cache))?;
    drop((engine, other, like, twin));
    let mut heir = ctx.factory().create(&ctx.model().relocated(&dir))?;
    let result = try_forward(heir.as_mut(), &[tokens[4..].to_vec()], Some(&mut cache))?;
    ctx.expect_error("a cache whose owner is gone", result, is_cache_error, "ForwardPassError::KVCacheError");
    check_len(ctx, "after its owner is gone", &cache, 4);
    Ok(())
}

pub(super) fn other_batch(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let rows = [prompt(ctx.facts(), 5, 55), prompt(ctx.facts(), 5, 56)];
    let whole = forward(engine.as_mut(), &rows, None)?;
    let mut cache = KVCache::new(8);
    let start: Vec<Vec<u32>> = rows.iter().map(|r| r[..3].to_vec()).collect();
    forward(engine.as_mut(), &start, Some(&mut cache))?;
    let mismatch = |e: &InferenceError| {
        matches!(
            e,
            InferenceError::ForwardPass(
                ForwardPassError::KVCacheError { .. }
                    | ForwardPassError::ShapeMismatch { .. }
                    | ForwardPassError::InvalidInput { .. }
            )
        )
    };
    for batch in [1, 3] {
        let other: Vec<Vec<u32>> = (0..batch).map(|b| prompt(ctx.facts(), 2, 57 + b)).collect();
        let result = try_forward(engine.as_mut(), &other, Some(&mut cache))?;
        let what = format!("{batch} sequences with a cache of 2");
        ctx.expect_error(what, result, mismatch, "ForwardPassError::KVCacheError");
        check_len(ctx, "after the mismatch", &cache, 3);
    }
    let rest: Vec<Vec<u32>> = rows.iter().map(|r| r[3..].to_vec()).collect();
    let seen = forward(engine.as_mut(), &rest, Some(&mut cache))?;
    for row in 0..2 {
        let expected: Vec<f32> = (3..5).flat_map(|t| whole.row(row, t).to_vec()).collect();
        same_logits(
            ctx,
            Axis::Chunking,
            format!("logits of sequence {row} after the mismatches"),
            seen.sequence(row),
            &expected,
        );
    }
    cache.clear();
    let alone = forward(engine.as_mut(), &[rows[0].clone()], Some(&mut cache))?;
    same_logits(ctx, Axis::Chunking, "one sequence in the cleared cache of two", &alone.data, whole.sequence(0));
    Ok(())
}
