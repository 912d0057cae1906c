//! What an error means for the caller: where it arose, how bad it is, and what may help.

use std::time::SystemTime;

use super::{
    ConfigurationError, DeviceError, ForwardPassError, GenerationError, InferenceError, MemoryError, ModelError,
    OutputValidationError, QuantizationError, TokenizationError,
};
use crate::SystemState;

/// Context of an error, for debugging and recovery.
pub trait ErrorContext {
    /// Where the error arose, with a reading of the machine taken now.
    fn context(&self) -> ErrorContextInfo;

    /// Whether trying again, perhaps differently, can help.
    fn is_recoverable(&self) -> bool;

    /// What may help, the most promising first.
    fn recovery_suggestions(&self) -> Vec<RecoveryAction>;

    /// How bad it is.
    fn severity(&self) -> ErrorSeverity;
}

/// Where and when an error arose.
#[derive(Debug, Clone)]
pub struct ErrorContextInfo {
    /// Component where the error arose.
    pub component: String,
    /// What that component was doing.
    pub operation: String,
    /// The error's own details: the inputs that led to it.
    pub input_info: Option<String>,
    /// The machine at this moment.
    pub system_state: SystemState,
    /// This moment.
    pub timestamp: SystemTime,
}

/// Something a caller can do about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RecoveryAction {
    /// A simple retry may work.
    Retry,
    /// Try again with another configuration.
    RetryWithDifferentConfig,
    /// Switch from the GPU to the CPU.
    FallbackToCPU,
    /// Use smaller batches or shorter sequences.
    ReduceMemoryUsage,
    /// Clear the KV cache and other caches.
    ClearCaches,
    /// Load the model again.
    RestartModel,
    /// Only a person can help.
    UserIntervention,
}

/// How bad an error is, the mildest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ErrorSeverity {
    /// A warning: the operation can continue.
    Low,
    /// An error, but recoverable.
    Medium,
    /// A critical error: act at once.
    High,
    /// Nothing can be done.
    Fatal,
}

impl ErrorContext for InferenceError {
    fn context(&self) -> ErrorContextInfo {
        let (component, operation) = self.place();
        let details = match self {
            Self::Configuration(error) => format!("{error:?}"),
            Self::Model(error) => format!("{error:?}"),
            Self::ForwardPass(error) => format!("{error:?}"),
            Self::Generation(error) => format!("{error:?}"),
            Self::Quantization(error) => format!("{error:?}"),
            Self::Device(error) => format!("{error:?}"),
            Self::OutputValidation(error) => format!("{error:?}"),
            Self::Memory(error) => format!("{error:?}"),
            Self::Tokenization(error) => format!("{error:?}"),
        };
        ErrorContextInfo {
            component: component.to_string(),
            operation: operation.to_string(),
            input_info: Some(details),
            system_state: SystemState::current(),
            timestamp: SystemTime::now(),
        }
    }

    fn is_recoverable(&self) -> bool {
        // The arms above the catch-all say why those errors, of all, are worth another try.
        match self {
            Self::Configuration(_) => false,
            Self::Model(ModelError::FileNotFound { .. }) => false,
            Self::Memory(MemoryError::OutOfMemory { .. }) => true, // a smaller batch may fit
            Self::Device(DeviceError::DeviceNotAvailable { .. }) => true, // the CPU can take over
            Self::ForwardPass(ForwardPassError::NumericalInstability { .. }) => true,
            _ => true,
        }
    }

    fn recovery_suggestions(&self) -> Vec<RecoveryAction> {
        match self {
            Self::Memory(MemoryError::OutOfMemory { .. }) => {
                vec![RecoveryAction::ReduceMemoryUsage, RecoveryAction::ClearCaches, RecoveryAction::FallbackToCPU]
            }
            Self::Device(DeviceError::DeviceNotAvailable { .. }) => {
                vec![RecoveryAction::FallbackToCPU]
            }
            Self::ForwardPass(ForwardPassError::NumericalInstability { .. }) => {
                vec![RecoveryAction::RetryWithDifferentConfig, RecoveryAction::RestartModel]
            }
            _ => vec![RecoveryAction::Retry],
        }
    }

