//! Faults of input validation and of the errors that it gives.

use super::super::Fault;
use super::super::naive::{Deviation, Naive};
use super::{Configured, Generates};
use bitnet_contracts::{
    BitNetInference, ConfigurationError, DType, ForwardPassError, GenerationConfig, GenerationResult, InferenceError,
    InferenceOutput, InputValidator, KVCache, Result, StandardInputValidator, Tensor, TokenizationError,
};
use std::sync::{Arc, Mutex, PoisonError};

pub(super) const FAULTS: &[Fault] = &[
    Fault::new(
        "token-clamped",
        "an id outside the vocabulary is taken for the last one",
        "RWKV PR #217",
        "errors/token_out_of_range",
        || Arc::new(Ids(|id, vocab| id.clamp(0, vocab - 1))),
    ),
    Fault::new(
        "token-largest-silent",
        "the id u32::MAX is taken for padding and read as 0",
        "candle cpu_backend: an index of u32::MAX gives zeros",
        "errors/token_out_of_range",
        || Arc::new(Ids(|id, _| if id == i64::from(u32::MAX) { 0 } else { id })),
    ),
    Fault::new(
        "token-cut-to-32-bits",
        "i64 ids are cut to 32 bits: 2^32 + 5 is read as 5",
        "clause ERR-1",
        "errors/token_out_of_range",
        || Arc::new(Ids(|id, _| i64::from(id as u32))),
    ),
    Fault::new(
        "token-negative-wraps",
        "a negative id counts from the end of the vocabulary",
        "clause ERR-1",
        "errors/token_out_of_range",
        || Arc::new(Ids(|id, vocab| if (-vocab..0).contains(&id) { id + vocab } else { id })),
    ),
    Fault::new(
        "token-position-in-batch",
        "the position of an invalid token is counted through the batch",
        "clause ERR-1",
        "errors/token_out_of_range",
        || Arc::new(PositionInBatch),
    ),
    Fault::new(
        "token-position-from-1",
        "the position of an invalid token is counted from 1",
        "clause ERR-1",
        "errors/token_out_of_range",
        || {
            Arc::new(Says(|error| match error {
                InferenceError::Tokenization(TokenizationError::InvalidToken { position, token_id, vocab_size }) => {
                    TokenizationError::InvalidToken { position: position + 1, token_id, vocab_size }.into()
                }
                other => other,
            }))
        },
    ),
    Fault::new("empty-prompt-panics", "an empty prompt is a panic", "candle #1095", "errors/empty_input", || {
        Arc::new(Generates(|engine, prompt, max_tokens, config| {
            assert!(!prompt.is_empty(), "attempt to subtract with overflow");
            engine.honest_generate(prompt, max_tokens, config)
        }))
    }),
    Fault::new(
        "empty-prompt-invalid-input",
        "an empty prompt is InvalidInput",
        "clause ERR-2",
        "errors/empty_input",
        || {
            Arc::new(Says(|error| match error {
                InferenceError::Tokenization(TokenizationError::EmptySequence) => invalid_input("empty"),
                other => other,
            }))
        },
    ),
    Fault::new("u8-ids-accepted", "ids of one byte are taken", "clause ERR-3", "errors/id_type", || {
        Arc::new(Cast(|dtype| dtype == DType::U8))
    }),
    Fault::new("float-ids-rounded", "float ids are rounded in silence", "candle #3534", "errors/id_type", || {
        Arc::new(Cast(|dtype| dtype.is_float()))
    }),
    Fault::new("rank-1-accepted", "ids of rank 1 are taken for one sequence", "candle #3812", "errors/rank", || {
        Arc::new(Flattened(|rank| rank == 1))
    }),
    Fault::new(
        "rank-3-flattened",
        "ids of a higher rank are taken for one sequence",
        "candle #3812",
        "errors/rank",
        || Arc::new(Flattened(|rank| rank > 2)),
    ),
    Fault::new(
        "long-prompt-cut",
        "a prompt beyond the context is cut at its beginning in silence",
        "llama.cpp #3969",
        "errors/too_long",
        || {
            Arc::new(Generates(|engine, prompt, max_tokens, config| {
                let over = prompt.len().saturating_sub(engine.config().max_position_embeddings);
                engine.honest_generate(&prompt[over..], max_tokens, config)
            }))
        },
    ),
    Fault::new(
        "nan-passes",
        "a NaN passes every comparison: temperature and penalties of NaN are accepted",
        "B9: NaN < 0.0 is false",
        "errors/generation_config",
        || {
            Arc::new(Configured(|config| {
                for value in [
                    &mut config.temperature,
                    &mut config.repetition_penalty,
                    &mut config.frequency_penalty,
                    &mut config.presence_penalty,
                ] {
                    if value.is_nan() {
                        *value = 1.0;
                    }
                }
            }))
        },
    ),
    Fault::new(
        "top-p-above-1-accepted",
        "a top_p above 1 counts as 1",
        "clause ERR-6",
        "errors/generation_config",
        || {
            Arc::new(Configured(|config| {
                config.top_p = config.top_p.map(|p| if p.is_finite() { p.min(1.0) } else { p })
            }))
        },
    ),
    Fault::new(
        "top-p-zero-is-all",
        "a top_p of 0 filters nothing",
        "candle LogitsProcessor",
        "errors/generation_config",
        || Arc::new(Configured(|config| config.top_p = config.top_p.filter(|&p| p != 0.0))),
    ),
    Fault::new(
        "stop-token-unchecked",
        "a stop token outside the vocabulary is accepted",
        "clause ERR-6",
        "errors/generation_config",
        || Arc::new(Configured(|config| config.stop_tokens.retain(|&token| token < 100))),
    ),
    Fault::new(
        "negative-zero-refused",
        "a temperature of -0 is refused as negative",
        "clause ERR-6; IEEE 754: -0 = 0",
        "errors/generation_config",
        || {
            Arc::new(Generates(|engine, prompt, max_tokens, config| {
                if config.temperature == 0.0 && config.temperature.is_sign_negative() {
                    let (parameter, valid_range) = ("temperature".to_string(), "0 or more".to_string());
                    let value = config.temperature.to_string();
                    return Err(ConfigurationError::InvalidParameter { parameter, value, valid_range }.into());
                }
                engine.honest_generate(prompt, max_tokens, config)
            }))
        },
    ),
    Fault::new(
        "max-new-overflows",
        "prompt and max_new_tokens are added without a look at their size",
        "clause ERR-6",
        "errors/generation_config",
        || {
            Arc::new(Generates(|engine, prompt, max_tokens, config| {
                let room = prompt.len().checked_add(config.max_new_tokens);
                assert!(room.is_some(), "attempt to add with overflow");
                engine.honest_generate(prompt, max_tokens, config)
            }))
        },
    ),
    Fault::new(
        "config-range-unnamed",
        "an error of the configuration does not say what is valid",
        "B9",
        "errors/generation_config",
        || {
            Arc::new(Says(|error| match error {
                InferenceError::Configuration(ConfigurationError::InvalidParameter { parameter, value, .. }) => {
                    let valid_range = "see the documentation".to_string();
                    ConfigurationError::InvalidParameter { parameter, value, valid_range }.into()
                }
                other => other,
            }))
        },
    ),
    Fault::new(
        "prompt-before-config",
        "the prompt is checked before the configuration",
        "clause ERR-7",
        "errors/configuration_first",
        || {
            Arc::new(Generates(|engine, prompt, max_tokens, config| {
                if !prompt.is_empty() {
                    validator(engine).validate_token_sequence(prompt, engine.config().vocab_size)?;
                }
                engine.honest_generate(prompt, max_tokens, config)
            }))
        },
    ),
    Fault::new(
        "greedy-skips-validation",
        "what greedy generation does not use is not validated",
        "clause ERR-7",
        "errors/configuration_first",
        || {
            Arc::new(Configured(|config| {
                if !config.do_sample {
                    (config.top_k, config.top_p) = (None, None);
                }
            }))
        },
    ),
    Fault::new(
        "refused-config-stays",
        "a refused configuration without sampling stays in force for the next generation",
        "clause ERR-8",
        "errors/engine_goes_on",
        || Arc::new(Stays(Mutex::new(false))),
    ),
    Fault::new(
        "broken-after-error",
        "after a refused prompt the engine is unusable",
        "clause ERR-8",
        "errors/engine_goes_on",
        || Arc::new(Broken(Mutex::new(false))),
    ),
    Fault::new(
        "cache-error-unnamed",
        "the error of a full cache names an operation called unknown",
        "B11",
        "errors/context",
        || {
            Arc::new(Says(|error| match error {
                InferenceError::ForwardPass(ForwardPassError::KVCacheError { reason, .. }) => {
                    ForwardPassError::KVCacheError { operation: "unknown".to_string(), reason }.into()
                }
                other => other,
            }))
        },
    ),
    Fault::new(
        "error-with-backtrace",
        "the message of an error goes on with a backtrace",
        "candle errors carry one where the environment asks for it",
        "errors/context",
        || {
            Arc::new(Says(|error| match error {
                InferenceError::ForwardPass(ForwardPassError::InvalidInput { reason }) => {
                    invalid_input(&format!("{reason}\n   0: forward\n   1: main"))
                }
                other => other,
            }))
        },
    ),
];

