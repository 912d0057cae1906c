//! Faults of one option on one way to generate.

use super::super::Fault;
use super::super::naive::{Deviation, Naive};
use super::{Configured, Generates};
use bitnet_contracts::{
    BitNetInference, GenerationConfig, GenerationResult, InferenceError, Result, TokenizationError,
};
use std::sync::Arc;

pub(super) const FAULTS: &[Fault] = &[
    Fault::new(
        "position-in-its-piece",
        "with prefill_chunk_size the position of an invalid token is counted from the beginning of its piece",
        "clause ERR-10: each piece validates its own tokens",
        "errors/every_path",
        || Arc::new(Generates(position_in_its_piece)),
    ),
    Fault::new(
        "no-penalties-without-cache",
        "with use_cache false nothing is penalised",
        "clause GEN-14: a second decode loop that is kept by hand",
        "generation/every_path",
        || {
            Arc::new(Configured(|config| {
                if !config.use_cache {
                    (config.repetition_penalty, config.frequency_penalty, config.presence_penalty) = (1.0, 0.0, 0.0);
                }
            }))
        },
    ),
    Fault::new(
        "stop-tokens-in-pieces-ignored",
        "with prefill_chunk_size and without a cache stop tokens are passed over",
        "clause GEN-14: two options that nobody tried together",
        "generation/every_path",
        || {
            Arc::new(Configured(|config| {
                if !config.use_cache && config.prefill_chunk_size.is_some() {
                    config.stop_tokens.clear();
                }
            }))
        },
    ),
    Fault::new(
        "concurrent-without-minimum",
        "generate_concurrent takes no notice of min_new_tokens",
        "clause GEN-14: a configuration that is rebuilt field by field",
        "generation/every_path",
        || Arc::new(ConcurrentWithoutMinimum),
    ),
];

fn position_in_its_piece(
    engine: &mut Naive,
    prompt: &[u32],
    max_tokens: usize,
    config: &GenerationConfig,
) -> Result<GenerationResult> {
    let result = engine.honest_generate(prompt, max_tokens, config);
    match (result, config.prefill_chunk_size) {
        (
            Err(InferenceError::Tokenization(TokenizationError::InvalidToken { position, token_id, vocab_size })),
            Some(size),
        ) => Err(TokenizationError::InvalidToken { position: position % size, token_id, vocab_size }.into()),
        (result, _) => result,
    }
}

struct ConcurrentWithoutMinimum;

impl Deviation for ConcurrentWithoutMinimum {
    fn generate_concurrent(
        &self,
        engine: &Naive,
        prompt: &[u32],
        max_tokens: usize,
        config: &GenerationConfig,
    ) -> Result<GenerationResult> {
        let config = GenerationConfig { min_new_tokens: 0, ..config.clone() };
        engine.copy().generate(prompt, max_tokens, &config)
    }
}
