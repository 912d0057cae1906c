//! Model folders that lie, and numbers that overflow: a typed error, never a crash and never garbage.

use super::edit::{Model, with_header};
use super::support::{EDIT_MODEL, generate, greedy, is_instability, logits_of, plain, prompt, try_forward};
use crate::case::{Category, Check, CheckResult, Context, ModelSet, Stop};
use bitnet_contracts::{ErrorContext, InferenceError, ModelError};
use safetensors::tensor::Dtype;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

const HOSTILE: Category = Category::Hostile;

const fn check(
    id: &'static str,
    name: &'static str,
    clause: &'static str,
    run: fn(&mut Context<'_>) -> CheckResult,
) -> Check {
    Check::new(id, name, HOSTILE, clause, run).on(ModelSet::Only(EDIT_MODEL)).within(120)
}

pub(super) const CHECKS: &[Check] = &[
    check(
        "HST-1",
        "hostile/not_a_number",
        "NaN or infinite weights are refused or NumericalInstability, never a result",
        not_a_number,
    )
    .long(),
    check("HST-2", "hostile/overflow", "numbers that overflow at run time are NumericalInstability", overflow),
    check("HST-3", "hostile/missing_files", "missing folders and files are model errors", missing_files),
    check(
        "HST-4",
        "hostile/broken_weights",
        "truncated, lying and incomplete weight files are refused",
        broken_weights,
    )
    .long(),
    check("HST-5", "hostile/broken_config", "a config.json that is garbage or fits nothing is refused", broken_config)
        .long(),
    check("HST-6", "hostile/invalid_trits", "a packed byte with a code that is no trit is refused", invalid_trits),
];

const NORM: &str = "model.layers.1.input_layernorm.weight";
const PROJECTION: &str = "model.layers.0.self_attn.q_proj.weight";

/// A change to a model.
type Edit = fn(&mut Model) -> CheckResult;
/// A change to the header of its weight file.
type HeaderEdit = fn(&mut Value);

/// A place for one edited model.
fn place(ctx: &Context<'_>, name: &str) -> PathBuf {
    ctx.scratch().join(name.replace(|c: char| !c.is_ascii_alphanumeric(), "-"))
}

/// Asserts that creating an engine on a folder fails with an error about the model, its configuration or its data.
fn refused(ctx: &mut Context<'_>, what: &str, dir: &Path) {
    let result = ctx.factory().create(&ctx.model().relocated(dir));
    if let Err(error) = &result {
        let context = error.context();
        let named = !context.component.is_empty() && context.component != "Unknown";
        ctx.check(named, format!("{what}: an error that names its component"), format!("{:?}", context.component));
    }
    let kind = |error: &InferenceError| {
        matches!(
            error,
            InferenceError::Model(_)
                | InferenceError::Configuration(_)
                | InferenceError::Quantization(_)
                | InferenceError::Memory(_)
        )
    };
    ctx.expect_error(
        format!("loading a model with {what}"),
        result,
        kind,
        "a Model, Configuration or Quantization error",
    );
}

/// Asserts that a model whose numbers are bad is refused when it is loaded, or else when it is used.
fn refused_or_unstable(ctx: &mut Context<'_>, what: &str, dir: &Path, tokens: &[u32]) -> CheckResult {
    let mut engine = match ctx.factory().create(&ctx.model().relocated(dir)) {
        Ok(engine) => engine,
        Err(error) => {
            let kind = matches!(
                error,
                InferenceError::Model(_) | InferenceError::Configuration(_) | InferenceError::Quantization(_)
            ) || is_instability(&error);
            ctx.check(kind, format!("{what}: a model error or NumericalInstability"), format!("{error:?}"));
            return Ok(());
        }
    };
    let result = try_forward(engine.as_mut(), &[tokens.to_vec()], None)?;
    ctx.expect_error(format!("forward with {what}"), result, is_instability, "NumericalInstability");
    for config in [greedy(), plain(1)] {
        let result = engine.generate(tokens, 3, &config);
        ctx.expect_error(format!("generate with {what}"), result, is_instability, "NumericalInstability");
    }
    Ok(())
}

fn not_a_number(ctx: &mut Context<'_>) -> CheckResult {
    let model = Model::read(ctx.model().dir())?;
    let hidden = ctx.facts().hidden_size;
    let tokens = prompt(ctx.facts(), 4, 600);
    let embedded = tokens[1] as usize * hidden + 3;
    let places: [(&str, &str, usize); 8] = [
        ("a norm weight", NORM, 5),
        ("the final norm", "model.norm.weight", 0),
        ("an attention sub-norm", "model.layers.0.self_attn.attn_sub_norm.weight", 7),
        ("a feed-forward sub-norm", "model.layers.2.mlp.ffn_sub_norm.weight", 1),
        ("an embedding in the prompt", "model.embed_tokens.weight", embedded),
        ("the scale of q_proj", "model.layers.0.self_attn.q_proj.weight_scale", 0),
        ("the scale of down_proj", "model.layers.1.mlp.down_proj.weight_scale", 0),
        ("the head", "lm_head.weight", 11),
    ];
    for (place_name, tensor, index) in places {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let what = format!("{value} in {place_name}");
            let mut edited = model.clone();
            edited.tensor(tensor)?.put(index, value)?;
            let dir = place(ctx, &what);
            edited.write(&dir)?;
            refused_or_unstable(ctx, &what, &dir, &tokens)?;
            std::fs::remove_dir_all(&dir)?;
        }
    }
    Ok(())
}

