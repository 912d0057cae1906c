//! Shapes, element types, devices and configuration.

use super::edit::Model;
use super::support::{Logits, forward, ids, other_token, prompt, reach, same_logits};
use super::truth::{Attention, Subject};
use crate::backend::{Capability, CreateOptions, Noise, Semantics};
use crate::case::{Category, Check, CheckResult, Context, ModelSet};
use crate::invariance::Axis;
use crate::tolerance;
use bitnet_contracts::{BitNetInference, DType, Device, KVCache, QuantizationType, Tensor};

const SHAPE: Category = Category::Shape;

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "SHP-1",
        "shape/logits",
        SHAPE,
        "logits are [batch, seq, vocab] on the engine's device, pass their own validation, and only at their size",
        logits,
    )
    .on(ModelSet::Every),
    Check::new("SHP-3", "shape/id_types", SHAPE, "u32 and i64 ids, contiguous or not, mean the same", id_types),
    Check::new(
        "SHP-4",
        "shape/attention_weights",
        SHAPE,
        "attention weights are [batch, heads, seq, total] a layer, sum to 1, are causal, and are the oracle's",
        attention_weights,
    )
    .needs(Capability::AttentionWeights),
    Check::new(
        "SHP-5",
        "shape/hidden_states",
        SHAPE,
        "hidden states are the final normed state: the head's input",
        hidden_states,
    )
    .needs(Capability::HiddenStates)
    .on(ModelSet::Every),
    Check::new(
        "SHP-6",
        "shape/optional_outputs_off",
        SHAPE,
        "attention weights and hidden states are None by default",
        optional_outputs_off,
    ),
    Check::new("SHP-7", "shape/config", SHAPE, "config() says what config.json says and is valid", config)
        .on(ModelSet::Every),
    Check::new("SHP-9", "shape/quantization", SHAPE, "supports_quantization answers as declared", quantization),
];

fn logits(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let facts = ctx.facts().clone();
    let batches: &[usize] = if ctx.capabilities().batch { &[1, 2, 3] } else { &[1] };
    for &batch in batches {
        for seq in [1, 2, 7] {
            let rows: Vec<Vec<u32>> = (0..batch).map(|b| prompt(&facts, seq, b as u64)).collect();
            let input = ids(&rows, engine.device())?;
            let output = engine.forward(&input, None)?;
            let vocab = facts.vocab_size;
            ctx.check_eq("logits shape", output.logits.dims(), [batch, seq, vocab]);
            let dtype = output.logits.dtype();
            ctx.check(
                matches!(dtype, DType::F32 | DType::F16 | DType::BF16 | DType::F64),
                "logits of a float type",
                format!("{dtype:?}"),
            );
            let (device, seen) = (engine.device(), output.logits.device());
            ctx.check(device.same_device(seen), format!("logits on {device:?}"), format!("logits on {seen:?}"));
            ctx.check_ok(format!("validate({batch}, {seq}, {vocab})"), output.validate(batch, seq, vocab));
            for (batch, seq, vocab) in [(batch + 1, seq, vocab), (batch, seq + 1, vocab), (batch, seq, vocab + 1)] {
                let refused = output.validate(batch, seq, vocab).is_err();
                ctx.check(refused, format!("validate({batch}, {seq}, {vocab}) refuses"), "it accepted");
            }
            let all = Logits::of(&output)?;
            let next = output.next_token_logits()?;
            ctx.check_eq("next_token_logits shape", next.dims(), [batch, vocab]);
            let next = next.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
            let last: Vec<f32> = (0..batch).flat_map(|b| all.last(b).to_vec()).collect();
            ctx.check_bits("next_token_logits is the last row", &next, &last);
        }
    }
    Ok(())
}

fn id_types(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let device = engine.device().clone();
    let tokens = prompt(ctx.facts(), 6, 2);
    let input = ids(std::slice::from_ref(&tokens), &device)?;
    let expected = Logits::of(&engine.forward(&input, None)?)?;
    let wide = input.to_dtype(DType::I64)?;
    let seen = Logits::of(&engine.forward(&wide, None)?)?;
    ctx.check_bits("logits of i64 ids", &seen.data, &expected.data);
    // A column of a matrix, read as a row: same ids, with a stride of 2 between them.
    let strided: Vec<u32> = tokens.iter().flat_map(|&t| [t, other_token(ctx.facts(), t)]).collect();
    let strided = Tensor::from_vec(strided, (tokens.len(), 2), &device)?.narrow(1, 0, 1)?.t()?;
    let seen = Logits::of(&engine.forward(&strided, None)?)?;
    ctx.check_bits("logits of non-contiguous ids", &seen.data, &expected.data);
    // A part of a longer tensor: contiguous, and not at its beginning.
    let longer = [&prompt(ctx.facts(), 3, 5), &tokens[..], &[0]].concat();
    let part = Tensor::from_vec(longer, (1, tokens.len() + 4), &device)?.narrow(1, 3, tokens.len())?;
    let seen = Logits::of(&engine.forward(&part, None)?)?;
    ctx.check_bits("logits of ids inside a longer tensor", &seen.data, &expected.data);
    if ctx.capabilities().batch {
        // Two sequences that lie in memory position by position.
        let other = prompt(ctx.facts(), tokens.len(), 6);
        let rows = ids(&[tokens.clone(), other.clone()], &device)?;
        let expected = Logits::of(&engine.forward(&rows, None)?)?;
        let turned: Vec<u32> = tokens.iter().zip(&other).flat_map(|(&a, &b)| [a, b]).collect();
        let turned = Tensor::from_vec(turned, (tokens.len(), 2), &device)?.t()?;
        for (what, turned) in [("u32", turned.clone()), ("i64", turned.to_dtype(DType::I64)?)] {
            let seen = Logits::of(&engine.forward(&turned, None)?)?;
            ctx.check_bits(format!("logits of a transposed batch of {what} ids"), &seen.data, &expected.data);
        }
    }
    Ok(())
}

