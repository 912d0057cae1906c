//! A small, slow, honest backend: the golden oracle's f64 forward pass behind the contracts.
//!
//! It keeps no keys and values. Its cache storage is the token ids seen so far, and a call computes the whole sequence
//! again, which is the plainest way to make chunking invisible.

mod cache;
mod model;
mod sampling;

use bitnet_contracts::{
    BitNetInference, CacheOwner, ConfigurationError, DType, Device, FinishReason, ForwardPassError, ForwardPassMetrics,
    GenerationConfig, GenerationResult, GenerationTiming, InferenceError, InferenceOutput, InputValidator, KVCache,
    MemoryUsage, ModelConfig, ModelError, QuantizationType, Result, StandardInputValidator, Tensor, TokenizationError,
};
use cache::SeenIds;
use conformance::{BackendFactory, Capabilities, ModelFixture, Semantics};
use golden::oracle::{Oracle, Run};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Makes [`OracleBackend`]s.
pub struct OracleFactory;

impl BackendFactory for OracleFactory {
    fn name(&self) -> &str {
        "oracle"
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::new(Semantics::Fp32).with_batch().with_bitwise()
    }

    fn create(&self, model: &ModelFixture) -> Result<Box<dyn BitNetInference>> {
        Ok(Box::new(OracleBackend::load(model)?))
    }
}

/// The oracle as an engine.
pub struct OracleBackend {
    oracle: Oracle,
    config: ModelConfig,
    eos: Vec<u32>,
    owner: CacheOwner,
    weight_bytes: usize,
    peak_bytes: usize,
}

impl OracleBackend {
    fn load(fixture: &ModelFixture) -> Result<Self> {
        static NEXT_MODEL: AtomicU64 = AtomicU64::new(1);
        let path = fixture.dir().display().to_string();
        if !fixture.dir().join("config.json").is_file() {
            return Err(ModelError::FileNotFound { path: format!("{path}/config.json") }.into());
        }
        let failed = |reason: String| InferenceError::Model(ModelError::LoadingFailed { path: path.clone(), reason });
        // What the folder says now, not what was said of it.
        let facts = ModelFixture::open(fixture.name(), fixture.dir()).map_err(|e| failed(e.to_string()))?.config;
        let config = model::model_config(&facts, fixture.name());
        config.validate()?;
        let oracle = Oracle::load(fixture.dir()).map_err(|e| failed(e.to_string()))?;
        let weight_bytes = model::weight_bytes(&facts);
        let owner = CacheOwner { backend: "oracle".to_string(), model: NEXT_MODEL.fetch_add(1, Ordering::Relaxed) };
        Ok(Self { oracle, config, eos: facts.eos, owner, weight_bytes, peak_bytes: weight_bytes })
    }

    fn validator(&self) -> StandardInputValidator {
        StandardInputValidator::new(self.config.clone(), Device::Cpu)
    }

    /// The rows of an input tensor, every id checked.
    fn rows(&self, input_ids: &Tensor) -> Result<Vec<Vec<u32>>> {
        self.validator().validate_input_tensor(input_ids, &[0, 0])?;
        let invalid = |reason: &str| ForwardPassError::InvalidInput { reason: reason.to_string() };
        if input_ids.elem_count() == 0 {
            return Err(invalid("no tokens").into());
        }
        let rows: Vec<Vec<i64>> = match input_ids.dtype() {
            DType::U32 | DType::I64 => input_ids.to_dtype(DType::I64)?.to_vec2()?,
            _ => return Err(invalid("token ids must be u32 or i64").into()),
        };
        let vocab = self.config.vocab_size;
        let id = |(position, id): (usize, i64)| match u32::try_from(id) {
            Ok(id) if (id as usize) < vocab => Ok(id),
            small_or_large => Err(InferenceError::Tokenization(TokenizationError::InvalidToken {
                position,
                token_id: small_or_large.unwrap_or(u32::MAX),
                vocab_size: u32::try_from(vocab).unwrap_or(u32::MAX),
            })),
        };
        rows.into_iter().map(|row| row.into_iter().enumerate().map(id).collect()).collect()
    }

    /// The logits of the last `new` positions of a sequence.
    fn last_logits(&self, sequence: &[u32], new: usize) -> Result<Vec<Vec<f32>>> {
        let mut run = self.oracle.start(golden::oracle::Semantics::Fp32);
        let rows: Vec<Vec<f32>> = sequence.iter().map(|&token| step(&mut run, token)).collect::<Result<_>>()?;
        Ok(rows[rows.len() - new..].to_vec())
    }
}

/// The logits after one more token.
fn step(run: &mut Run<'_>, token: u32) -> Result<Vec<f32>> {
    let row = run
        .step(token)
        .map_err(|e| ForwardPassError::ComputationFailed { component: "oracle".to_string(), reason: e.to_string() })?;
    let row: Vec<f32> = row.into_iter().map(|logit| logit as f32).collect();
    if let Some(bad) = row.iter().position(|logit| !logit.is_finite()) {
        let details = format!("logit {bad} of token {token} is {}", row[bad]);
        return Err(ForwardPassError::NumericalInstability { details }.into());
    }
    Ok(row)
}

