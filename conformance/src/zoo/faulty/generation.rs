//! Faults of the decode loop: limits, stop rules, results, and what one generation leaves for the next.

use super::super::Fault;
use super::super::naive::{Deviation, Naive};
use super::Generates;
use bitnet_contracts::{BitNetInference, FinishReason, GenerationConfig, GenerationResult, Result};
use std::sync::{Arc, Mutex, PoisonError};

pub(super) const FAULTS: &[Fault] = &[
    Fault::new(
        "max-new-ignored",
        "only max_tokens limits a generation",
        "clause GEN-1",
        "generation/two_limits",
        || Arc::new(Limits(|max_tokens, _| max_tokens, total)),
    ),
    Fault::new(
        "max-tokens-off-by-one",
        "where max_tokens is the smaller limit, one token more comes",
        "transformers #20814",
        "generation/two_limits",
        || {
            Arc::new(Limits(
                |max_tokens, config| match max_tokens < config.max_new_tokens {
                    true => max_tokens + 1,
                    false => config.max_new_tokens,
                },
                total,
            ))
        },
    ),
    Fault::new(
        "max-total-ignored",
        "max_total_tokens limits nothing",
        "clause GEN-2",
        "generation/context_full",
        || Arc::new(Limits(new, |_, positions| positions)),
    ),
    Fault::new(
        "context-short-by-one",
        "generation ends one position before the context does",
        "llama.cpp #2754",
        "generation/context_full",
        || Arc::new(Limits(new, |config, positions| config.max_total_tokens.min(positions - 1))),
    ),
    Fault::new(
        "context-full-is-max-tokens",
        "a full context is reported as the limit of tokens",
        "clause GEN-2",
        "generation/context_full",
        || {
            Arc::new(Finished(|result, _| {
                if result.finish_reason == FinishReason::ContextFull {
                    result.finish_reason = FinishReason::MaxTokens;
                }
            }))
        },
    ),
    Fault::new(
        "stop-first-only",
        "only the first of several stop tokens is honoured",
        "text-generation-webui #5885; transformers #31362",
        "generation/stop_token",
        || {
            Arc::new(Stops(|token, _, config, eos| match config.stop_tokens.first() == Some(&token) {
                true => Some(FinishReason::StopToken),
                false => eos.contains(&token).then_some(FinishReason::EndOfSequence),
            }))
        },
    ),
    Fault::new(
        "stop-not-first",
        "a stop token that comes first of all is passed over",
        "clause GEN-3",
        "generation/stop_token",
        || {
            Arc::new(Stops(|token, made, config, eos| match config.stop_tokens.contains(&token) {
                true => (made > 0).then_some(FinishReason::StopToken),
                false => eos.contains(&token).then_some(FinishReason::EndOfSequence),
            }))
        },
    ),
    Fault::new(
        "stop-included",
        "the stop token is part of the output",
        "MLPerf #1545",
        "generation/stop_token",
        || Arc::new(StopIncluded(Mutex::default())),
    ),
    Fault::new(
        "stop-in-prompt",
        "a stop token in the prompt ends the generation before its first token",
        "clause GEN-3",
        "generation/stop_token",
        || {
            Arc::new(Generates(|engine, prompt, max_tokens, config| {
                let mut result = engine.honest_generate(prompt, max_tokens, config)?;
                if prompt.iter().any(|token| config.stop_tokens.contains(token)) {
                    cut(&mut result, 0);
                    result.finish_reason = FinishReason::StopToken;
                }
                Ok(result)
            }))
        },
    ),
    Fault::new(
        "eos-in-prompt",
        "eos_token_id in the prompt ends the generation before its first token",
        "clause GEN-4",
        "generation/end_of_sequence",
        || {
            Arc::new(Generates(|engine, prompt, max_tokens, config| {
                let mut result = engine.honest_generate(prompt, max_tokens, config)?;
                if config.eos_token_id.is_some_and(|eos| prompt.contains(&eos)) {
                    cut(&mut result, 0);
                    result.finish_reason = FinishReason::EndOfSequence;
                }
                Ok(result)
            }))
        },
    ),
    Fault::new(
        "eos-is-stop-token",
        "eos_token_id is reported as a stop token",
        "clause GEN-4",
        "generation/end_of_sequence",
        || {
            Arc::new(Stops(|token, _, config, eos| {
                let ends = config.stop_tokens.contains(&token) || config.eos_token_id == Some(token);
                match ends {
                    true => Some(FinishReason::StopToken),
                    false => eos.contains(&token).then_some(FinishReason::EndOfSequence),
                }
            }))
        },
    ),
    Fault::new(
        "eos-id-ignored",
        "eos_token_id is not looked at where the model has an end-of-sequence token of its own",
        "clause GEN-4",
        "generation/end_of_sequence",
        || Arc::new(Eos(|_, own| own.to_vec())),
    ),
    Fault::new(
        "eos-first-only",
        "only the first of the model's own end-of-sequence tokens is honoured",
        "vLLM #4180; TensorRT-LLM #2120",
        "generation/own_end_of_sequence",
        || Arc::new(Eos(|config, own| config.eos_token_id.or(own.first().copied()).into_iter().collect())),
    ),
    Fault::new(
        "min-new-ignored",
        "min_new_tokens holds no stop rule back",
        "clause GEN-5",
        "generation/min_new_tokens",
        || Arc::new(Held(|_, _, _, _| Vec::new())),
    ),
    Fault::new(
        "min-new-counts-prompt",
        "min_new_tokens counts the prompt as well",
        "transformers #20814",
        "generation/min_new_tokens",
        || {
            Arc::new(Held(|made, prompt, config, eos| match made + prompt < config.min_new_tokens {
                true => config.stop_tokens.iter().chain(eos).copied().collect(),
                false => Vec::new(),
            }))
        },
    ),
    Fault::new(
        "min-new-holds-stop-tokens-only",
        "min_new_tokens does not hold back eos_token_id",
        "clause GEN-5",
        "generation/min_new_tokens",
        || {
            Arc::new(Held(|made, _, config, _| match made < config.min_new_tokens {
                true => config.stop_tokens.clone(),
                false => Vec::new(),
            }))
        },
    ),
    Fault::new(
        "first-id-is-padding",
        "the first id of the vocabulary is taken for padding in a prompt and left out",
        "unsloth #3699",
        "generation/greedy_is_argmax",
        || {
            Arc::new(Generates(|engine, prompt, max_tokens, config| {
                let kept: Vec<u32> = prompt.iter().copied().filter(|&token| token > 0).collect();
                if kept.is_empty() {
                    return engine.honest_generate(prompt, max_tokens, config);
                }
                let mut result = engine.honest_generate(&kept, max_tokens, config)?;
                result.prompt_tokens = prompt.to_vec();
                Ok(result)
            }))
        },
    ),
    Fault::new(
        "double-bos",
        "a beginning-of-text token is put before every prompt",
        "llama.cpp PR #7107, #7332; llama-cpp-python #1501",
        "generation/greedy_is_argmax",
        || {
            Arc::new(Generates(|engine, prompt, max_tokens, config| {
                let whole: Vec<u32> = bos(engine).into_iter().chain(prompt.iter().copied()).collect();
                let room = whole.len() <= engine.config().max_position_embeddings;
                if prompt.is_empty() || !room {
                    return engine.honest_generate(prompt, max_tokens, config);
                }
                let mut result = engine.honest_generate(&whole, max_tokens, config)?;
                result.prompt_tokens = prompt.to_vec();
                Ok(result)
            }))
        },
    ),
    Fault::new(
        "prompt-with-bos",
        "prompt_tokens begins with a token that the caller did not give",
        "llama-cpp-python #1501",
        "generation/result_is_true",
        || Arc::new(Finished(|result, _| result.prompt_tokens.insert(0, 1))),
    ),
    Fault::new(
        "tokens-counted-with-end",
        "times are given for one token more than came",
        "MLPerf PR #1556",
        "generation/result_is_true",
        || {
            Arc::new(Finished(|result, _| {
                let last = result.timing.per_token.last().copied();
                result.timing.per_token.extend(last.map(|time| time / 1000));
            }))
        },
    ),
    Fault::new(
        "goes-on-from-last",
        "a generation continues the sequence of the last one",
        "candle PR #3381, #2819",
        "generation/clean_state",
        || {
            Arc::new(AfterAnother(Mutex::default(), |last, prompt, room| {
                let whole = [last, prompt].concat();
                if whole.len() <= room { whole } else { prompt.to_vec() }
            }))
        },
    ),
    Fault::new(
        "next-turn-skips-a-token",
        "a prompt that begins with the last sequence is taken to be held to its end, whose last token was never read",
        "llama.cpp #28527; vLLM #5543",
        "generation/clean_state",
        || {
            Arc::new(AfterAnother(Mutex::default(), |last, prompt, _| {
                match !last.is_empty() && prompt.len() > last.len() && prompt.starts_with(last) {
                    true => [&last[..last.len() - 1], &prompt[last.len()..]].concat(),
                    false => prompt.to_vec(),
                }
            }))
        },
    ),
    Fault::new(
        "no-cache-forgets-prompt",
        "without a cache each step computes the generated tokens only",
        "clause GEN-10",
        "generation/cache_and_chunks_do_not_show",
        || Arc::new(ForgetsPrompt),
    ),
    Fault::new(
        "piece-of-the-whole-prompt",
        "with a prefill_chunk_size of exactly the prompt's length its last token is not seen",
        "clause GEN-10: a comparison that is off by one",
        "generation/cache_and_chunks_do_not_show",
        || {
            Arc::new(Generates(|engine, prompt, max_tokens, config| {
                let seen = match config.prefill_chunk_size {
                    Some(size) if size == prompt.len() && size > 1 => &prompt[..size - 1],
                    _ => prompt,
                };
                let mut result = engine.honest_generate(seen, max_tokens, config)?;
                result.prompt_tokens = prompt.to_vec();
                Ok(result)
            }))
        },
    ),
    Fault::new(
        "last-chunk-dropped",
        "the last piece of a prompt is dropped where it is smaller than the others",
        "clause GEN-10",
        "generation/cache_and_chunks_do_not_show",
        || {
            Arc::new(Generates(|engine, prompt, max_tokens, config| {
                let whole = config.prefill_chunk_size.map_or(prompt.len(), |size| prompt.len() / size.max(1) * size);
                let mut result = match whole {
                    0 => return engine.honest_generate(prompt, max_tokens, config),
                    whole => engine.honest_generate(&prompt[..whole], max_tokens, config)?,
                };
                result.prompt_tokens = prompt.to_vec();
                Ok(result)
            }))
        },
    ),
];

