//! The shape of a model, its validation and its size budgets.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{ConfigurationError, Result};

/// How ternary weights are packed for the kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum QuantizationType {
    /// Two bits a weight, integer multiply-add.
    I2S,
    /// Two bits a weight, lookup table over pairs of weights.
    TL1,
    /// Five bits for three weights, lookup table over triples.
    TL2,
}

impl QuantizationType {
    /// Bits a parameter in the size budget of [`ModelConfig::quantized_model_size`].
    fn budget_bits(self) -> u128 {
        match self {
            Self::I2S => 2,
            Self::TL1 => 4,
            Self::TL2 => 8,
        }
    }

    /// Bytes that `weights` ternary values take once packed, rounded up to whole bytes.
    fn packed_bytes(self, weights: u128) -> u128 {
        match self {
            Self::I2S | Self::TL1 => weights.div_ceil(4),
            Self::TL2 => weights.div_ceil(3).saturating_mul(5).div_ceil(8),
        }
    }
}

impl fmt::Display for QuantizationType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::I2S => "I2S",
            Self::TL1 => "TL1",
            Self::TL2 => "TL2",
        })
    }
}

/// The configuration of a model, with validation.
///
/// The thirteen fields are all public and there are no others: what a forward pass needs beyond them (the epsilon of
/// its norms, its activation, tied embeddings) belongs to an engine's own model description.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    /// Model hidden dimension.
    pub hidden_size: usize,
    /// Number of transformer layers.
    pub num_layers: usize,
    /// Number of attention (query) heads.
    pub num_attention_heads: usize,
    /// Number of key and value heads (grouped-query attention).
    pub num_key_value_heads: usize,
    /// Intermediate size of the feed-forward block.
    pub intermediate_size: usize,
    /// Vocabulary size.
    pub vocab_size: usize,

    /// Maximum sequence length, in positions.
    pub max_position_embeddings: usize,
    /// Base of the rotary position frequencies.
    pub rope_theta: f32,

    /// How the weights are packed.
    pub quantization_type: QuantizationType,
    /// Required accuracy: correlation with the FP32 reference, 0 to 1.
    pub quantization_accuracy: f32,

    /// Name of the architecture.
    pub model_type: String,
    /// Name of the model for people.
    pub model_name: Option<String>,
    /// Version or checkpoint of the model.
    pub version: String,
}

/// The most layers that [`ModelConfig::validate`] lets through.
const MAX_LAYERS: usize = 10_000;

impl ModelConfig {
    /// Checks that the configuration is consistent.
    ///
    /// Zero and non-finite values are tested first, so that no later check can divide by them; sizes that overflow
    /// `usize` come last.
    ///
    /// # Errors
    /// * `InvalidParameter` for a value that is wrong by itself (zero, NaN, out of range);
    /// * `InvalidDimensions` for head counts that do not divide, or an odd head dimension (rotary embeddings turn
    ///   pairs of channels);
    /// * `IncompatibleConfig` for sizes whose parameter count or byte budget does not fit `usize`.
    pub fn validate(&self) -> Result<()> {
        self.check_each_value()?;

        if !self.hidden_size.is_multiple_of(self.num_attention_heads) {
            return Err(ConfigurationError::InvalidDimensions {
                hidden_size: self.hidden_size,
                num_heads: self.num_attention_heads,
                reason: "hidden_size must be divisible by num_attention_heads".to_string(),
            }
            .into());
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            return Err(ConfigurationError::InvalidDimensions {
                hidden_size: self.num_attention_heads,
                num_heads: self.num_key_value_heads,
                reason: "num_attention_heads must be divisible by num_key_value_heads".to_string(),
            }
            .into());
        }
        if !self.head_dim().is_multiple_of(2) {
            return Err(ConfigurationError::InvalidDimensions {
                hidden_size: self.hidden_size,
                num_heads: self.num_attention_heads,
                reason: format!("head dimension {} must be even for rotary embeddings", self.head_dim()),
            }
            .into());
        }

        // Saturated sizes mean that the true ones do not fit the address space.
        if self.parameter_count() == usize::MAX || self.quantized_model_size() == usize::MAX {
            return Err(ConfigurationError::IncompatibleConfig {
                reason: "the model's size overflows the address space of this machine".to_string(),
            }
            .into());
        }
        Ok(())
    }