    fn severity(&self) -> ErrorSeverity {
        match self {
            Self::Configuration(_) | Self::Model(_) => ErrorSeverity::High,
            Self::Memory(MemoryError::OutOfMemory { .. }) => ErrorSeverity::Medium,
            Self::Device(_) => ErrorSeverity::Medium,
            Self::ForwardPass(ForwardPassError::NumericalInstability { .. }) => ErrorSeverity::Medium,
            _ => ErrorSeverity::Low,
        }
    }
}

impl InferenceError {
    /// Component and operation. No wildcard arm: a new variant must say where it belongs before it compiles.
    fn place(&self) -> (&'static str, &str) {
        match self {
            Self::Configuration(error) => (
                "Configuration",
                match error {
                    ConfigurationError::InvalidDimensions { .. }
                    | ConfigurationError::InvalidParameter { .. }
                    | ConfigurationError::IncompatibleConfig { .. }
                    | ConfigurationError::MissingParameter { .. } => "Validation",
                },
            ),
            Self::Model(error) => (
                "Model",
                match error {
                    ModelError::FileNotFound { .. } => "Open",
                    ModelError::InvalidFormat { .. } => "Parse",
                    ModelError::ValidationFailed { .. } => "Validation",
                    ModelError::IncompatibleVersion { .. } => "VersionCheck",
                    ModelError::LoadingFailed { .. } => "Load",
                    ModelError::ModelTooLarge { .. } => "SizeCheck",
                },
            ),
            Self::ForwardPass(error) => (
                "ForwardPass",
                match error {
                    ForwardPassError::InvalidInput { .. } => "InputValidation",
                    ForwardPassError::ShapeMismatch { .. } => "ShapeCheck",
                    // The two variants that carry their own place; an empty one falls back to a real word.
                    ForwardPassError::ComputationFailed { component, .. } => own_or(component, "Computation"),
                    ForwardPassError::NumericalInstability { .. } => "NumericalCheck",
                    ForwardPassError::KVCacheError { operation, .. } => own_or(operation, "KVCache"),
                },
            ),
            Self::Generation(error) => (
                "Generation",
                match error {
                    GenerationError::ContextExhausted { .. } => "Decode",
                    GenerationError::SamplingFailed { .. } => "Sampling",
                    GenerationError::Cancelled { .. } => "Cancellation",
                    GenerationError::PromptTooLong { .. } => "Prefill",
                },
            ),
            Self::Quantization(error) => (
                "Quantization",
                match error {
                    QuantizationError::UnsupportedType { .. } => "TypeSelection",
                    QuantizationError::InvalidScale { .. } => "ScaleCheck",
                    QuantizationError::InvalidCode { .. } => "Unpack",
                    QuantizationError::LayoutMismatch { .. } => "LayoutCheck",
                },
            ),
            Self::Device(error) => (
                "Device",
                match error {
                    DeviceError::DeviceNotAvailable { .. } => "Selection",
                    DeviceError::InsufficientCapability { .. } => "CapabilityCheck",
                    DeviceError::CudaError { .. } => "CudaCall",
                    DeviceError::DeviceMemoryError { .. } => "MemoryAccess",
                    DeviceError::SynchronizationFailed { .. } => "Synchronization",
                },
            ),
            Self::OutputValidation(error) => (
                "OutputValidation",
                match error {
                    OutputValidationError::InvalidShape { .. } => "ShapeCheck",
                    OutputValidationError::NumericalInstability { .. } => "NumericalCheck",
                    OutputValidationError::InconsistentOutput { .. } => "ConsistencyCheck",
                    OutputValidationError::MissingOutput { .. } => "PresenceCheck",
                },
            ),
            Self::Memory(error) => (
                "Memory",
                match error {
                    MemoryError::OutOfMemory { .. } => "Reservation",
                    MemoryError::AllocationFailed { .. } => "Allocation",
                    MemoryError::PoolExhausted { .. } => "PoolRequest",
                    MemoryError::HighFragmentation { .. } => "FragmentationCheck",
                },
            ),
            Self::Tokenization(error) => (
                "Tokenization",
                match error {
                    TokenizationError::EmptySequence | TokenizationError::InvalidToken { .. } => "TokenValidation",
                    TokenizationError::MissingTokenizer { .. } => "TokenizerLookup",
                    TokenizationError::EncodingFailed { .. } => "Encode",
                    TokenizationError::DecodingFailed { .. } => "Decode",
                },
            ),
        }
    }
}

fn own_or<'a>(own: &'a str, fallback: &'a str) -> &'a str {
    if own.is_empty() { fallback } else { own }
}
