//! `bitnet inspect`: what a checkpoint holds.

use std::collections::BTreeMap;
use std::io::{Write, stdout};
use std::path::PathBuf;

use bitnet_engine::model::{Checkpoint, WeightScale};
use clap::Args;
use comfy_table::Table;
use serde_json::json;

use crate::{GgufArgs, Outcome};

/// Arguments of `bitnet inspect`.
#[derive(Args)]
pub(crate) struct InspectArgs {
    /// Folder with config.json and model.safetensors, or GGUF file (default: the embedded tiny model).
    model: Option<PathBuf>,
    #[command(flatten)]
    gguf: GgufArgs,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &InspectArgs) -> Outcome {
    let checkpoint = Checkpoint::open(&args.gguf.source(args.model.as_deref())?)?;
    let d = checkpoint.description();
    let config = d.config();
    let tensors = checkpoint.tensors();
    let scale = match d.weight_scale {
        WeightScale::Multiply => "multiplied (autobitlinear)",
        WeightScale::Divide => "divided by (bitlinear)",
    };
    let storage = storage(&checkpoint);
    let metadata = checkpoint.as_gguf().map(|model| model.file().metadata());
    let mut out = stdout().lock();
    if args.json {
        let list: Vec<_> = tensors
            .iter()
            .map(|t| json!({"name": t.name, "dtype": t.dtype, "shape": t.shape, "bytes": t.bytes}))
            .collect();
        let report = json!({
            "config": config,
            "parameters": config.parameter_count(),
            "rms_norm_eps": d.rms_norm_eps,
            "tie_word_embeddings": d.tie_word_embeddings,
            "bos_token_id": d.bos_token_id,
            "eos_token_ids": d.eos_token_ids,
            "packed": checkpoint.is_packed(),
            "activation": d.activation.name(),
            "weight_scale": scale,
            "chat_template": checkpoint.chat_template(),
            "metadata": metadata.map(|keys| keys.into_iter().collect::<BTreeMap<_, _>>()),
            "tokenizer_vocab_size": checkpoint.tokenizer().map(|t| t.vocab_size()),
            "tensor_bytes": checkpoint.tensor_bytes(),
            "tensors": list,
        });
        writeln!(out, "{report:#}")?;
        return Ok(());
    }
    let mut facts = Table::new();
    facts.load_style(comfy_table::presets::NOTHING);
    let tokenizer = checkpoint.tokenizer().map_or("none".to_string(), |t| format!("{} tokens", t.vocab_size()));
    for (name, value) in [
        ("model", d.name.clone().unwrap_or_default()),
        ("hidden size, layers", format!("{}, {}", d.hidden_size, d.num_layers)),
        ("heads", format!("{} query, {} key/value, of {}", d.num_attention_heads, d.num_key_value_heads, d.head_dim())),
        ("feed-forward size", d.intermediate_size.to_string()),
        ("vocabulary", d.vocab_size.to_string()),
        ("context", d.max_position_embeddings.to_string()),
        ("RoPE theta, RMSNorm epsilon", format!("{}, {:e}", d.rope_theta, d.rms_norm_eps)),
        ("output head", if d.tie_word_embeddings { "the embedding".to_string() } else { "its own".to_string() }),
        ("activation", d.activation.name().to_string()),
        ("linear layers", storage),
        ("weight scale", scale.to_string()),
        ("parameters", config.parameter_count().to_string()),
        ("tokenizer", tokenizer),
        ("chat template", checkpoint.chat_template().map_or("none".to_string(), |t| format!("{} bytes", t.len()))),
        ("tensors", format!("{}, {} bytes", tensors.len(), checkpoint.tensor_bytes())),
    ] {
        facts.add_row([name.to_string(), value]);
    }
    writeln!(out, "{facts}\n")?;
    if let Some(metadata) = metadata {
        let mut table = Table::new();
        table.load_style(comfy_table::presets::UTF8_HORIZONTAL_ONLY);
        table.set_header(["key", "value"]);
        for (key, value) in metadata {
            table.add_row([key, value]);
        }
        writeln!(out, "{table}\n")?;
    }
    let mut table = Table::new();
    table.load_style(comfy_table::presets::UTF8_HORIZONTAL_ONLY);
    table.set_header(["tensor", "type", "shape", "bytes"]);
    for t in tensors {
        table.add_row([t.name, t.dtype, format!("{:?}", t.shape), t.bytes.to_string()]);
    }
    writeln!(out, "{table}")?;
    Ok(())
}

/// How the matrices of the layers are stored.
fn storage(checkpoint: &Checkpoint) -> String {
    match checkpoint.as_gguf() {
        None if checkpoint.is_packed() => "packed ternary, 2 bits a weight".to_string(),
        None => "master weights".to_string(),
        Some(model) => {
            let is_linear =
                |name: &str| name.ends_with(".weight") && !name.contains("norm") && name.starts_with("blk.");
            let types: BTreeMap<_, _> = (model.file().tensors().iter())
                .filter(|(name, _)| is_linear(name))
                .map(|(_, tensor)| (tensor.ty.name(), tensor.ty))
                .collect();
            let names: Vec<_> = types.into_keys().collect();
            let layout = if names.contains(&"I2_S") {
                format!(" ({} layout)", model.i2s_layout().name())
            } else {
                String::new()
            };
            format!("GGUF {}{layout}", names.join(", "))
        }
    }
}