fn invalid_input(reason: &str) -> InferenceError {
    ForwardPassError::InvalidInput { reason: reason.to_string() }.into()
}

fn validator(engine: &Naive) -> StandardInputValidator {
    StandardInputValidator::new(engine.config().clone(), engine.device().clone())
}

/// Ids that become others, from an id and the size of the vocabulary, before they are checked.
struct Ids(fn(i64, i64) -> i64);

impl Deviation for Ids {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        if ids.rank() != 2 || ids.elem_count() == 0 || !matches!(ids.dtype(), DType::U32 | DType::I64) {
            return engine.honest_forward(ids, cache);
        }
        let vocab = engine.config().vocab_size as i64;
        let changed: Vec<i64> = ids.to_dtype(DType::I64)?.flatten_all()?.to_vec1()?;
        let changed: Vec<i64> = changed.into_iter().map(|id| (self.0)(id, vocab)).collect();
        engine.honest_forward(&Tensor::from_vec(changed, ids.shape(), ids.device())?, cache)
    }

    fn generate(
        &self,
        engine: &mut Naive,
        prompt: &[u32],
        max_tokens: usize,
        config: &GenerationConfig,
    ) -> Result<GenerationResult> {
        let vocab = engine.config().vocab_size as i64;
        let changed: Vec<u32> = prompt.iter().map(|&id| (self.0)(i64::from(id), vocab) as u32).collect();
        let mut result = engine.honest_generate(&changed, max_tokens, config)?;
        result.prompt_tokens = prompt.to_vec();
        Ok(result)
    }
}

