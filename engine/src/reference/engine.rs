//! What is the same for every dense backend: the contracts, caches, sessions, metrics. The arithmetic is a [`DenseModel`].

use std::any::Any;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bitnet_contracts::{
    BitNetInference, CacheOwner, CacheStorage, ConfigurationError, Device, ForwardPassError, ForwardPassMetrics,
    GenerationConfig, GenerationError, GenerationResult, InferenceError, InferenceOutput, InputValidator, KVCache,
    MemoryUsage, ModelConfig, QuantizationType, Result, StandardInputValidator, Tensor, ThreadSafeInference,
};

use super::weights::dense_elements;
use crate::generate::{self, GenerationContext, StepModel};
use crate::model::{Checkpoint, ModelDescription, ModelSource, Tokenizer};
use crate::session::{self, EngineOptions, TokenBatch};

/// The most threads that can be asked for.
const MAX_THREADS: usize = 1024;

/// The arithmetic of a dense backend. A forward pass changes nothing: it takes the keys and values of the past and returns them
/// with the new positions appended, so a pass that fails leaves every cache as it was.
pub trait DenseModel: Sized + Send + Sync + 'static {
    /// The backend's name.
    const NAME: &'static str;
    /// Bytes of a number, weight and activation alike.
    const NUMBER_BYTES: usize;
    /// Keys and values of one layer, of which a clone shares the memory.
    type Layer: Clone + Send + Sync + 'static;

    /// Reads the weights. `threads` is what the caller asked for, at least 1.
    ///
    /// # Errors
    /// As [`super::weights::Weights::load`].
    fn load(checkpoint: &Checkpoint, threads: Option<usize>) -> Result<Self>;

    /// Numbers held as weights.
    fn weight_elements(&self) -> usize;

    /// Numbers held as keys and values of a layer.
    fn layer_elements(layer: &Self::Layer) -> usize;

    /// Runs new tokens. `past` has one entry a layer with at least `input.start` positions, or is empty when `input.start` is 0.
    ///
    /// # Errors
    /// `ForwardPassError::NumericalInstability` naming the place where NaN or infinity first shows.
    fn forward(&self, input: &Input<'_>, past: &[Self::Layer], clock: &mut Clock) -> Result<Pass<Self::Layer>>;
}

/// What a forward pass is asked.
pub struct Input<'a> {
    /// Token ids `[batch, seq]`, all within the vocabulary.
    pub tokens: &'a [u32],
    /// Sequences.
    pub batch: usize,
    /// New tokens of each sequence.
    pub seq: usize,
    /// Position of the first new token.
    pub start: usize,
    /// Logits of every new position, or of the last one only.
    pub every_position: bool,
    /// Whether attention probabilities are wanted.
    pub attention: bool,
    /// Whether final hidden states are wanted.
    pub hidden: bool,
}

/// What a forward pass gives.
pub struct Pass<L> {
    /// `[batch, seq or 1, vocabulary]`, all finite.
    pub logits: Vec<f32>,
    /// One `[batch, heads, seq, start + seq]` tensor a layer.
    pub attention: Option<Vec<Tensor>>,
    /// `[batch, seq, hidden]`.
    pub hidden: Option<Tensor>,
    /// Keys and values of positions up to `start + seq`.
    pub layers: Vec<L>,
    /// Most attention scores held at once.
    pub scores: usize,
}

/// Adds up where the time goes.
pub struct Clock {
    last: Instant,
    /// Embedding rows and rotary angles.
    pub embedding: Duration,
    /// Attention with its projections.
    pub attention: Duration,
    /// Feed-forward with its projections.
    pub feed_forward: Duration,
    /// Norms.
    pub normalization: Duration,
    /// Output head.
    pub logits: Duration,
}

impl Clock {
    fn start() -> Self {
        let zero = Duration::ZERO;
        Self {
            last: Instant::now(),
            embedding: zero,
            attention: zero,
            feed_forward: zero,
            normalization: zero,
            logits: zero,
        }
    }

    /// Adds the time since the last lap to one of the counters.
    pub fn lap(&mut self, counter: impl Fn(&mut Self) -> &mut Duration) {
        let now = Instant::now();
        let since = now - self.last;
        *counter(self) += since;
        self.last = now;
    }
}

