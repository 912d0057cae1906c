//! The model description: `config.json` of a Hugging Face checkpoint, checked.

use std::path::Path;

use bitnet_contracts::{ConfigurationError, InferenceError, ModelConfig, ModelError, QuantizationType, Result};
use serde::Deserialize;

use super::in_file::in_file;

/// What `weight_scale` means in a packed checkpoint (`quantization_config.linear_class`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightScale {
    /// `autobitlinear`: the product is multiplied by it (it is the absmean).
    Multiply,
    /// `bitlinear`: the product is divided by it (it is one over the absmean).
    Divide,
}

/// The activation of the gate branch of a feed-forward block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `relu(x)^2`, of BitNet b1.58 2B4T.
    Relu2,
    /// `x / (1 + e^-x)`, of the b1.58 models before it.
    Silu,
}

impl Activation {
    /// `relu2` or `silu`, as config.json has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Relu2 => "relu2",
            Self::Silu => "silu",
        }
    }
}

impl std::str::FromStr for Activation {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        [Self::Relu2, Self::Silu]
            .into_iter()
            .find(|activation| activation.name() == name)
            .ok_or_else(|| format!("{name:?} is no activation; there are relu2 and silu"))
    }
}

/// Everything the forward pass needs to know beyond the weights.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelDescription {
    /// Model dimension H.
    pub hidden_size: usize,
    /// Feed-forward dimension F.
    pub intermediate_size: usize,
    /// Transformer layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads.
    pub num_key_value_heads: usize,
    /// Vocabulary size V.
    pub vocab_size: usize,
    /// Longest sequence in positions.
    pub max_position_embeddings: usize,
    /// RoPE base.
    pub rope_theta: f64,
    /// RMSNorm epsilon.
    pub rms_norm_eps: f64,
    /// Whether the output head is the embedding matrix.
    pub tie_word_embeddings: bool,
    /// Activation of the feed-forward blocks.
    pub activation: Activation,
    /// What `weight_scale` means.
    pub weight_scale: WeightScale,
    /// Begin-of-sequence token.
    pub bos_token_id: Option<u32>,
    /// End-of-sequence tokens, any of which ends a generation.
    pub eos_token_ids: Vec<u32>,
    /// `model_type` of the file.
    pub model_type: String,
    /// Human-readable name, if the file or its folder gives one.
    pub name: Option<String>,
    /// `transformers_version` of the file, or "unspecified".
    pub version: String,
}

/// The keys of config.json that matter. Unknown keys are ignored, as every loader of these files does.
#[derive(Deserialize)]
struct Config {
    model_type: Option<String>,
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: Option<usize>,
    max_position_embeddings: Option<usize>,
    rms_norm_eps: Option<f64>,
    rope_theta: Option<f64>,
    rope_parameters: Option<RopeParameters>,
    rope_scaling: Option<RopeParameters>,
    hidden_act: Option<String>,
    attention_bias: Option<bool>,
    tie_word_embeddings: Option<bool>,
    bos_token_id: Option<u32>,
    eos_token_id: Option<TokenIds>,
    quantization_config: Option<Quantization>,
    transformers_version: Option<String>,
    #[serde(rename = "_name_or_path")]
    name_or_path: Option<String>,
}