fn overflow(ctx: &mut Context<'_>) -> CheckResult {
    let model = Model::read(ctx.model().dir())?;
    let tokens = prompt(ctx.facts(), 4, 610);
    // Behind the final norm nothing scales down again: the logits themselves leave the range of a float.
    let what = "a final norm of 3e38";
    let mut edited = model.clone();
    edited.tensor("model.norm.weight")?.fill(3e38)?;
    let head = edited.head_name();
    let values: Vec<f32> = edited.tensor(head)?.floats()?.iter().map(|v| v * 1e3).collect();
    edited.tensor(head)?.set_floats(&values)?;
    let dir = place(ctx, what);
    edited.write(&dir)?;
    refused_or_unstable(ctx, what, &dir, &tokens)?;

    // The same without an infinity before: the hidden state is finite, and its products with the head are too large.
    let what = "a head of 1e12 behind a final norm of 1e30";
    let mut edited = model.clone();
    edited.tensor("model.norm.weight")?.fill(1e30)?;
    let values: Vec<f32> = edited.tensor(head)?.floats()?.iter().map(|v| v * 1e12).collect();
    edited.tensor(head)?.set_floats(&values)?;
    let dir = place(ctx, what);
    edited.write(&dir)?;
    refused_or_unstable(ctx, what, &dir, &tokens)?;

    // In the middle a later norm may bring them back, in wider arithmetic: then finite logits are right as well.
    let cases: [(&str, Vec<(&str, f32)>); 3] = [
        ("an input norm of 3e38", vec![(NORM, 3e38)]),
        (
            "sub-norms of 3e38",
            vec![
                ("model.layers.0.self_attn.attn_sub_norm.weight", 3e38),
                ("model.layers.1.mlp.ffn_sub_norm.weight", 3e38),
            ],
        ),
        (
            "weight scales of 3e38",
            vec![
                ("model.layers.0.mlp.gate_proj.weight_scale", 3e38),
                ("model.layers.0.mlp.up_proj.weight_scale", 3e38),
            ],
        ),
    ];
    for (what, edits) in cases {
        let mut edited = model.clone();
        for (tensor, value) in edits {
            edited.tensor(tensor)?.fill(value)?;
        }
        let dir = place(ctx, what);
        edited.write(&dir)?;
        let Ok(mut engine) = ctx.factory().create(&ctx.model().relocated(&dir)) else {
            ctx.check(true, "refused at loading", "");
            continue;
        };
        match try_forward(engine.as_mut(), std::slice::from_ref(&tokens), None)? {
            Err(error) => {
                let right = is_instability(&error);
                ctx.check(right, format!("{what}: NumericalInstability"), format!("{error:?}"));
            }
            Ok(output) => {
                let logits = super::support::Logits::of(&output)?;
                let bad = logits.data.iter().find(|x| !x.is_finite());
                ctx.check(bad.is_none(), format!("{what}: finite logits or an error"), format!("a logit of {bad:?}"));
            }
        }
    }
    Ok(())
}