/// NaN or infinity met at a place.
pub fn unstable(what: &str, layer: Option<usize>) -> InferenceError {
    let place = layer.map_or(String::new(), |n| format!(" of layer {n}"));
    ForwardPassError::NumericalInstability { details: format!("NaN or infinity in {what}{place}") }.into()
}

/// A dense backend on the arithmetic of `M`: [`CandleFp32`](super::CandleFp32) or [`NdarrayFp32`](super::NdarrayFp32).
///
/// Weights are dequantised once and shared: [`Clone`] and [`ThreadSafeInference::thread_local_copy`] give another caller with an
/// empty session on the same weights. Of [`EngineOptions`], `isa` means nothing here.
///
/// The same call gives the same bits every time. How a prompt is split into calls, and which batch a sequence is in, shows in the
/// last bits at most.
pub struct DenseEngine<M: DenseModel> {
    shared: Arc<Shared<M>>,
    /// The sequence of `generate`.
    session: Vec<M::Layer>,
    session_len: usize,
    logits: Vec<f32>,
    peak: usize,
}

struct Shared<M> {
    model: M,
    description: ModelDescription,
    config: ModelConfig,
    validator: StandardInputValidator,
    tokenizer: Option<Tokenizer>,
    owner: CacheOwner,
    options: EngineOptions,
}

/// What a [`KVCache`] holds for a dense backend.
struct DenseCache<M: DenseModel> {
    layers: Vec<M::Layer>,
    batch: usize,
}

impl<M: DenseModel> DenseCache<M> {
    fn empty() -> Result<Self> {
        Ok(Self { layers: Vec::new(), batch: 0 })
    }
}

impl<M: DenseModel> CacheStorage for DenseCache<M> {
    /// Positions from `len` on are not read any more; their memory goes with the next forward pass, or now when none is left.
    fn truncate(&mut self, len: usize) {
        if len == 0 {
            self.layers.clear();
        }
    }

