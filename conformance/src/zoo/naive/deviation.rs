//! The points at which the naive engine asks, and the honest answer to each.
//!
//! There are two kinds. Inner points stand inside the forward pass and the sampler: one number, one row, one choice. Outer
//! points stand around a whole call of the contracts and may do before, after or instead of it what they like.

use super::arithmetic::{self, dot_float, rotation, round_ties_even};
use super::cache::Sequence;
use super::engine::Naive;
use super::sampler::{self, SplitMix, Step};
use super::weights::{Ternary, Weights};
use crate::backend::{Capabilities, CreateOptions};
use crate::model::ModelFixture;
use bitnet_contracts::{
    BitNetInference, CacheOwner, ConfigurationError, Device, FinishReason, ForwardPassMetrics, GenerationConfig,
    GenerationResult, InferenceError, InferenceOutput, KVCache, MemoryUsage, ModelConfig, QuantizationType, Result,
    Tensor,
};
use std::path::Path;

/// The places of a forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Site {
    Embedding,
    InputNorm,
    Q,
    K,
    V,
    Attention,
    AttentionSubNorm,
    O,
    PostAttentionNorm,
    Gate,
    Up,
    FfnSubNorm,
    Down,
    FinalNorm,
    Head,
}

impl Site {
    /// Whether this is one of the seven ternary projections.
    pub fn is_projection(self) -> bool {
        matches!(self, Self::Q | Self::K | Self::V | Self::O | Self::Gate | Self::Up | Self::Down)
    }
}

/// One call into the engine.
#[derive(Debug, Clone)]
pub struct Call {
    /// Sequences of the call.
    pub batch: usize,
    /// New tokens of each.
    pub seq: usize,
    /// Positions before them.
    pub start: usize,
    /// The caller brought a cache.
    pub cached: bool,
    /// The call is a step of `generate`.
    pub generating: bool,
    /// Calls that this engine served before.
    pub serial: u64,
    /// The new tokens, row after row.
    pub tokens: Vec<u32>,
    /// How the engine was built.
    pub options: CreateOptions,
}

/// A place in a call.
#[derive(Debug, Clone, Copy)]
pub struct At<'a> {
    /// The call.
    pub call: &'a Call,
    /// The layer; the number of layers behind the last one.
    pub layer: usize,
    /// The place.
    pub site: Site,
    /// The row of the batch.
    pub sequence: usize,
    /// The position of the token in its sequence.
    pub position: usize,
}

