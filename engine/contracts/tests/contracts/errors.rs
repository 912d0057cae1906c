//! One row for every error variant: its text, its place, and what a caller should do about it.

use bitnet_contracts::*;
use rstest::rstest;

use ErrorSeverity::{High, Low, Medium};
use RecoveryAction::{ClearCaches, FallbackToCPU, ReduceMemoryUsage, RestartModel, Retry, RetryWithDifferentConfig};

fn s(text: &str) -> String {
    text.to_string()
}

/// Text, component, operation, recoverable, severity, suggestions.
struct Row(&'static str, &'static str, &'static str, bool, ErrorSeverity, &'static [RecoveryAction]);

#[rstest]
#[case(ConfigurationError::InvalidDimensions { hidden_size: 10, num_heads: 3, reason: s("no") },
    Row("Configuration error: Invalid dimensions: hidden_size=10, num_heads=3, reason=no",
     "Configuration", "Validation", false, High, &[Retry]))]
#[case(ConfigurationError::InvalidParameter { parameter: s("p"), value: s("v"), valid_range: s("r") },
    Row("Configuration error: Invalid parameter p: value=v, valid_range=r",
     "Configuration", "Validation", false, High, &[Retry]))]
#[case(ConfigurationError::IncompatibleConfig { reason: s("a and b") },
    Row("Configuration error: Incompatible configuration: a and b",
     "Configuration", "Validation", false, High, &[Retry]))]
#[case(ConfigurationError::MissingParameter { parameter: s("p") },
    Row("Configuration error: Missing required parameter: p",
     "Configuration", "Validation", false, High, &[Retry]))]
#[case(ModelError::FileNotFound { path: s("a/b") },
    Row("Model error: Model file not found: a/b", "Model", "Open", false, High, &[Retry]))]
#[case(ModelError::InvalidFormat { format: s("zip"), expected: s("safetensors") },
    Row("Model error: Invalid model format: zip, expected: safetensors", "Model", "Parse", true, High, &[Retry]))]
#[case(ModelError::ValidationFailed { reason: s("no head") },
    Row("Model error: Model validation failed: no head", "Model", "Validation", true, High, &[Retry]))]
#[case(ModelError::IncompatibleVersion { version: s("9"), supported_versions: vec![s("1"), s("2")] },
    Row("Model error: Incompatible model version: 9, supported: [\"1\", \"2\"]",
     "Model", "VersionCheck", true, High, &[Retry]))]
#[case(ModelError::LoadingFailed { path: s("a/b"), reason: s("cut short") },
    Row("Model error: Model loading failed: a/b - cut short", "Model", "Load", true, High, &[Retry]))]
#[case(ModelError::ModelTooLarge { size_gb: 9.876, max_size_gb: 8.0 },
    Row("Model error: Model too large: 9.88GB, maximum supported: 8.00GB", "Model", "SizeCheck", true, High, &[Retry]))]
#[case(ForwardPassError::InvalidInput { reason: s("f32 ids") },
    Row("Forward pass error: Input validation failed: f32 ids",
     "ForwardPass", "InputValidation", true, Low, &[Retry]))]
#[case(ForwardPassError::ShapeMismatch { expected: vec![1, 10], actual: vec![1, 5] },
    Row("Forward pass error: Tensor shape mismatch: expected [1, 10], got [1, 5]",
     "ForwardPass", "ShapeCheck", true, Low, &[Retry]))]
#[case(ForwardPassError::ComputationFailed { component: s("rope"), reason: s("no") },
    Row("Forward pass error: Computation failed in rope: no", "ForwardPass", "rope", true, Low, &[Retry]))]
#[case(ForwardPassError::ComputationFailed { component: s(""), reason: s("no") },
    Row("Forward pass error: Computation failed in : no", "ForwardPass", "Computation", true, Low, &[Retry]))]
#[case(ForwardPassError::NumericalInstability { details: s("NaN in layer 3") },
    Row("Forward pass error: Numerical instability detected: NaN in layer 3",
     "ForwardPass", "NumericalCheck", true, Medium, &[RetryWithDifferentConfig, RestartModel]))]