fn missing_files(ctx: &mut Context<'_>) -> CheckResult {
    let not_found = |e: &InferenceError| matches!(e, InferenceError::Model(ModelError::FileNotFound { .. }));
    let absent = ctx.scratch().join("absent");
    let result = ctx.factory().create(&ctx.model().relocated(&absent));
    ctx.expect_error("loading a missing folder", result, not_found, "ModelError::FileNotFound");
    let empty = place(ctx, "empty");
    std::fs::create_dir_all(&empty)?;
    refused(ctx, "an empty folder", &empty);
    for file in ["config.json", "model.safetensors"] {
        let dir = place(ctx, &format!("without {file}"));
        Model::read(ctx.model().dir())?.write(&dir)?;
        std::fs::remove_file(dir.join(file))?;
        let result = ctx.factory().create(&ctx.model().relocated(&dir));
        let model_error = |e: &InferenceError| matches!(e, InferenceError::Model(_));
        ctx.expect_error(format!("loading a model without {file}"), result, model_error, "a ModelError");
    }
    let sharded = ctx.other_model("sharded-untied-f32")?;
    let shards = std::fs::read_dir(sharded.dir())?.filter_map(|entry| entry.ok().map(|entry| entry.path()));
    let last = shards.filter(|path| path.extension().is_some_and(|e| e == "safetensors")).max();
    if let Some(last) = last {
        std::fs::remove_file(last)?;
        refused(ctx, "a shard missing", sharded.dir());
    }
    let file = ctx.scratch().join("a file");
    std::fs::write(&file, b"not a folder")?;
    refused(ctx, "a file for a folder", &file);
    Ok(())
}

/// Writes a model whose weight file is the given bytes and asserts that it is refused.
fn refuse_weights(ctx: &mut Context<'_>, what: &str, config: &Value, bytes: &[u8]) -> CheckResult {
    let dir = place(ctx, what);
    std::fs::create_dir_all(&dir)?;
    std::fs::write(dir.join("config.json"), config.to_string())?;
    std::fs::write(dir.join("model.safetensors"), bytes)?;
    refused(ctx, what, &dir);
    std::fs::remove_dir_all(&dir)?;
    Ok(())
}

fn broken_weights(ctx: &mut Context<'_>) -> CheckResult {
    let model = Model::read(ctx.model().dir())?;
    let (config, good) = (model.config.clone(), model.weights()?);
    for (what, length) in [
        ("no bytes of weights", 0),
        ("seven bytes of weights", 7),
        ("a cut header", 100),
        ("half the weights", good.len() / 2),
        ("one byte of weights missing", good.len() - 1),
    ] {
        refuse_weights(ctx, what, &config, &good[..length])?;
    }
    for (what, length) in [
        ("a header of u64::MAX bytes", u64::MAX),
        ("a header longer than the file", good.len() as u64),
        ("a header of no bytes", 0),
        ("a header of i64::MAX bytes", i64::MAX as u64),
    ] {
        let mut bytes = good.clone();
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        refuse_weights(ctx, what, &config, &bytes)?;
    }
    let headers: [(&str, HeaderEdit); 6] = [
        ("data beyond the file", |h| h[NORM]["data_offsets"] = json!([0, 1u64 << 40])),
        ("offsets that run backwards", |h| h[NORM]["data_offsets"] = json!([400, 16])),
        ("a shape whose product overflows", |h| h[NORM]["shape"] = json!([1u64 << 33, 1u64 << 33])),
        ("a shape larger than its data", |h| h[NORM]["shape"] = json!([1_000_000])),
        ("an unknown element type", |h| h[NORM]["dtype"] = json!("F31")),
        ("a header that is a list", |h| *h = json!([1, 2, 3])),
    ];
    for (what, change) in headers {
        refuse_weights(ctx, what, &config, &with_header(&good, change)?)?;
    }
    let edits: [(&str, Edit); 8] = [
        ("a missing norm", |m| removed(m, NORM)),
        ("a missing projection", |m| removed(m, PROJECTION)),
        ("a missing weight scale", |m| removed(m, "model.layers.2.mlp.up_proj.weight_scale")),
        ("a missing embedding", |m| removed(m, "model.embed_tokens.weight")),
        ("a missing head that config.json promises", |m| removed(m, "lm_head.weight")),
        ("a norm that is one short", |m| {
            let norm = m.tensor(NORM)?;
            norm.shape[0] -= 1;
            norm.data.truncate(norm.data.len() - 4);
            Ok(())
        }),
        ("a projection with its dimensions swapped", |m| {
            m.tensor(PROJECTION)?.shape.reverse();
            Ok(())
        }),
        ("a norm of integers", |m| {
            m.tensor(NORM)?.dtype = Dtype::I32;
            Ok(())
        }),
    ];
    for (what, edit) in edits {
        let mut edited = model.clone();
        edit(&mut edited)?;
        refuse_weights(ctx, what, &config, &edited.weights()?)?;
    }
    still_loads(ctx)
}

fn removed(model: &mut Model, name: &str) -> CheckResult {
    let gone = model.tensors.remove(name);
    gone.map(|_| ()).ok_or_else(|| Stop::Inconclusive(format!("the model has no tensor {name}")))
}

