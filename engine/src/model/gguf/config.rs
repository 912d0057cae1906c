//! The model description from the metadata of a GGUF file.

use bitnet_contracts::{ConfigurationError, Result};

use super::cursor::broken;
use super::file::GgufFile;
use super::{GgufOptions, contradiction};
use crate::model::description::{Activation, ModelDescription, WeightScale};
use crate::model::in_file::in_file;

/// Architectures that are read, and the activation that each stands for. `bitnet-b1.58` and `bitnet-25`, of bitnet.cpp and ik_llama.cpp,
/// are the graph of the 2B4T model. `bitnet` is None: llama.cpp runs it with SiLU, for the first b1.58 models; models with squared ReLU
/// are converted to it as well, since it is the only name that llama.cpp has.
pub(super) const ARCHITECTURES: [(&str, Option<Activation>); 3] =
    [("bitnet-b1.58", Some(Activation::Relu2)), ("bitnet-25", Some(Activation::Relu2)), ("bitnet", None)];

/// A key of ours that names the activation where the architecture's own would be another: `relu2` or `silu`.
pub(super) const ACTIVATION_KEY: &str = "bitnet.activation";

/// End-of-sequence tokens beyond the two that GGUF has keys for.
pub(super) const EOS_LIST_KEY: &str = "bitnet.eos_token_ids";

/// Reads the description; tensors are not looked at except for their presence.
///
/// # Errors
/// `ConfigurationError` for another architecture and for values that make no model, `ModelError` naming the key for values of the
/// wrong type.
pub(super) fn describe(file: &GgufFile, options: &GgufOptions) -> Result<ModelDescription> {
    read(file, options).map_err(|error| in_file(file.path(), error))
}

fn read(file: &GgufFile, options: &GgufOptions) -> Result<ModelDescription> {
    let architecture = file.text("general.architecture")?.ok_or_else(|| missing("general.architecture"))?;
    let Some(&(_, own)) = ARCHITECTURES.iter().find(|(name, _)| *name == architecture) else {
        let known = ARCHITECTURES.map(|(name, _)| name).join(", ");
        return Err(incompatible(format!("general.architecture is {architecture:?}, not one of {known}")));
    };
    if file.size("split.count")?.is_some_and(|n| n > 1) {
        return Err(incompatible("split.count: one part of a file that was split; merge it first".to_string()));
    }
    let key = |part: &str| format!("{architecture}.{part}");
    let size = |part: &str| file.size(&key(part))?.ok_or_else(|| missing(&key(part)));
    refuse_rope_scaling(file, &architecture)?;
    let heads = size("attention.head_count")?;
    let kv_heads = file.size(&key("attention.head_count_kv"))?.unwrap_or(heads);
    let vocab_size = match (file.size(&key("vocab_size"))?, file.tensors().get("token_embd.weight")) {
        (_, None) => return Err(contradiction(file.path(), "tensor token_embd.weight is missing")),
        (said, Some(embedding)) => {
            let rows = embedding.matrix().0;
            if said.is_some_and(|said| said != rows) {
                return Err(contradiction(
                    file.path(),
                    format_args!("{} is {}, token_embd.weight has {rows} rows", key("vocab_size"), said.unwrap_or(0)),
                ));
            }
            rows
        }
    };
    let description = ModelDescription {
        hidden_size: size("embedding_length")?,
        intermediate_size: size("feed_forward_length")?,
        num_layers: size("block_count")?,
        num_attention_heads: heads,
        num_key_value_heads: kv_heads,
        vocab_size,
        max_position_embeddings: size("context_length")?,
        // The default of llama.cpp.
        rope_theta: file.float(&key("rope.freq_base"))?.unwrap_or(10_000.0),
        rms_norm_eps: file
            .float(&key("attention.layer_norm_rms_epsilon"))?
            .ok_or_else(|| missing(&key("attention.layer_norm_rms_epsilon")))?,
        tie_word_embeddings: !file.tensors().contains_key("output.weight"),
        activation: activation(file, own, kv_heads != heads, options)?,
        weight_scale: WeightScale::Multiply,
        bos_token_id: file.id("tokenizer.ggml.bos_token_id")?,
        eos_token_ids: eos(file)?,
        model_type: architecture.clone(),
        name: file
            .text("general.name")?
            .filter(|name| !name.is_empty())
            .or_else(|| Some(file.path().file_stem()?.to_string_lossy().into_owned())),
        version: format!("GGUF {}", file.version()),
    };
    description.check(None)?;
    for part in ["rope.dimension_count", "attention.key_length", "attention.value_length"] {
        if let Some(n) = file.size(&key(part))?.filter(|&n| n != description.head_dim()) {
            return Err(contradiction(
                file.path(),
                format_args!("{} is {n}, expected the head dimension {}", key(part), description.head_dim()),
            ));
        }
    }
    Ok(description)
}