    fn memory_bytes(&self) -> usize {
        layer_bytes::<M>(&self.layers)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

fn layer_bytes<M: DenseModel>(layers: &[M::Layer]) -> usize {
    layers.iter().map(|layer| M::layer_elements(layer) * M::NUMBER_BYTES).sum()
}

impl<M: DenseModel> DenseEngine<M> {
    /// Loads a Hugging Face folder: packed or master weights, one file or shards.
    ///
    /// # Errors
    /// `ModelError` and `ConfigurationError` naming file, tensor or key; `MemoryError::OutOfMemory` before anything is made dense
    /// when the dense model does not fit.
    pub fn load(folder: &Path, options: &EngineOptions) -> Result<Self> {
        Self::open(&ModelSource::from_path(folder), options)
    }

    /// The trained tiny model that is compiled in.
    ///
    /// # Errors
    /// `ConfigurationError` for an impossible number of threads.
    pub fn embedded(options: &EngineOptions) -> Result<Self> {
        Self::open(&ModelSource::Embedded, options)
    }

    /// Loads from either source.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn open(source: &ModelSource, options: &EngineOptions) -> Result<Self> {
        Self::from_checkpoint(&Checkpoint::open(source)?, options)
    }

    /// Makes the weights of an open checkpoint dense.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn from_checkpoint(checkpoint: &Checkpoint, options: &EngineOptions) -> Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        if let Some(threads) = options.threads.filter(|n| !(1..=MAX_THREADS).contains(n)) {
            return Err(ConfigurationError::InvalidParameter {
                parameter: "threads".to_string(),
                value: threads.to_string(),
                valid_range: format!("1 to {MAX_THREADS}"),
            }
            .into());
        }
        let description = checkpoint.description().clone();
        let config = description.config();
        let validator = StandardInputValidator::new(config.clone(), Device::Cpu);
        validator.validate_memory_requirements(dense_elements(checkpoint).saturating_mul(M::NUMBER_BYTES))?;
        let shared = Shared {
            model: M::load(checkpoint, options.threads)?,
            description,
            config,
            validator,
            tokenizer: checkpoint.tokenizer().cloned(),
            owner: CacheOwner { backend: M::NAME.to_string(), model: NEXT.fetch_add(1, Ordering::Relaxed) },
            options: options.clone(),
        };
        Ok(Self::caller(Arc::new(shared)))
    }

    fn caller(shared: Arc<Shared<M>>) -> Self {
        let mut engine = Self { shared, session: Vec::new(), session_len: 0, logits: Vec::new(), peak: 0 };
        engine.peak = engine.memory(0, 0, 0).peak_usage;
        engine
    }

    /// The model's description.
    pub fn description(&self) -> &ModelDescription {
        &self.shared.description
    }

    /// The model's tokenizer, if it has one.
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.shared.tokenizer.as_ref()
    }

    fn weight_bytes(&self) -> usize {
        self.shared.model.weight_elements() * M::NUMBER_BYTES
    }

    /// Bytes by component: `more_cache` of a caller's cache, `activations` and `temporary` of a pass.
    fn memory(&self, more_cache: usize, activations: usize, temporary: usize) -> MemoryUsage {
        let mut usage = MemoryUsage {
            model_weights: self.weight_bytes(),
            kv_cache: layer_bytes::<M>(&self.session) + more_cache,
            activations,
            temporary_buffers: self.logits.capacity() * 4 + temporary,
            ..MemoryUsage::default()
        };
        usage.current_usage = usage.total_footprint();
        usage.peak_usage = self.peak.max(usage.current_usage);
        usage
    }

    /// Bytes of a pass at its widest, counted from the shapes: the residual stream and its norm, with either the heads or the
    /// gated values, and the attention scores before and after softmax.
    fn activation_bytes(&self, batch: &TokenBatch, scores: usize) -> usize {
        let d = &self.shared.description;
        let widest = (2 * d.hidden_size + 2 * d.kv_size()).max(4 * d.intermediate_size);
        (batch.batch * batch.seq * (2 * d.hidden_size + widest) + 2 * scores) * M::NUMBER_BYTES
    }

    /// Everything but committing the new positions: output, and keys and values with them.
    fn compute(
        &mut self,
        batch: &TokenBatch,
        past: &[M::Layer],
        begin: Instant,
    ) -> Result<(InferenceOutput, Vec<M::Layer>)> {
        let shared = self.shared.clone();
        let input = Input {
            tokens: &batch.tokens,
            batch: batch.batch,
            seq: batch.seq,
            start: batch.start,
            every_position: true,
            attention: shared.options.output_attentions,
            hidden: shared.options.output_hidden_states,
        };
        let mut clock = Clock::start();
        let pass = shared.model.forward(&input, past, &mut clock)?;
        let cache_bytes = layer_bytes::<M>(&pass.layers);
        let temporary = pass.logits.capacity() * 4 + layer_bytes::<M>(past);
        let usage = self.memory(cache_bytes, self.activation_bytes(batch, pass.scores), temporary);
        self.peak = usage.peak_usage;
        let total = begin.elapsed();
        let config = &shared.config;
        let metrics = ForwardPassMetrics {
            total_time: total,
            embedding_time: clock.embedding,
            attention_time: clock.attention,
            feedforward_time: clock.feed_forward,
            normalization_time: clock.normalization,
            logits_time: clock.logits,
            // Activations are not quantised, and weights were dequantised when they were loaded.
            quantization_time: Duration::ZERO,
            dequantization_time: Duration::ZERO,
            peak_memory_usage: usage.peak_usage,
            cache_memory_usage: cache_bytes,
            flops_estimate: session::operations(config, batch.batch, batch.seq, batch.start, batch.batch * batch.seq),
            memory_bandwidth_usage: session::bandwidth(self.weight_bytes() + cache_bytes, total),
        };
        let mut output = session::output(pass.logits, batch, config, metrics, usage)?;
        output.attention_weights = pass.attention;
        output.hidden_states = pass.hidden;
        Ok((output, pass.layers))
    }
}

impl<M: DenseModel> Clone for DenseEngine<M> {
    /// Another caller on the same weights, with an empty session.
    fn clone(&self) -> Self {
        Self::caller(self.shared.clone())
    }
}