#[derive(Deserialize)]
struct RopeParameters {
    rope_theta: Option<f64>,
    #[serde(alias = "type")]
    rope_type: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum TokenIds {
    One(u32),
    Many(Vec<u32>),
}

#[derive(Deserialize)]
struct Quantization {
    quant_method: Option<String>,
    linear_class: Option<String>,
}

fn invalid(parameter: &str, value: impl ToString, valid_range: &str) -> InferenceError {
    ConfigurationError::InvalidParameter {
        parameter: parameter.to_string(),
        value: value.to_string(),
        valid_range: valid_range.to_string(),
    }
    .into()
}

fn required<T>(value: Option<T>, parameter: &str) -> Result<T> {
    value.ok_or_else(|| ConfigurationError::MissingParameter { parameter: parameter.to_string() }.into())
}

/// The key whose value is of the wrong type, which the error of the JSON reader does not tell.
fn wrong_key(json: &[u8]) -> Option<String> {
    let keys: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(json).ok()?;
    keys.into_iter()
        .map(|(key, value)| (key.clone(), serde_json::json!({ key: value })))
        .find_map(|(key, alone)| serde_json::from_value::<Config>(alone).is_err().then_some(key))
}

/// The contracts check a configuration under a name of their own; the file has another.
fn in_words_of_the_file(mut error: InferenceError) -> InferenceError {
    if let InferenceError::Configuration(ConfigurationError::InvalidParameter { parameter, .. }) = &mut error
        && parameter == "num_layers"
    {
        *parameter = "num_hidden_layers".to_string();
    }
    error
}

impl ModelDescription {
    /// Reads and checks a config.json. `path` is for error messages; its folder's name becomes the model's when the file has none.
    ///
    /// # Errors
    /// `ModelError::InvalidFormat` for text that is no such JSON, `ConfigurationError` naming the key for values that make no model
    /// or a model that is not BitNet b1.58 as published.
    pub fn from_json(json: &[u8], path: &Path) -> Result<Self> {
        let config: Config = serde_json::from_slice(json).map_err(|e| ModelError::InvalidFormat {
            format: match wrong_key(json) {
                Some(key) => format!("{}: {key}: {e}", path.display()),
                None => format!("{}: {e}", path.display()),
            },
            expected: "config.json of a BitNet b1.58 checkpoint".to_string(),
        })?;
        Self::from_config(config, path).map_err(|error| in_file(path, in_words_of_the_file(error)))
    }

    fn from_config(config: Config, path: &Path) -> Result<Self> {
        config.refuse_other_architectures()?;
        let rope_theta = config.rope_theta()?;
        let description = Self {
            hidden_size: required(config.hidden_size, "hidden_size")?,
            intermediate_size: required(config.intermediate_size, "intermediate_size")?,
            num_layers: required(config.num_hidden_layers, "num_hidden_layers")?,
            num_attention_heads: required(config.num_attention_heads, "num_attention_heads")?,
            num_key_value_heads: match config.num_key_value_heads {
                Some(n) => n,
                None => required(config.num_attention_heads, "num_attention_heads")?,
            },
            vocab_size: required(config.vocab_size, "vocab_size")?,
            // The defaults of transformers' BitNetConfig.
            max_position_embeddings: config.max_position_embeddings.unwrap_or(2048),
            rms_norm_eps: config.rms_norm_eps.unwrap_or(1e-5),
            tie_word_embeddings: config.tie_word_embeddings.unwrap_or(false),
            rope_theta,
            // Any other was refused above.
            activation: Activation::Relu2,
            weight_scale: config.weight_scale()?,
            bos_token_id: config.bos_token_id,
            eos_token_ids: match config.eos_token_id {
                None => Vec::new(),
                Some(TokenIds::One(id)) => vec![id],
                Some(TokenIds::Many(ids)) => ids,
            },
            model_type: config.model_type.unwrap_or_else(|| "bitnet".to_string()),
            name: config
                .name_or_path
                .filter(|name| !name.is_empty())
                .or_else(|| Some(path.parent()?.file_name()?.to_string_lossy().into_owned())),
            version: config.transformers_version.unwrap_or_else(|| "unspecified".to_string()),
        };
        description.check(config.head_dim)?;
        Ok(description)
    }