fn attention_weights(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine_with(&CreateOptions::default().with_attentions())?;
    let facts = ctx.facts().clone();
    let batch = if ctx.capabilities().batch { 2 } else { 1 };
    let (mut cache, mut plain_cache) = (KVCache::new(12), KVCache::new(12));
    let mut plain = ctx.engine()?;
    let sequences: Vec<Vec<u32>> = (0..batch).map(|b| prompt(&facts, 9, 50 + b as u64)).collect();
    // The oracle's, sequence by sequence and layer by layer. A model of the caller's own may be too large for it.
    let truth = match ctx.model().weights_sha256 {
        Some(_) => {
            let subject = Subject::open(ctx, ctx.model().name(), ctx.model().dir())?;
            sequences.iter().map(|tokens| subject.attention(tokens)).collect::<Result<_, _>>()?
        }
        None => Vec::new(),
    };
    // In three calls with a cache, and in one without.
    for (past, total, cached) in [(0, 5, true), (5, 8, true), (8, 9, true), (0, 9, false)] {
        let seq = total - past;
        let rows: Vec<Vec<u32>> = sequences.iter().map(|tokens| tokens[past..total].to_vec()).collect();
        let input = ids(&rows, engine.device())?;
        let output = engine.forward(&input, cached.then_some(&mut cache))?;
        let Some(layers) = &output.attention_weights else {
            ctx.check(false, "attention weights when asked for", "None");
            return Ok(());
        };
        ctx.check_eq("attention weights: layers", layers.len(), facts.layers);
        for (layer, weights) in layers.iter().enumerate() {
            let what = format!("attention weights of layer {layer}, positions {past}..{total}, cache {cached}");
            if !ctx.check_eq(format!("shape of {what}"), weights.dims(), [batch, facts.heads, seq, total]) {
                continue;
            }
            let values = weights.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?;
            check_attention(ctx, &what, &values, seq, total);
            if !truth.is_empty() {
                let expected = expected_attention(&truth, layer, facts.heads, past, total);
                ctx.check_close_within(what, &values, &expected, 1.0, attention_tolerance(ctx));
            }
        }
        let logits = Logits::of(&output)?;
        let without = forward(plain.as_mut(), &rows, cached.then_some(&mut plain_cache))?;
        same_logits(ctx, Axis::Chunking, "logits with and without attention output", &logits.data, &without.data);
    }
    Ok(())
}

/// `[batch × head × position × total]` of the positions from `past` on, from what the oracle gave for whole sequences.
fn expected_attention(truth: &[Attention], layer: usize, heads: usize, past: usize, total: usize) -> Vec<f32> {
    let mut values = Vec::new();
    for layers in truth {
        // The positions before p hold heads × (1 + 2 + … + p) weights.
        let start = |position: usize| heads * position * (position + 1) / 2;
        for head in 0..heads {
            for position in past..total {
                let seen = position + 1;
                let weights = &layers[layer][start(position) + head * seen..][..seen];
                values.extend(weights.iter().map(|&w| w as f32));
                values.extend(std::iter::repeat_n(0.0, total - seen));
            }
        }
    }
    values
}

