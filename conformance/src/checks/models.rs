//! Models that a check makes: of other shapes, changed in one fact, or saying the same thing in another way. The golden
//! oracle says what their logits are.

use super::edit::Model;
use super::support::{EDIT_MODEL, logits_of, prompt, same_logits_of};
use super::truth::{SMALL, Subject, check_truth, synthetic};
use crate::case::{Category, Check, CheckResult, Context, ModelSet, Stop};
use crate::invariance::Axis;
use fixtures::{LinearClass, Spec, Storage};
use safetensors::tensor::Dtype;
use serde_json::{Value, json};

const GOLDEN: Category = Category::Golden;

const fn check(
    id: &'static str,
    name: &'static str,
    clause: &'static str,
    run: fn(&mut Context<'_>) -> CheckResult,
) -> Check {
    Check::new(id, name, GOLDEN, clause, run).on(ModelSet::Only(EDIT_MODEL)).within(120)
}

pub(super) const CHECKS: &[Check] = &[
    check(
        "GLD-6",
        "golden/reproduced_rows",
        "on models of any shape, where no activation is near a rounding tie, every logit is the oracle's",
        reproduced_rows,
    )
    .long(),
    check(
        "GLD-7",
        "golden/spellings",
        "RoPE base, tied head, scale and element type have several spellings each, and mean the same in all",
        spellings,
    ),
    check(
        "GLD-8",
        "golden/facts_are_read",
        "RoPE base, epsilon, heads, scales, norms and linear_class are read from the model, not assumed",
        facts_are_read,
    )
    .long(),
];

/// Shapes at the edges of blocks: columns 4, 8, 12, 28, 32, 36, 44 and 124 beyond a multiple of 128, rows that no vector
/// divides, one head, as many key/value heads as heads, a vocabulary that is no multiple of anything.
const SHAPES: [(&str, Spec); 5] = [
    ("tail-4", Spec { hidden: 132, ffn: 260, layers: 1, heads: 3, kv_heads: 1, vocab: 61, ..SMALL }),
    ("tail-12", Spec { hidden: 36, ffn: 44, heads: 6, kv_heads: 2, vocab: 33, tied: true, ..SMALL }),
    ("tail-124", Spec { hidden: 160, ffn: 124, layers: 1, heads: 4, kv_heads: 4, vocab: 130, ..SMALL }),
    ("one-head", Spec { hidden: 12, ffn: 20, layers: 3, heads: 1, kv_heads: 1, vocab: 37, ..SMALL }),
    (
        "bitlinear",
        Spec { hidden: 56, ffn: 284, heads: 2, kv_heads: 1, vocab: 67, storage: Storage::Bf16, tied: true, ..DIVIDED },
    ),
];

const DIVIDED: Spec = Spec { layers: 1, layout: fixtures::Layout::Packed(LinearClass::BitLinear), ..SMALL };

fn reproduced_rows(ctx: &mut Context<'_>) -> CheckResult {
    let mut clear = 0;
    for (name, spec) in SHAPES {
        let subject = Subject::write(ctx, name, &synthetic(ctx, name, &spec)?)?;
        let mut engine = subject.engine(ctx)?;
        for (length, salt) in [(1, 0), (2, 1), (2, 2), (3, 3), (4, 4)] {
            let truth = subject.clear_prompt(length, salt)?;
            clear += usize::from(truth.clear);
            let seen = logits_of(engine.as_mut(), &truth.tokens)?;
            let heads = format!("{} heads, {} of keys", spec.heads, spec.kv_heads);
            let what = format!("logits of {:?} on model {name} of its own ({heads})", truth.tokens);
            check_truth(ctx, what, &seen.data, &truth);
        }
    }
    ctx.note(format!("{clear} prompts have no activation near a rounding tie"));
    Ok(())
}

/// The logits of a prompt by an engine on an edited model.
fn edited(ctx: &Context<'_>, name: &str, model: &Model, tokens: &[u32]) -> Result<Vec<f32>, Stop> {
    let subject = Subject::write(ctx, name, model)?;
    Ok(logits_of(subject.engine(ctx)?.as_mut(), tokens)?.data)
}

/// A change to a model.
type Edit = Box<dyn Fn(&mut Model) -> CheckResult>;

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
    // Not the default of any reader.
    let theta = 7000.0;
    let mut original = synthetic(ctx, "spellings", &SMALL)?;
    original.set("rope_theta", json!(theta));
    let tokens = prompt(Subject::write(ctx, "as-it-was", &original)?.facts(), 9, 700);
    let base = edited(ctx, "as-it-was", &original, &tokens)?;

    let mut model = original.clone();
    model.set("rope_theta", Value::Null);
    model.set("rope_parameters", json!({"rope_theta": theta, "rope_type": "default"}));
    let seen = edited(ctx, "rope-parameters", &model, &tokens)?;
    ctx.check_bits("logits with rope_parameters in place of rope_theta", &seen, &base);

    // An own head that is the embedding, against a tied one.
    let embedding = original.clone().tensor("model.embed_tokens.weight")?.clone();
    let mut own = original.clone();
    own.tensors.insert("lm_head.weight".to_string(), embedding);
    own.set("tie_word_embeddings", json!(false));
    let mut tied = own.clone();
    tied.tensors.remove("lm_head.weight");
    tied.set("tie_word_embeddings", json!(true));
    let (own, tied) = (edited(ctx, "own-head", &own, &tokens)?, edited(ctx, "tied-head", &tied, &tokens)?);
    same_logits_of(ctx, SMALL.vocab, Axis::Chunking, "logits of a tied head and of the same head untied", &tied, &own);
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
    same_logits_of(ctx, SMALL.vocab, Axis::Chunking, "logits of bitlinear with reciprocal scales", &seen, &multiplied);
    linear_class(&mut divided, None);
    let by_default = edited(ctx, "scale-divided-by-default", &divided, &tokens)?;
    ctx.check_bits("logits with linear_class left out, which means bitlinear", &by_default, &seen);

    // Values that bf16 holds exactly, stored in four bytes and in two.
    let mut wide = original.clone();
    for held in wide.tensors.values_mut().filter(|h| h.dtype == Dtype::F32) {
        held.truncate_to_bf16()?;
    }
    let mut narrow = wide.clone();
    for held in narrow.tensors.values_mut().filter(|h| h.dtype == Dtype::F32) {
        *held = held.as_bf16()?;
    }
    narrow.set("torch_dtype", json!("bfloat16"));
    let (wide, narrow) = (edited(ctx, "four-bytes", &wide, &tokens)?, edited(ctx, "two-bytes", &narrow, &tokens)?);
    same_logits_of(
        ctx,
        SMALL.vocab,
        Axis::Chunking,
        "logits of a model in bf16 and of the same values in f32",
        &narrow,
        &wide,
    );
    Ok(())
}