    /// Checks the numbers against each other; `head_dim` is one that the file gives besides.
    pub(super) fn check(&self, head_dim: Option<usize>) -> Result<()> {
        self.config().validate()?;
        if let Some(explicit) = head_dim.filter(|&d| d != self.head_dim()) {
            // attn_sub_norm is as long as the hidden state and is applied to all heads' outputs, so the two must agree.
            return Err(invalid("head_dim", explicit, "hidden_size / num_attention_heads"));
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps >= 0.0) {
            return Err(invalid("rms_norm_eps", self.rms_norm_eps, "a finite number, 0 or more"));
        }
        for &id in self.eos_token_ids.iter().chain(&self.bos_token_id) {
            if id as usize >= self.vocab_size {
                return Err(invalid("bos_token_id, eos_token_id", id, "below vocab_size"));
            }
        }
        Ok(())
    }

    /// Floats a head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }

    /// Query heads that share one key and value head.
    pub fn group_size(&self) -> usize {
        self.num_attention_heads / self.num_key_value_heads
    }

    /// The width of keys and of values: KV heads times head dimension.
    pub fn kv_size(&self) -> usize {
        self.num_key_value_heads * self.head_dim()
    }

    /// The contracts' view of this model.
    pub fn config(&self) -> ModelConfig {
        ModelConfig {
            hidden_size: self.hidden_size,
            num_layers: self.num_layers,
            num_attention_heads: self.num_attention_heads,
            num_key_value_heads: self.num_key_value_heads,
            intermediate_size: self.intermediate_size,
            vocab_size: self.vocab_size,
            max_position_embeddings: self.max_position_embeddings,
            rope_theta: self.rope_theta as f32,
            quantization_type: QuantizationType::I2S,
            quantization_accuracy: 0.99,
            model_type: self.model_type.clone(),
            model_name: self.name.clone(),
            version: self.version.clone(),
        }
    }
}

impl Config {
    fn refuse_other_architectures(&self) -> Result<()> {
        if let Some(other) = self.model_type.as_deref().filter(|&t| t != "bitnet") {
            return Err(ConfigurationError::IncompatibleConfig {
                reason: format!("model_type is {other:?}, not \"bitnet\""),
            }
            .into());
        }
        if let Some(other) = self.hidden_act.as_deref().filter(|&a| a != "relu2") {
            return Err(invalid("hidden_act", other, "relu2"));
        }
        if self.attention_bias == Some(true) {
            return Err(invalid("attention_bias", true, "false: no published BitNet b1.58 model has biases"));
        }
        if let Some(other) =
            self.quantization_config.as_ref().and_then(|q| q.quant_method.as_deref()).filter(|&m| m != "bitnet")
        {
            return Err(invalid("quantization_config.quant_method", other, "bitnet"));
        }
        Ok(())
    }

    /// Both spellings: `rope_theta` of the published files, `rope_parameters` as transformers 5 writes it (which it prefers too).
    fn rope_theta(&self) -> Result<f64> {
        for (parameter, rope) in [("rope_parameters", &self.rope_parameters), ("rope_scaling", &self.rope_scaling)] {
            if let Some(other) = rope.as_ref().and_then(|r| r.rope_type.as_deref()).filter(|&t| t != "default") {
                return Err(invalid(&format!("{parameter}.rope_type"), other, "default"));
            }
        }
        let theta = self.rope_parameters.as_ref().and_then(|r| r.rope_theta).or(self.rope_theta).unwrap_or(500_000.0);
        if !(theta.is_finite() && theta > 0.0 && (theta as f32).is_finite()) {
            return Err(invalid("rope_theta", theta, "a finite number above 0"));
        }
        Ok(theta)
    }

