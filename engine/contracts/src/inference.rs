//! The trait that every backend implements.

use candle_core::{Device, Tensor};

use crate::{
    GenerationConfig, GenerationResult, InferenceOutput, KVCache, MemoryUsage, ModelConfig, QuantizationType, Result,
};

/// Core inference trait for all BitNet transformer implementations.
///
/// The trait is object safe: a caller holds a `Box<dyn BitNetInference>` and need not know which backend it is.
pub trait BitNetInference: Send + Sync {
    /// Runs the transformer over new tokens, with an optional KV cache.
    ///
    /// # Arguments
    /// * `input_ids` - ids of the NEW tokens, `[batch_size, sequence_length]`, of type u32 or i64.
    /// * `kv_cache` - keys and values of the positions before these. Positions start at `kv_cache.len()`. Without a
    ///   cache they start at 0 and nothing is remembered between calls.
    ///
    /// # Returns
    /// Logits for every input position, with metrics. How a prompt is split into calls does not show: any split gives
    /// the same logits as one call.
    ///
    /// # Errors
    /// * `ForwardPassError::InvalidInput` for ids of another element type, `ForwardPassError::ShapeMismatch` for a
    ///   tensor that is not of rank 2, `TokenizationError::InvalidToken` for an id outside the vocabulary;
    /// * `ForwardPassError::KVCacheError` when the new positions do not fit, or when the cache was filled by another
    ///   backend or model.
    ///
    /// After any error the cache is exactly as it was before the call.
    ///
    /// # Performance contract
    /// * CPU: <10ms latency per token (single batch)
    /// * GPU: <2ms latency per token (single batch)
    /// * Memory: <8GB peak usage for a 2B parameter model
    fn forward(&mut self, input_ids: &Tensor, kv_cache: Option<&mut KVCache>) -> Result<InferenceOutput>;

    /// Generates tokens autoregressively with sampling.
    ///
    /// # Arguments
    /// * `prompt_tokens` - the prompt as token ids.
    /// * `max_tokens` - the most tokens to generate; the effective limit is `min(max_tokens, config.max_new_tokens)`.
    /// * `config` - sampling, penalties and stop rules.
    ///
    /// Each call starts from a clean state. The whole configuration is validated before any token is computed.
    ///
    /// # Errors
    /// The configuration's own errors (`max_tokens == 0` is the same error as `max_new_tokens == 0`), the prompt's
    /// (`TokenizationError::EmptySequence`, `InvalidToken`), and whatever the forward pass reports.
    ///
    /// # Performance contract
    /// * CPU: 5-15 tok/sec for a 2B model
    /// * GPU: 15-45 tok/sec for a 2B model
    /// * Accuracy: >99% correlation with the FP32 reference
    fn generate(
        &mut self,
        prompt_tokens: &[u32],
        max_tokens: usize,
        config: &GenerationConfig,
    ) -> Result<GenerationResult>;

    /// Generates with [`GenerationConfig::default`] and a fixed seed.
    ///
    /// # Contract
    /// * The same seed gives the same result: call after call, with or without [`reset`](Self::reset), at any thread
    ///   count, alone or beside other callers.
    /// * Determinism comes from fixed orders of summation, not from a slower mode.
    ///
    /// # Errors
    /// As [`generate`](Self::generate).
    fn generate_deterministic(
        &mut self,
        prompt_tokens: &[u32],
        max_tokens: usize,
        seed: u64,
    ) -> Result<GenerationResult>;

    /// The model's configuration.
    fn config(&self) -> &ModelConfig;

    /// The device on which this engine computes.
    fn device(&self) -> &Device;

    /// Whether the engine has a kernel for this quantization.
    fn supports_quantization(&self, qtype: QuantizationType) -> bool;

    /// Memory held by this engine, in bytes.
    fn memory_usage(&self) -> MemoryUsage;

    /// Forgets all internal state: caches and positions. Weights stay loaded.
    ///
    /// # Errors
    /// Whatever the backend meets while it clears its device's memory; a CPU backend has no reason to fail.
    fn reset(&mut self) -> Result<()>;
}
