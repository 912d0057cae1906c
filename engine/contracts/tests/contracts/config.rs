//! Model configuration: what is refused, and the size formulas.

use bitnet_contracts::*;
use rstest::rstest;

/// The shape of the 2B model.
fn big() -> ModelConfig {
    ModelConfig {
        hidden_size: 2560,
        num_layers: 30,
        num_attention_heads: 20,
        num_key_value_heads: 5,
        intermediate_size: 6912,
        vocab_size: 128_256,
        max_position_embeddings: 4096,
        rope_theta: 500_000.0,
        quantization_type: QuantizationType::I2S,
        quantization_accuracy: 0.99,
        model_type: "bitnet".to_string(),
        model_name: None,
        version: "1".to_string(),
    }
}

#[test]
fn the_big_model_by_hand() {
    let config = big();
    config.validate().unwrap();
    assert_eq!(config.head_dim(), 128);
    assert_eq!(config.group_size(), 4);

    let ternary = 30 * (2560 * 2560 * 2 + 2 * 640 * 2560 + 3 * 2560 * 6912);
    let params = 128_256 * 2560 + ternary + 31 * 2560;
    assert_eq!(config.parameter_count(), params);
    assert_eq!(config.quantized_model_size(), params * 2 / 8 + params / 32 * 4 + 1_048_576);
    assert_eq!(config.packed_model_size(), ternary / 4 + 30 * 7 * 4);
}

#[rstest]
#[case(QuantizationType::I2S, 2)]
#[case(QuantizationType::TL1, 4)]
#[case(QuantizationType::TL2, 8)]
fn budget_bits(#[case] quantization_type: QuantizationType, #[case] bits: usize) {
    let config = ModelConfig { quantization_type, ..big() };
    let params = config.parameter_count();
    assert_eq!(config.quantized_model_size(), params * bits / 8 + params / 32 * 4 + 1_048_576);
}

#[test]
fn packed_sizes_round_up_to_whole_bytes() {
    // Matrices of 4 (q, o), 4 (k, v) and 6 (gate, up, down) weights.
    let tiny = ModelConfig {
        hidden_size: 2,
        num_layers: 1,
        num_attention_heads: 1,
        num_key_value_heads: 1,
        intermediate_size: 3,
        ..big()
    };
    let size = |quantization_type| ModelConfig { quantization_type, ..tiny.clone() }.packed_model_size();
    assert_eq!(size(QuantizationType::I2S), 4 + 3 * 2 + 7 * 4);
    assert_eq!(size(QuantizationType::TL1), 4 + 3 * 2 + 7 * 4);
    // 4 weights are two triples, 10 bits; 6 weights are two triples as well.
    assert_eq!(size(QuantizationType::TL2), 7 * 2 + 7 * 4);
}

#[rstest]
#[case("hidden_size", ModelConfig { hidden_size: 0, ..big() }, "0", "1 to usize::MAX")]
#[case("num_layers", ModelConfig { num_layers: 0, ..big() }, "0", "1 to 10,000")]
#[case("num_layers", ModelConfig { num_layers: 10_001, ..big() }, "10001", "1 to 10,000")]
#[case("num_attention_heads", ModelConfig { num_attention_heads: 0, ..big() }, "0", "1 to usize::MAX")]
#[case("num_key_value_heads", ModelConfig { num_key_value_heads: 0, ..big() }, "0", "1 to usize::MAX")]
#[case("intermediate_size", ModelConfig { intermediate_size: 0, ..big() }, "0", "1 to usize::MAX")]
#[case("vocab_size", ModelConfig { vocab_size: 0, ..big() }, "0", "1 to 1,000,000")]
#[case("vocab_size", ModelConfig { vocab_size: 1_000_001, ..big() }, "1000001", "1 to 1,000,000")]
#[case("max_position_embeddings", ModelConfig { max_position_embeddings: 0, ..big() }, "0", "1 to 1,000,000")]
#[case("max_position_embeddings", ModelConfig { max_position_embeddings: 1_000_001, ..big() }, "1000001",
    "1 to 1,000,000")]
#[case("rope_theta", ModelConfig { rope_theta: 0.0, ..big() }, "0", "positive finite float")]
#[case("rope_theta", ModelConfig { rope_theta: -1.0, ..big() }, "-1", "positive finite float")]
#[case("rope_theta", ModelConfig { rope_theta: f32::NAN, ..big() }, "NaN", "positive finite float")]
#[case("rope_theta", ModelConfig { rope_theta: f32::INFINITY, ..big() }, "inf", "positive finite float")]
#[case("quantization_accuracy", ModelConfig { quantization_accuracy: 1.5, ..big() }, "1.5", "0.0 to 1.0")]
#[case("quantization_accuracy", ModelConfig { quantization_accuracy: -0.5, ..big() }, "-0.5", "0.0 to 1.0")]
#[case("quantization_accuracy", ModelConfig { quantization_accuracy: f32::NAN, ..big() }, "NaN", "0.0 to 1.0")]
fn refused_parameters(
    #[case] parameter: &str,
    #[case] config: ModelConfig,
    #[case] value: &str,
    #[case] valid_range: &str,
) {
    let expected = ConfigurationError::InvalidParameter {
        parameter: parameter.to_string(),
        value: value.to_string(),
        valid_range: valid_range.to_string(),
    };
    assert_eq!(config.validate(), Err(expected.into()));
}

#[rstest]
#[case(ModelConfig { num_attention_heads: 7, num_key_value_heads: 7, ..big() }, 2560, 7,
    "hidden_size must be divisible by num_attention_heads")]
#[case(ModelConfig { num_key_value_heads: 3, ..big() }, 20, 3,
    "num_attention_heads must be divisible by num_key_value_heads")]
#[case(ModelConfig { hidden_size: 60, ..big() }, 60, 20, "head dimension 3 must be even for rotary embeddings")]
fn refused_dimensions(
    #[case] config: ModelConfig,
    #[case] hidden_size: usize,
    #[case] num_heads: usize,
    #[case] reason: &str,
) {
    let expected = ConfigurationError::InvalidDimensions { hidden_size, num_heads, reason: reason.to_string() };
    assert_eq!(config.validate(), Err(expected.into()));
}

#[rstest]
#[case(ModelConfig { hidden_size: 20 << 40, ..big() })]
#[case(ModelConfig { intermediate_size: usize::MAX, ..big() })]
fn refused_for_overflow(#[case] config: ModelConfig) {
    assert!(
        matches!(config.validate(), Err(InferenceError::Configuration(ConfigurationError::IncompatibleConfig { .. }))),
        "{:?}",
        config.validate()
    );
    assert_eq!(config.parameter_count(), usize::MAX);
    assert_eq!(config.quantized_model_size(), usize::MAX, "a saturated count has no smaller budget");
}

#[test]
fn a_config_survives_json() {
    let config = big();
    let text = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<ModelConfig>(&text).unwrap(), config);
}
