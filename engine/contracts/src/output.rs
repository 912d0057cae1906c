//! The result of one forward pass, and its checks.

use candle_core::{DType, Tensor};

use crate::{ForwardPassMetrics, MemoryUsage, OutputValidationError, Result};

/// A logit beyond this is finite but suspicious, and is worth a warning.
const SUSPICIOUS_LOGIT: f64 = 100.0;

/// Logits are examined in pieces of this many values, so that a check of a long prompt needs no second copy of them.
const CHECK_CHUNK: usize = 1 << 20;

/// What a forward pass returns.
#[derive(Debug, Clone)]
pub struct InferenceOutput {
    /// Logits, `[batch_size, sequence_length, vocab_size]`.
    pub logits: Tensor,

    /// Attention weights, one `[batch_size, num_heads, sequence_length, total_length]` tensor a layer; only from an
    /// engine that was built with that option on.
    pub attention_weights: Option<Vec<Tensor>>,

    /// Final, normed hidden states, `[batch_size, sequence_length, hidden_size]`; only from an engine that was built
    /// with that option on.
    pub hidden_states: Option<Tensor>,

    /// What the pass cost in time.
    pub metrics: ForwardPassMetrics,

    /// What the pass cost in memory.
    pub memory_usage: MemoryUsage,
}

impl InferenceOutput {
    /// Checks the shape of the logits and that all of them are finite.
    ///
    /// # Errors
    /// `OutputValidationError::InvalidShape`, and those of
    /// [`check_numerical_stability`](Self::check_numerical_stability).
    pub fn validate(&self, expected_batch_size: usize, expected_seq_len: usize, vocab_size: usize) -> Result<()> {
        let expected = [expected_batch_size, expected_seq_len, vocab_size];
        // Slices of different lengths differ, so this is the check of the rank as well.
        if self.logits.dims() != expected {
            return Err(self.invalid_logits_shape(expected.to_vec()));
        }
        self.check_numerical_stability()
    }

    /// Checks that no logit is NaN or infinite, in f64, f32, f16 or bf16 logits of any memory layout. A finite logit
    /// beyond ±100 is logged as a warning.
    ///
    /// # Errors
    /// * `OutputValidationError::NumericalInstability` with the exact count of NaN and infinite values;
    /// * `OutputValidationError::InconsistentOutput` for logits that are not of a floating-point type.
    pub fn check_numerical_stability(&self) -> Result<()> {
        let flat = self.logits.flatten_all()?;
        let total_values = flat.elem_count();

        let mut invalid_values = 0;
        let mut max_abs = 0.0_f64;
        let mut start = 0;
        while start < total_values {
            let length = CHECK_CHUNK.min(total_values - start);
            let chunk = flat.narrow(0, start, length)?;
            let (invalid, largest) = match chunk.dtype() {
                // An f64 may be finite and still too large for an f32: it is looked at as it is.
                DType::F64 => survey(chunk.to_vec1::<f64>()?),
                // Every f16 and bf16 has an exact f32.
                DType::F32 | DType::F16 | DType::BF16 => {
                    survey(chunk.to_dtype(DType::F32)?.to_vec1::<f32>()?.into_iter().map(f64::from))
                }
                other => {
                    return Err(OutputValidationError::InconsistentOutput {
                        reason: format!("logits have dtype {other:?}, expected a floating-point type"),
                    }
                    .into());
                }
            };
            invalid_values += invalid;
            max_abs = max_abs.max(largest);
            start += length;
        }

        if invalid_values > 0 {
            return Err(OutputValidationError::NumericalInstability {
                tensor: "logits".to_string(),
                invalid_values,
                total_values,
            }
            .into());
        }
        if max_abs > SUSPICIOUS_LOGIT {
            log::warn!("Logits contain large values (max_abs: {max_abs:.2}), may indicate numerical issues");
        }
        Ok(())
    }

    /// The logits of the last position, `[batch_size, vocab_size]`: what the next token is drawn from.
    ///
    /// # Errors
    /// `OutputValidationError::InvalidShape` for logits that are not of rank 3 or that have no position.
    pub fn next_token_logits(&self) -> Result<Tensor> {
        let dims = self.logits.dims();
        let &[batch, positions, vocab] = dims else {
            return Err(self.invalid_logits_shape(vec![1, 1, dims.last().copied().unwrap_or(0)]));
        };
        let Some(last) = positions.checked_sub(1) else {
            return Err(self.invalid_logits_shape(vec![batch, 1, vocab]));
        };
        Ok(self.logits.narrow(1, last, 1)?.squeeze(1)?)
    }

    fn invalid_logits_shape(&self, expected: Vec<usize>) -> crate::InferenceError {
        OutputValidationError::InvalidShape {
            tensor: "logits".to_string(),
            expected,
            actual: self.logits.dims().to_vec(),
        }
        .into()
    }
}

/// How many of the values are not finite, and the largest magnitude of those that are.
fn survey(values: impl IntoIterator<Item = f64>) -> (usize, f64) {
    values.into_iter().fold((0, 0.0), |(invalid, largest), value| {
        if value.is_finite() { (invalid, value.abs().max(largest)) } else { (invalid + 1, largest) }
    })
}
