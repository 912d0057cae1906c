//! The standard validator: what it refuses, in which order and in which words.

use bitnet_contracts::*;
use rstest::rstest;

use crate::toy;

fn validator() -> StandardInputValidator {
    StandardInputValidator { config: toy::config(), device: Device::Cpu }
}

fn base() -> GenerationConfig {
    GenerationConfig::default()
}

#[rstest]
#[case(GenerationConfig { max_new_tokens: 0, min_new_tokens: 0, ..base() }, "max_new_tokens", "0", "1 to usize::MAX")]
#[case(GenerationConfig { temperature: -0.1, ..base() }, "temperature", "-0.1", "0.0 to positive float")]
#[case(GenerationConfig { temperature: f32::NAN, ..base() }, "temperature", "NaN", "0.0 to positive float")]
#[case(GenerationConfig { temperature: f32::INFINITY, ..base() }, "temperature", "inf", "0.0 to positive float")]
#[case(GenerationConfig { top_p: Some(0.0), ..base() }, "top_p", "0", "0.0 < top_p <= 1.0")]
#[case(GenerationConfig { top_p: Some(1.01), ..base() }, "top_p", "1.01", "0.0 < top_p <= 1.0")]
#[case(GenerationConfig { top_p: Some(f32::NAN), ..base() }, "top_p", "NaN", "0.0 < top_p <= 1.0")]
#[case(GenerationConfig { top_p: Some(f32::NEG_INFINITY), ..base() }, "top_p", "-inf", "0.0 < top_p <= 1.0")]
#[case(GenerationConfig { top_k: Some(0), ..base() }, "top_k", "0", "1 to usize::MAX")]
#[case(GenerationConfig { repetition_penalty: 0.0, ..base() }, "repetition_penalty", "0", "positive float")]
#[case(GenerationConfig { repetition_penalty: f32::NAN, ..base() }, "repetition_penalty", "NaN", "positive float")]
#[case(GenerationConfig { repetition_penalty: f32::INFINITY, ..base() }, "repetition_penalty", "inf",
    "positive float")]
#[case(GenerationConfig { frequency_penalty: f32::NAN, ..base() }, "frequency_penalty", "NaN", "finite float")]
#[case(GenerationConfig { frequency_penalty: f32::INFINITY, ..base() }, "frequency_penalty", "inf", "finite float")]
#[case(GenerationConfig { presence_penalty: f32::NAN, ..base() }, "presence_penalty", "NaN", "finite float")]
#[case(GenerationConfig { presence_penalty: f32::NEG_INFINITY, ..base() }, "presence_penalty", "-inf",
    "finite float")]
#[case(GenerationConfig { stop_tokens: vec![31, 32], ..base() }, "stop_tokens", "32", "0 to 31")]
#[case(GenerationConfig { eos_token_id: Some(32), ..base() }, "eos_token_id", "32", "0 to 31")]
#[case(GenerationConfig { stop_sequences: vec!["a".into(), "".into()], ..base() }, "stop_sequences", "\"\"",
    "non-empty strings")]
#[case(GenerationConfig { max_total_tokens: 0, ..base() }, "max_total_tokens", "0", "1 to usize::MAX")]
#[case(GenerationConfig { prefill_chunk_size: Some(0), ..base() }, "prefill_chunk_size", "0", "1 to usize::MAX")]
// The source's order decides when two things are wrong at once.
#[case(GenerationConfig { top_p: Some(2.0), temperature: f32::NAN, ..base() }, "temperature", "NaN",
    "0.0 to positive float")]
#[case(GenerationConfig { top_k: Some(0), top_p: Some(2.0), ..base() }, "top_p", "2", "0.0 < top_p <= 1.0")]
#[case(GenerationConfig { max_total_tokens: 0, stop_tokens: vec![99], ..base() }, "stop_tokens", "99", "0 to 31")]
fn refused_generation_configs(
    #[case] config: GenerationConfig,
    #[case] parameter: &str,
    #[case] value: &str,
    #[case] valid_range: &str,
) {
    let expected = ConfigurationError::InvalidParameter {
        parameter: parameter.to_string(),
        value: value.to_string(),
        valid_range: valid_range.to_string(),
    };
    assert_eq!(validator().validate_generation_config(&config), Err(expected.into()));
}

#[test]
fn the_minimum_cannot_exceed_the_maximum() {
    let config = GenerationConfig { min_new_tokens: 6, max_new_tokens: 5, ..base() };
    let expected = ConfigurationError::IncompatibleConfig {
        reason: "min_new_tokens (6) cannot be greater than max_new_tokens (5)".to_string(),
    };
    assert_eq!(validator().validate_generation_config(&config), Err(expected.into()));
}

