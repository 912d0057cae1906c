//! When a generation ends: stop tokens, end-of-sequence tokens, stop texts.

use bitnet_contracts::{FinishReason, GenerationConfig, Result};

use super::GenerationContext;
use crate::model::Tokenizer;

/// The stop rules of one generation.
pub(super) struct StopRules<'a> {
    stop_tokens: &'a [u32],
    eos: Vec<u32>,
    /// All final tokens together.
    all: Vec<u32>,
    sequences: &'a [String],
    tokenizer: Option<&'a Tokenizer>,
    min_new: usize,
}

impl<'a> StopRules<'a> {
    pub(super) fn new(context: &GenerationContext<'a>, config: &'a GenerationConfig) -> Self {
        // The caller's end-of-sequence token replaces the model's own; with none given, any of the model's ends the text.
        let eos = config.eos_token_id.map_or_else(|| context.eos.to_vec(), |id| vec![id]);
        Self {
            stop_tokens: &config.stop_tokens,
            all: config.stop_tokens.iter().chain(&eos).copied().collect(),
            eos,
            sequences: &config.stop_sequences,
            tokenizer: context.tokenizer,
            min_new: config.min_new_tokens,
        }
    }

    /// Tokens that must not come after `generated` tokens: a final token may neither end the text before `min_new_tokens` nor be
    /// part of it, so until then it cannot be chosen.
    pub(super) fn forbidden(&self, generated: usize) -> &[u32] {
        if generated < self.min_new { &self.all } else { &[] }
    }

    /// Why `token` ends the generation, if it does.
    pub(super) fn is_final(&self, token: u32) -> Option<FinishReason> {
        if self.stop_tokens.contains(&token) {
            Some(FinishReason::StopToken)
        } else if self.eos.contains(&token) {
            Some(FinishReason::EndOfSequence)
        } else {
            None
        }
    }

    /// If the text of `generated` holds a stop text: how many tokens to keep, so that no part of it remains.
    pub(super) fn sequence_found(&self, generated: &[u32]) -> Result<Option<usize>> {
        let Some(tokenizer) = self.tokenizer.filter(|_| !self.sequences.is_empty() && generated.len() >= self.min_new)
        else {
            return Ok(None);
        };
        let text = tokenizer.decode(generated)?;
        let Some(start) = self.sequences.iter().filter_map(|s| text.find(s.as_str())).min() else {
            return Ok(None);
        };
        let mut keep = generated.len();
        while keep > 0 && tokenizer.decode(&generated[..keep])?.len() > start {
            keep -= 1;
        }
        Ok(Some(keep))
    }
}