impl BitNetInference for OracleBackend {
    fn forward(&mut self, input_ids: &Tensor, kv_cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        let start = Instant::now();
        let new = self.rows(input_ids)?;
        let (batch, length) = (new.len(), new[0].len());
        let before = kv_cache.as_ref().map_or(0, |cache| cache.len());
        if before + length > self.config.max_position_embeddings {
            let reason =
                format!("{before} + {length} positions, and the model has {}", self.config.max_position_embeddings);
            return Err(match kv_cache {
                Some(_) => ForwardPassError::KVCacheError { operation: "append".to_string(), reason },
                None => ForwardPassError::InvalidInput { reason },
            }
            .into());
        }
        let mut local = KVCache::new(length);
        let cache = kv_cache.unwrap_or(&mut local);
        cache.check_room(length)?;
        let seen = cache.storage(&self.owner, || Ok(SeenIds(vec![Vec::new(); batch])))?;
        if before == 0 {
            seen.0 = vec![Vec::new(); batch];
        } else if seen.0.len() != batch {
            let reason = format!("the cache holds {} sequences, and the input {batch}", seen.0.len());
            return Err(ForwardPassError::KVCacheError { operation: "append".to_string(), reason }.into());
        }
        let whole: Vec<Vec<u32>> =
            seen.0.iter().zip(&new).map(|(old, new)| old[..before].iter().chain(new).copied().collect()).collect();
        let mut logits = Vec::with_capacity(batch * length * self.config.vocab_size);
        for sequence in &whole {
            logits.extend(self.last_logits(sequence, length)?.into_iter().flatten());
        }
        let activations = logits.len() * size_of::<f32>();
        let logits = Tensor::from_vec(logits, (batch, length, self.config.vocab_size), &Device::Cpu)?;
        cache.storage(&self.owner, || Ok(SeenIds(Vec::new())))?.0 = whole;
        cache.advance(length)?;
        let cache_bytes = cache.memory_bytes();
        self.peak_bytes = self.peak_bytes.max(self.weight_bytes + cache_bytes + activations);
        let memory_usage = MemoryUsage { kv_cache: cache_bytes, activations, ..self.memory_usage() };
        let flops = 2 * self.config.parameter_count() as u64 * (batch * (before + length)) as u64;
        let metrics = ForwardPassMetrics {
            total_time: start.elapsed(),
            peak_memory_usage: self.peak_bytes,
            cache_memory_usage: cache_bytes,
            flops_estimate: flops,
            ..ForwardPassMetrics::default()
        };
        Ok(InferenceOutput { logits, attention_weights: None, hidden_states: None, metrics, memory_usage })
    }

    fn generate(
        &mut self,
        prompt_tokens: &[u32],
        max_tokens: usize,
        config: &GenerationConfig,
    ) -> Result<GenerationResult> {
        let start = Instant::now();
        let validator = self.validator();
        validator.validate_generation_config(config)?;
        if max_tokens == 0 {
            validator.validate_generation_config(&GenerationConfig { max_new_tokens: 0, ..config.clone() })?;
        }
        validator.validate_token_sequence(prompt_tokens, self.config.vocab_size)?;
        if !config.stop_sequences.is_empty() {
            let reason = "stop sequences need a tokenizer, and this backend has none".to_string();
            return Err(ConfigurationError::IncompatibleConfig { reason }.into());
        }
        let most = max_tokens.min(config.max_new_tokens);
        let context = config.max_total_tokens.min(self.config.max_position_embeddings);
        let eos = config.eos_token_id.map_or_else(|| self.eos.clone(), |id| vec![id]);
        let mut sampler = sampling::Sampler::new(config);
        let mut run = self.oracle.start(golden::oracle::Semantics::Fp32);
        let mut sequence = prompt_tokens.to_vec();
        let mut timing = GenerationTiming::default();
        let finish_reason = loop {
            let made = sequence.len() - prompt_tokens.len();
            if made == most {
                break FinishReason::MaxTokens;
            }
            if sequence.len() >= context {
                break FinishReason::ContextFull;
            }
            let began = Instant::now();
            let unread = if made == 0 { 0 } else { sequence.len() - 1 };
            let mut logits = Vec::new();
            for &token in &sequence[unread..] {
                logits = step(&mut run, token)?;
            }
            if made < config.min_new_tokens {
                for id in eos.iter().chain(&config.stop_tokens) {
                    if let Some(logit) = logits.get_mut(*id as usize) {
                        *logit = f32::NEG_INFINITY;
                    }
                }
            }
            let token = sampler.next(&logits, &sequence);
            if config.stop_tokens.contains(&token) {
                break FinishReason::StopToken;
            }
            if eos.contains(&token) {
                break FinishReason::EndOfSequence;
            }
            sequence.push(token);
            timing.per_token.push(began.elapsed());
        };
        timing.total = start.elapsed();
        timing.prefill = timing.per_token.first().copied().unwrap_or(timing.total);
        timing.time_to_first_token = timing.prefill;
        timing.decode = timing.per_token.iter().skip(1).sum::<Duration>();
        Ok(GenerationResult {
            prompt_tokens: prompt_tokens.to_vec(),
            generated_tokens: sequence.split_off(prompt_tokens.len()),
            generated_text: String::new(),
            finish_reason,
            timing,
            memory_usage: self.memory_usage(),
        })
    }

    fn generate_deterministic(
        &mut self,
        prompt_tokens: &[u32],
        max_tokens: usize,
        seed: u64,
    ) -> Result<GenerationResult> {
        self.generate(prompt_tokens, max_tokens, &GenerationConfig { seed: Some(seed), ..GenerationConfig::default() })
    }

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn device(&self) -> &Device {
        &Device::Cpu
    }

    fn supports_quantization(&self, qtype: QuantizationType) -> bool {
        qtype == QuantizationType::I2S
    }

    fn memory_usage(&self) -> MemoryUsage {
        MemoryUsage {
            current_usage: self.weight_bytes,
            peak_usage: self.peak_bytes,
            model_weights: self.weight_bytes,
            ..MemoryUsage::default()
        }
    }

    fn reset(&mut self) -> Result<()> {
        // Nothing outlives a call but the weights.
        Ok(())
    }
}
