//! The CPU backend: the contracts implemented on `forward/`.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bitnet_contracts::{
    BitNetInference, CacheOwner, CacheStorage, Device, ForwardPassMetrics, GenerationConfig, GenerationResult,
    InferenceOutput, InputValidator, KVCache, MemoryUsage, ModelConfig, QuantizationType, Result,
    StandardInputValidator, Tensor, ThreadSafeInference,
};

use crate::forward::{AttentionWeights, CpuCache, LoadOptions, Observed, Row, Run, Times, Transformer, Wanted};
use crate::generate::{self, GenerationContext, Logits, StepModel};
use crate::kernels::{Isa, Kernels, Limits, Threads};
use crate::model::{Checkpoint, ModelDescription, ModelSource, Tokenizer};
use crate::session::{self, EngineOptions, TokenBatch};

/// BitNet b1.58 on the CPU in integer arithmetic (semantics `w1.58a8`).
///
/// Weights are packed once and shared: [`ThreadSafeInference::thread_local_copy`] and [`Clone`] give another caller with its own
/// caches and buffers on the same weights. There is no lock around the arithmetic.
///
/// Logits are the same bits at every number of threads, on every instruction set, for every split of a prompt into calls and in
/// every batch.
pub struct CpuEngine {
    shared: Arc<Shared>,
    run: Run,
    /// The sequence of `generate`.
    session: CpuCache,
    session_len: usize,
    logits: Vec<f32>,
    /// The rows of the call at hand; kept so that a step allocates nothing.
    rows: Vec<Row>,
    peak: usize,
}

/// Bytes that a step of `generate` reads at least, each once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct StepBytes {
    /// Every layer's weights.
    pub weights: usize,
    /// The screen of the head.
    pub screen: usize,
    /// Keys and values of the positions that are attended to.
    pub keys_and_values: usize,
}

impl StepBytes {
    /// All of them.
    pub fn total(&self) -> usize {
        self.weights + self.screen + self.keys_and_values
    }
}

/// What all callers of one loaded model share.
struct Shared {
    model: Transformer,
    config: ModelConfig,
    validator: StandardInputValidator,
    tokenizer: Option<Tokenizer>,
    owner: CacheOwner,
    kernels: &'static Kernels,
    threads: Threads,
    options: EngineOptions,
}

impl Shared {
    /// An empty cache.
    fn cache(&self) -> CpuCache {
        CpuCache::new(&self.model.description, self.options.kv)
    }
}

impl CpuEngine {
    /// Loads a Hugging Face folder (packed or master weights, one file or shards) or a GGUF file.
    ///
    /// # Errors
    /// `ModelError` and `ConfigurationError` naming file, tensor or key; `MemoryError::OutOfMemory` before anything is allocated when
    /// the model does not fit; what [`EngineOptions`] asks for and is not there.
    pub fn load(path: &Path, options: &EngineOptions) -> Result<Self> {
        Self::open(&ModelSource::from_path(path), options)
    }

    /// The trained tiny model that is compiled in.
    ///
    /// # Errors
    /// What [`EngineOptions`] asks for and is not there.
    pub fn embedded(options: &EngineOptions) -> Result<Self> {
        Self::open(&ModelSource::Embedded, options)
    }

