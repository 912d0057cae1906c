//! Reading a checkpoint: `config.json`, safetensors files, and the trits in them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::{OracleError, Result};

#[derive(Deserialize)]
pub(super) struct Config {
    pub(super) hidden_size: usize,
    pub(super) intermediate_size: usize,
    pub(super) num_hidden_layers: usize,
    pub(super) num_attention_heads: usize,
    pub(super) num_key_value_heads: usize,
    pub(super) vocab_size: usize,
    pub(super) max_position_embeddings: usize,
    pub(super) rms_norm_eps: f64,
    hidden_act: String,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    pub(super) tie_word_embeddings: bool,
    rope_theta: Option<f64>,
    rope_parameters: Option<RopeParameters>,
    pub(super) quantization_config: Quantization,
}

impl Config {
    pub(super) fn parse(json: &[u8]) -> Result<Self> {
        let config: Config = serde_json::from_slice(json).map_err(|e| OracleError::Config(e.to_string()))?;
        let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
        let sizes = [config.hidden_size, config.intermediate_size, config.vocab_size, heads, kv_heads];
        if sizes.contains(&0) {
            return Err(OracleError::Config("a size is 0".into()));
        }
        let pairs = config.hidden_size.is_multiple_of(heads.saturating_mul(2));
        if !pairs || !heads.is_multiple_of(kv_heads) {
            return Err(OracleError::Config("the head counts do not divide the sizes".into()));
        }
        if config.hidden_act != "relu2" || config.attention_bias {
            return Err(OracleError::Config("only relu2 without biases is covered".into()));
        }
        if config.quantization_config.quant_method.as_deref().is_some_and(|method| method != "bitnet") {
            return Err(OracleError::Config("only the quantisation method \"bitnet\" is covered".into()));
        }
        Ok(config)
    }

    pub(super) fn head_size(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }

    /// Base of the rotary embedding, in either spelling, or the format's default.
    pub(super) fn rope_theta(&self) -> f64 {
        let of_parameters = self.rope_parameters.as_ref().and_then(|p| p.rope_theta);
        of_parameters.or(self.rope_theta).unwrap_or(500_000.0)
    }
}

#[derive(Deserialize)]
struct RopeParameters {
    rope_theta: Option<f64>,
}

#[derive(Deserialize)]
pub(super) struct Quantization {
    quant_method: Option<String>,
    linear_class: Option<String>,
}

/// A ternary matrix of shape [out, in]: trits, and the factor that every product is multiplied by.
pub struct Linear {
    /// Columns: the length of an input.
    pub inputs: usize,
    /// Row-major, each -1, 0 or 1.
    pub trits: Vec<i8>,
    /// What every product is multiplied by.
    pub scale: f64,
}

impl Linear {
    pub(super) fn rows(&self) -> impl Iterator<Item = &[i8]> {
        self.trits.chunks_exact(self.inputs)
    }
}

/// `config.json` and every `model*.safetensors` of a folder, in the order of their names.
pub(crate) fn read_folder(dir: &Path) -> Result<(Vec<u8>, Vec<Vec<u8>>)> {
    let fail = |e: std::io::Error| OracleError::Weights(format!("{}: {e}", dir.display()));
    let paths = std::fs::read_dir(dir).map_err(fail)?.map(|entry| Ok(entry?.path()));
    let mut paths = paths.collect::<std::io::Result<Vec<_>>>().map_err(fail)?;
    paths.sort();
    let is_weights = |path: &&PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("model") && name.ends_with(".safetensors")
    };
    let files = paths.iter().filter(is_weights).map(std::fs::read);
    let files = files.collect::<std::io::Result<Vec<_>>>().map_err(fail)?;
    Ok((std::fs::read(dir.join("config.json")).map_err(fail)?, files))
}

/// The tensors of a checkpoint as they stand in its files.
pub(super) struct Checkpoint<'a> {
    tensors: BTreeMap<String, (Header, &'a [u8])>,
    /// Whether `weight_scale` divides the product (`linear_class` `bitlinear`, the default) or multiplies it.
    pub(super) divides: bool,
}

