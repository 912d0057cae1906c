//! What the backends share at their border: token tensors in, logits and metrics out.

use std::time::Duration;

use bitnet_contracts::{
    DType, Device, ForwardPassError, ForwardPassMetrics, InferenceOutput, InputValidator, KVCache, MemoryUsage,
    ModelConfig, Result, StandardInputValidator, Tensor, TokenizationError,
};

/// How an engine is made.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct EngineOptions {
    /// Threads of the engine; None takes as many as the process may use.
    pub threads: Option<usize>,
    /// Instruction set of the kernels (CPU backend only); None takes `BITNET_ISA`, else the fastest.
    pub isa: Option<crate::kernels::Isa>,
    /// Kernels of the ternary weights (CPU backend only), which are packed for them whatever the file's format. All give the same bits.
    pub quantization: crate::ternary::Quantization,
    /// Copy a large bf16 embedding or head into memory (CPU backend only); otherwise it stays in its file, of which a step of
    /// generation reads a few rows.
    pub weights_in_memory: bool,
    /// Whether packed weights are kept in a file beside the model (CPU backend only).
    pub packed: crate::model::PackedWeights,
    /// How keys and values are kept (CPU backend only). Other formats than f32 change the logits a little, and those of one format are
    /// the same bits on every way as ever.
    pub kv: crate::kernels::KvFormat,
    /// Give the attention probabilities of every layer in `InferenceOutput::attention_weights`.
    pub output_attentions: bool,
    /// Give the final normed states in `InferenceOutput::hidden_states`.
    pub output_hidden_states: bool,
}

impl EngineOptions {
    /// With `threads` threads.
    #[must_use]
    pub fn with_threads(mut self, threads: usize) -> Self {
        self.threads = Some(threads);
        self
    }

    /// With the kernels of `isa`.
    #[must_use]
    pub fn with_isa(mut self, isa: crate::kernels::Isa) -> Self {
        self.isa = Some(isa);
        self
    }

    /// With the kernels of `quantization`.
    #[must_use]
    pub fn with_quantization(mut self, quantization: crate::ternary::Quantization) -> Self {
        self.quantization = quantization;
        self
    }

    /// With all weights in memory.
    #[must_use]
    pub fn with_weights_in_memory(mut self) -> Self {
        self.weights_in_memory = true;
        self
    }

    /// With packed weights kept in a file or not.
    #[must_use]
    pub fn with_packed(mut self, packed: crate::model::PackedWeights) -> Self {
        self.packed = packed;
        self
    }

    /// With keys and values kept as `kv`.
    #[must_use]
    pub fn with_kv(mut self, kv: crate::kernels::KvFormat) -> Self {
        self.kv = kv;
        self
    }

    /// With attention probabilities in the output.
    #[must_use]
    pub fn with_attentions(mut self) -> Self {
        self.output_attentions = true;
        self
    }

    /// With final hidden states in the output.
    #[must_use]
    pub fn with_hidden_states(mut self) -> Self {
        self.output_hidden_states = true;
        self
    }
}

/// Token ids of a forward call, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TokenBatch {
    /// Sequences.
    pub(crate) batch: usize,
    /// New tokens of each sequence.
    pub(crate) seq: usize,
    /// `[batch, seq]`, every id below the vocabulary size.
    pub(crate) tokens: Vec<u32>,
    /// Position of the first new token.
    pub(crate) start: usize,
}