    /// Loads from any source.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn open(source: &ModelSource, options: &EngineOptions) -> Result<Self> {
        Self::from_checkpoint(&Checkpoint::open(source)?, options)
    }

    /// Packs the weights of an open checkpoint.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn from_checkpoint(checkpoint: &Checkpoint, options: &EngineOptions) -> Result<Self> {
        let fastest = Kernels::of(options.isa.map_or_else(Isa::from_environment, Ok)?)?;
        let kernels = fastest.with_packing(options.quantization.packing(fastest.packing()));
        let threads = Threads::new(options.threads)?;
        let quantization_type = options.quantization.kind();
        let config = ModelConfig { quantization_type, ..checkpoint.description().config() };
        let validator = StandardInputValidator::new(config.clone(), Device::Cpu);
        validator.validate_memory_requirements(checkpoint.tensor_bytes())?;
        let load = LoadOptions { in_memory: options.weights_in_memory, packed: options.packed };
        let model = Transformer::load(checkpoint, kernels, &threads, load)?;
        let owner = CacheOwner { backend: "cpu".to_string(), model: model.id };
        let tokenizer = checkpoint.tokenizer().cloned();
        Ok(Self::caller(Arc::new(Shared {
            model,
            config,
            validator,
            tokenizer,
            owner,
            kernels,
            threads,
            options: options.clone(),
        })))
    }

    fn caller(shared: Arc<Shared>) -> Self {
        let mut engine = Self {
            run: Run::new(&shared.model, shared.kernels, shared.threads.clone()),
            session: shared.cache(),
            session_len: 0,
            logits: Vec::new(),
            rows: Vec::new(),
            peak: 0,
            shared,
        };
        engine.note_peak(0);
        engine
    }

    /// The model's description.
    pub fn description(&self) -> &ModelDescription {
        &self.shared.model.description
    }

    /// The model's tokenizer, if it has one.
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.shared.tokenizer.as_ref()
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.run.kernels().isa()
    }

    /// The number of threads in use.
    pub fn threads(&self) -> usize {
        self.shared.threads.count()
    }

    /// Bytes of weights that a pass with all logits reads: every layer and the head, once.
    pub fn bytes_per_pass(&self) -> usize {
        self.shared.model.bytes_per_pass()
    }

    /// Bytes of weights that a step of `generate` reads at least: every layer and the screen of the head, once.
    pub fn bytes_per_step(&self) -> usize {
        let (weights, screen) = self.shared.model.bytes_per_step();
        weights + screen
    }

    /// What a step of `generate` reads when its token sees `positions` positions, itself included.
    pub fn step_bytes(&self, positions: usize) -> StepBytes {
        let (weights, screen) = self.shared.model.bytes_per_step();
        StepBytes { weights, screen, keys_and_values: positions * self.session.bytes_per_position() }
    }

    /// Ternary products of one token, attention's scores and the head not counted: one for every ternary weight.
    pub fn products_per_token(&self) -> usize {
        self.shared.model.ternary_weights()
    }

    /// What the machine allows this engine's instruction set and threads: see [`Limits::measure`].
    ///
    /// # Errors
    /// As [`Limits::measure`].
    pub fn limits(&self) -> Result<Limits> {
        Limits::measure(self.run.kernels(), &self.shared.threads)
    }

    /// Where this caller's time went since the last call of this function or of [`BitNetInference::forward`].
    pub fn take_times(&mut self) -> Times {
        self.run.take_times()
    }

    /// As [`BitNetInference::generate`], with a look at every token as it comes.
    ///
    /// # Errors
    /// As [`BitNetInference::generate`].
    pub fn generate_streaming(
        &mut self,
        prompt: &[u32],
        max_tokens: usize,
        config: &GenerationConfig,
        on_token: &mut dyn FnMut(u32),
    ) -> Result<GenerationResult> {
        let shared = self.shared.clone();
        let context = GenerationContext {
            config: &shared.config,
            validator: &shared.validator,
            tokenizer: shared.tokenizer.as_ref(),
            eos: &shared.model.description.eos_token_ids,
        };
        generate::generate(self, &context, prompt, max_tokens, config, on_token)
    }

    /// Appends `tokens` to the session of this caller and gives the logits of the last one: what `generate` does at every step,
    /// for those who write their own loop or measure it. [`BitNetInference::reset`] starts a new session.
    ///
    /// # Errors
    /// As [`BitNetInference::forward`].
    pub fn feed(&mut self, tokens: &[u32]) -> Result<&[f32]> {
        StepModel::feed(self, tokens)
    }

    /// As [`Self::feed`], but gives only the token of the largest logit (the lowest of equal ones), found without reading the whole
    /// head: a step of `generate` without sampling.
    ///
    /// # Errors
    /// As [`BitNetInference::forward`].
    pub fn feed_greedy(&mut self, tokens: &[u32]) -> Result<u32> {
        let logits = self.feed_for(tokens, 1, &[])?;
        let larger = |best: (u32, f32), next: (u32, f32)| if next.1 > best.1 { next } else { best };
        let none = (0, f32::NEG_INFINITY);
        Ok(match logits {
            Logits::All(logits) => (0..).zip(logits.iter().copied()).fold(none, larger).0,
            Logits::Largest(logits) => logits.iter().copied().fold(none, larger).0,
        })
    }

    /// Forgets the positions of this caller's session from `len` on; with fewer than that, nothing changes.
    pub fn rewind(&mut self, len: usize) {
        // The pages stay: what they hold is never read before it is written again.
        self.session_len = self.session_len.min(len);
    }

    /// Appends `tokens` to the session.
    fn append(&mut self, tokens: &[u32], wanted: Wanted<'_>) -> Result<()> {
        let shared = self.shared.clone();
        shared.validator.validate_token_sequence(tokens, shared.config.vocab_size)?;
        let start = self.session_len;
        let end = start + tokens.len();
        if end > shared.config.max_position_embeddings {
            return Err(bitnet_contracts::GenerationError::ContextExhausted {
                position: end,
                max_positions: shared.config.max_position_embeddings,
            }
            .into());
        }
        self.session.reserve(1, end)?;
        self.rows.clear();
        self.rows.extend((start..).zip(tokens).map(|(position, &token)| Row { sequence: 0, position, token }));
        self.run.forward(&shared.model, &self.rows, &mut self.session, wanted, &mut Observed::default())?;
        self.session_len = end;
        Ok(())
    }

    fn rows(batch: &TokenBatch) -> Vec<Row> {
        (0..batch.batch * batch.seq)
            .map(|i| Row { sequence: i / batch.seq, position: batch.start + i % batch.seq, token: batch.tokens[i] })
            .collect()
    }

    fn run_batch(&mut self, batch: &TokenBatch, cache: &mut CpuCache) -> Result<(Vec<f32>, Observed)> {
        cache.reserve(batch.batch, batch.start + batch.seq)?;
        let options = &self.shared.options;
        let mut observed = Observed {
            attention: options
                .output_attentions
                .then(|| AttentionWeights::new(&self.shared.model, batch.batch, batch.start, batch.seq)),
            hidden: options.output_hidden_states.then(Vec::new),
        };
        let mut logits = session::logits_buffer(batch.batch * batch.seq * self.shared.config.vocab_size)?;
        self.run.forward(&self.shared.model, &Self::rows(batch), cache, Wanted::Every(&mut logits), &mut observed)?;
        Ok((logits, observed))
    }

    /// Bytes by component, with `more_cache` bytes of a caller's cache and `temporary` of outputs.
    fn memory(&self, more_cache: usize, temporary: usize) -> MemoryUsage {
        let (activations, quantized) = self.run.memory_bytes();
        let mut usage = MemoryUsage {
            model_weights: self.shared.model.memory_bytes(),
            kv_cache: self.session.bytes() + more_cache,
            activations,
            temporary_buffers: quantized + self.logits.capacity() * 4 + temporary,
            ..MemoryUsage::default()
        };
        usage.current_usage = usage.total_footprint();
        usage.peak_usage = self.peak.max(usage.current_usage);
        usage
    }

    fn note_peak(&mut self, more: usize) -> MemoryUsage {
        let usage = self.memory(more, 0);
        self.peak = usage.peak_usage;
        usage
    }

    fn metrics(
        &self,
        times: Times,
        total: Duration,
        batch: &TokenBatch,
        cache_bytes: usize,
        peak: usize,
    ) -> ForwardPassMetrics {
        let config = &self.shared.config;
        ForwardPassMetrics {
            total_time: total,
            embedding_time: times.embedding,
            attention_time: times.attention + times.attention_scores,
            feedforward_time: times.feed_forward,
            // The final norm; a layer's norms are one pass with the quantisation behind them and timed there.
            normalization_time: times.normalization,
            logits_time: times.logits,
            quantization_time: times.quantization,
            // The scale is applied where the integer product leaves its registers: there is no pass of its own to measure.
            dequantization_time: Duration::ZERO,
            peak_memory_usage: peak,
            cache_memory_usage: cache_bytes,
            flops_estimate: session::operations(config, batch.batch, batch.seq, batch.start, batch.batch * batch.seq),
            memory_bandwidth_usage: session::bandwidth(self.shared.model.bytes_per_pass() + cache_bytes, total),
        }
    }

    fn tensors(&self, observed: Observed, batch: &TokenBatch, output: &mut InferenceOutput) -> Result<()> {
        let config = &self.shared.config;
        if let Some(hidden) = observed.hidden {
            output.hidden_states =
                Some(Tensor::from_vec(hidden, (batch.batch, batch.seq, config.hidden_size), &Device::Cpu)?);
        }
        if let Some(attention) = observed.attention {
            let shape = (batch.batch, config.num_attention_heads, batch.seq, batch.start + batch.seq);
            let layers = attention.layers.into_iter().map(|layer| Tensor::from_vec(layer, shape, &Device::Cpu));
            output.attention_weights = Some(layers.collect::<std::result::Result<_, _>>()?);
        }
        Ok(())
    }
}

