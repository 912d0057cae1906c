//! Faults of reading model folders, and of numbers that are none.

use super::super::Fault;
use super::super::naive::{At, Deviation, Weights};
use crate::model::ModelFixture;
use bitnet_contracts::{InferenceError, ModelError, Result};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

pub(super) const FAULTS: &[Fault] = &[
    Fault::new(
        "nan-accepted",
        "NaN goes through: weights and results are not looked at",
        "onnxruntime-genai PR #2444; vllm-rbln PR #615: token 0, which reads as !!!!",
        "hostile/not_a_number",
        || Arc::new(Unchecked),
    ),
    Fault::new(
        "nan-to-zero",
        "weights that are no numbers are replaced by 0 at loading",
        "clause HST-1",
        "hostile/not_a_number",
        || Arc::new(NanToZero),
    ),
    Fault::new(
        "scale-infinite-is-one",
        "a weight scale that is not finite counts as 1",
        "clause HST-1",
        "hostile/not_a_number",
        || Arc::new(InfiniteScale),
    ),
    Fault::new(
        "overflow-saturates",
        "logits that overflow are clamped to the largest float",
        "clause HST-2",
        "hostile/overflow",
        || Arc::new(Saturates),
    ),
    Fault::new(
        "missing-folder-misnamed",
        "a missing folder is said to be a failed load",
        "clause HST-3",
        "hostile/missing_files",
        || Arc::new(Misnamed),
    ),
    Fault::new(
        "file-padded",
        "a weight file that ends early is taken to go on with zeros",
        "ggml PR #709; llama.cpp PR #18674",
        "hostile/broken_weights",
        || Arc::new(Mends(|_, weights| padded(weights))),
    ),
    Fault::new(
        "header-allocated",
        "as many bytes are allocated as the header's length says",
        "ggml PR #1516; llama.cpp #19856; candle #3533",
        "hostile/broken_weights",
        || Arc::new(HeaderAllocated),
    ),
    Fault::new(
        "missing-scale-is-one",
        "a weight scale that is missing counts as 1",
        "clause HST-4",
        "hostile/broken_weights",
        || Arc::new(Mends(|config, weights| with_missing(config, weights, |name| name.ends_with("weight_scale"), 1.0))),
    ),
    Fault::new(
        "missing-tensor-is-zeros",
        "a norm that is missing counts as zeros",
        "clause HST-4",
        "hostile/broken_weights",
        || Arc::new(Mends(|config, weights| with_missing(config, weights, |name| name.ends_with("norm.weight"), 0.0))),
    ),
    Fault::new(
        "linear-class-unknown-accepted",
        "an unknown linear_class counts as none",
        "clause HST-5",
        "hostile/broken_config",
        || {
            Arc::new(Mends(|config, _| {
                let class = config.get_mut("quantization_config")?.get_mut("linear_class")?;
                *class = json!("bitlinear");
                Some(())
            }))
        },
    ),
    Fault::new(
        "vocabulary-of-the-file",
        "a vocabulary that is not the embedding's is corrected in silence",
        "clause HST-5",
        "hostile/broken_config",
        || {
            Arc::new(Mends(|config, weights| {
                let rows = shape(weights, "model.embed_tokens.weight")?[0];
                *config.get_mut("vocab_size")? = json!(rows);
                Some(())
            }))
        },
    ),
    Fault::new(
        "heads-of-the-file",
        "key/value heads that do not divide the heads are corrected by the shape of k_proj",
        "clause HST-5",
        "hostile/broken_config",
        || {
            Arc::new(Mends(|config, weights| {
                let width = 4 * shape(weights, "model.layers.0.self_attn.k_proj.weight")?[0] as u64;
                let head = config.get("hidden_size")?.as_u64()? / config.get("num_attention_heads")?.as_u64()?.max(1);
                *config.get_mut("num_key_value_heads")? = json!(width / head.max(1));
                Some(())
            }))
        },
    ),
    Fault::new(
        "config-garbage-panics",
        "a config.json that is not JSON is a panic",
        "candle #3585",
        "hostile/broken_config",
        || Arc::new(GarbagePanics),
    ),
    Fault::new(
        "config-deep-overflows",
        "a deeply nested config.json overflows the stack",
        "whisper.cpp PR #3864",
        "hostile/broken_config",
        || Arc::new(DeepOverflows),
    ),
    Fault::new(
        "trit-3-is-zero",
        "the code 3 of a packed trit is read as 0",
        "BitNet #598; tomsanbear/bitnet-rs #1",
        "hostile/invalid_trits",
        // 0b11 becomes 0b01.
        || Arc::new(Mends(|_, weights| recoded(weights, |byte| byte & !((byte & (byte >> 1) & 0x55) << 1)))),
    ),
    Fault::new(
        "trit-3-is-one",
        "the code 3 of a packed trit is read as 1",
        "BitNet #598; tomsanbear/bitnet-rs #1",
        "hostile/invalid_trits",
        // 0b11 becomes 0b10.
        || Arc::new(Mends(|_, weights| recoded(weights, |byte| byte & !(byte & (byte >> 1) & 0x55)))),
    ),
];

