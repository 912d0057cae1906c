//! A complete small engine: a seeded table of transition scores instead of a transformer.
//!
//! Its next-token logits depend on the last two tokens, so a caller whose state leaks into another's changes what the
//! other generates. One token makes it panic half way and leaves it marked as broken until it is reset.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bitnet_contracts::*;

/// Generating from a prompt that ends in this token panics.
pub const PANIC_TOKEN: u32 = 31;

pub fn config() -> ModelConfig {
    ModelConfig {
        hidden_size: 8,
        num_layers: 1,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        intermediate_size: 16,
        vocab_size: 32,
        max_position_embeddings: 64,
        rope_theta: 10000.0,
        quantization_type: QuantizationType::I2S,
        quantization_accuracy: 0.99,
        model_type: "toy".to_string(),
        model_name: None,
        version: "1".to_string(),
    }
}

pub struct Toy {
    config: ModelConfig,
    device: Device,
    history: Vec<u32>,
    broken: bool,
    /// Set when a reset is to fail, which it then does once.
    pub reset_failures: Arc<AtomicUsize>,
    /// Copies made so far, by all handles.
    pub copies: Arc<AtomicUsize>,
}

impl Toy {
    pub fn new() -> Self {
        Self {
            config: config(),
            device: Device::Cpu,
            history: Vec::new(),
            broken: false,
            reset_failures: Arc::default(),
            copies: Arc::default(),
        }
    }

    /// What a caller alone with the engine gets.
    pub fn alone(prompt: &[u32], max_tokens: usize, config: &GenerationConfig) -> Vec<u32> {
        Self::new().generate(prompt, max_tokens, config).unwrap().generated_tokens
    }

    fn copy(&self) -> Self {
        Self {
            config: self.config.clone(),
            device: self.device.clone(),
            history: Vec::new(),
            broken: false,
            reset_failures: Arc::clone(&self.reset_failures),
            copies: Arc::clone(&self.copies),
        }
    }

    fn validator(&self) -> StandardInputValidator {
        StandardInputValidator::new(self.config.clone(), self.device.clone())
    }

    fn logits_after(&self, previous: u32, last: u32, seed: u64) -> Vec<f32> {
        (0..self.config.vocab_size as u64 - 1)
            .map(|next| {
                let mixed = (seed ^ (u64::from(previous) << 40) ^ (u64::from(last) << 20) ^ next)
                    .wrapping_mul(0x9e37_79b9_7f4a_7c15);
                ((mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 40) as f32 / (1 << 20) as f32
            })
            // The panicking token is never generated.
            .chain([-1.0])
            .collect()
    }
}

impl BitNetInference for Toy {
    fn forward(&mut self, input_ids: &Tensor, kv_cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        self.validator().validate_input_tensor(input_ids, &[0, 0])?;
        let start = Instant::now();
        let rows = input_ids.to_vec2::<u32>()?;
        let (batch, seq) = input_ids.dims2()?;
        if let Some(cache) = kv_cache {
            cache.check_room(seq)?;
            cache.advance(seq)?;
        }
        let mut logits = Vec::new();
        for row in &rows {
            self.validator().validate_token_sequence(row, self.config.vocab_size)?;
            let mut previous = 0;
            for &token in row {
                logits.extend(self.logits_after(previous, token, 0));
                previous = token;
            }
        }
        Ok(InferenceOutput {
            logits: Tensor::from_vec(logits, (batch, seq, self.config.vocab_size), &self.device)?,
            attention_weights: None,
            hidden_states: None,
            metrics: ForwardPassMetrics {
                // A clock too coarse for so small a pass must not read as "no time".
                total_time: start.elapsed().max(Duration::from_nanos(1)),
                ..Default::default()
            },
            memory_usage: self.memory_usage(),
        })
    }

    fn generate(
        &mut self,
        prompt_tokens: &[u32],
        max_tokens: usize,
        config: &GenerationConfig,
    ) -> Result<GenerationResult> {
        if self.broken {
            return Err(ForwardPassError::ComputationFailed {
                component: "toy".to_string(),
                reason: "used after a panic without a reset".to_string(),
            }
            .into());
        }
        self.validator().validate_generation_config(config)?;
        self.validator().validate_token_sequence(prompt_tokens, self.config.vocab_size)?;
        self.broken = true;
        assert_ne!(prompt_tokens.last(), Some(&PANIC_TOKEN), "the toy was asked to panic");

        let start = Instant::now();
        self.history = prompt_tokens.to_vec();
        for step in 0..max_tokens.min(config.max_new_tokens) {
            // Give another caller every chance to get in between.
            std::thread::yield_now();
            let last = self.history[self.history.len() - 1];
            let previous = if self.history.len() > 1 { self.history[self.history.len() - 2] } else { 0 };
            let seed = config.seed.unwrap_or(0).wrapping_mul(step as u64 + 1);
            let logits = self.logits_after(previous, last, seed);
            let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
            self.history.push(best as u32);
        }
        self.broken = false;
        let generated_tokens = self.history[prompt_tokens.len()..].to_vec();
        Ok(GenerationResult {
            prompt_tokens: prompt_tokens.to_vec(),
            generated_tokens,
            generated_text: String::new(),
            finish_reason: FinishReason::MaxTokens,
            timing: GenerationTiming { total: start.elapsed(), ..Default::default() },
            memory_usage: self.memory_usage(),
        })
    }

    fn generate_deterministic(
        &mut self,
        prompt_tokens: &[u32],
        max_tokens: usize,
        seed: u64,
    ) -> Result<GenerationResult> {
        let config = GenerationConfig { seed: Some(seed), ..Default::default() };
        self.generate(prompt_tokens, max_tokens, &config)
    }

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn supports_quantization(&self, qtype: QuantizationType) -> bool {
        qtype == QuantizationType::I2S
    }

    fn memory_usage(&self) -> MemoryUsage {
        MemoryUsage { kv_cache: self.history.len() * 4, ..Default::default() }
    }

    fn reset(&mut self) -> Result<()> {
        if self.reset_failures.load(Ordering::SeqCst) > 0 {
            self.reset_failures.fetch_sub(1, Ordering::SeqCst);
            return Err(DeviceError::SynchronizationFailed { reason: "asked to fail".to_string() }.into());
        }
        self.history.clear();
        self.broken = false;
        Ok(())
    }
}

impl ThreadSafeInference for Toy {
    fn generate_concurrent(
        &self,
        prompt_tokens: &[u32],
        max_tokens: usize,
        config: &GenerationConfig,
    ) -> Result<GenerationResult> {
        self.copy().generate(prompt_tokens, max_tokens, config)
    }

    fn thread_local_copy(&self) -> Result<Box<dyn BitNetInference>> {
        self.copies.fetch_add(1, Ordering::SeqCst);
        Ok(Box::new(self.copy()))
    }

    fn supports_concurrent_generation(&self) -> bool {
        true
    }
}