    fn weight_scale(&self) -> Result<WeightScale> {
        match self.quantization_config.as_ref().and_then(|q| q.linear_class.as_deref()) {
            Some("autobitlinear") => Ok(WeightScale::Multiply),
            // The class default of transformers' BitNetQuantConfig when the key is missing.
            Some("bitlinear") | None => Ok(WeightScale::Divide),
            Some(other) => Err(invalid("quantization_config.linear_class", other, "bitlinear, autobitlinear")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: &str = r#"{"model_type": "bitnet", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 128, "hidden_act": "relu2",
        "rope_theta": 10000.0, "eos_token_id": 3, "tie_word_embeddings": true,
        "quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear"}}"#;

    fn with(changes: &[(&str, serde_json::Value)]) -> Result<ModelDescription> {
        let mut json: serde_json::Value = serde_json::from_str(BASE).unwrap();
        for (key, value) in changes {
            if value.is_null() {
                json.as_object_mut().unwrap().remove(*key);
            } else {
                json[*key] = value.clone();
            }
        }
        ModelDescription::from_json(json.to_string().as_bytes(), Path::new("folder/config.json"))
    }

    #[test]
    fn reads_a_plain_file() {
        let d = with(&[]).unwrap();
        assert_eq!((d.head_dim(), d.group_size(), d.kv_size(), d.rope_theta), (16, 2, 32, 10000.0));
        assert_eq!(
            (d.weight_scale, d.eos_token_ids, d.name.as_deref()),
            (WeightScale::Multiply, vec![3], Some("folder"))
        );
    }

    #[test]
    fn both_rope_spellings_and_lists_of_eos() {
        let rope = serde_json::json!({"rope_theta": 77.0, "rope_type": "default"});
        let d =
            with(&[("rope_theta", ().into()), ("rope_parameters", rope), ("eos_token_id", serde_json::json!([1, 2]))])
                .unwrap();
        assert_eq!((d.rope_theta, d.eos_token_ids), (77.0, vec![1, 2]));
    }

    #[test]
    fn missing_linear_class_divides() {
        let d = with(&[("quantization_config", serde_json::json!({"quant_method": "bitnet"}))]).unwrap();
        assert_eq!(d.weight_scale, WeightScale::Divide);
    }

    #[rstest::rstest]
    #[case("hidden_size", 0.into())]
    #[case("hidden_size", ().into())]
    #[case("num_attention_heads", 0.into())]
    #[case("num_attention_heads", 3.into())]
    #[case("num_key_value_heads", 3.into())]
    #[case("num_key_value_heads", 0.into())]
    #[case("num_hidden_layers", 0.into())]
    #[case("num_hidden_layers", 10_001.into())]
    #[case("num_hidden_layers", "many".into())]
    #[case("eos_token_id", serde_json::json!([1, "x"]))]
    #[case("vocab_size", 2_000_000.into())]
    #[case("rope_theta", (-1.0).into())]
    #[case("rms_norm_eps", (-1.0).into())]
    #[case("hidden_act", "silu".into())]
    #[case("model_type", "llama".into())]
    #[case("attention_bias", true.into())]
    #[case("head_dim", 32.into())]
    #[case("eos_token_id", 100.into())]
    #[case("hidden_size", "many".into())]
    #[case("rope_scaling", serde_json::json!({"type": "linear", "factor": 2.0}))]
    #[case("quantization_config", serde_json::json!({"quant_method": "gptq"}))]
    #[case("quantization_config", serde_json::json!({"linear_class": "other"}))]
    fn impossible_values_are_refused(#[case] key: &str, #[case] value: serde_json::Value) {
        let error = with(&[(key, value)]).unwrap_err().to_string();
        // Of a key in a key the last is the telling one.
        let key = key.split('.').next_back().unwrap_or(key);
        assert!(error.contains("folder/config.json") && error.contains(key), "{error}");
    }

    #[test]
    fn a_key_twice_is_an_error() {
        let twice = BASE.replacen("{", r#"{"hidden_size": 32, "#, 1);
        let error = ModelDescription::from_json(twice.as_bytes(), Path::new("c")).unwrap_err().to_string();
        assert!(error.contains("hidden_size"), "{error}");
    }

    #[test]
    fn garbage_is_a_format_error() {
        let deep = "[".repeat(100_000);
        for json in ["", "{", "[]", "{\"hidden_size\": -1}", &deep] {
            assert!(ModelDescription::from_json(json.as_bytes(), Path::new("c")).is_err(), "{json:.20}");
        }
    }
}