/// Neither weights nor results are looked at.
struct Unchecked;

impl Deviation for Unchecked {
    fn checks_weights(&self) -> bool {
        false
    }

    fn checks_output(&self) -> bool {
        false
    }
}

fn floats(weights: &mut Weights) -> impl Iterator<Item = &mut f32> {
    let Weights { embedding, layers, final_norm, head, .. } = weights;
    let of_layers = layers.iter_mut().flat_map(|l| {
        let norms = [&mut l.input_norm, &mut l.attn_sub_norm, &mut l.post_attention_norm, &mut l.ffn_sub_norm];
        let scales = [&mut l.q, &mut l.k, &mut l.v, &mut l.o, &mut l.gate, &mut l.up, &mut l.down];
        norms.into_iter().flatten().chain(scales.map(|t| &mut t.scale))
    });
    of_layers.chain(embedding).chain(final_norm).chain(head.iter_mut().flatten())
}

/// What is no number becomes 0.
struct NanToZero;

impl Deviation for NanToZero {
    fn checks_weights(&self) -> bool {
        false
    }

    fn weights(&self, weights: &mut Weights) {
        floats(weights).filter(|x| !x.is_finite()).for_each(|x| *x = 0.0);
    }
}

/// A scale that is not finite becomes 1; all else is looked at.
struct InfiniteScale;

impl Deviation for InfiniteScale {
    fn load(&self, model: &ModelFixture) -> Result<Weights> {
        let mut weights = Weights::load(model.dir(), model.name())?;
        for matrix in weights.layers.iter_mut().flat_map(|l| l.projections()).filter(|t| !t.scale.is_finite()) {
            matrix.scale = 1.0;
        }
        Ok(weights)
    }
}

/// What is too large becomes the largest.
struct Saturates;

impl Deviation for Saturates {
    fn logits(&self, _: &At<'_>, _: u32, logits: &mut [f32]) {
        logits.iter_mut().for_each(|x| *x = x.clamp(f32::MIN, f32::MAX));
    }
}

/// Every error of a folder that is not there has another name.
struct Misnamed;

impl Deviation for Misnamed {
    fn load_error(&self, _: &Path, error: InferenceError) -> InferenceError {
        match error {
            InferenceError::Model(ModelError::FileNotFound { path }) => {
                ModelError::LoadingFailed { path, reason: "no such file".to_string() }.into()
            }
            other => other,
        }
    }
}

/// A change to `config.json` and the weight file that makes a broken model loadable.
type Mend = fn(&mut Value, &mut Vec<u8>) -> Option<()>;

/// What cannot be loaded is changed until it can.
struct Mends(Mend);

impl Deviation for Mends {
    fn load(&self, model: &ModelFixture) -> Result<Weights> {
        let refused = match Weights::load(model.dir(), model.name()) {
            Err(error) => error,
            loaded => return loaded,
        };
        mended(model, self.0).unwrap_or(Err(refused))
    }
}

/// A changed copy of the folder, loaded; `None` where there is nothing to change.
fn mended(model: &ModelFixture, mend: Mend) -> Option<Result<Weights>> {
    let mut config = serde_json::from_slice(&std::fs::read(model.dir().join("config.json")).ok()?).ok()?;
    let mut weights = std::fs::read(model.dir().join("model.safetensors")).ok()?;
    mend(&mut config, &mut weights)?;
    let copy = tempfile::tempdir().ok()?;
    std::fs::write(copy.path().join("config.json"), config.to_string()).ok()?;
    std::fs::write(copy.path().join("model.safetensors"), weights).ok()?;
    Some(Weights::load(copy.path(), model.name()))
}

/// The header of a weight file and where the data begins.
fn header(weights: &[u8]) -> Option<(Value, usize)> {
    let length = usize::try_from(u64::from_le_bytes(*weights.first_chunk::<8>()?)).ok()?;
    let data = length.checked_add(8)?;
    Some((serde_json::from_slice(weights.get(8..data)?).ok()?, data))
}

fn shape(weights: &[u8], name: &str) -> Option<Vec<usize>> {
    let (header, _) = header(weights)?;
    serde_json::from_value(header.get(name)?.get("shape")?.clone()).ok()
}

