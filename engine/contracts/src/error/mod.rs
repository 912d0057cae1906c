//! The error tree: one root, [`InferenceError`], and one enum for each area below it.
//!
//! Every sub-error converts into the root with `?` or `.into()`, and so does `candle_core::Error`. What an error
//! means for the caller (where it arose, whether to retry, how bad it is) is [`ErrorContext`].

mod context;

pub use context::{ErrorContext, ErrorContextInfo, ErrorSeverity, RecoveryAction};

/// Result of any operation of an engine.
pub type Result<T> = std::result::Result<T, InferenceError>;

/// Root error type of all BitNet inference operations.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum InferenceError {
    /// A configuration that cannot work.
    #[error("Configuration error: {0}")]
    Configuration(#[from] ConfigurationError),

    /// A model that cannot be loaded.
    #[error("Model error: {0}")]
    Model(#[from] ModelError),

    /// A forward pass that failed.
    #[error("Forward pass error: {0}")]
    ForwardPass(#[from] ForwardPassError),

    /// A generation that failed.
    #[error("Generation error: {0}")]
    Generation(#[from] GenerationError),

    /// Quantized weights that cannot be used.
    #[error("Quantization error: {0}")]
    Quantization(#[from] QuantizationError),

    /// A device that cannot do what is asked.
    #[error("Device error: {0}")]
    Device(#[from] DeviceError),

    /// An output that breaks its contract.
    #[error("Output validation error: {0}")]
    OutputValidation(#[from] OutputValidationError),

    /// Memory that cannot be had.
    #[error("Memory error: {0}")]
    Memory(#[from] MemoryError),

    /// Tokens or text that cannot be converted.
    #[error("Tokenization error: {0}")]
    Tokenization(#[from] TokenizationError),
}

/// Errors found when a configuration is validated.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigurationError {
    /// Dimensions that do not fit each other.
    #[error("Invalid dimensions: hidden_size={hidden_size}, num_heads={num_heads}, reason={reason}")]
    InvalidDimensions {
        /// The size that is to be divided.
        hidden_size: usize,
        /// The number of heads to divide it among.
        num_heads: usize,
        /// What is wrong.
        reason: String,
    },

    /// One parameter outside its range.
    #[error("Invalid parameter {parameter}: value={value}, valid_range={valid_range}")]
    InvalidParameter {
        /// Name of the parameter.
        parameter: String,
        /// The value it had.
        value: String,
        /// The values it may have.
        valid_range: String,
    },

    /// Parameters that are valid alone but not together.
    #[error("Incompatible configuration: {reason}")]
    IncompatibleConfig {
        /// What is wrong.
        reason: String,
    },

    /// A parameter that must be given.
    #[error("Missing required parameter: {parameter}")]
    MissingParameter {
        /// Name of the parameter.
        parameter: String,
    },
}

impl ConfigurationError {
    /// An `InvalidParameter`, from whatever can be printed.
    pub(crate) fn invalid(parameter: &str, value: impl ToString, valid_range: impl Into<String>) -> Self {
        Self::InvalidParameter {
            parameter: parameter.to_string(),
            value: value.to_string(),
            valid_range: valid_range.into(),
        }
    }
}

/// Errors met when a model is loaded.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// No file at this path.
    #[error("Model file not found: {path}")]
    FileNotFound {
        /// The path looked at.
        path: String,
    },

    /// A file of the wrong kind.
    #[error("Invalid model format: {format}, expected: {expected}")]
    InvalidFormat {
        /// What was found.
        format: String,
        /// What was expected.
        expected: String,
    },

    /// A file of the right kind whose contents contradict each other.
    #[error("Model validation failed: {reason}")]
    ValidationFailed {
        /// What is wrong.
        reason: String,
    },

    /// A version that this engine does not read.
    #[error("Incompatible model version: {version}, supported: {supported_versions:?}")]
    IncompatibleVersion {
        /// The version found.
        version: String,
        /// The versions that can be read.
        supported_versions: Vec<String>,
    },

    /// A file that could not be read to its end.
    #[error("Model loading failed: {path} - {reason}")]
    LoadingFailed {
        /// The path of the file.
        path: String,
        /// What went wrong.
        reason: String,
    },

    /// A model beyond the engine's limit.
    #[error("Model too large: {size_gb:.2}GB, maximum supported: {max_size_gb:.2}GB")]
    ModelTooLarge {
        /// Size of the model, in gigabytes.
        size_gb: f64,
        /// The limit, in gigabytes.
        max_size_gb: f64,
    },
}

/// Errors met during a forward pass.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ForwardPassError {
    /// An input of the wrong kind.
    #[error("Input validation failed: {reason}")]
    InvalidInput {
        /// What is wrong.
        reason: String,
    },

    /// A tensor of the wrong shape.
    #[error("Tensor shape mismatch: expected {expected:?}, got {actual:?}")]
    ShapeMismatch {
        /// The shape expected; 0 stands for any size.
        expected: Vec<usize>,
        /// The shape found.
        actual: Vec<usize>,
    },

    /// A step of the computation that failed.
    #[error("Computation failed in {component}: {reason}")]
    ComputationFailed {
        /// The step that failed.
        component: String,
        /// What went wrong.
        reason: String,
    },

    /// NaN or infinite values inside the pass.
    #[error("Numerical instability detected: {details}")]
    NumericalInstability {
        /// Where, and what was seen.
        details: String,
    },

    /// A KV cache that cannot take what is asked of it.
    #[error("KV cache error: {operation} failed - {reason}")]
    KVCacheError {
        /// The operation that failed, such as `append` or `attach`.
        operation: String,
        /// What went wrong.
        reason: String,
    },
}

/// Errors met while tokens are generated.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GenerationError {
    /// No position left for the next token.
    #[error("Context exhausted: position {position}, maximum positions: {max_positions}")]
    ContextExhausted {
        /// The position that was needed.
        position: usize,
        /// The positions that the model has.
        max_positions: usize,
    },

    /// No token could be drawn.
    #[error("Sampling failed at step {step}: {reason}")]
    SamplingFailed {
        /// The step, from 0.
        step: usize,
        /// What went wrong.
        reason: String,
    },

    /// The caller ended the generation.
    #[error("Generation cancelled at step {step}")]
    Cancelled {
        /// The step, from 0, that was not computed.
        step: usize,
    },

    /// A prompt that leaves no room for a new token.
    #[error("Prompt too long: {prompt_tokens} tokens, maximum positions: {max_positions}")]
    PromptTooLong {
        /// Tokens of the prompt.
        prompt_tokens: usize,
        /// The positions that the model, or the configuration, allows.
        max_positions: usize,
    },
}

/// Errors in quantized weights.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum QuantizationError {
    /// A packing that this engine has no kernel for.
    #[error("Unsupported quantization type: {requested}, supported: {supported:?}")]
    UnsupportedType {
        /// The packing asked for.
        requested: String,
        /// The packings that can be used.
        supported: Vec<String>,
    },

    /// A scale that is not a usable number.
    #[error("Invalid scale in {tensor}: {value}")]
    InvalidScale {
        /// Name of the tensor.
        tensor: String,
        /// The scale found.
        value: f32,
    },

    /// A code that stands for no ternary value.
    #[error("Invalid code in {tensor}: {code} at position {position}")]
    InvalidCode {
        /// Name of the tensor.
        tensor: String,
        /// Position of the weight within the tensor.
        position: usize,
        /// The code found.
        code: u8,
    },

    /// Packed data of the wrong shape, size or type.
    #[error("Layout mismatch in {tensor}: expected {expected}, got {actual}")]
    LayoutMismatch {
        /// Name of the tensor.
        tensor: String,
        /// The layout expected.
        expected: String,
        /// The layout found.
        actual: String,
    },
}

/// Errors found when an output is checked against its contract.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OutputValidationError {
    /// An output tensor of the wrong shape.
    #[error("Invalid tensor shape for {tensor}: expected {expected:?}, got {actual:?}")]
    InvalidShape {
        /// Name of the tensor.
        tensor: String,
        /// The shape expected.
        expected: Vec<usize>,
        /// The shape found.
        actual: Vec<usize>,
    },

    /// NaN or infinite values in an output tensor.
    #[error("Numerical instability in {tensor}: {invalid_values}/{total_values} invalid values")]
    NumericalInstability {
        /// Name of the tensor.
        tensor: String,
        /// How many values are NaN or infinite.
        invalid_values: usize,
        /// How many values there are.
        total_values: usize,
    },

    /// Outputs that contradict each other or what was promised.
    #[error("Output consistency check failed: {reason}")]
    InconsistentOutput {
        /// What is wrong.
        reason: String,
    },

    /// An output that should be there.
    #[error("Missing expected output: {output_name}")]
    MissingOutput {
        /// Name of the output.
        output_name: String,
    },
}

/// Errors of memory management.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// More memory asked for than there is.
    #[error("Out of memory: requested {requested_mb}MB, available {available_mb}MB")]
    OutOfMemory {
        /// What was asked for, in MiB.
        requested_mb: usize,
        /// What there is, in MiB.
        available_mb: usize,
    },

    /// An allocation that failed.
    #[error("Memory allocation failed: {size_bytes} bytes - {reason}")]
    AllocationFailed {
        /// Size asked for, in bytes.
        size_bytes: usize,
        /// What went wrong.
        reason: String,
    },

    /// A pool with nothing left.
    #[error("Memory pool exhausted: {pool_type}")]
    PoolExhausted {
        /// Which pool.
        pool_type: String,
    },

    /// Too much of the held memory is unusable.
    #[error("Memory fragmentation too high: {fragmentation_ratio:.2}")]
    HighFragmentation {
        /// Share of the held memory that is not in use, 0 to 1.
        fragmentation_ratio: f32,
    },
}

/// Errors of devices and hardware.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// A device that is not there, or that this build cannot use.
    #[error("Device not available: {device}")]
    DeviceNotAvailable {
        /// Name of the device.
        device: String,
    },

    /// A device that is there but too small or too old.
    #[error("Device capability insufficient: required {required}, available {available}")]
    InsufficientCapability {
        /// What is needed.
        required: String,
        /// What there is.
        available: String,
    },

    /// An error reported by CUDA.
    #[error("CUDA error: {cuda_error_code} - {description}")]
    CudaError {
        /// CUDA's own code.
        cuda_error_code: i32,
        /// CUDA's own text.
        description: String,
    },

    /// Memory that is on the wrong device, or that the device refuses.
    #[error("Device memory error on {device}: {details}")]
    DeviceMemoryError {
        /// Name of the device.
        device: String,
        /// What went wrong.
        details: String,
    },

    /// A wait for the device that failed.
    #[error("Device synchronization failed: {reason}")]
    SynchronizationFailed {
        /// What went wrong.
        reason: String,
    },
}

