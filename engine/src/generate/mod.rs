//! The decode loop: limits, sampling, stop rules, timing. Every backend generates through it, so they differ in arithmetic only.

mod sampling;
mod stop;

use std::time::{Duration, Instant};

use bitnet_contracts::{
    ConfigurationError, FinishReason, GenerationConfig, GenerationResult, GenerationTiming, InputValidator,
    MemoryUsage, ModelConfig, Result, StandardInputValidator, TokenizationError,
};

pub use sampling::SAMPLER_VERSION;
use sampling::Sampler;
use stop::StopRules;

use crate::model::Tokenizer;

/// A model that takes tokens one call after another and gives the logits of the last one.
pub(crate) trait StepModel {
    /// Forgets all tokens fed so far.
    fn restart(&mut self) -> Result<()>;
    /// Appends `tokens` (at least one) and returns the logits after the last of them, `[vocabulary]`, all finite.
    fn feed(&mut self, tokens: &[u32]) -> Result<&[f32]>;
    /// As [`Self::feed`], for who needs only the `top` largest logits and those of the tokens in `also`.
    fn feed_for(&mut self, tokens: &[u32], _top: usize, _also: &[u32]) -> Result<Logits<'_>> {
        Ok(Logits::All(self.feed(tokens)?))
    }
    /// Memory held now.
    fn memory(&self) -> MemoryUsage;
}

/// Logits of the next token.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Logits<'a> {
    /// Of every token.
    All(&'a [f32]),
    /// Of at least the tokens asked for, by rising token.
    Largest(&'a [(u32, f32)]),
}

/// What generation needs to know about a model besides its arithmetic.
pub(crate) struct GenerationContext<'a> {
    pub(crate) config: &'a ModelConfig,
    pub(crate) validator: &'a StandardInputValidator,
    pub(crate) tokenizer: Option<&'a Tokenizer>,
    /// The model's own end-of-sequence tokens, used when the caller names none.
    pub(crate) eos: &'a [u32],
}

/// Generates up to `min(max_tokens, config.max_new_tokens)` tokens after `prompt`. `on_token` sees every token as it comes.
pub(crate) fn generate(
    model: &mut dyn StepModel,
    context: &GenerationContext<'_>,
    prompt: &[u32],
    max_tokens: usize,
    config: &GenerationConfig,
    on_token: &mut dyn FnMut(u32),
) -> Result<GenerationResult> {
    let start = Instant::now();
    validate(context, prompt, max_tokens, config)?;
    let stop = StopRules::new(context, config);
    let new_limit = max_tokens.min(config.max_new_tokens);
    let total_limit = config.max_total_tokens.min(context.config.max_position_embeddings);
    // Room for all that there can be, within reason: a step allocates nothing.
    let room = new_limit.min(total_limit.saturating_sub(prompt.len())).min(1 << 16);
    let mut sampler = Sampler::new(config, prompt, room);
    let mut timing = GenerationTiming { per_token: Vec::with_capacity(room), ..Default::default() };
    let mut generated: Vec<u32> = Vec::with_capacity(room);
    let mut sequence = Vec::with_capacity(prompt.len() + room);
    sequence.extend_from_slice(prompt);
    let mut last = start;
    model.restart()?;
    let finish_reason = loop {
        if generated.len() >= new_limit {
            break FinishReason::MaxTokens;
        }
        if sequence.len() >= total_limit {
            break FinishReason::ContextFull;
        }
        let forbidden = stop.forbidden(generated.len());
        let last_piece = advance(model, config, &sequence, generated.len())?;
        let logits = match sampler.wanted(forbidden.len()) {
            Some(top) => model.feed_for(last_piece, top, sampler.penalised())?,
            None => Logits::All(model.feed(last_piece)?),
        };
        if generated.is_empty() {
            timing.prefill = start.elapsed();
        }
        let token = sampler.next(logits, forbidden);
        if let Some(reason) = stop.is_final(token) {
            break reason;
        }
        generated.push(token);
        sequence.push(token);
        sampler.seen(token);
        on_token(token);
        let now = Instant::now();
        timing.per_token.push(now - last);
        last = now;
        if let Some(keep) = stop.sequence_found(&generated)? {
            generated.truncate(keep);
            break FinishReason::StopSequence;
        }
    };
    timing.per_token.truncate(generated.len());
    timing.total = start.elapsed();
    timing.time_to_first_token = timing.per_token.first().copied().unwrap_or(Duration::ZERO);
    timing.decode = timing.total.saturating_sub(timing.prefill);
    let generated_text = match context.tokenizer {
        Some(tokenizer) => tokenizer.decode(&generated)?,
        None => String::new(),
    };
    Ok(GenerationResult {
        prompt_tokens: prompt.to_vec(),
        generated_tokens: generated,
        generated_text,
        finish_reason,
        timing,
        memory_usage: model.memory(),
    })
}

/// Everything that can be wrong is found before the first token is computed.
fn validate(
    context: &GenerationContext<'_>,
    prompt: &[u32],
    max_tokens: usize,
    config: &GenerationConfig,
) -> Result<()> {
    context.validator.validate_generation_config(config)?;
    if max_tokens == 0 {
        return Err(ConfigurationError::InvalidParameter {
            parameter: "max_new_tokens".to_string(),
            value: "0".to_string(),
            valid_range: "1 to usize::MAX".to_string(),
        }
        .into());
    }
    if !config.stop_sequences.is_empty() && context.tokenizer.is_none() {
        return Err(TokenizationError::MissingTokenizer {
            reason: "stop_sequences are text and the model has none".into(),
        }
        .into());
    }
    context.validator.validate_token_sequence(prompt, context.config.vocab_size)
}

/// Feeds what the model has not seen yet but for the last piece, which it gives.
fn advance<'s>(
    model: &mut dyn StepModel,
    config: &GenerationConfig,
    sequence: &'s [u32],
    generated: usize,
) -> Result<&'s [u32]> {
    if generated > 0 && config.use_cache {
        return Ok(&sequence[sequence.len() - 1..]);
    }
    if generated > 0 {
        model.restart()?;
    }
    let piece = config.prefill_chunk_size.unwrap_or(sequence.len()).max(1);
    let (head, tail) = sequence.split_at((sequence.len() - 1) / piece * piece);
    for chunk in head.chunks(piece) {
        model.feed_for(chunk, 1, &[])?;
    }
    Ok(tail)
}

#[cfg(test)]
mod tests;