fn new(max_tokens: usize, config: &GenerationConfig) -> usize {
    max_tokens.min(config.max_new_tokens)
}

fn total(config: &GenerationConfig, positions: usize) -> usize {
    config.max_total_tokens.min(positions)
}

fn bos(engine: &Naive) -> Option<u32> {
    engine.shared.weights.facts.bos
}

fn cut(result: &mut GenerationResult, len: usize) {
    result.generated_tokens.truncate(len);
    result.timing.per_token.truncate(len);
    result.generated_text.clear();
}

/// Other limits: of new tokens, and of tokens in all.
struct Limits(fn(usize, &GenerationConfig) -> usize, fn(&GenerationConfig, usize) -> usize);

impl Deviation for Limits {
    fn new_limit(&self, max_tokens: usize, config: &GenerationConfig) -> usize {
        (self.0)(max_tokens, config)
    }

    fn total_limit(&self, config: &GenerationConfig, positions: usize) -> usize {
        (self.1)(config, positions)
    }
}

type Rule = fn(u32, usize, &GenerationConfig, &[u32]) -> Option<FinishReason>;

/// Another rule for the tokens that end a text.
struct Stops(Rule);

impl Deviation for Stops {
    fn ends(&self, token: u32, made: usize, config: &GenerationConfig, eos: &[u32]) -> Option<FinishReason> {
        (self.0)(token, made, config, eos)
    }
}

