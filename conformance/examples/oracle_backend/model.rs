//! What the folder of a model says, in the terms of the contracts.

use bitnet_contracts::{ModelConfig, QuantizationType};
use conformance::ModelFacts;

/// What the oracle holds: a byte for each ternary weight, an f64 for every other.
pub fn weight_bytes(facts: &ModelFacts) -> usize {
    let (hidden, ffn, kv) = (facts.hidden_size, facts.intermediate_size, facts.kv_heads * facts.head_dim);
    let ternary = facts.layers * hidden * (2 * hidden + 2 * kv + 3 * ffn);
    let tables = if facts.tied { 1 } else { 2 };
    let floats = tables * facts.vocab_size * hidden + facts.layers * (3 * hidden + ffn) + hidden;
    ternary + floats * size_of::<f64>()
}

/// What the contracts say of a model, from what `config.json` says.
pub fn model_config(facts: &ModelFacts, name: &str) -> ModelConfig {
    ModelConfig {
        hidden_size: facts.hidden_size,
        num_layers: facts.layers,
        num_attention_heads: facts.heads,
        num_key_value_heads: facts.kv_heads,
        intermediate_size: facts.intermediate_size,
        vocab_size: facts.vocab_size,
        max_position_embeddings: facts.max_positions,
        rope_theta: facts.rope_theta as f32,
        quantization_type: QuantizationType::I2S,
        quantization_accuracy: 0.99,
        model_type: "bitnet".to_string(),
        model_name: Some(name.to_string()),
        version: "1".to_string(),
    }
}
