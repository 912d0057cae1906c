//! Sharing one engine between threads.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{Device, Tensor};

use crate::{
    BitNetInference, ConfigurationError, GenerationConfig, GenerationResult, InferenceOutput, KVCache, MemoryUsage,
    ModelConfig, QuantizationType, Result,
};

/// The most workers that one call of [`ConcurrentInferenceEngine::create_workers`] makes.
pub const MAX_WORKERS: usize = 65_536;

/// An engine that many threads may use at once.
pub trait ThreadSafeInference: BitNetInference + Send + Sync {
    /// Generates text; many threads may call this at the same time on the same engine, and each gets what it would
    /// have got alone.
    ///
    /// # Errors
    /// As [`BitNetInference::generate`].
    fn generate_concurrent(
        &self,
        prompt_tokens: &[u32],
        max_tokens: usize,
        config: &GenerationConfig,
    ) -> Result<GenerationResult>;

    /// A handle for one thread, for instance one with its own KV cache.
    ///
    /// # Errors
    /// Whatever stands in the way of making it, such as memory.
    fn thread_local_copy(&self) -> Result<Box<dyn BitNetInference>>;

    /// Whether [`generate_concurrent`](Self::generate_concurrent) may be called from many threads at once.
    fn supports_concurrent_generation(&self) -> bool;
}

/// One engine, many handles. A clone is another handle on the same engine.
///
/// * [`new`](Self::new) takes any engine and lets one caller in at a time.
/// * [`from_thread_safe`](Self::from_thread_safe) takes an engine that is thread safe by itself and runs callers in
///   parallel: [`generate_concurrent`](ThreadSafeInference::generate_concurrent) goes straight to the engine, and
///   what needs `&mut self` goes to a copy that each handle makes on first use.
///
/// A caller that panics inside the engine does not poison the others: a serialised engine is
/// [`reset`](BitNetInference::reset) before the next caller gets it, and a handle's own copy is thrown away.
///
/// ```
/// use bitnet_contracts::*;
///
/// /// Asks four questions at once.
/// fn ask_four(engine: Box<dyn BitNetInference>) -> Vec<Result<GenerationResult>> {
///     let shared = ConcurrentInferenceEngine::new(engine);
///     let threads: Vec<_> = (0..4_u32)
///         .map(|i| {
///             let handle = shared.clone();
///             std::thread::spawn(move || handle.generate_concurrent(&[1, 2, 3 + i], 5, &GenerationConfig::greedy()))
///         })
///         .collect();
///     threads.into_iter().filter_map(|thread| thread.join().ok()).collect()
/// }
/// #
/// # struct Counter(ModelConfig, u32);
/// # impl BitNetInference for Counter {
/// #     fn forward(&mut self, ids: &Tensor, _: Option<&mut KVCache>) -> Result<InferenceOutput> {
/// #         let (batch, seq) = ids.dims2()?;
/// #         Ok(InferenceOutput {
/// #             logits: Tensor::zeros((batch, seq, self.0.vocab_size), DType::F32, &Device::Cpu)?,
/// #             attention_weights: None,
/// #             hidden_states: None,
/// #             metrics: ForwardPassMetrics::new(),
/// #             memory_usage: MemoryUsage::default(),
/// #         })
/// #     }
/// #     fn generate(&mut self, prompt: &[u32], max: usize, _: &GenerationConfig) -> Result<GenerationResult> {
/// #         let last = prompt.last().copied().unwrap_or(0);
/// #         Ok(GenerationResult {
/// #             prompt_tokens: prompt.to_vec(),
/// #             generated_tokens: (1..=max as u32).map(|i| last + i).collect(),
/// #             generated_text: String::new(),
/// #             finish_reason: FinishReason::MaxTokens,
/// #             timing: GenerationTiming::default(),
/// #             memory_usage: MemoryUsage::default(),
/// #         })
/// #     }
/// #     fn generate_deterministic(&mut self, prompt: &[u32], max: usize, _: u64) -> Result<GenerationResult> {
/// #         self.generate(prompt, max, &GenerationConfig::default())
/// #     }
/// #     fn config(&self) -> &ModelConfig { &self.0 }
/// #     fn device(&self) -> &Device { &Device::Cpu }
/// #     fn supports_quantization(&self, _: QuantizationType) -> bool { true }
/// #     fn memory_usage(&self) -> MemoryUsage { MemoryUsage::default() }
/// #     fn reset(&mut self) -> Result<()> { Ok(()) }
/// # }
/// # let config = ModelConfig {
/// #     hidden_size: 8, num_layers: 1, num_attention_heads: 2, num_key_value_heads: 1, intermediate_size: 16,
/// #     vocab_size: 32, max_position_embeddings: 64, rope_theta: 10000.0,
/// #     quantization_type: QuantizationType::I2S, quantization_accuracy: 0.99, model_type: "bitnet".into(),
/// #     model_name: None, version: "1".into(),
/// # };
/// # let answers = ask_four(Box::new(Counter(config, 0)));
/// # assert_eq!(answers.len(), 4);
/// # assert_eq!(answers[3].as_ref().unwrap().generated_tokens, [7, 8, 9, 10, 11]);
/// ```
pub struct ConcurrentInferenceEngine {
    inner: Inner,
    config: ModelConfig,
    device: Device,
}