/// Other tokens for the end of a sequence, from the configuration and the model's own.
struct Eos(fn(&GenerationConfig, &[u32]) -> Vec<u32>);

impl Deviation for Eos {
    fn end_of_sequence(&self, config: &GenerationConfig, own: &[u32]) -> Vec<u32> {
        (self.0)(config, own)
    }
}

/// Other tokens held back, after so many generated ones and such a prompt.
struct Held(fn(usize, usize, &GenerationConfig, &[u32]) -> Vec<u32>);

impl Deviation for Held {
    fn forbidden(&self, made: usize, prompt: usize, config: &GenerationConfig, eos: &[u32]) -> Vec<u32> {
        (self.0)(made, prompt, config, eos)
    }
}

/// The token that ended the text, kept until the result is made.
struct StopIncluded(Mutex<Option<u32>>);

impl Deviation for StopIncluded {
    fn ends(&self, token: u32, _: usize, config: &GenerationConfig, eos: &[u32]) -> Option<FinishReason> {
        let stopped = config.stop_tokens.contains(&token);
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = stopped.then_some(token);
        match stopped {
            true => Some(FinishReason::StopToken),
            false => eos.contains(&token).then_some(FinishReason::EndOfSequence),
        }
    }

    fn result(&self, result: &mut GenerationResult, _: &GenerationConfig) {
        let token = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        if result.finish_reason == FinishReason::StopToken {
            result.generated_tokens.extend(token);
        }
    }
}

/// A result that is changed once it is made.
struct Finished(fn(&mut GenerationResult, &GenerationConfig));

impl Deviation for Finished {
    fn result(&self, result: &mut GenerationResult, config: &GenerationConfig) {
        (self.0)(result, config);
    }
}

/// What is evaluated, from the last sequence, the prompt and the positions there are.
type After = fn(&[u32], &[u32], usize) -> Vec<u32>;

/// An engine that keeps its last sequence and makes something of it.
struct AfterAnother(Mutex<Vec<u32>>, After);

impl Deviation for AfterAnother {
    fn generate(
        &self,
        engine: &mut Naive,
        prompt: &[u32],
        max_tokens: usize,
        config: &GenerationConfig,
    ) -> Result<GenerationResult> {
        let last = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        let room = engine.config().max_position_embeddings;
        let evaluated = if prompt.is_empty() { Vec::new() } else { (self.1)(&last, prompt, room) };
        let mut result = engine.honest_generate(&evaluated, max_tokens, config)?;
        result.prompt_tokens = prompt.to_vec();
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = [prompt, &result.generated_tokens].concat();
        Ok(result)
    }
}

/// Without a cache the prompt is not computed again.
struct ForgetsPrompt;

impl Deviation for ForgetsPrompt {
    fn recomputes_from(&self, prompt: usize) -> usize {
        prompt
    }
}
