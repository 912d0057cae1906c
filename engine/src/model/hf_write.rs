//! A checkpoint of any format as a Hugging Face folder with packed weights, as `transformers` loads it.
//!
//! `linear_class` is `autobitlinear`, whose `weight_scale` multiplies, whatever it was in the source. Tensors are written one after
//! another; the folder has its name once it is whole.

use std::io::{BufWriter, Write};
use std::path::Path;

use bitnet_contracts::{ConfigurationError, Result};
use half::bf16;
use serde_json::{Map, Value, json};

use super::checkpoint::Checkpoint;
use super::description::Activation;
use super::gguf::{TensorType, floats};
use super::mapped_file::loading_failed;
use super::plan::Part;
use crate::ternary::{hf_packed, usable_scale};

/// Bytes that end up in the file for one tensor name.
struct Declared {
    name: String,
    dtype: &'static str,
    shape: Vec<usize>,
    bytes: usize,
}

/// Writes `checkpoint` to the folder `path`, which must not be there yet. `progress` is told the bytes written and all bytes.
///
/// # Errors
/// What [`Checkpoint`] reports for a tensor; `QuantizationError::LayoutMismatch` for rows that are no multiple of 4;
/// `ConfigurationError` for a model with SiLU; `ModelError` naming a path that cannot be written or is there already.
pub fn write_hf_packed(checkpoint: &Checkpoint, path: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<()> {
    let failed = |e: &dyn std::fmt::Display| loading_failed(path, e);
    if path.exists() {
        return Err(failed(&"is there already"));
    }
    let d = checkpoint.description();
    if d.activation != Activation::Relu2 {
        return Err(ConfigurationError::IncompatibleConfig {
            reason: "a model with SiLU has no form as a packed BitNet folder".to_string(),
        }
        .into());
    }
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut builder = tempfile::Builder::new();
    builder.prefix(".bitnet-").suffix(".partial");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(std::fs::Permissions::from_mode(0o777));
    }
    let folder = builder.tempdir_in(parent).map_err(|e| failed(&e))?;
    write_weights(checkpoint, &folder.path().join("model.safetensors"), progress)?;
    let put = |name: &str, bytes: &[u8]| std::fs::write(folder.path().join(name), bytes).map_err(|e| failed(&e));
    put("config.json", format!("{:#}\n", config(checkpoint)?).as_bytes())?;
    if let Some(json) = checkpoint.tokenizer_json() {
        put("tokenizer.json", json)?;
        let mut config =
            json!({"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": d.max_position_embeddings});
        for (key, id) in [("bos_token", d.bos_token_id), ("eos_token", d.eos_token_ids.first().copied())] {
            if let Some(token) = id.and_then(|id| checkpoint.tokenizer()?.token(id)) {
                config[key] = token.into();
            }
        }
        if let Some(template) = checkpoint.chat_template() {
            config["chat_template"] = template.into();
        }
        put("tokenizer_config.json", format!("{config:#}\n").as_bytes())?;
    }
    // The rename is the last step: before it nothing of this name is there, after it all is.
    let made = folder.keep();
    std::fs::rename(&made, path).map_err(|e| {
        // Best effort: the rename's own error is the one to tell.
        let _ = std::fs::remove_dir_all(&made);
        failed(&e)
    })
}

/// The type of an embedding in the folder: as it is stored, floats for a quantised one.
fn float_type(checkpoint: &Checkpoint, name: &str) -> Result<TensorType> {
    Ok(match checkpoint.stored_type(name)? {
        plain @ (TensorType::F32 | TensorType::F16 | TensorType::Bf16) => plain,
        _ => TensorType::F32,
    })
}

fn config(checkpoint: &Checkpoint) -> Result<Value> {
    let d = checkpoint.description();
    let dtype = match float_type(checkpoint, "model.embed_tokens.weight")? {
        TensorType::Bf16 => "bfloat16",
        TensorType::F16 => "float16",
        _ => "float32",
    };
    let eos = match d.eos_token_ids.as_slice() {
        [] => Value::Null,
        [one] => json!(one),
        many => json!(many),
    };
    Ok(json!({
        "architectures": ["BitNetForCausalLM"],
        "attention_bias": false,
        "attention_dropout": 0.0,
        "bos_token_id": d.bos_token_id,
        "eos_token_id": eos,
        "hidden_act": d.activation.name(),
        "hidden_size": d.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": d.intermediate_size,
        "max_position_embeddings": d.max_position_embeddings,
        "model_type": "bitnet",
        "num_attention_heads": d.num_attention_heads,
        "num_hidden_layers": d.num_layers,
        "num_key_value_heads": d.num_key_value_heads,
        "rms_norm_eps": d.rms_norm_eps,
        "rope_theta": d.rope_theta,
        "tie_word_embeddings": d.tie_word_embeddings,
        "torch_dtype": dtype,
        "use_cache": true,
        "vocab_size": d.vocab_size,
        "quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"},
    }))
}