enum Inner {
    /// Any engine, one caller at a time.
    Serialised(Arc<Mutex<Box<dyn BitNetInference>>>),
    /// A thread-safe engine, and this handle's own copy of it once it has needed one.
    Parallel { engine: Arc<dyn ThreadSafeInference>, own: Option<Box<dyn BitNetInference>> },
}

impl Clone for ConcurrentInferenceEngine {
    fn clone(&self) -> Self {
        let inner = match &self.inner {
            Inner::Serialised(engine) => Inner::Serialised(Arc::clone(engine)),
            // A copy belongs to its handle; the clone makes its own.
            Inner::Parallel { engine, .. } => Inner::Parallel { engine: Arc::clone(engine), own: None },
        };
        Self { inner, config: self.config.clone(), device: self.device.clone() }
    }
}

impl fmt::Debug for ConcurrentInferenceEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let access = match &self.inner {
            Inner::Serialised(_) => "serialised",
            Inner::Parallel { .. } => "parallel",
        };
        f.debug_struct("ConcurrentInferenceEngine")
            .field("access", &access)
            .field("config", &self.config)
            .field("device", &self.device)
            .finish()
    }
}

impl ConcurrentInferenceEngine {
    /// Wraps any engine; callers take turns.
    pub fn new(inference: Box<dyn BitNetInference>) -> Self {
        let config = inference.config().clone();
        let device = inference.device().clone();
        Self { inner: Inner::Serialised(Arc::new(Mutex::new(inference))), config, device }
    }

    /// Wraps an engine that is thread safe by itself; callers run in parallel.
    pub fn from_thread_safe(engine: Arc<dyn ThreadSafeInference>) -> Self {
        let config = engine.config().clone();
        let device = engine.device().clone();
        Self { inner: Inner::Parallel { engine, own: None }, config, device }
    }

    /// Makes `num_workers` handles for parallel processing.
    ///
    /// # Errors
    /// `ConfigurationError::InvalidParameter` for more than [`MAX_WORKERS`], and whatever stands in the way of making
    /// one of them.
    pub fn create_workers(&self, num_workers: usize) -> Result<Vec<Box<dyn BitNetInference>>> {
        if num_workers > MAX_WORKERS {
            return Err(ConfigurationError::invalid("num_workers", num_workers, format!("0 to {MAX_WORKERS}")).into());
        }
        (0..num_workers).map(|_| self.thread_local_copy()).collect()
    }

    /// Runs `work` on the engine that this handle may change.
    fn with_engine<T>(&mut self, work: impl FnOnce(&mut dyn BitNetInference) -> Result<T>) -> Result<T> {
        match &mut self.inner {
            Inner::Serialised(engine) => work(lock_for_use(engine)?.as_mut()),
            Inner::Parallel { engine, own } => {
                // Taken out while in use: a panic inside `work` drops a copy that may be in any state.
                let mut copy = match own.take() {
                    Some(copy) => copy,
                    None => engine.thread_local_copy()?,
                };
                let result = work(copy.as_mut());
                *own = Some(copy);
                result
            }
        }
    }
}

