//! The naive engine behind the contracts.

use super::cache::{NaiveCache, Sequence};
use super::deviation::{Call, Deviation};
use super::forward::{Clock, Pass, Rows};
use super::weights::Weights;
use crate::backend::{Capabilities, CreateOptions};
use crate::model::ModelFixture;
use bitnet_contracts::{
    BitNetInference, CacheOwner, ConfigurationError, DType, Device, ForwardPassError, ForwardPassMetrics,
    GenerationConfig, GenerationResult, InferenceOutput, InputValidator, KVCache, MemoryUsage, ModelConfig, ModelError,
    QuantizationType, Result, StandardInputValidator, Tensor, ThreadSafeInference, TokenizationError,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// What all callers of one model share.
pub struct Shared {
    /// The model.
    pub weights: Weights,
    /// Its tokenizer.
    pub tokenizer: Option<tokenizers::Tokenizer>,
    /// Who answers where engines differ.
    pub deviation: Arc<dyn Deviation>,
    /// What it declares, the function that it computes among it.
    pub declared: Capabilities,
    /// How it was built.
    pub options: CreateOptions,
    /// Whose caches these are.
    pub owner: CacheOwner,
}

/// One caller's engine.
pub struct Naive {
    /// What it shares with its copies.
    pub shared: Arc<Shared>,
    /// What `config()` says.
    pub config: ModelConfig,
    /// What `device()` says.
    pub device: Device,
    /// Calls served.
    pub serial: u64,
    /// Most bytes held at once.
    pub peak: usize,
    /// The prompt of the last generation, so that the same one again costs nothing.
    pub last_prompt: Option<Evaluated>,
}

/// A sequence and the logits behind its last token.
#[derive(Clone)]
pub struct Evaluated {
    /// The tokens.
    pub tokens: Vec<u32>,
    /// Their keys and values.
    pub sequence: Sequence,
    /// The logits, one a token of the vocabulary.
    pub logits: Vec<f32>,
}

impl Naive {
    /// Builds an engine on a model folder.
    ///
    /// # Errors
    /// `ModelError` and `ConfigurationError` for a folder that is no sound model.
    pub fn load(
        model: &ModelFixture,
        declared: &Capabilities,
        options: &CreateOptions,
        deviation: Arc<dyn Deviation>,
    ) -> Result<Self> {
        Self::read(model, declared, options, deviation.clone()).map_err(|e| deviation.load_error(model.dir(), e))
    }

    fn read(
        model: &ModelFixture,
        declared: &Capabilities,
        options: &CreateOptions,
        deviation: Arc<dyn Deviation>,
    ) -> Result<Self> {
        static NEXT_MODEL: AtomicU64 = AtomicU64::new(1);
        let path = || model.dir().display().to_string();
        let options = &deviation.options(options, declared)?;
        if options.threads == Some(0) {
            let (parameter, valid_range) = ("threads".to_string(), "1 or more".to_string());
            return Err(ConfigurationError::InvalidParameter { parameter, value: "0".to_string(), valid_range }.into());
        }
        let mut weights = deviation.load(model)?;
        if let Some(place) = weights.not_finite().filter(|_| deviation.checks_weights()) {
            let reason = format!("{}: NaN or infinity in {place}", path());
            return Err(ModelError::ValidationFailed { reason }.into());
        }
        deviation.weights(&mut weights);
        let mut config = model_config(&weights, model.name());
        if deviation.checks_config() {
            config.validate()?;
        }
        deviation.config(&mut config);
        let tokenizer = match weights.facts.has_tokenizer && declared.tokenizer {
            true => Some(tokenizers::Tokenizer::from_file(model.dir().join("tokenizer.json")).map_err(|e| {
                ModelError::LoadingFailed { path: format!("{}/tokenizer.json", path()), reason: e.to_string() }
            })?),
            false => None,
        };
        let owner = CacheOwner { backend: "naive".to_string(), model: NEXT_MODEL.fetch_add(1, Ordering::Relaxed) };
        let owner = deviation.owner(owner, &weights);
        let (device, peak) = (deviation.device(), weights.bytes());
        let shared = Arc::new(Shared {
            weights,
            tokenizer,
            deviation,
            declared: declared.clone(),
            options: options.clone(),
            owner,
        });
        Ok(Self { shared, config, device, serial: 0, peak, last_prompt: None })
    }

    /// Another caller on the same weights.
    pub fn copy(&self) -> Self {
        Self {
            shared: self.shared.clone(),
            config: self.config.clone(),
            device: self.device.clone(),
            serial: 0,
            peak: self.shared.weights.bytes(),
            last_prompt: None,
        }
    }

    pub(super) fn validator(&self) -> StandardInputValidator {
        StandardInputValidator::new(self.config.clone(), Device::Cpu)
    }

    /// The rows of an input tensor, every id checked.
    ///
    /// # Errors
    /// What `forward` says of an input that is none.
    pub fn rows(&self, ids: &Tensor) -> Result<Vec<Vec<u32>>> {
        let validator = self.validator();
        validator.validate_input_tensor(ids, &[0, 0])?;
        if ids.elem_count() == 0 {
            return Err(TokenizationError::EmptySequence.into());
        }
        let rows: Vec<Vec<i64>> = match ids.dtype() {
            DType::U32 | DType::I64 => ids.to_dtype(DType::I64)?.to_vec2()?,
            other => {
                let reason = format!("token ids are {other:?}, expected u32 or i64");
                return Err(ForwardPassError::InvalidInput { reason }.into());
            }
        };
        // An id that is no u32 is out of every vocabulary; the largest u32 stands for it.
        let narrow = |row: Vec<i64>| row.into_iter().map(|id| u32::try_from(id).unwrap_or(u32::MAX)).collect();
        let rows: Vec<Vec<u32>> = rows.into_iter().map(narrow).collect();
        for row in &rows {
            validator.validate_token_sequence(row, self.config.vocab_size)?;
        }
        Ok(rows)
    }

    /// `forward` as the contracts ask for it, with the deviation's answers at the inner points.
    ///
    /// # Errors
    /// As `BitNetInference::forward`.
    pub fn honest_forward(&mut self, ids: &Tensor, mut cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        let begin = Instant::now();
        let shared = self.shared.clone();
        let rows = self.rows(ids)?;
        let (batch, seq) = (rows.len(), rows[0].len());
        if batch > 1 && !shared.deviation.takes_batches(&shared.declared) {
            let reason = format!("one sequence at a time, and {batch} were given");
            return Err(ForwardPassError::InvalidInput { reason }.into());
        }
        let start = cache.as_ref().map_or(0, |c| c.len());
        if let Some(cache) = cache.as_deref() {
            cache.check_room(seq)?;
        }
        if start + seq > self.config.max_position_embeddings {
            let reason = format!("{start} + {seq} positions of {}", self.config.max_position_embeddings);
            return Err(ForwardPassError::KVCacheError { operation: "append".to_string(), reason }.into());
        }
        let layers = shared.weights.layers.len();
        let fresh = || NaiveCache { sequences: vec![Sequence::new(layers); batch], ..NaiveCache::default() };
        let cached = cache.is_some();
        let capacity = cache.as_ref().map_or(seq, |c| c.capacity()).min(self.config.max_position_embeddings);
        let mut local = fresh();
        let held = match cache.as_deref_mut() {
            None => &mut local,
            Some(cache) => {
                let held = cache.storage(&shared.owner, || Ok(fresh()))?;
                if start == 0 {
                    *held = fresh();
                }
                if held.sequences.len() != batch {
                    let reason = format!("the cache holds {} sequences, the input {batch}", held.sequences.len());
                    return Err(ForwardPassError::KVCacheError { operation: "append".to_string(), reason }.into());
                }
                held
            }
        };
        let call = Call {
            batch,
            seq,
            start,
            cached,
            generating: false,
            serial: self.serial,
            tokens: rows.concat(),
            options: shared.options.clone(),
        };
        self.serial += 1;
        let clock = Clock::default();
        let pass = Pass {
            weights: &shared.weights,
            deviation: &*shared.deviation,
            semantics: shared.declared.semantics,
            call: &call,
            clock: &clock,
        };
        let width = shared.weights.facts.kv_heads * shared.weights.facts.head_dim;
        for sequence in &mut held.sequences {
            shared.deviation.make_room(sequence, width, seq, capacity);
        }
        let mut made: Vec<Rows> = Vec::with_capacity(batch);
        for (index, (sequence, tokens)) in held.sequences.iter_mut().zip(&rows).enumerate() {
            match pass.run(sequence, index, tokens, shared.options.output_attentions) {
                Ok(rows) => made.push(rows),
                Err(error) => {
                    held.sequences.iter_mut().for_each(|s| s.truncate(start));
                    return Err(error);
                }
            }
        }
        let cache_bytes: usize = held.sequences.iter().map(Sequence::bytes).sum();
        if let Some(cache) = cache {
            cache.advance(seq)?;
        }
        self.output(&call, made, cache_bytes, begin, &clock)
    }

    fn output(
        &mut self,
        call: &Call,
        made: Vec<Rows>,
        cache_bytes: usize,
        begin: Instant,
        clock: &Clock,
    ) -> Result<InferenceOutput> {
        let shared = self.shared.clone();
        let (batch, seq, facts) = (call.batch, call.seq, &shared.weights.facts);
        let logits: Vec<f32> = made.iter().flat_map(|r| r.logits.iter().copied()).collect();
        let activations = logits.len() * size_of::<f32>();
        let logits = Tensor::from_vec(logits, (batch, seq, logits_width(&made, seq)), &Device::Cpu)?;
        let hidden: Vec<f32> = made.iter().flat_map(|r| r.hidden.iter().copied()).collect();
        let hidden_states = match shared.options.output_hidden_states {
            true => Some(Tensor::from_vec(hidden, (batch, seq, facts.hidden_size), &Device::Cpu)?),
            false => None,
        };
        let attention = |layer: usize| {
            let all: Vec<f32> = made.iter().flat_map(|r| r.attention[layer].iter().copied()).collect();
            Tensor::from_vec(all, (batch, facts.heads, seq, call.start + seq), &Device::Cpu)
        };
        let attention_weights = match shared.options.output_attentions {
            true => Some((0..facts.layers).map(attention).collect::<candle_core::Result<Vec<_>>>()?),
            false => None,
        };
        let memory_usage = self.memory_with(cache_bytes, activations);
        let total_time = begin.elapsed();
        let mut metrics = ForwardPassMetrics {
            total_time,
            attention_time: clock.attention.get(),
            feedforward_time: clock.feed_forward.get(),
            logits_time: clock.logits.get(),
            peak_memory_usage: memory_usage.peak_usage,
            cache_memory_usage: cache_bytes,
            flops_estimate: 2 * weights_met(&shared.weights) * (batch * seq) as u64,
            memory_bandwidth_usage: shared.weights.bytes() as f64 / total_time.as_secs_f64().max(1e-9) / 1e9,
            ..ForwardPassMetrics::default()
        };
        shared.deviation.metrics(&mut metrics, call);
        Ok(InferenceOutput { logits, attention_weights, hidden_states, metrics, memory_usage })
    }

    /// Tokens of a generation: the logits after the last one.
    pub(super) fn feed(&mut self, sequence: &mut Sequence, tokens: &[u32]) -> Result<Vec<f32>> {
        let shared = self.shared.clone();
        let call = Call {
            batch: 1,
            seq: tokens.len(),
            start: sequence.len,
            cached: true,
            generating: true,
            serial: self.serial,
            tokens: tokens.to_vec(),
            options: shared.options.clone(),
        };
        let clock = Clock::default();
        let pass = Pass {
            weights: &shared.weights,
            deviation: &*shared.deviation,
            semantics: shared.declared.semantics,
            call: &call,
            clock: &clock,
        };
        let rows = pass.run(sequence, 0, tokens, false)?;
        self.peak = self.peak.max(shared.weights.bytes() + sequence.bytes() + 4 * rows.logits.len());
        let width = logits_width(std::slice::from_ref(&rows), tokens.len());
        Ok(rows.logits[rows.logits.len() - width..].to_vec())
    }

    /// Memory figures with a cache and activations beside the weights.
    pub fn memory_with(&mut self, kv_cache: usize, activations: usize) -> MemoryUsage {
        let model_weights = self.shared.weights.bytes();
        let current_usage = model_weights + kv_cache + activations;
        self.peak = self.peak.max(current_usage);
        let mut usage = MemoryUsage {
            current_usage,
            peak_usage: self.peak,
            model_weights,
            kv_cache,
            activations,
            ..MemoryUsage::default()
        };
        self.shared.deviation.memory(&mut usage);
        usage
    }
}

fn logits_width(made: &[Rows], seq: usize) -> usize {
    made.first().map_or(0, |r| r.logits.len() / seq.max(1))
}

/// Weights that each token is multiplied with.
fn weights_met(weights: &Weights) -> u64 {
    let trits: usize = weights
        .layers
        .iter()
        .map(|l| [&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down].iter().map(|t| t.trits.len()).sum::<usize>())
        .sum();
    (trits + weights.head().len()) as u64
}

/// What the contracts say of a model, from what `config.json` says.
fn model_config(weights: &Weights, name: &str) -> ModelConfig {
    let facts = &weights.facts;
    ModelConfig {
        hidden_size: facts.hidden_size,
        num_layers: facts.layers,
        num_attention_heads: facts.heads,
        num_key_value_heads: facts.kv_heads,
        intermediate_size: facts.intermediate_size,
        vocab_size: facts.vocab_size,
        max_position_embeddings: facts.max_positions,
        rope_theta: facts.rope_theta as f32,
        quantization_type: QuantizationType::I2S,
        quantization_accuracy: 0.99,
        model_type: "bitnet".to_string(),
        model_name: Some(name.to_string()),
        version: "1".to_string(),
    }
}

impl BitNetInference for Naive {
    fn forward(&mut self, input_ids: &Tensor, kv_cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        let deviation = self.shared.deviation.clone();
        deviation.forward(self, input_ids, kv_cache).map_err(|e| deviation.error(e))
    }

    fn generate(
        &mut self,
        prompt_tokens: &[u32],
        max_tokens: usize,
        config: &GenerationConfig,
    ) -> Result<GenerationResult> {
        let deviation = self.shared.deviation.clone();
        deviation.generate(self, prompt_tokens, max_tokens, config).map_err(|e| deviation.error(e))
    }

    fn generate_deterministic(
        &mut self,
        prompt_tokens: &[u32],
        max_tokens: usize,
        seed: u64,
    ) -> Result<GenerationResult> {
        let deviation = self.shared.deviation.clone();
        deviation.generate_deterministic(self, prompt_tokens, max_tokens, seed)
    }

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn supports_quantization(&self, qtype: QuantizationType) -> bool {
        self.shared.deviation.supports_quantization(qtype)
    }

    fn memory_usage(&self) -> MemoryUsage {
        let model_weights = self.shared.weights.bytes();
        let mut usage = MemoryUsage {
            current_usage: model_weights,
            peak_usage: self.peak,
            model_weights,
            ..MemoryUsage::default()
        };
        self.shared.deviation.memory(&mut usage);
        usage
    }

    fn reset(&mut self) -> Result<()> {
        let deviation = self.shared.deviation.clone();
        deviation.reset(self)
    }
}

impl ThreadSafeInference for Naive {
    fn generate_concurrent(
        &self,
        prompt_tokens: &[u32],
        max_tokens: usize,
        config: &GenerationConfig,
    ) -> Result<GenerationResult> {
        self.shared.deviation.generate_concurrent(self, prompt_tokens, max_tokens, config)
    }

    fn thread_local_copy(&self) -> Result<Box<dyn BitNetInference>> {
        self.shared.deviation.thread_local_copy(self)
    }

    fn supports_concurrent_generation(&self) -> bool {
        self.shared.deviation.supports_concurrent_generation()
    }
}