#[case(ForwardPassError::KVCacheError { operation: s("append"), reason: s("full") },
    Row("Forward pass error: KV cache error: append failed - full",
     "ForwardPass", "append", true, Low, &[Retry]))]
#[case(GenerationError::ContextExhausted { position: 64, max_positions: 64 },
    Row("Generation error: Context exhausted: position 64, maximum positions: 64",
     "Generation", "Decode", true, Low, &[Retry]))]
#[case(GenerationError::SamplingFailed { step: 3, reason: s("no mass") },
    Row("Generation error: Sampling failed at step 3: no mass", "Generation", "Sampling", true, Low, &[Retry]))]
#[case(GenerationError::Cancelled { step: 7 },
    Row("Generation error: Generation cancelled at step 7", "Generation", "Cancellation", true, Low, &[Retry]))]
#[case(GenerationError::PromptTooLong { prompt_tokens: 65, max_positions: 64 },
    Row("Generation error: Prompt too long: 65 tokens, maximum positions: 64",
     "Generation", "Prefill", true, Low, &[Retry]))]
#[case(QuantizationError::UnsupportedType { requested: s("TL2"), supported: vec![s("I2S"), s("TL1")] },
    Row("Quantization error: Unsupported quantization type: TL2, supported: [\"I2S\", \"TL1\"]",
     "Quantization", "TypeSelection", true, Low, &[Retry]))]
#[case(QuantizationError::InvalidScale { tensor: s("q"), value: f32::INFINITY },
    Row("Quantization error: Invalid scale in q: inf", "Quantization", "ScaleCheck", true, Low, &[Retry]))]
#[case(QuantizationError::InvalidCode { tensor: s("q"), position: 12, code: 3 },
    Row("Quantization error: Invalid code in q: 3 at position 12", "Quantization", "Unpack", true, Low, &[Retry]))]
#[case(QuantizationError::LayoutMismatch { tensor: s("q"), expected: s("[4, 8] u8"), actual: s("[4, 9] u8") },
    Row("Quantization error: Layout mismatch in q: expected [4, 8] u8, got [4, 9] u8",
     "Quantization", "LayoutCheck", true, Low, &[Retry]))]
#[case(DeviceError::DeviceNotAvailable { device: s("cuda:1") },
    Row("Device error: Device not available: cuda:1", "Device", "Selection", true, Medium, &[FallbackToCPU]))]
#[case(DeviceError::InsufficientCapability { required: s("8.0"), available: s("7.5") },
    Row("Device error: Device capability insufficient: required 8.0, available 7.5",
     "Device", "CapabilityCheck", true, Medium, &[Retry]))]
#[case(DeviceError::CudaError { cuda_error_code: 700, description: s("illegal address") },
    Row("Device error: CUDA error: 700 - illegal address", "Device", "CudaCall", true, Medium, &[Retry]))]
#[case(DeviceError::DeviceMemoryError { device: s("Cpu"), details: s("elsewhere") },
    Row("Device error: Device memory error on Cpu: elsewhere", "Device", "MemoryAccess", true, Medium, &[Retry]))]
#[case(DeviceError::SynchronizationFailed { reason: s("lost") },
    Row("Device error: Device synchronization failed: lost", "Device", "Synchronization", true, Medium, &[Retry]))]
#[case(OutputValidationError::InvalidShape { tensor: s("logits"), expected: vec![1, 2, 3], actual: vec![1, 2] },
    Row("Output validation error: Invalid tensor shape for logits: expected [1, 2, 3], got [1, 2]",
     "OutputValidation", "ShapeCheck", true, Low, &[Retry]))]
#[case(OutputValidationError::NumericalInstability { tensor: s("logits"), invalid_values: 2, total_values: 9 },
    Row("Output validation error: Numerical instability in logits: 2/9 invalid values",
     "OutputValidation", "NumericalCheck", true, Low, &[Retry]))]
#[case(OutputValidationError::InconsistentOutput { reason: s("differs") },
    Row("Output validation error: Output consistency check failed: differs",
     "OutputValidation", "ConsistencyCheck", true, Low, &[Retry]))]
#[case(OutputValidationError::MissingOutput { output_name: s("hidden_states") },
    Row("Output validation error: Missing expected output: hidden_states",
     "OutputValidation", "PresenceCheck", true, Low, &[Retry]))]