/// The caller's, the file's own key, the architecture's; of `bitnet` what else the file says about its age, with a warning.
fn activation(
    file: &GgufFile,
    own: Option<Activation>,
    grouped_heads: bool,
    options: &GgufOptions,
) -> Result<Activation> {
    if let Some(said) = options.activation {
        return Ok(said);
    }
    if let Some(name) = file.text(ACTIVATION_KEY)? {
        return name.parse().map_err(|e| contradiction(file.path(), format_args!("{ACTIVATION_KEY}: {e}")));
    }
    if let Some(own) = own {
        return Ok(own);
    }
    // The first models have a SentencePiece tokenizer and as many key/value heads as query heads; the converter of llama.cpp knows no
    // others under this name.
    let (activation, sign) = match file.text("tokenizer.ggml.model")?.as_deref() {
        Some("gpt2") => (Activation::Relu2, "its tokenizer is byte-level BPE, which the models with SiLU do not have"),
        Some("llama") => (Activation::Silu, "its tokenizer is SentencePiece, as that of the first b1.58 models"),
        _ if grouped_heads => {
            (Activation::Relu2, "its heads share keys and values, which those of the models with SiLU do not")
        }
        _ => (Activation::Silu, "llama.cpp runs this architecture so"),
    };
    log::warn!(
        "{}: architecture \"bitnet\" does not tell the activation; {} is taken, since {sign} (see --activation)",
        file.path().display(),
        activation.name()
    );
    Ok(activation)
}

fn eos(file: &GgufFile) -> Result<Vec<u32>> {
    if let Some(ids) = file.integers(EOS_LIST_KEY)? {
        let id = |n: i64| u32::try_from(n).map_err(|_| broken(file.path(), format!("{EOS_LIST_KEY} holds {n}")));
        return ids.into_iter().map(id).collect();
    }
    let mut ids: Vec<u32> = Vec::new();
    for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"] {
        ids.extend(file.id(key)?.filter(|id| !ids.contains(id)));
    }
    Ok(ids)
}

/// Scaled positions are another model.
fn refuse_rope_scaling(file: &GgufFile, architecture: &str) -> Result<()> {
    let key = |part: &str| format!("{architecture}.rope.{part}");
    let ty = file.text(&key("scaling.type"))?;
    let mut factor = file.float(&key("scaling.factor"))?;
    if factor.is_none() {
        factor = file.float(&key("scale_linear"))?;
    }
    // llama.cpp's own converter writes "linear" with a factor of 1, which changes nothing.
    let plain = match ty.as_deref() {
        None | Some("none") => factor.is_none_or(|f| f == 1.0 || f == 0.0),
        Some("linear") => factor == Some(1.0),
        Some(_) => false,
    };
    if plain {
        return Ok(());
    }
    Err(incompatible(format!(
        "{} is {:?} with a factor of {factor:?}; BitNet b1.58 has no scaled positions",
        key("scaling.type"),
        ty.unwrap_or_default()
    )))
}

fn missing(key: &str) -> bitnet_contracts::InferenceError {
    ConfigurationError::MissingParameter { parameter: key.to_string() }.into()
}

fn incompatible(reason: String) -> bitnet_contracts::InferenceError {
    ConfigurationError::IncompatibleConfig { reason }.into()
}
