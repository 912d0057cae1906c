//! Checks made before any arithmetic starts.

use candle_core::{DType, Device, Tensor};

use crate::{
    ConfigurationError, DeviceError, ForwardPassError, GenerationConfig, MemoryError, ModelConfig, Result,
    TokenizationError, available_cpu_memory,
};

/// Validation of everything that a caller hands to an engine.
pub trait InputValidator {
    /// Checks a tensor's shape (0 in `expected_shape` stands for any size), device and element type.
    ///
    /// # Errors
    /// `ForwardPassError::ShapeMismatch`, `DeviceError::DeviceMemoryError` or `ForwardPassError::InvalidInput`.
    fn validate_input_tensor(&self, tensor: &Tensor, expected_shape: &[usize]) -> Result<()>;

    /// Checks that a sequence is not empty, not too long, and within a vocabulary of `vocab_size` tokens.
    ///
    /// # Errors
    /// `TokenizationError::EmptySequence`, `ForwardPassError::InvalidInput` or `TokenizationError::InvalidToken`.
    fn validate_token_sequence(&self, tokens: &[u32], vocab_size: usize) -> Result<()>;

    /// Checks every field of a generation configuration.
    ///
    /// # Errors
    /// `ConfigurationError::InvalidParameter` naming the first bad parameter, or
    /// `ConfigurationError::IncompatibleConfig`.
    fn validate_generation_config(&self, config: &GenerationConfig) -> Result<()>;

    /// Checks that `required_memory` bytes can be had on the engine's device.
    ///
    /// # Errors
    /// `MemoryError::OutOfMemory`, or a `DeviceError` when the device's memory cannot be read.
    fn validate_memory_requirements(&self, required_memory: usize) -> Result<()>;
}

/// The validator for a model on a device.
#[derive(Debug, Clone)]
pub struct StandardInputValidator {
    /// Configuration of the model that is to take the inputs.
    pub config: ModelConfig,
    /// Device of the engine that is to take the inputs.
    pub device: Device,
}

impl StandardInputValidator {
    /// A validator for this model on this device.
    pub fn new(config: ModelConfig, device: Device) -> Self {
        Self { config, device }
    }

    /// Checks that a token of a generation configuration is within the vocabulary.
    fn check_token(&self, parameter: &str, token: u32) -> Result<()> {
        if token as usize >= self.config.vocab_size {
            let valid_range = match self.config.vocab_size.checked_sub(1) {
                Some(last) => format!("0 to {last}"),
                None => "none: the vocabulary is empty".to_string(),
            };
            return Err(ConfigurationError::invalid(parameter, token, valid_range).into());
        }
        Ok(())
    }
}

impl InputValidator for StandardInputValidator {
    fn validate_input_tensor(&self, tensor: &Tensor, expected_shape: &[usize]) -> Result<()> {
        let actual_shape = tensor.dims();
        let fits = actual_shape.len() == expected_shape.len()
            && expected_shape.iter().zip(actual_shape).all(|(&expected, &actual)| expected == 0 || expected == actual);
        if !fits {
            return Err(ForwardPassError::ShapeMismatch {
                expected: expected_shape.to_vec(),
                actual: actual_shape.to_vec(),
            }
            .into());
        }

        if !tensor.device().same_device(&self.device) {
            return Err(DeviceError::DeviceMemoryError {
                device: format!("{:?}", self.device),
                details: format!("Input tensor on {:?}, expected {:?}", tensor.device(), self.device),
            }
            .into());
        }

        if !matches!(tensor.dtype(), DType::F32 | DType::U32 | DType::I64) {
            return Err(ForwardPassError::InvalidInput {
                reason: format!("Unsupported tensor dtype: {:?}", tensor.dtype()),
            }
            .into());
        }
        Ok(())
    }