/// Errors in token sequences and their text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizationError {
    /// A sequence without a token.
    #[error("Empty token sequence")]
    EmptySequence,

    /// A token outside the vocabulary.
    #[error("Invalid token at position {position}: token_id={token_id}, vocab_size={vocab_size}")]
    InvalidToken {
        /// Position within the sequence, from 0.
        position: usize,
        /// The id found.
        token_id: u32,
        /// Size of the vocabulary.
        vocab_size: u32,
    },

    /// Text was asked for, but the model came without a tokenizer.
    #[error("Missing tokenizer: {reason}")]
    MissingTokenizer {
        /// What was looked for.
        reason: String,
    },

    /// Text that could not be turned into tokens.
    #[error("Encoding failed: {reason}")]
    EncodingFailed {
        /// What went wrong.
        reason: String,
    },

    /// Tokens that could not be turned into text.
    #[error("Decoding failed: {reason}")]
    DecodingFailed {
        /// What went wrong.
        reason: String,
    },
}

impl From<candle_core::Error> for InferenceError {
    /// A failed tensor operation: component `candle`, with candle's own message (a shape mismatch names both shapes).
    fn from(error: candle_core::Error) -> Self {
        // A backtrace, which candle adds when the environment asks for one, would bury the message.
        let mut innermost = &error;
        while let candle_core::Error::WithBacktrace { inner, .. } = innermost {
            innermost = inner;
        }
        ForwardPassError::ComputationFailed { component: "candle".to_string(), reason: innermost.to_string() }.into()
    }
}