fn attention_tolerance(ctx: &Context<'_>) -> &'static tolerance::Tolerance {
    match (ctx.capabilities().semantics, ctx.capabilities().noise) {
        (Semantics::Fp32, Noise::F32) => &tolerance::ATTENTION_FP32,
        (_, Noise::F32) => &tolerance::ATTENTION,
        (_, Noise::Coarse) => &tolerance::ATTENTION_COARSE,
    }
}

/// Every row of weights is non-negative, sums to 1, and is zero after its own position.
fn check_attention(ctx: &mut Context<'_>, what: &str, values: &[f32], seq: usize, total: usize) {
    let (mut worst_sum, mut negative, mut late) = (0.0f64, 0.0f32, 0.0f32);
    for (row, weights) in values.chunks_exact(total).enumerate() {
        let position = total - seq + row % seq;
        let sum: f64 = weights.iter().map(|&w| f64::from(w)).sum();
        let off = (sum - 1.0).abs();
        worst_sum = if off.is_nan() { f64::INFINITY } else { worst_sum.max(off) };
        negative = weights.iter().fold(negative, |m, &w| m.min(w));
        late = weights[position + 1..].iter().fold(late, |m, &w| m.max(w.abs()));
    }
    ctx.compared(values.len());
    ctx.check_within(format!("{what}: distance of a row's sum from 1"), worst_sum, &tolerance::ATTENTION_SUM);
    ctx.check_eq(format!("{what}: lowest weight below zero"), negative, 0.0);
    ctx.check_eq(format!("{what}: largest weight on a later position"), late, 0.0);
}

fn hidden_states(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine_with(&CreateOptions::default().with_hidden_states())?;
    let facts = ctx.facts().clone();
    let head = Model::read(ctx.model().dir())?.head()?;
    let rows: Vec<Vec<u32>> =
        (0..if ctx.capabilities().batch { 2 } else { 1 }).map(|b| prompt(&facts, 6, 3 + b)).collect();
    // Without a cache, then in two pieces with one.
    let mut cache = KVCache::new(6);
    check_states(ctx, engine.as_mut(), &head, &rows, None)?;
    for piece in [0..4, 4..6] {
        let rows: Vec<Vec<u32>> = rows.iter().map(|row| row[piece.clone()].to_vec()).collect();
        check_states(ctx, engine.as_mut(), &head, &rows, Some(&mut cache))?;
    }
    Ok(())
}

/// One call, and the head's product with its hidden states against its logits.
fn check_states(
    ctx: &mut Context<'_>,
    engine: &mut dyn BitNetInference,
    head: &[f32],
    rows: &[Vec<u32>],
    cache: Option<&mut KVCache>,
) -> CheckResult {
    let hidden = ctx.facts().hidden_size;
    let input = ids(rows, engine.device())?;
    let output = engine.forward(&input, cache)?;
    let Some(states) = &output.hidden_states else {
        ctx.check(false, "hidden states when asked for", "None");
        return Ok(());
    };
    let shape = [rows.len(), rows[0].len(), hidden];
    ctx.check_eq("shape of hidden states", states.dims(), shape);
    ctx.require(states.dims() == shape, format!("hidden states {shape:?}"), format!("{:?}", states.dims()))?;
    let states = states.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?;
    let product: Vec<f32> = states
        .chunks_exact(hidden)
        .flat_map(|state| {
            head.chunks_exact(hidden)
                .map(move |row| state.iter().zip(row).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>() as f32)
        })
        .collect();
    let logits = Logits::of(&output)?;
    let tolerance = match ctx.capabilities().noise {
        Noise::F32 => &tolerance::HEAD,
        Noise::Coarse => &tolerance::HEAD_COARSE,
    };
    ctx.check_close_within("hidden states times the head", &product, &logits.data, reach(&logits.data), tolerance);
    Ok(())
}

fn optional_outputs_off(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let input = ids(&[prompt(ctx.facts(), 3, 4)], engine.device())?;
    let output = engine.forward(&input, None)?;
    ctx.check(output.attention_weights.is_none(), "no attention weights by default", "Some");
    ctx.check(output.hidden_states.is_none(), "no hidden states by default", "Some");
    Ok(())
}

fn config(ctx: &mut Context<'_>) -> CheckResult {
    let engine = ctx.engine()?;
    let facts = ctx.facts().clone();
    let config = engine.config().clone();
    ctx.check_ok("config().validate()", config.validate());
    ctx.check_eq("hidden_size", config.hidden_size, facts.hidden_size);
    ctx.check_eq("num_layers", config.num_layers, facts.layers);
    ctx.check_eq("num_attention_heads", config.num_attention_heads, facts.heads);
    ctx.check_eq("num_key_value_heads", config.num_key_value_heads, facts.kv_heads);
    ctx.check_eq("intermediate_size", config.intermediate_size, facts.intermediate_size);
    ctx.check_eq("vocab_size", config.vocab_size, facts.vocab_size);
    ctx.check_eq("max_position_embeddings", config.max_position_embeddings, facts.max_positions);
    ctx.check_eq("rope_theta", config.rope_theta, facts.rope_theta as f32);
    ctx.check_eq("head_dim()", config.head_dim(), facts.head_dim);
    ctx.check_eq("group_size()", config.group_size(), facts.heads / facts.kv_heads.max(1));
    // "bitnet", "bitnet-b1.58" and "BitNetForCausalLM" are all in use.
    let named = config.model_type.to_lowercase().contains("bitnet");
    ctx.check(named, "model_type names a BitNet", format!("{:?}", config.model_type));
    Ok(())
}

fn quantization(ctx: &mut Context<'_>) -> CheckResult {
    let engine = ctx.engine()?;
    for kind in [QuantizationType::I2S, QuantizationType::TL1, QuantizationType::TL2] {
        let declared = ctx.capabilities().quantization.contains(&kind);
        ctx.check_eq(format!("supports_quantization({kind:?})"), engine.supports_quantization(kind), declared);
    }
    let own = engine.config().quantization_type;
    let supported = engine.supports_quantization(own);
    ctx.check(supported, format!("the type in use, {own:?}, is supported"), "it is not");
    Ok(())
}