    fn validate_token_sequence(&self, tokens: &[u32], vocab_size: usize) -> Result<()> {
        if tokens.is_empty() {
            return Err(TokenizationError::EmptySequence.into());
        }
        if tokens.len() > self.config.max_position_embeddings {
            return Err(ForwardPassError::InvalidInput {
                reason: format!(
                    "Sequence too long: {} tokens, maximum supported: {}",
                    tokens.len(),
                    self.config.max_position_embeddings
                ),
            }
            .into());
        }
        if let Some(position) = tokens.iter().position(|&token| token as usize >= vocab_size) {
            return Err(TokenizationError::InvalidToken {
                position,
                token_id: tokens[position],
                // A vocabulary beyond u32 has no invalid token, so nothing is lost here.
                vocab_size: u32::try_from(vocab_size).unwrap_or(u32::MAX),
            }
            .into());
        }
        Ok(())
    }

    fn validate_generation_config(&self, config: &GenerationConfig) -> Result<()> {
        let invalid = |parameter: &str, value: String, valid_range: &str| -> Result<()> {
            Err(ConfigurationError::invalid(parameter, value, valid_range).into())
        };

        if config.max_new_tokens == 0 {
            return invalid("max_new_tokens", config.max_new_tokens.to_string(), "1 to usize::MAX");
        }
        if config.min_new_tokens > config.max_new_tokens {
            return Err(ConfigurationError::IncompatibleConfig {
                reason: format!(
                    "min_new_tokens ({}) cannot be greater than max_new_tokens ({})",
                    config.min_new_tokens, config.max_new_tokens
                ),
            }
            .into());
        }

        // A NaN is below nothing and above nothing: each float is tested for finiteness before it is compared.
        if !config.temperature.is_finite() || config.temperature < 0.0 {
            return invalid("temperature", config.temperature.to_string(), "0.0 to positive float");
        }
        if let Some(top_p) = config.top_p
            && (!top_p.is_finite() || top_p <= 0.0 || top_p > 1.0)
        {
            return invalid("top_p", top_p.to_string(), "0.0 < top_p <= 1.0");
        }
        if let Some(top_k) = config.top_k
            && top_k == 0
        {
            return invalid("top_k", top_k.to_string(), "1 to usize::MAX");
        }
        if !config.repetition_penalty.is_finite() || config.repetition_penalty <= 0.0 {
            return invalid("repetition_penalty", config.repetition_penalty.to_string(), "positive float");
        }
        if !config.frequency_penalty.is_finite() {
            return invalid("frequency_penalty", config.frequency_penalty.to_string(), "finite float");
        }
        if !config.presence_penalty.is_finite() {
            return invalid("presence_penalty", config.presence_penalty.to_string(), "finite float");
        }

        for &token in &config.stop_tokens {
            self.check_token("stop_tokens", token)?;
        }
        if let Some(token) = config.eos_token_id {
            self.check_token("eos_token_id", token)?;
        }
        // The empty text is found everywhere and would end every generation at once.
        if config.stop_sequences.iter().any(String::is_empty) {
            return invalid("stop_sequences", "\"\"".to_string(), "non-empty strings");
        }

        if config.max_total_tokens == 0 {
            return invalid("max_total_tokens", config.max_total_tokens.to_string(), "1 to usize::MAX");
        }
        if let Some(size) = config.prefill_chunk_size
            && size == 0
        {
            return invalid("prefill_chunk_size", size.to_string(), "1 to usize::MAX");
        }
        Ok(())
    }

    /// On the CPU the reading respects a container's limit. The memory of any other device is known only to its
    /// driver, which this crate does not link: there this validator answers `DeviceNotAvailable`, and the backend of
    /// that device brings a validator of its own.
    fn validate_memory_requirements(&self, required_memory: usize) -> Result<()> {
        let available_memory = match &self.device {
            Device::Cpu => available_cpu_memory()?,
            other => {
                return Err(DeviceError::DeviceNotAvailable { device: format!("{other:?}") }.into());
            }
        };
        if required_memory > available_memory {
            return Err(MemoryError::OutOfMemory {
                requested_mb: required_memory / 1024 / 1024,
                available_mb: available_memory / 1024 / 1024,
            }
            .into());
        }
        Ok(())
    }
}