impl Clone for CpuEngine {
    /// Another caller on the same weights, with an empty session.
    fn clone(&self) -> Self {
        Self::caller(self.shared.clone())
    }
}

impl BitNetInference for CpuEngine {
    fn forward(&mut self, input_ids: &Tensor, kv_cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        let start = Instant::now();
        let shared = self.shared.clone();
        let batch = TokenBatch::read(input_ids, kv_cache.as_deref(), &shared.validator, &shared.config)?;
        self.run.take_times();
        let (logits, observed, cache_bytes) = match kv_cache {
            None => {
                let mut cache = shared.cache();
                let (logits, observed) = self.run_batch(&batch, &mut cache)?;
                (logits, observed, cache.bytes())
            }
            Some(cache) => {
                let held = cache.len();
                let storage = cache.storage(&shared.owner, || Ok(shared.cache()))?;
                if held > 0 && storage.batch() != batch.batch {
                    return Err(session::batch_mismatch(storage.batch(), batch.batch));
                }
                let result = self.run_batch(&batch, storage);
                if result.is_err() {
                    // Pages taken for the failed call go back: the cache is as it was.
                    storage.truncate(held);
                }
                let (logits, observed) = result?;
                let bytes = storage.bytes();
                cache.advance(batch.seq)?;
                (logits, observed, bytes)
            }
        };
        let times = self.run.take_times();
        let usage = self.memory(cache_bytes, logits.capacity() * 4);
        self.peak = usage.peak_usage;
        let metrics = self.metrics(times, start.elapsed(), &batch, cache_bytes, usage.peak_usage);
        let mut output = session::output(logits, &batch, &shared.config, metrics, usage)?;
        self.tensors(observed, &batch, &mut output)?;
        Ok(output)
    }