/// The engine, after a reset if the last caller panicked inside it. While the reset fails, the engine stays closed.
fn lock_for_use<'a>(engine: &'a Mutex<Box<dyn BitNetInference>>) -> Result<MutexGuard<'a, Box<dyn BitNetInference>>> {
    match engine.lock() {
        Ok(guard) => Ok(guard),
        Err(poisoned) => {
            let mut guard = poisoned.into_inner();
            guard.reset()?;
            engine.clear_poison();
            Ok(guard)
        }
    }
}

/// The engine for a question that no earlier panic can spoil. The poison stays for the next caller that computes.
fn lock_to_read<'a>(engine: &'a Mutex<Box<dyn BitNetInference>>) -> MutexGuard<'a, Box<dyn BitNetInference>> {
    engine.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ThreadSafeInference for ConcurrentInferenceEngine {
    fn generate_concurrent(
        &self,
        prompt_tokens: &[u32],
        max_tokens: usize,
        config: &GenerationConfig,
    ) -> Result<GenerationResult> {
        match &self.inner {
            Inner::Serialised(engine) => lock_for_use(engine)?.generate(prompt_tokens, max_tokens, config),
            Inner::Parallel { engine, .. } => engine.generate_concurrent(prompt_tokens, max_tokens, config),
        }
    }

    /// Another handle on a serialised engine, or a copy made by a parallel one.
    fn thread_local_copy(&self) -> Result<Box<dyn BitNetInference>> {
        match &self.inner {
            Inner::Serialised(_) => Ok(Box::new(self.clone())),
            Inner::Parallel { engine, .. } => engine.thread_local_copy(),
        }
    }

    /// Always true for a serialised engine, whose lock sees to it; otherwise the engine's own answer.
    fn supports_concurrent_generation(&self) -> bool {
        match &self.inner {
            Inner::Serialised(_) => true,
            Inner::Parallel { engine, .. } => engine.supports_concurrent_generation(),
        }
    }
}

impl BitNetInference for ConcurrentInferenceEngine {
    fn forward(&mut self, input_ids: &Tensor, kv_cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        self.with_engine(|engine| engine.forward(input_ids, kv_cache))
    }

    fn generate(
        &mut self,
        prompt_tokens: &[u32],
        max_tokens: usize,
        config: &GenerationConfig,
    ) -> Result<GenerationResult> {
        self.with_engine(|engine| engine.generate(prompt_tokens, max_tokens, config))
    }

    fn generate_deterministic(
        &mut self,
        prompt_tokens: &[u32],
        max_tokens: usize,
        seed: u64,
    ) -> Result<GenerationResult> {
        self.with_engine(|engine| engine.generate_deterministic(prompt_tokens, max_tokens, seed))
    }

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn supports_quantization(&self, qtype: QuantizationType) -> bool {
        match &self.inner {
            Inner::Serialised(engine) => lock_to_read(engine).supports_quantization(qtype),
            Inner::Parallel { engine, .. } => engine.supports_quantization(qtype),
        }
    }

    fn memory_usage(&self) -> MemoryUsage {
        match &self.inner {
            Inner::Serialised(engine) => lock_to_read(engine).memory_usage(),
            // Weights are shared, so the handle's own copy speaks for both.
            Inner::Parallel { own: Some(copy), .. } => copy.memory_usage(),
            Inner::Parallel { engine, own: None } => engine.memory_usage(),
        }
    }

    fn reset(&mut self) -> Result<()> {
        match &mut self.inner {
            Inner::Serialised(engine) => lock_for_use(engine)?.reset(),
            Inner::Parallel { own: Some(copy), .. } => copy.reset(),
            // Nothing remembered yet.
            Inner::Parallel { own: None, .. } => Ok(()),
        }
    }
}