/// The seven projections, as the checkpoint names them.
const PROJECTIONS: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

/// The norms of a layer.
const NORMS: [&str; 4] = ["input_layernorm", "self_attn.attn_sub_norm", "post_attention_layernorm", "mlp.ffn_sub_norm"];

/// Sets keys of `config.json`.
fn set(keys: &[(&'static str, Value)]) -> Edit {
    let keys = keys.to_vec();
    Box::new(move |m| {
        keys.iter().for_each(|(key, value)| m.set(key, value.clone()));
        Ok(())
    })
}

/// Every change, by name. With an epsilon of 0.5 a norm does not take the scale of its input away, so that the scales of
/// v, gate and up reach the logits.
fn changes() -> Vec<(String, Edit)> {
    let mut changes: Vec<(String, Edit)> = vec![
        ("another-rope-base".to_string(), set(&[("rope_theta", json!(100.0))])),
        ("another-epsilon".to_string(), set(&[("rms_norm_eps", json!(0.5))])),
        ("wider-heads".to_string(), set(&[("num_attention_heads", json!(2)), ("num_key_value_heads", json!(1))])),
        (
            "the-other-linear_class".to_string(),
            Box::new(|m| {
                linear_class(m, Some("bitlinear"));
                Ok(())
            }),
        ),
        ("another-final-norm".to_string(), Box::new(|m| m.tensor("model.norm.weight")?.put(0, 9.0))),
    ];
    for layer in 0..SMALL.layers {
        for projection in PROJECTIONS {
            let tensor = format!("model.layers.{layer}.{projection}.weight_scale");
            changes.push((
                format!("another-scale-of-{projection}-{layer}"),
                Box::new(move |m| {
                    m.set("rms_norm_eps", json!(0.5));
                    let scale = m.tensor(&tensor)?;
                    let tripled: Vec<f32> = scale.floats()?.iter().map(|s| 3.0 * s).collect();
                    scale.set_floats(&tripled)
                }),
            ));
        }
        for norm in NORMS {
            let tensor = format!("model.layers.{layer}.{norm}.weight");
            changes.push((format!("another-{norm}-{layer}"), Box::new(move |m| m.tensor(&tensor)?.put(1, 30.0))));
        }
    }
    changes
}

fn facts_are_read(ctx: &mut Context<'_>) -> CheckResult {
    let original = synthetic(ctx, "facts", &SMALL)?;
    let subject = Subject::write(ctx, "unchanged", &original)?;
    let truth = subject.clear_prompt(4, 710)?;
    let seen = logits_of(subject.engine(ctx)?.as_mut(), &truth.tokens)?;
    if !check_truth(ctx, "logits of the model before any change", &seen.data, &truth) {
        return Ok(());
    }
    for (name, change) in changes() {
        let mut model = original.clone();
        change(&mut model)?;
        let subject = Subject::write(ctx, &name, &model)?;
        let truth = subject.clear_prompt(4, 710)?;
        let seen = logits_of(subject.engine(ctx)?.as_mut(), &truth.tokens)?;
        check_truth(ctx, format!("logits with {name}"), &seen.data, &truth);
    }
    Ok(())
}