/// What an engine does at each point. Every default is what a right engine does.
#[allow(unused_variables)]
pub trait Deviation: Send + Sync + 'static {
    // Loading.

    /// Reads a model folder. Around [`Weights::load`].
    ///
    /// # Errors
    /// What keeps the model from being loaded.
    fn load(&self, model: &ModelFixture) -> Result<Weights> {
        Weights::load(model.dir(), model.name())
    }

    /// Changes weights and facts after they were read and checked.
    fn weights(&self, weights: &mut Weights) {}

    /// Whether weights that are not finite are refused at loading.
    fn checks_weights(&self) -> bool {
        true
    }

    /// What is said of an error while loading.
    fn load_error(&self, dir: &Path, error: InferenceError) -> InferenceError {
        error
    }

    /// The options that are honoured.
    ///
    /// # Errors
    /// For an option that the backend does not have.
    fn options(&self, options: &CreateOptions, declared: &Capabilities) -> Result<CreateOptions> {
        let known = |name: &String| declared.instruction_sets.contains(name);
        let asked = [
            ("attention weights", options.output_attentions && !declared.attention_weights),
            ("hidden states", options.output_hidden_states && !declared.hidden_states),
            ("a number of threads", options.threads.is_some() && !declared.threads),
            ("this instruction set", options.isa.as_ref().is_some_and(|name| !known(name))),
        ];
        match asked.iter().find(|(_, refused)| *refused) {
            Some((what, _)) => Err(lacking(what)),
            None => Ok(options.clone()),
        }
    }

    /// Whether there is an engine for many threads.
    fn thread_safe(&self, declared: &Capabilities) -> bool {
        declared.thread_safe
    }

    /// Whether a batch of more than one sequence is taken.
    fn takes_batches(&self, declared: &Capabilities) -> bool {
        declared.batch
    }

    /// Whether stop texts are passed over where there is no tokenizer to find them with.
    fn ignores_stop_texts(&self) -> bool {
        false
    }

    /// Whether `validate()` of the configuration is called.
    fn checks_config(&self) -> bool {
        true
    }

    // The forward pass.

    /// The residual stream's first value.
    fn embed(&self, at: &At<'_>, weights: &Weights, token: u32) -> Vec<f32> {
        let hidden = weights.facts.hidden_size;
        weights.embedding[token as usize * hidden..][..hidden].to_vec()
    }

    /// RMSNorm: x / sqrt(mean(x²) + eps) × gain.
    fn norm(&self, at: &At<'_>, x: &[f32], gain: &[f32], eps: f64) -> Vec<f32> {
        let mean = x.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>() / x.len() as f64;
        let factor = (1.0 / (mean + eps).sqrt()) as f32;
        x.iter().zip(gain).map(|(&v, &g)| g * (v * factor)).collect()
    }

    /// Int8 codes of one token's activations and the factor that made them.
    fn quantise(&self, at: &At<'_>, x: &[f32]) -> (Vec<i16>, f32) {
        let largest = x.iter().fold(1e-5f32, |a, &v| a.max(v.abs()));
        let k = (1.0 / largest) * 127.0;
        (x.iter().map(|&v| round_ties_even(v * k).clamp(-128.0, 127.0) as i16).collect(), k)
    }

    /// A ternary product in integers, one output a row.
    fn dots(&self, at: &At<'_>, matrix: &Ternary, codes: &[i16]) -> Vec<i32> {
        arithmetic::dots(matrix, codes)
    }

    /// From the integer to the real product.
    fn rescale(&self, at: &At<'_>, product: i32, scale: f32, k: f32) -> f32 {
        (f64::from(product) * f64::from(scale) / f64::from(k)) as f32
    }

    /// A ternary product in floats, before the scale.
    fn dots_float(&self, at: &At<'_>, matrix: &Ternary, x: &[f32]) -> Vec<f32> {
        matrix.each_row().map(|row| dot_float(row, x)).collect()
    }

    /// The outputs of a whole projection.
    fn projected(&self, at: &At<'_>, values: &mut [f32]) {}

    /// The position that the rotary embedding is given.
    fn rope_position(&self, at: &At<'_>, position: usize) -> usize {
        position
    }

    /// Rotary embedding of one head in place: pairs are half a head apart.
    fn rope(&self, at: &At<'_>, head: &mut [f32], position: usize, theta: f64) {
        let size = head.len();
        for (i, &(sin, cos)) in rotation(theta, size, position).iter().enumerate() {
            let (a, b) = (f64::from(head[i]), f64::from(head[i + size / 2]));
            head[i] = (a * cos - b * sin) as f32;
            head[i + size / 2] = (b * cos + a * sin) as f32;
        }
    }

    /// Keys and values of one position on their way into the cache.
    fn remember(&self, at: &At<'_>, values: &mut [f32]) {}

    /// The key/value head of a query head.
    fn kv_head(&self, head: usize, heads: usize, kv_heads: usize) -> usize {
        head / (heads / kv_heads)
    }

    /// Whether this position sees another one that is held.
    fn sees(&self, at: &At<'_>, other: usize) -> bool {
        other <= at.position
    }

    /// What scores are multiplied by.
    fn attention_scale(&self, head_dim: usize) -> f64 {
        1.0 / (head_dim as f64).sqrt()
    }

    /// The scores of one query against every position held, of whose rows of keys this head's part begins at `offset`.
    fn scores(&self, at: &At<'_>, q: &[f32], keys: &[f32], stride: usize, offset: usize) -> Vec<f64> {
        let scale = self.attention_scale(q.len());
        let score = |j: usize| match self.sees(at, j) {
            true => f64::from(dot_float(q, &keys[j * stride + offset..][..q.len()])) * scale,
            false => f64::NEG_INFINITY,
        };
        (0..keys.len() / stride.max(1)).map(score).collect()
    }

    /// Probabilities from scores.
    fn softmax(&self, at: &At<'_>, scores: &[f64]) -> Vec<f64> {
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| libm::exp(s - largest)).collect();
        let total: f64 = weights.iter().sum();
        weights.iter().map(|w| w / total).collect()
    }

    /// Adds a block's output to the residual stream.
    fn residual(&self, at: &At<'_>, x: &mut [f32], y: &[f32]) {
        x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
    }

    /// The gated unit: relu(gate)² × up.
    fn gated(&self, gate: f32, up: f32) -> f32 {
        let relu = gate.max(0.0);
        relu * relu * up
    }

    /// The logits of a final hidden state.
    fn head(&self, at: &At<'_>, weights: &Weights, hidden: &[f32]) -> Vec<f32> {
        weights.head().chunks_exact(hidden.len()).map(|row| dot_float(row, hidden)).collect()
    }

    /// The logits of one position, before anybody sees them.
    fn logits(&self, at: &At<'_>, token: u32, logits: &mut [f32]) {}

    /// Whether numbers that are not finite are noticed.
    fn checks_output(&self) -> bool {
        true
    }

    // Sampling and generation.

    /// The seed of a generation.
    fn seed(&self, config: &GenerationConfig, serial: u64) -> u64 {
        config.seed.unwrap_or_else(|| {
            use std::hash::{BuildHasher, Hasher};
            std::hash::RandomState::new().build_hasher().finish() ^ serial
        })
    }

    /// Penalties in place; the first `prompt` tokens of the sequence are the prompt.
    fn penalise(&self, scores: &mut [f64], sequence: &[u32], prompt: usize, config: &GenerationConfig) {
        sampler::penalise(scores, sequence, config);
    }

    /// Whether the most likely token is taken.
    fn is_greedy(&self, config: &GenerationConfig) -> bool {
        !config.do_sample || config.temperature == 0.0
    }

    /// The greedy choice: the lowest id among equal maxima.
    fn argmax(&self, scores: &[f64], prompt: usize, sequence: &[u32]) -> u32 {
        scores.iter().enumerate().fold(0, |best, (i, s)| if *s > scores[best] { i } else { best }) as u32
    }

    /// What may be drawn and with what weight, by falling weight.
    fn candidates(&self, scores: &[f64], config: &GenerationConfig) -> Vec<(u32, f64)> {
        sampler::candidates(scores, config)
    }

    /// The draw of one step.
    fn draw(&self, kept: &[(u32, f64)], rng: &mut SplitMix, step: usize) -> u32 {
        sampler::draw(kept, rng)
    }

    /// Tokens that end a text as the end of sequence.
    fn end_of_sequence(&self, config: &GenerationConfig, own: &[u32]) -> Vec<u32> {
        config.eos_token_id.map_or_else(|| own.to_vec(), |id| vec![id])
    }

    /// The most new tokens.
    fn new_limit(&self, max_tokens: usize, config: &GenerationConfig) -> usize {
        max_tokens.min(config.max_new_tokens)
    }

    /// The most tokens in all.
    fn total_limit(&self, config: &GenerationConfig, positions: usize) -> usize {
        config.max_total_tokens.min(positions)
    }

    /// Whether a token ends the text, and how.
    fn ends(&self, token: u32, made: usize, config: &GenerationConfig, eos: &[u32]) -> Option<FinishReason> {
        if config.stop_tokens.contains(&token) {
            Some(FinishReason::StopToken)
        } else if eos.contains(&token) {
            Some(FinishReason::EndOfSequence)
        } else {
            None
        }
    }

    /// Tokens that may not come after so many generated ones.
    fn forbidden(&self, made: usize, prompt: usize, config: &GenerationConfig, eos: &[u32]) -> Vec<u32> {
        match made < config.min_new_tokens {
            true => config.stop_tokens.iter().chain(eos).copied().collect(),
            false => Vec::new(),
        }
    }

    /// Where a stop text begins in the text so far.
    fn stop_text(&self, text: &str, before: &str, config: &GenerationConfig) -> Option<usize> {
        config.stop_sequences.iter().filter_map(|stop| text.find(stop.as_str())).min()
    }

    /// The text of tokens.
    fn text(&self, tokenizer: &tokenizers::Tokenizer, tokens: &[u32]) -> String {
        tokenizer.decode(tokens, true).unwrap_or_default()
    }

    /// Whether the evaluation of a prompt is kept for a generation that begins with the same one.
    fn reuses_prompt(&self) -> bool {
        true
    }

    /// The size of the pieces that a prompt is fed in.
    fn prefill_piece(&self, config: &GenerationConfig, length: usize) -> usize {
        config.prefill_chunk_size.unwrap_or(length).clamp(1, length.max(1))
    }

    /// The first token that is computed again at a step without a cache.
    fn recomputes_from(&self, prompt: usize) -> usize {
        0
    }

    /// A choice of its own for one step, in place of penalties, filters and draw.
    fn choose(&self, step: &mut Step<'_>) -> Option<u32> {
        None
    }

    /// A finished generation, before the caller sees it.
    fn result(&self, result: &mut GenerationResult, config: &GenerationConfig) {}

    // Whole calls.

    /// Around `forward`.
    ///
    /// # Errors
    /// As `BitNetInference::forward`.
    fn forward(&self, engine: &mut Naive, ids: &Tensor, cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        engine.honest_forward(ids, cache)
    }

    /// Around `generate`.
    ///
    /// # Errors
    /// As `BitNetInference::generate`.
    fn generate(
        &self,
        engine: &mut Naive,
        prompt: &[u32],
        max_tokens: usize,
        config: &GenerationConfig,
    ) -> Result<GenerationResult> {
        engine.honest_generate(prompt, max_tokens, config)
    }

    /// Around `generate_deterministic`.
    ///
    /// # Errors
    /// As `BitNetInference::generate_deterministic`.
    fn generate_deterministic(
        &self,
        engine: &mut Naive,
        prompt: &[u32],
        max_tokens: usize,
        seed: u64,
    ) -> Result<GenerationResult> {
        let config = GenerationConfig { seed: Some(seed), ..GenerationConfig::default() };
        engine.generate(prompt, max_tokens, &config)
    }

    /// Around `reset`.
    ///
    /// # Errors
    /// None in a right engine.
    fn reset(&self, engine: &mut Naive) -> Result<()> {
        Ok(())
    }

    /// Around `generate_concurrent`, which runs on a caller's own copy.
    ///
    /// # Errors
    /// As `generate`.
    fn generate_concurrent(
        &self,
        engine: &Naive,
        prompt: &[u32],
        max_tokens: usize,
        config: &GenerationConfig,
    ) -> Result<GenerationResult> {
        engine.copy().generate(prompt, max_tokens, config)
    }

    /// Around `thread_local_copy`.
    ///
    /// # Errors
    /// None in a right engine.
    fn thread_local_copy(&self, engine: &Naive) -> Result<Box<dyn BitNetInference>> {
        Ok(Box::new(engine.copy()))
    }

    /// What `supports_concurrent_generation` says.
    fn supports_concurrent_generation(&self) -> bool {
        true
    }

    /// What `config()` says: changed once, when the engine is made.
    fn config(&self, config: &mut ModelConfig) {}

    /// What `device()` says.
    fn device(&self) -> Device {
        Device::Cpu
    }

    /// What `supports_quantization` says.
    fn supports_quantization(&self, kind: QuantizationType) -> bool {
        kind == QuantizationType::I2S
    }

    /// Memory figures, before the caller sees them.
    fn memory(&self, usage: &mut MemoryUsage) {}

    /// Metrics of a forward pass, before the caller sees them.
    fn metrics(&self, metrics: &mut ForwardPassMetrics, call: &Call) {}

    /// Whose caches those of an engine are.
    fn owner(&self, owner: CacheOwner, weights: &Weights) -> CacheOwner {
        owner
    }

    /// Room for new positions of one sequence, before they are computed: `width` values of keys and as many of values
    /// each, up to `capacity` in all.
    fn make_room(&self, sequence: &mut Sequence, width: usize, positions: usize, capacity: usize) {}

    /// An error of a call, before the caller sees it.
    fn error(&self, error: InferenceError) -> InferenceError {
        error
    }
}

/// The refusal of what an engine declares that it lacks.
pub fn lacking(what: &str) -> InferenceError {
    ConfigurationError::IncompatibleConfig { reason: format!("this engine has no choice of {what}") }.into()
}

/// The engine that goes its own way nowhere.
#[derive(Debug, Clone, Copy, Default)]
pub struct Honest;

impl Deviation for Honest {}