/// After all refusals the sound model loads and works.
fn still_loads(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let tokens = prompt(ctx.facts(), 3, 620);
    let logits = logits_of(engine.as_mut(), &tokens)?;
    let finite = logits.data.iter().all(|x| x.is_finite());
    ctx.check(finite, "the sound model works after the refusals", "its logits are not finite");
    let made = generate(engine.as_mut(), &tokens, 2, &plain(3))?;
    ctx.compared(made.generated_tokens.len());
    Ok(())
}

fn broken_config(ctx: &mut Context<'_>) -> CheckResult {
    let model = Model::read(ctx.model().dir())?;
    let weights = model.weights()?;
    let texts: [(&str, Vec<u8>); 6] = [
        ("an empty config.json", Vec::new()),
        ("a config.json of garbage", b"{\"hidden_size\": 96,,,".to_vec()),
        ("a config.json that is a list", b"[1, 2, 3]".to_vec()),
        ("a config.json that is not UTF-8", vec![0xff, 0xfe, 0x00, 0x80]),
        ("a config.json nested 100,000 deep", [vec![b'['; 100_000], vec![b']'; 100_000]].concat()),
        ("an empty object as config.json", b"{}".to_vec()),
    ];
    for (what, text) in texts {
        let dir = place(ctx, what);
        std::fs::create_dir_all(&dir)?;
        std::fs::write(dir.join("config.json"), text)?;
        std::fs::write(dir.join("model.safetensors"), &weights)?;
        refused(ctx, what, &dir);
        std::fs::remove_dir_all(&dir)?;
    }
    let facts = ctx.facts().clone();
    let edits: Vec<(&str, &str, Value)> = vec![
        ("no heads", "num_attention_heads", json!(0)),
        ("no layers", "num_hidden_layers", json!(0)),
        ("no key/value heads", "num_key_value_heads", json!(0)),
        ("no hidden size", "hidden_size", json!(0)),
        ("heads that do not divide the hidden size", "num_attention_heads", json!(facts.heads + 1)),
        ("key/value heads that do not divide the heads", "num_key_value_heads", json!(facts.heads + 1)),
        ("a vocabulary larger than the embedding", "vocab_size", json!(facts.vocab_size + 1)),
        ("a vocabulary smaller than the embedding", "vocab_size", json!(facts.vocab_size - 1)),
        ("an absurd vocabulary", "vocab_size", json!(u64::MAX)),
        ("another hidden size than the tensors", "hidden_size", json!(facts.hidden_size * 2)),
        ("another feed-forward size than the tensors", "intermediate_size", json!(facts.intermediate_size + 8)),
        ("more layers than tensors", "num_hidden_layers", json!(facts.layers + 1)),
        ("a million million layers", "num_hidden_layers", json!(1_000_000_000_000u64)),
        ("a negative hidden size", "hidden_size", json!(-96)),
        ("a hidden size in words", "hidden_size", json!("ninety-six")),
        ("no context", "max_position_embeddings", json!(0)),
        ("a RoPE base of zero", "rope_theta", json!(0.0)),
        ("a negative RoPE base", "rope_theta", json!(-10000.0)),
        ("a missing hidden size", "hidden_size", Value::Null),
        ("a missing vocabulary", "vocab_size", Value::Null),
        (
            "an unknown linear_class",
            "quantization_config",
            json!({"quant_method": "bitnet", "linear_class": "superlinear", "quantization_mode": "offline"}),
        ),
        ("another quantisation method", "quantization_config", json!({"quant_method": "gptq", "bits": 4})),
    ];
    for (what, key, value) in edits {
        let mut edited = model.clone();
        edited.set(key, value);
        refuse_weights(ctx, what, &edited.config, &weights)?;
    }
    still_loads(ctx)
}

fn invalid_trits(ctx: &mut Context<'_>) -> CheckResult {
    let model = Model::read(ctx.model().dir())?;
    let names: Vec<String> =
        model.tensors.iter().filter(|(_, t)| t.dtype == Dtype::U8).map(|(name, _)| name.clone()).collect();
    ctx.require(!names.is_empty(), "packed tensors in the model", "none")?;
    // The code 3 in each of the four places of a byte, at the first, a middle and the last byte.
    for (i, name) in [names.first(), names.get(names.len() / 2), names.last()].into_iter().flatten().enumerate() {
        for shift in [0, 2, 4, 6] {
            let mut edited = model.clone();
            let data = &mut edited.tensor(name)?.data;
            let at = i * (data.len() - 1) / 2;
            data[at] |= 3 << shift;
            let dir = place(ctx, &format!("trit {i} {shift}"));
            edited.write(&dir)?;
            refused(ctx, &format!("code 3 at bit {shift} of byte {at} of {name}"), &dir);
            std::fs::remove_dir_all(&dir)?;
        }
    }
    Ok(())
}