impl TokenBatch {
    /// Checks `input_ids` against the model and the room in `cache`.
    ///
    /// # Errors
    /// `ShapeMismatch` for another rank than 2, `InvalidInput` for another type than u32 or i64, `EmptySequence`, `InvalidToken` with
    /// its position in its sequence, `KVCacheError` when the cache has no room, `InvalidInput` when the model has no positions.
    pub(crate) fn read(
        input_ids: &Tensor,
        cache: Option<&KVCache>,
        validator: &StandardInputValidator,
        config: &ModelConfig,
    ) -> Result<Self> {
        // Zeroes: any batch, any length.
        validator.validate_input_tensor(input_ids, &[0, 0])?;
        let (batch, seq) = input_ids.dims2()?;
        if batch == 0 || seq == 0 {
            return Err(TokenizationError::EmptySequence.into());
        }
        let start = cache.map_or(0, KVCache::len);
        if let Some(cache) = cache {
            cache.check_room(seq)?;
            if start.saturating_add(seq) > config.max_position_embeddings {
                return Err(ForwardPassError::KVCacheError {
                    operation: "append".to_string(),
                    reason: format!(
                        "{start} positions held, {seq} more, the model has {}",
                        config.max_position_embeddings
                    ),
                }
                .into());
            }
        }
        let tokens = match input_ids.dtype() {
            DType::U32 => input_ids.flatten_all()?.to_vec1::<u32>()?,
            DType::I64 => {
                let ids = input_ids.flatten_all()?.to_vec1::<i64>()?;
                // Ids that are no u32 are out of every vocabulary; the largest u32 stands for them in the error.
                ids.into_iter().map(|id| u32::try_from(id).unwrap_or(u32::MAX)).collect()
            }
            other => {
                return Err(ForwardPassError::InvalidInput {
                    reason: format!("token ids are {other:?}, expected u32 or i64"),
                }
                .into());
            }
        };
        for row in tokens.chunks_exact(seq) {
            validator.validate_token_sequence(row, config.vocab_size)?;
        }
        Ok(Self { batch, seq, tokens, start })
    }
}

/// A KV cache that holds another number of sequences.
pub(crate) fn batch_mismatch(held: usize, asked: usize) -> bitnet_contracts::InferenceError {
    ForwardPassError::KVCacheError {
        operation: "append".to_string(),
        reason: format!("the cache holds {held} sequences, the input has {asked}"),
    }
    .into()
}

/// A zeroed `[batch, seq, vocabulary]` buffer for logits.
///
/// # Errors
/// `MemoryError::AllocationFailed`.
pub(crate) fn logits_buffer(floats: usize) -> Result<Vec<f32>> {
    let mut buffer = Vec::new();
    buffer.try_reserve_exact(floats).map_err(|e| bitnet_contracts::MemoryError::AllocationFailed {
        size_bytes: floats.saturating_mul(4),
        reason: e.to_string(),
    })?;
    buffer.resize(floats, 0.0);
    Ok(buffer)
}

/// Floating-point and integer operations of `tokens` tokens at positions from `start` on: two a multiply-accumulate, counted from the
/// shapes (linear layers, scores and values of attention, head).
pub(crate) fn operations(config: &ModelConfig, batch: usize, seq: usize, start: usize, heads: usize) -> u64 {
    let (h, f, kv) = (
        config.hidden_size as u64,
        config.intermediate_size as u64,
        (config.num_key_value_heads * config.head_dim()) as u64,
    );
    let (batch, seq, start) = (batch as u64, seq as u64, start as u64);
    let layers = config.num_layers as u64;
    let linear = layers * (2 * h * h + 2 * h * kv + 3 * h * f) * batch * seq;
    let attended: u64 = seq * start + seq * (seq + 1) / 2;
    let attention = layers * 2 * h * attended * batch;
    let head = config.vocab_size as u64 * h * heads as u64;
    2 * (linear + attention + head)
}

/// The output of a forward call.
pub(crate) fn output(
    logits: Vec<f32>,
    batch: &TokenBatch,
    config: &ModelConfig,
    metrics: ForwardPassMetrics,
    memory_usage: MemoryUsage,
) -> Result<InferenceOutput> {
    Ok(InferenceOutput {
        logits: Tensor::from_vec(logits, (batch.batch, batch.seq, config.vocab_size), &Device::Cpu)?,
        attention_weights: None,
        hidden_states: None,
        metrics,
        memory_usage,
    })
}

/// Gigabytes a second; 0 when no time was measured.
pub(crate) fn bandwidth(bytes: usize, time: Duration) -> f64 {
    let seconds = time.as_secs_f64();
    if seconds > 0.0 { bytes as f64 / seconds / 1e9 } else { 0.0 }
}