#[case(MemoryError::OutOfMemory { requested_mb: 9000, available_mb: 8000 },
    Row("Memory error: Out of memory: requested 9000MB, available 8000MB",
     "Memory", "Reservation", true, Medium, &[ReduceMemoryUsage, ClearCaches, FallbackToCPU]))]
#[case(MemoryError::AllocationFailed { size_bytes: 4096, reason: s("no") },
    Row("Memory error: Memory allocation failed: 4096 bytes - no", "Memory", "Allocation", true, Low, &[Retry]))]
#[case(MemoryError::PoolExhausted { pool_type: s("activations") },
    Row("Memory error: Memory pool exhausted: activations", "Memory", "PoolRequest", true, Low, &[Retry]))]
#[case(MemoryError::HighFragmentation { fragmentation_ratio: 0.456 },
    Row("Memory error: Memory fragmentation too high: 0.46", "Memory", "FragmentationCheck", true, Low, &[Retry]))]
#[case(TokenizationError::EmptySequence,
    Row("Tokenization error: Empty token sequence", "Tokenization", "TokenValidation", true, Low, &[Retry]))]
#[case(TokenizationError::InvalidToken { position: 3, token_id: 99, vocab_size: 32 },
    Row("Tokenization error: Invalid token at position 3: token_id=99, vocab_size=32",
     "Tokenization", "TokenValidation", true, Low, &[Retry]))]
#[case(TokenizationError::MissingTokenizer { reason: s("no tokenizer.json") },
    Row("Tokenization error: Missing tokenizer: no tokenizer.json",
     "Tokenization", "TokenizerLookup", true, Low, &[Retry]))]
#[case(TokenizationError::EncodingFailed { reason: s("no") },
    Row("Tokenization error: Encoding failed: no", "Tokenization", "Encode", true, Low, &[Retry]))]
#[case(TokenizationError::DecodingFailed { reason: s("no") },
    Row("Tokenization error: Decoding failed: no", "Tokenization", "Decode", true, Low, &[Retry]))]
fn every_variant(#[case] sub_error: impl Into<InferenceError> + std::fmt::Debug, #[case] row: Row) {
    let details = format!("{sub_error:?}");
    let error: InferenceError = sub_error.into();
    let Row(text, component, operation, recoverable, severity, suggestions) = row;

    assert_eq!(error.to_string(), text);
    assert_eq!(error.is_recoverable(), recoverable);
    assert_eq!(error.severity(), severity);
    assert_eq!(error.recovery_suggestions(), suggestions);

    let before = std::time::SystemTime::now();
    let context = error.context();
    assert_eq!(context.component, component);
    assert_eq!(context.operation, operation);
    assert_eq!(context.input_info.as_deref(), Some(details.as_str()));
    assert!(context.timestamp >= before);
    assert!(context.system_state.cpu_count > 0);
}

#[test]
fn a_source_chain_leads_to_the_sub_error() {
    use std::error::Error;
    let error = InferenceError::from(TokenizationError::EmptySequence);
    assert_eq!(error.source().map(ToString::to_string).as_deref(), Some("Empty token sequence"));
}

#[test]
fn a_candle_error_keeps_its_message() {
    let a = Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap();
    let b = Tensor::zeros((4, 5), DType::F32, &Device::Cpu).unwrap();
    let error: InferenceError = a.matmul(&b).unwrap_err().into();
    let InferenceError::ForwardPass(ForwardPassError::ComputationFailed { component, reason }) = error else {
        panic!("another variant: {error:?}");
    };
    assert_eq!(component, "candle");
    assert!(reason.contains("[2, 3]") && reason.contains("[4, 5]"), "both shapes are named: {reason}");
}

#[test]
fn a_candle_backtrace_does_not_bury_the_message() {
    let error = candle_core::Error::WithBacktrace {
        inner: Box::new(candle_core::Error::Msg("the message".to_string())),
        backtrace: Box::new(std::backtrace::Backtrace::force_capture()),
    };
    let expected =
        ForwardPassError::ComputationFailed { component: "candle".to_string(), reason: "the message".to_string() };
    assert_eq!(InferenceError::from(error), expected.into());
}