    /// The checks that look at one value at a time.
    fn check_each_value(&self) -> Result<()> {
        let counts = [
            ("hidden_size", self.hidden_size, usize::MAX, "1 to usize::MAX"),
            ("num_layers", self.num_layers, MAX_LAYERS, "1 to 10,000"),
            ("num_attention_heads", self.num_attention_heads, usize::MAX, "1 to usize::MAX"),
            ("num_key_value_heads", self.num_key_value_heads, usize::MAX, "1 to usize::MAX"),
            ("intermediate_size", self.intermediate_size, usize::MAX, "1 to usize::MAX"),
            ("vocab_size", self.vocab_size, 1_000_000, "1 to 1,000,000"),
            ("max_position_embeddings", self.max_position_embeddings, 1_000_000, "1 to 1,000,000"),
        ];
        for (name, value, largest, valid_range) in counts {
            if value == 0 || value > largest {
                return Err(ConfigurationError::invalid(name, value, valid_range).into());
            }
        }
        if !self.rope_theta.is_finite() || self.rope_theta <= 0.0 {
            return Err(ConfigurationError::invalid("rope_theta", self.rope_theta, "positive finite float").into());
        }
        // A NaN is in no range.
        if !(0.0..=1.0).contains(&self.quantization_accuracy) {
            return Err(
                ConfigurationError::invalid("quantization_accuracy", self.quantization_accuracy, "0.0 to 1.0").into()
            );
        }
        Ok(())
    }

    /// Channels a head: `hidden_size / num_attention_heads`, and 0 where there are no heads.
    pub fn head_dim(&self) -> usize {
        self.hidden_size.checked_div(self.num_attention_heads).unwrap_or(0)
    }

    /// Query heads that share one key and value head, and 0 where there are no key and value heads.
    pub fn group_size(&self) -> usize {
        self.num_attention_heads.checked_div(self.num_key_value_heads).unwrap_or(0)
    }

    /// Approximate number of parameters, `usize::MAX` where it does not fit.
    ///
    /// The output head counts as tied to the embedding, and each layer as having one norm, as the budget formulas
    /// that build on this figure assume.
    pub fn parameter_count(&self) -> usize {
        saturate(self.wide_parameter_count())
    }

    /// The parameter count before it is squeezed into a `usize`.
    fn wide_parameter_count(&self) -> u128 {
        let hidden = self.hidden_size as u128;
        let layers = self.num_layers as u128;
        let embedding = (self.vocab_size as u128).saturating_mul(hidden);

        let kv_width = (self.num_key_value_heads as u128).saturating_mul(self.head_dim() as u128);
        let qkv = hidden.saturating_mul(hidden.saturating_add(kv_width.saturating_mul(2)));
        let output = hidden.saturating_mul(hidden);
        let attention = layers.saturating_mul(qkv.saturating_add(output));

        let gate_up_down = hidden.saturating_mul(self.intermediate_size as u128).saturating_mul(3);
        let feed_forward = layers.saturating_mul(gate_up_down);

        let norms = (layers + 1).saturating_mul(hidden);

        [attention, feed_forward, norms].into_iter().fold(embedding, u128::saturating_add)
    }

    /// Size budget of the quantized model in bytes: an upper bound, `usize::MAX` where it does not fit.
    ///
    /// 2, 4 or 8 bits a parameter for `I2S`, `TL1` or `TL2`, one f32 scale for each block of 32 parameters, and 1 MiB
    /// of metadata. [`packed_model_size`](Self::packed_model_size) is what the ternary weights truly take.
    pub fn quantized_model_size(&self) -> usize {
        const METADATA: u128 = 1024 * 1024;
        let params = self.wide_parameter_count();
        let weights = params.saturating_mul(self.quantization_type.budget_bits()) / 8;
        let scales = params / 32 * 4;
        saturate(weights.saturating_add(scales).saturating_add(METADATA))
    }

    /// True size in bytes of the packed ternary weights of all layers with their scales, `usize::MAX` where it does
    /// not fit.
    ///
    /// Each layer has seven ternary matrices (query, key, value, output, gate, up, down), packed at 2 bits (`I2S`,
    /// `TL1`) or 5/3 bits (`TL2`) a weight and rounded up to whole bytes, each with one f32 scale. Embeddings, head
    /// and norms keep their checkpoint's precision: an engine counts them in its `memory_usage()`, not here. For
    /// every configuration that passes [`validate`](Self::validate) this is at most
    /// [`quantized_model_size`](Self::quantized_model_size).
    pub fn packed_model_size(&self) -> usize {
        const SCALE: u128 = size_of::<f32>() as u128;
        let hidden = self.hidden_size as u128;
        let kv_width = (self.num_key_value_heads as u128).saturating_mul(self.head_dim() as u128);
        let ffn = self.intermediate_size as u128;

        let matrix = |rows: u128, columns: u128| -> u128 {
            self.quantization_type.packed_bytes(rows.saturating_mul(columns)).saturating_add(SCALE)
        };
        let layer = [
            matrix(hidden, hidden),   // query
            matrix(kv_width, hidden), // key
            matrix(kv_width, hidden), // value
            matrix(hidden, hidden),   // output
            matrix(ffn, hidden),      // gate
            matrix(ffn, hidden),      // up
            matrix(hidden, ffn),      // down
        ]
        .into_iter()
        .fold(0_u128, u128::saturating_add);
        saturate(layer.saturating_mul(self.num_layers as u128))
    }
}

/// The value as a `usize`, or the largest one.
fn saturate(value: u128) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}