#[rstest]
#[case(base())]
#[case(GenerationConfig { temperature: 0.0, top_p: Some(1.0), top_k: Some(1), ..base() })]
#[case(GenerationConfig { top_p: None, top_k: None, min_new_tokens: 0, ..base() })]
#[case(GenerationConfig { min_new_tokens: 128, top_k: Some(usize::MAX), ..base() })]
#[case(GenerationConfig { frequency_penalty: -2.0, presence_penalty: -2.0, ..base() })]
#[case(GenerationConfig { stop_tokens: vec![0, 31], eos_token_id: Some(31), ..base() })]
#[case(GenerationConfig { max_total_tokens: 1, prefill_chunk_size: Some(1), ..base() })]
fn accepted_generation_configs(#[case] config: GenerationConfig) {
    validator().validate_generation_config(&config).unwrap();
}

#[test]
fn an_empty_vocabulary_has_no_range() {
    let validator =
        StandardInputValidator { config: ModelConfig { vocab_size: 0, ..toy::config() }, device: Device::Cpu };
    let error = validator.validate_generation_config(&GenerationConfig { stop_tokens: vec![0], ..base() }).unwrap_err();
    assert!(error.to_string().contains("the vocabulary is empty"), "{error}");
}

#[test]
fn token_sequences() {
    let validator = validator();
    assert_eq!(validator.validate_token_sequence(&[], 32), Err(TokenizationError::EmptySequence.into()));
    validator.validate_token_sequence(&[0, 31], 32).unwrap();
    let expected = TokenizationError::InvalidToken { position: 2, token_id: 32, vocab_size: 32 };
    assert_eq!(validator.validate_token_sequence(&[0, 31, 32, 99], 32), Err(expected.into()));
    let expected = TokenizationError::InvalidToken { position: 0, token_id: 0, vocab_size: 0 };
    assert_eq!(validator.validate_token_sequence(&[0], 0), Err(expected.into()));
    validator.validate_token_sequence(&[u32::MAX], usize::MAX).unwrap();

    validator.validate_token_sequence(&[1; 64], 32).unwrap();
    // Too long is said before the invalid token inside it.
    let expected =
        ForwardPassError::InvalidInput { reason: "Sequence too long: 65 tokens, maximum supported: 64".to_string() };
    assert_eq!(validator.validate_token_sequence(&[99; 65], 32), Err(expected.into()));
}

#[rstest]
#[case(&[2, 3], &[2, 3], true)]
#[case(&[2, 3], &[0, 3], true)]
#[case(&[2, 3], &[0, 0], true)]
#[case(&[2, 3], &[2, 4], false)]
#[case(&[2, 3], &[3, 0], false)]
#[case(&[2, 3], &[2], false)]
#[case(&[2, 3], &[2, 3, 0], false)]
#[case(&[], &[], true)]
#[case(&[2, 0], &[2, 1], false)]
fn tensor_shapes(#[case] shape: &[usize], #[case] expected: &[usize], #[case] fits: bool) {
    let tensor = Tensor::zeros(shape, DType::U32, &Device::Cpu).unwrap();
    let verdict = if fits {
        Ok(())
    } else {
        Err(ForwardPassError::ShapeMismatch { expected: expected.to_vec(), actual: shape.to_vec() }.into())
    };
    assert_eq!(validator().validate_input_tensor(&tensor, expected), verdict);
}

#[rstest]
#[case(DType::F32, true)]
#[case(DType::U32, true)]
#[case(DType::I64, true)]
#[case(DType::U8, false)]
#[case(DType::F16, false)]
#[case(DType::BF16, false)]
#[case(DType::F64, false)]
fn tensor_types(#[case] dtype: DType, #[case] accepted: bool) {
    let tensor = Tensor::zeros((1, 2), dtype, &Device::Cpu).unwrap();
    let verdict = validator().validate_input_tensor(&tensor, &[1, 2]);
    if accepted {
        verdict.unwrap();
    } else {
        let reason = format!("Unsupported tensor dtype: {dtype:?}");
        assert_eq!(verdict, Err(ForwardPassError::InvalidInput { reason }.into()));
    }
}

#[test]
fn memory_is_held_against_the_machine() {
    validator().validate_memory_requirements(1).unwrap();
    let error = validator().validate_memory_requirements(usize::MAX).unwrap_err();
    let InferenceError::Memory(MemoryError::OutOfMemory { requested_mb, available_mb }) = error else {
        panic!("another error: {error:?}");
    };
    assert_eq!(requested_mb, usize::MAX / 1024 / 1024);
    assert!(available_mb > 0 && available_mb < requested_mb);
}

// Without the `cuda` feature candle still has the type, so a device that this build cannot use can be named.
#[test]
fn a_device_that_this_crate_cannot_read_is_an_error() {
    let validator = StandardInputValidator { config: toy::config(), device: Device::Cuda(candle_core::CudaDevice) };
    let error = validator.validate_memory_requirements(1).unwrap_err();
    let InferenceError::Device(DeviceError::DeviceNotAvailable { device }) = &error else {
        panic!("another error: {error:?}");
    };
    assert!(device.contains("Cuda"), "{device}");

    let tensor = Tensor::zeros((1, 2), DType::U32, &Device::Cpu).unwrap();
    let error = validator.validate_input_tensor(&tensor, &[1, 2]).unwrap_err();
    assert!(matches!(error, InferenceError::Device(DeviceError::DeviceMemoryError { .. })), "{error:?}");
}