/// The position of an invalid token in the flattened batch.
struct PositionInBatch;

impl Deviation for PositionInBatch {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        let vocab = engine.config().vocab_size as i64;
        let error = match engine.honest_forward(ids, cache) {
            Err(InferenceError::Tokenization(error)) => error,
            other => return other,
        };
        Err(match error {
            TokenizationError::InvalidToken { token_id, vocab_size, position } => {
                let all: Vec<i64> = ids.to_dtype(DType::I64)?.flatten_all()?.to_vec1()?;
                let first = all.iter().position(|&id| !(0..vocab).contains(&id)).unwrap_or(position);
                TokenizationError::InvalidToken { position: first, token_id, vocab_size }.into()
            }
            other => other.into(),
        })
    }
}

/// Errors that say something else.
struct Says(fn(InferenceError) -> InferenceError);

impl Deviation for Says {
    fn error(&self, error: InferenceError) -> InferenceError {
        (self.0)(error)
    }
}

/// Element types that are cast to ids.
struct Cast(fn(DType) -> bool);

impl Deviation for Cast {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        match (self.0)(ids.dtype()) {
            true => engine.honest_forward(&ids.to_dtype(DType::U32)?, cache),
            false => engine.honest_forward(ids, cache),
        }
    }
}

/// Ranks that are taken for one sequence.
struct Flattened(fn(usize) -> bool);

impl Deviation for Flattened {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        match (self.0)(ids.rank()) {
            true => engine.honest_forward(&ids.flatten_all()?.unsqueeze(0)?, cache),
            false => engine.honest_forward(ids, cache),
        }
    }
}

/// The configuration is stored before it is validated, and sampling is switched off by one that is refused.
struct Stays(Mutex<bool>);

impl Deviation for Stays {
    fn generate(
        &self,
        engine: &mut Naive,
        prompt: &[u32],
        max_tokens: usize,
        config: &GenerationConfig,
    ) -> Result<GenerationResult> {
        let greedy = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        let refused = validator(engine).validate_generation_config(config).is_err();
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = refused && !config.do_sample;
        let do_sample = config.do_sample && !greedy;
        engine.honest_generate(prompt, max_tokens, &GenerationConfig { do_sample, ..config.clone() })
    }
}

/// An engine whose state is left half changed by a prompt that it refused.
struct Broken(Mutex<bool>);

impl Deviation for Broken {
    fn generate(
        &self,
        engine: &mut Naive,
        prompt: &[u32],
        max_tokens: usize,
        config: &GenerationConfig,
    ) -> Result<GenerationResult> {
        if *self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            let reason = "the engine is in an unusable state".to_string();
            return Err(ForwardPassError::ComputationFailed { component: "generate".to_string(), reason }.into());
        }
        let result = engine.honest_generate(prompt, max_tokens, config);
        let refused = matches!(result, Err(InferenceError::Tokenization(TokenizationError::InvalidToken { .. })));
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = refused;
        result
    }
}
