//! The decode loop of the naive engine.

use super::cache::Sequence;
use super::engine::{Evaluated, Naive};
use super::sampler::{SplitMix, Step, next_token};
use bitnet_contracts::{
    ConfigurationError, FinishReason, GenerationConfig, GenerationResult, GenerationTiming, InputValidator, Result,
};
use std::time::{Duration, Instant};

impl Naive {
    /// Generation as the contracts ask for it, with the deviation's answers at the inner points.
    ///
    /// # Errors
    /// As `BitNetInference::generate`.
    pub fn honest_generate(
        &mut self,
        prompt: &[u32],
        max_tokens: usize,
        config: &GenerationConfig,
    ) -> Result<GenerationResult> {
        let start = Instant::now();
        let shared = self.shared.clone();
        let d = &*shared.deviation;
        let validator = self.validator();
        validator.validate_generation_config(config)?;
        if max_tokens == 0 {
            let (parameter, valid_range) = ("max_new_tokens".to_string(), "1 to usize::MAX".to_string());
            return Err(ConfigurationError::InvalidParameter { parameter, value: "0".to_string(), valid_range }.into());
        }
        if !config.stop_sequences.is_empty() && shared.tokenizer.is_none() && !d.ignores_stop_texts() {
            return Err(super::deviation::lacking("stop texts"));
        }
        validator.validate_token_sequence(prompt, self.config.vocab_size)?;

        let facts = &shared.weights.facts;
        let eos = d.end_of_sequence(config, &facts.eos);
        let (most, total) = (d.new_limit(max_tokens, config), d.total_limit(config, facts.max_positions));
        let mut rng = SplitMix(d.seed(config, self.serial));
        self.serial += 1;
        let mut sequence = Sequence::new(shared.weights.layers.len());
        let mut tokens = prompt.to_vec();
        let mut timing = GenerationTiming::default();
        let mut last = start;
        let text_of = |made: &[u32]| shared.tokenizer.as_ref().map_or(String::new(), |t| d.text(t, made));
        let finish_reason = loop {
            let made = tokens.len() - prompt.len();
            if made >= most {
                break FinishReason::MaxTokens;
            }
            if tokens.len() >= total {
                break FinishReason::ContextFull;
            }
            let logits = self.advance(&mut sequence, &tokens, made, config)?;
            if made == 0 {
                timing.prefill = start.elapsed();
            }
            let forbidden = d.forbidden(made, prompt.len(), config, &eos);
            let (rng, prompt_len) = (&mut rng, prompt.len());
            let mut step =
                Step { config, rng, logits: &logits, sequence: &tokens, prompt: prompt_len, forbidden: &forbidden };
            let token = next_token(d, &mut step);
            if let Some(reason) = d.ends(token, made, config, &eos) {
                break reason;
            }
            let before =
                if config.stop_sequences.is_empty() { String::new() } else { text_of(&tokens[prompt.len()..]) };
            tokens.push(token);
            timing.per_token.push(last.elapsed());
            last = Instant::now();
            if !config.stop_sequences.is_empty() && made + 1 >= config.min_new_tokens {
                let found = d.stop_text(&text_of(&tokens[prompt.len()..]), &before, config);
                if let Some(at) = found {
                    // No part of the stop text remains.
                    while tokens.len() > prompt.len() && text_of(&tokens[prompt.len()..]).len() > at {
                        tokens.pop();
                    }
                    timing.per_token.truncate(tokens.len() - prompt.len());
                    break FinishReason::StopSequence;
                }
            }
        };
        timing.total = start.elapsed();
        timing.time_to_first_token = timing.per_token.first().copied().unwrap_or(Duration::ZERO);
        timing.decode = timing.total.saturating_sub(timing.prefill);
        let generated_tokens = tokens.split_off(prompt.len());
        let mut result = GenerationResult {
            prompt_tokens: tokens,
            generated_text: text_of(&generated_tokens),
            generated_tokens,
            finish_reason,
            timing,
            memory_usage: self.memory_with(sequence.bytes(), 0),
        };
        d.result(&mut result, config);
        Ok(result)
    }

    /// Feeds what the sequence has not seen and gives the logits of the last token.
    fn advance(
        &mut self,
        sequence: &mut Sequence,
        tokens: &[u32],
        made: usize,
        config: &GenerationConfig,
    ) -> Result<Vec<f32>> {
        let deviation = self.shared.deviation.clone();
        let d = &*deviation;
        if made > 0 && !config.use_cache {
            *sequence = Sequence::new(sequence.keys.len());
        }
        let prompt_only = made == 0 && d.reuses_prompt();
        if let Some(known) = self.last_prompt.as_ref().filter(|known| prompt_only && known.tokens == tokens) {
            *sequence = known.sequence.clone();
            return Ok(known.logits.clone());
        }
        let from = if made > 0 && !config.use_cache { d.recomputes_from(tokens.len() - made) } else { sequence.len };
        let unread = &tokens[from..];
        let piece = d.prefill_piece(config, unread.len());
        let mut logits = Vec::new();
        for chunk in unread.chunks(piece) {
            logits = self.feed(sequence, chunk)?;
        }
        if prompt_only {
            let (tokens, sequence, logits) = (tokens.to_vec(), sequence.clone(), logits.clone());
            self.last_prompt = Some(Evaluated { tokens, sequence, logits });
        }
        Ok(logits)
    }
}