fn padded(weights: &mut Vec<u8>) -> Option<()> {
    /// No more than this is ever missing here.
    const MOST: u64 = 1 << 24;
    let (header, data) = header(weights)?;
    let ends = header.as_object()?.values().filter_map(|tensor| tensor.get("data_offsets")?.get(1)?.as_u64());
    let end = ends.max().filter(|end| *end <= MOST)?;
    weights.resize(data + usize::try_from(end).ok()?, 0);
    Some(())
}

/// The weight file with what a model of this configuration lacks, where the name is one that is made up for.
fn with_missing(config: &Value, weights: &mut Vec<u8>, made_up: fn(&str) -> bool, value: f32) -> Option<()> {
    let number = |key: &str| usize::try_from(config.get(key)?.as_u64()?).ok();
    let (hidden, inner, layers) = (number("hidden_size")?, number("intermediate_size")?, number("num_hidden_layers")?);
    let parsed = SafeTensors::deserialize(weights).ok()?;
    let projections = ["self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down"];
    let norms = ["input_layernorm", "self_attn.attn_sub_norm", "post_attention_layernorm", "mlp.ffn_sub_norm"];
    let wanted = (0..layers.min(100)).flat_map(|layer| {
        let scales = projections.map(|p| (format!("model.layers.{layer}.{p}_proj.weight_scale"), 1));
        let norms = norms.map(|n| {
            let size = if n.ends_with("ffn_sub_norm") { inner } else { hidden };
            (format!("model.layers.{layer}.{n}.weight"), size)
        });
        scales.into_iter().chain(norms)
    });
    let missing: BTreeMap<String, Vec<u8>> = wanted
        .filter(|(name, _)| made_up(name) && parsed.tensor(name).is_err())
        .map(|(name, size)| (name, value.to_le_bytes().repeat(size)))
        .collect();
    let mut views: Vec<(String, TensorView<'_>)> = parsed.tensors();
    for (name, data) in &missing {
        views.push((name.clone(), TensorView::new(Dtype::F32, vec![data.len() / 4], data).ok()?));
    }
    let whole = safetensors::serialize(views, None).ok()?;
    *weights = whole;
    Some(())
}

/// The weight file with every packed byte changed.
fn recoded(weights: &mut Vec<u8>, recode: fn(u8) -> u8) -> Option<()> {
    let parsed = SafeTensors::deserialize(weights).ok()?;
    let changed: Vec<(String, TensorView<'_>, Vec<u8>)> = parsed
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            let data = view.data().iter().map(|&b| if view.dtype() == Dtype::U8 { recode(b) } else { b }).collect();
            (name, view, data)
        })
        .collect();
    let views: Option<Vec<(&str, TensorView<'_>)>> = changed
        .iter()
        .map(|(name, view, data)| {
            Some((name.as_str(), TensorView::new(view.dtype(), view.shape().to_vec(), data).ok()?))
        })
        .collect();
    let whole = safetensors::serialize(views?, None).ok()?;
    *weights = whole;
    Some(())
}

/// Trusts the first eight bytes of a weight file.
struct HeaderAllocated;

impl Deviation for HeaderAllocated {
    fn load(&self, model: &ModelFixture) -> Result<Weights> {
        let weights = std::fs::read(model.dir().join("model.safetensors")).unwrap_or_default();
        if let Some(length) = weights.first_chunk::<8>() {
            let header: Vec<u8> = Vec::with_capacity(u64::from_le_bytes(*length) as usize);
            std::hint::black_box(&header);
        }
        Weights::load(model.dir(), model.name())
    }
}

/// Takes every `config.json` for JSON.
struct GarbagePanics;

impl Deviation for GarbagePanics {
    fn load(&self, model: &ModelFixture) -> Result<Weights> {
        if let Ok(text) = std::fs::read(model.dir().join("config.json")) {
            let parsed: std::result::Result<Value, _> = serde_json::from_slice(&text);
            assert!(parsed.is_ok(), "called `Result::unwrap()` on an `Err` value");
        }
        Weights::load(model.dir(), model.name())
    }
}

/// Reads nested lists by a function that calls itself.
struct DeepOverflows;

impl Deviation for DeepOverflows {
    fn load(&self, model: &ModelFixture) -> Result<Weights> {
        fn depth(text: &[u8]) -> usize {
            let level = std::hint::black_box([0u8; 512]);
            match text.first() {
                Some(b'[') => 1 + depth(&text[1..]) + usize::from(level[0]),
                _ => 0,
            }
        }
        let text = std::fs::read(model.dir().join("config.json")).unwrap_or_default();
        std::hint::black_box(depth(&text));
        Weights::load(model.dir(), model.name())
    }
}