/// BF16 when that loses nothing and the embedding is BF16 as well, F32 otherwise.
fn narrow(values: &[f32], embedding: TensorType) -> (&'static str, Vec<u8>) {
    let exact = |x: f32| bf16::from_f32(x).to_f32().to_bits() == x.to_bits();
    if embedding == TensorType::Bf16 && values.iter().all(|&x| exact(x)) {
        ("BF16", values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect())
    } else {
        ("F32", values.iter().flat_map(|x| x.to_le_bytes()).collect())
    }
}

fn write_weights(checkpoint: &Checkpoint, path: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<()> {
    let failed = |e: std::io::Error| loading_failed(path, &e);
    let embedding = float_type(checkpoint, "model.embed_tokens.weight")?;
    let parts = checkpoint.description().parts();
    let mut declared = Vec::new();
    for part in &parts {
        match part {
            Part::Vector { name, len } => {
                let (dtype, bytes) = narrow(&checkpoint.vector(name, *len)?, embedding);
                declared.push(Declared { name: name.clone(), dtype, shape: vec![*len], bytes: bytes.len() });
            }
            Part::Floats { name, rows, columns } => {
                let ty = float_type(checkpoint, name)?;
                let bytes = ty
                    .bytes(*rows, *columns)
                    .ok_or_else(|| loading_failed(path, &format_args!("{name} of {rows} x {columns} is too large")))?;
                declared.push(Declared { name: name.clone(), dtype: ty.name(), shape: vec![*rows, *columns], bytes });
            }
            Part::Ternary { name, rows, columns } => {
                let shape = vec![rows / 4, *columns];
                declared.push(Declared {
                    name: format!("{name}.weight"),
                    dtype: "U8",
                    shape,
                    bytes: rows / 4 * columns,
                });
                let scale = checkpoint.ternary(name, *rows, *columns)?.scale();
                let (dtype, bytes) = narrow(&[usable_scale(name, scale)?], embedding);
                declared.push(Declared {
                    name: format!("{name}.weight_scale"),
                    dtype,
                    shape: vec![1],
                    bytes: bytes.len(),
                });
            }
        }
    }
    let total: u64 = declared.iter().map(|t| t.bytes as u64).sum();
    let mut out = BufWriter::with_capacity(1 << 20, std::fs::File::create_new(path).map_err(failed)?);
    out.write_all(&header(&declared)).map_err(failed)?;
    let mut done = 0;
    for part in &parts {
        match part {
            Part::Vector { name, len } => {
                let (_, bytes) = narrow(&checkpoint.vector(name, *len)?, embedding);
                done += bytes.len() as u64;
                out.write_all(&bytes).map_err(failed)?;
            }
            Part::Floats { name, rows, columns } => {
                let ty = float_type(checkpoint, name)?;
                floats::copy(checkpoint, (name, *rows, *columns), ty, &mut |bytes| {
                    done += bytes.len() as u64;
                    out.write_all(bytes).map_err(failed)
                })?;
            }
            Part::Ternary { name, rows, columns } => {
                let tensor = checkpoint.ternary(name, *rows, *columns)?;
                let packed = hf_packed::pack(name, &tensor.trits()?, *rows, *columns)?;
                let (_, scale) = narrow(&[tensor.scale()], embedding);
                done += (packed.len() + scale.len()) as u64;
                out.write_all(&packed).and_then(|()| out.write_all(&scale)).map_err(failed)?;
                checkpoint.release(&format!("{name}.weight"));
            }
        }
        progress(done, total);
    }
    out.into_inner().map_err(|e| failed(e.into_error()))?.sync_all().map_err(failed)
}

/// Length and JSON of a safetensors header, padded to a multiple of 8.
fn header(tensors: &[Declared]) -> Vec<u8> {
    let mut entries = Map::new();
    entries.insert("__metadata__".to_string(), json!({"format": "pt"}));
    let mut offset = 0;
    for t in tensors {
        let offsets = [offset, offset + t.bytes];
        entries.insert(t.name.clone(), json!({"dtype": t.dtype, "shape": t.shape, "data_offsets": offsets}));
        offset += t.bytes;
    }
    let mut json = Value::Object(entries).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut out = (json.len() as u64).to_le_bytes().to_vec();
    out.extend(json);
    out
}