impl<M: DenseModel> BitNetInference for DenseEngine<M> {
    fn forward(&mut self, input_ids: &Tensor, mut kv_cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        let begin = Instant::now();
        let shared = self.shared.clone();
        let batch = TokenBatch::read(input_ids, kv_cache.as_deref(), &shared.validator, &shared.config)?;
        let past = match kv_cache.as_deref_mut().filter(|_| batch.start > 0) {
            Some(cache) => {
                let storage = cache.storage::<DenseCache<M>>(&shared.owner, DenseCache::empty)?;
                if storage.batch != batch.batch {
                    return Err(session::batch_mismatch(storage.batch, batch.batch));
                }
                storage.layers.clone()
            }
            None => Vec::new(),
        };
        let (output, layers) = self.compute(&batch, &past, begin)?;
        // Nothing can fail from here on: the room was checked, and the storage is the one above or an empty cache's.
        if let Some(cache) = kv_cache {
            *cache.storage::<DenseCache<M>>(&shared.owner, DenseCache::empty)? =
                DenseCache { layers, batch: batch.batch };
            cache.advance(batch.seq)?;
        }
        Ok(output)
    }

    fn generate(
        &mut self,
        prompt_tokens: &[u32],
        max_tokens: usize,
        config: &GenerationConfig,
    ) -> Result<GenerationResult> {
        let shared = self.shared.clone();
        let context = GenerationContext {
            config: &shared.config,
            validator: &shared.validator,
            tokenizer: shared.tokenizer.as_ref(),
            eos: &shared.description.eos_token_ids,
        };
        generate::generate(self, &context, prompt_tokens, max_tokens, config, &mut |_| ())
    }

    fn generate_deterministic(
        &mut self,
        prompt_tokens: &[u32],
        max_tokens: usize,
        seed: u64,
    ) -> Result<GenerationResult> {
        let config = GenerationConfig { seed: Some(seed), ..GenerationConfig::default() };
        self.generate(prompt_tokens, max_tokens, &config)
    }

    fn config(&self) -> &ModelConfig {
        &self.shared.config
    }

    fn device(&self) -> &Device {
        &Device::Cpu
    }

    /// True for `I2S` alone: its weights are what these backends take, and make dense as they load them.
    fn supports_quantization(&self, qtype: QuantizationType) -> bool {
        matches!(qtype, QuantizationType::I2S)
    }

    fn memory_usage(&self) -> MemoryUsage {
        self.memory(0, 0, 0)
    }

    fn reset(&mut self) -> Result<()> {
        self.restart()
    }
}

impl<M: DenseModel> StepModel for DenseEngine<M> {
    fn restart(&mut self) -> Result<()> {
        self.session.clear();
        self.session_len = 0;
        Ok(())
    }

    fn feed(&mut self, tokens: &[u32]) -> Result<&[f32]> {
        let shared = self.shared.clone();
        shared.validator.validate_token_sequence(tokens, shared.config.vocab_size)?;
        let (start, max_positions) = (self.session_len, shared.config.max_position_embeddings);
        let end = start + tokens.len();
        if end > max_positions {
            return Err(GenerationError::ContextExhausted { position: end, max_positions }.into());
        }
        let batch = TokenBatch { batch: 1, seq: tokens.len(), tokens: tokens.to_vec(), start };
        let input =
            Input { tokens, batch: 1, seq: batch.seq, start, every_position: false, attention: false, hidden: false };
        let pass = shared.model.forward(&input, &self.session, &mut Clock::start())?;
        // While the pass ran, the shorter keys and values of the session were held beside the new ones.
        let new = layer_bytes::<M>(&pass.layers);
        self.peak = self.memory(new, self.activation_bytes(&batch, pass.scores), 0).peak_usage;
        self.session = pass.layers;
        self.session_len = end;
        self.logits = pass.logits;
        Ok(&self.logits)
    }

    fn memory(&self) -> MemoryUsage {
        self.memory_usage()
    }
}

impl<M: DenseModel> ThreadSafeInference for DenseEngine<M> {
    fn generate_concurrent(
        &self,
        prompt_tokens: &[u32],
        max_tokens: usize,
        config: &GenerationConfig,
    ) -> Result<GenerationResult> {
        self.clone().generate(prompt_tokens, max_tokens, config)
    }

    fn thread_local_copy(&self) -> Result<Box<dyn BitNetInference>> {
        Ok(Box::new(self.clone()))
    }

    fn supports_concurrent_generation(&self) -> bool {
        true
    }
}