#[derive(Deserialize)]
struct Header {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

impl<'a> Checkpoint<'a> {
    /// A safetensors file: the header's length in 8 bytes, the header as JSON, the data.
    pub(super) fn parse(shards: &[&'a [u8]], config: &Config) -> Result<Self> {
        let damaged = |what: &str| OracleError::Weights(format!("damaged safetensors file: {what}"));
        let mut tensors = BTreeMap::new();
        for shard in shards {
            let (length, rest) = shard.split_first_chunk::<8>().ok_or_else(|| damaged("no header"))?;
            let length = usize::try_from(u64::from_le_bytes(*length)).unwrap_or(usize::MAX);
            let (json, data) = rest.split_at_checked(length).ok_or_else(|| damaged("the header is cut off"))?;
            let header: BTreeMap<String, serde_json::Value> =
                serde_json::from_slice(json).map_err(|e| damaged(&e.to_string()))?;
            for (name, value) in header.into_iter().filter(|(name, _)| name != "__metadata__") {
                let header: Header = serde_json::from_value(value).map_err(|e| damaged(&e.to_string()))?;
                let bytes = data.get(header.data_offsets.0..header.data_offsets.1).ok_or_else(|| damaged(&name))?;
                tensors.insert(name, (header, bytes));
            }
        }
        let divides = match config.quantization_config.linear_class.as_deref() {
            Some("autobitlinear") => false,
            Some("bitlinear") | None => true,
            Some(other) => return Err(OracleError::Config(format!("unknown linear_class {other:?}"))),
        };
        Ok(Checkpoint { tensors, divides })
    }

    fn find(&self, name: &str, shape: &[usize]) -> Result<(&str, &'a [u8])> {
        let (header, bytes) =
            self.tensors.get(name).ok_or_else(|| OracleError::Weights(format!("no tensor {name}")))?;
        if header.shape != shape {
            return Err(OracleError::Weights(format!("{name} has shape {:?}, not {shape:?}", header.shape)));
        }
        Ok((&header.dtype, bytes))
    }

    pub(super) fn floats(&self, name: &str, shape: &[usize]) -> Result<Vec<f64>> {
        let (dtype, bytes) = self.find(name, shape)?;
        let two = || bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
        let values: Vec<f64> = match dtype {
            "F32" => bytes.chunks_exact(4).map(|b| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]]))).collect(),
            "F16" => two().map(|b| half::f16::from_le_bytes(b).to_f64()).collect(),
            "BF16" => two().map(|b| half::bf16::from_le_bytes(b).to_f64()).collect(),
            other => return Err(OracleError::Weights(format!("{name} is of type {other}"))),
        };
        let expected = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        if expected != Some(values.len()) {
            return Err(OracleError::Weights(format!("{name} has {} values", values.len())));
        }
        Ok(values)
    }

    /// A projection of either kind: packed trits with a scale, or masters.
    pub(super) fn linear(&self, name: &str, outputs: usize, inputs: usize) -> Result<Linear> {
        let scale_name = format!("{name}_scale");
        if !self.tensors.contains_key(&scale_name) {
            return Ok(ternarise(&self.floats(name, &[outputs, inputs])?, inputs));
        }
        let scale = self.floats(&scale_name, &[1])?[0];
        let (dtype, bytes) = self.find(name, &[outputs / 4, inputs])?;
        if dtype != "U8" || !outputs.is_multiple_of(4) || (outputs / 4).checked_mul(inputs) != Some(bytes.len()) {
            return Err(OracleError::Weights(format!("{name} is not packed in fours")));
        }
        if bytes.iter().any(|byte| byte & (byte >> 1) & 0b01_01_01_01 != 0) {
            return Err(OracleError::Weights(format!("{name} holds the code 3, which is no trit")));
        }
        // Bits 2i and 2i+1 of the byte in row r hold the trit of row i * outputs/4 + r, plus one.
        let trits = (0..4).flat_map(|i| bytes.iter().map(move |byte| (byte >> (2 * i) & 3) as i8 - 1)).collect();
        Ok(Linear { inputs, trits, scale: if self.divides { 1.0 / scale } else { scale } })
    }
}

/// Absmean ternarisation of master weights, in f32 as training did it.
fn ternarise(weights: &[f64], inputs: usize) -> Linear {
    let mean = weights.iter().map(|w| w.abs()).sum::<f64>() / weights.len() as f64;
    let inverse = 1.0 / (mean as f32).max(1e-5);
    let trits = weights.iter().map(|&w| (w as f32 * inverse).round_ties_even().clamp(-1.0, 1.0) as i8).collect();
    Linear { inputs, trits, scale: f64::from(1.0 / inverse) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masters_become_trits_and_their_mean_magnitude() {
        // Mean magnitude 1: 0.5 ties to even, which is 0; 0.6 rounds up; 2.5 is clamped.
        let linear = ternarise(&[0.5, 0.6, -2.5, 0.4], 2);
        assert_eq!(linear.trits, [0, 1, -1, 0]);
        assert_eq!(linear.scale, 1.0);
    }

    #[test]
    fn damaged_files_are_errors() {
        let fixture = fixtures::preset("context-32", 1).expect("preset");
        let (config, weights) = (fixture.config_json(), fixture.weights());
        for cut in [0, 7, 8, 100, weights.len() - 1] {
            let error = super::super::Oracle::from_bytes(config, &weights[..cut]).err();
            assert!(matches!(error, Some(OracleError::Weights(_))), "cut at {cut}: {error:?}");
        }
        let mut huge = weights.to_vec();
        huge[..8].fill(0xff);
        assert!(matches!(super::super::Oracle::from_bytes(config, &huge).err(), Some(OracleError::Weights(_))));
        let text = String::from_utf8(config.to_vec()).expect("text");
        for (from, to) in [
            ("\"num_attention_heads\": 4", "\"num_attention_heads\": 0"),
            ("\"num_attention_heads\": 4", "\"num_attention_heads\": 3"),
            ("\"hidden_act\": \"relu2\"", "\"hidden_act\": \"silu\""),
            ("\"vocab_size\": 127", "\"vocab_size\": 0"),
        ] {
            assert!(text.contains(from), "{text}");
            let config = text.replace(from, to);
            let error = super::super::Oracle::from_bytes(config.as_bytes(), weights).err();
            assert!(matches!(error, Some(OracleError::Config(_))), "{to}: {error:?}");
        }
        let wrong_shape = text.replace("\"hidden_size\": 64", "\"hidden_size\": 128");
        let error = super::super::Oracle::from_bytes(wrong_shape.as_bytes(), weights).err();
        assert!(matches!(error, Some(OracleError::Weights(_))), "{error:?}");
    }
}
