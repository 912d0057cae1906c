//! What to generate, and what came out.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::MemoryUsage;

/// How to generate: limits, sampling, penalties and stop rules.
///
/// Penalties apply over prompt and generated tokens, then temperature, then `top_k`, then `top_p`, then the draw.
/// A missing field of a serialized configuration takes its default.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct GenerationConfig {
    /// The most tokens to generate. Default 128.
    pub max_new_tokens: usize,
    /// The most tokens in all, prompt included. Default 2048.
    pub max_total_tokens: usize,
    /// No stop token, end-of-sequence token or stop sequence ends the text before this many tokens. Default 1.
    pub min_new_tokens: usize,
    /// Divides the logits; 0 is greedy. Default 0.8.
    pub temperature: f32,
    /// Keep only this many of the most likely tokens. Default `Some(50)`.
    pub top_k: Option<usize>,
    /// Keep the smallest set of tokens whose probability reaches this. Default `Some(0.95)`.
    pub top_p: Option<f32>,
    /// Divides positive and multiplies negative logits of tokens seen before; 1 is none. Default 1.1.
    pub repetition_penalty: f32,
    /// Subtracted from a token's logit once for each time it was seen. Default 0.
    pub frequency_penalty: f32,
    /// Subtracted once from the logit of every token seen. Default 0.
    pub presence_penalty: f32,
    /// Tokens that end the text and are not part of it. Default none.
    pub stop_tokens: Vec<u32>,
    /// Texts that end the text (an engine with a tokenizer compares them). Default none.
    pub stop_sequences: Vec<String>,
    /// The model's own end-of-sequence token. Default `None`.
    pub eos_token_id: Option<u32>,
    /// Draw from the distribution (true) or take the most likely token (false). Default true.
    pub do_sample: bool,
    /// Seed of the draws; `None` takes a fresh one. Default `None`.
    pub seed: Option<u64>,
    /// Keep keys and values between steps rather than computing them again. Default true.
    pub use_cache: bool,
    /// Feed the prompt in pieces of this many tokens; `None` leaves it to the engine. Default `None`.
    pub prefill_chunk_size: Option<usize>,
}

impl Default for GenerationConfig {
    fn default() -> Self {
        Self {
            max_new_tokens: 128,
            max_total_tokens: 2048,
            min_new_tokens: 1,
            temperature: 0.8,
            top_k: Some(50),
            top_p: Some(0.95),
            repetition_penalty: 1.1,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            stop_tokens: Vec::new(),
            stop_sequences: Vec::new(),
            eos_token_id: None,
            do_sample: true,
            seed: None,
            use_cache: true,
            prefill_chunk_size: None,
        }
    }
}

impl GenerationConfig {
    /// The most likely token at every step: no sampling, no filters and no penalties.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: None,
            top_p: None,
            repetition_penalty: 1.0,
            do_sample: false,
            ..Self::default()
        }
    }
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum FinishReason {
    /// The requested number of tokens was reached.
    MaxTokens,
    /// One of the configured stop tokens came.
    StopToken,
    /// One of the configured stop texts came.
    StopSequence,
    /// The end-of-sequence token came.
    EndOfSequence,
    /// The model's positions or `max_total_tokens` ran out.
    ContextFull,
}

impl fmt::Display for FinishReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::MaxTokens => "maximum number of tokens reached",
            Self::StopToken => "stop token",
            Self::StopSequence => "stop sequence",
            Self::EndOfSequence => "end of sequence",
            Self::ContextFull => "context full",
        })
    }
}

/// Where the time of one generation went.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GenerationTiming {
    /// Time to compute the prompt.
    pub prefill: Duration,
    /// Time to compute the tokens after the first.
    pub decode: Duration,
    /// Time of the whole call.
    pub total: Duration,
    /// Time from the call to the first generated token.
    pub time_to_first_token: Duration,
    /// Time of each generated token, in order.
    pub per_token: Vec<Duration>,
}

/// A finished generation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GenerationResult {
    /// The prompt as it was given.
    pub prompt_tokens: Vec<u32>,
    /// The generated tokens, without the one that stopped the generation.
    pub generated_tokens: Vec<u32>,
    /// The tokenizer's text of `generated_tokens`; empty without a tokenizer.
    pub generated_text: String,
    /// Why the generation ended.
    pub finish_reason: FinishReason,
    /// Where the time went.
    pub timing: GenerationTiming,
    /// Memory held during the generation.
    pub memory_usage: MemoryUsage,
}

impl GenerationResult {
    /// Generated tokens a second of total time; 0 when no time was measured.
    pub fn tokens_per_second(&self) -> f64 {
        let seconds = self.timing.total.as_secs_f64();
        if seconds > 0.0 { self.generated_tokens.len() as f64 / seconds } else { 0.0 }
    }
}