    fn generate(
        &mut self,
        prompt_tokens: &[u32],
        max_tokens: usize,
        config: &GenerationConfig,
    ) -> Result<GenerationResult> {
        self.generate_streaming(prompt_tokens, max_tokens, config, &mut |_| ())
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

    fn supports_quantization(&self, qtype: QuantizationType) -> bool {
        // Each has kernels of its own: see `EngineOptions::quantization`. Types that may come are not among them.
        matches!(qtype, QuantizationType::I2S | QuantizationType::TL1 | QuantizationType::TL2)
    }

    fn memory_usage(&self) -> MemoryUsage {
        self.memory(0, 0)
    }

    fn reset(&mut self) -> Result<()> {
        self.session = self.shared.cache();
        self.session_len = 0;
        Ok(())
    }
}

impl StepModel for CpuEngine {
    fn restart(&mut self) -> Result<()> {
        // The pages stay: what they hold is never read before it is written again.
        self.session_len = 0;
        Ok(())
    }

    fn feed(&mut self, tokens: &[u32]) -> Result<&[f32]> {
        let mut logits = std::mem::take(&mut self.logits);
        logits.resize(self.shared.config.vocab_size, 0.0);
        let outcome = self.append(tokens, Wanted::Last(&mut logits));
        self.logits = logits;
        outcome?;
        self.note_peak(0);
        Ok(&self.logits)
    }

    fn feed_for(&mut self, tokens: &[u32], top: usize, also: &[u32]) -> Result<Logits<'_>> {
        let mut enough = false;
        self.append(tokens, Wanted::Largest { top, also, enough: &mut enough })?;
        if !enough {
            self.logits.resize(self.shared.config.vocab_size, 0.0);
            self.run.last_logits(&self.shared.model, &mut self.logits)?;
        }
        self.note_peak(0);
        Ok(if enough { Logits::Largest(self.run.largest()) } else { Logits::All(&self.logits) })
    }

    fn memory(&self) -> MemoryUsage {
        self.memory_usage()
    }
}

impl ThreadSafeInference for CpuEngine {
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
