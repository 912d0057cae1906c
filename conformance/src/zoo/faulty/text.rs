//! Faults of the text: decoding, special tokens, stop texts.

use super::super::Fault;
use super::super::naive::{Deviation, Naive};
use bitnet_contracts::{FinishReason, GenerationConfig, GenerationResult, Result};
use std::sync::Arc;
use tokenizers::Tokenizer;

pub(super) const FAULTS: &[Fault] = &[
    Fault::new(
        "text-by-token",
        "tokens become text one by one, and a character of several tokens is lost",
        "llama-cpp-python #372; aprender PR #2019; ds4 PR #815",
        "generation/text",
        || Arc::new(Text(|tokenizer, tokens| tokens.iter().map(|&t| decode(tokenizer, &[t], true)).collect())),
    ),
    Fault::new(
        "text-cut-at-special",
        "the text ends at its first special token",
        "clause GEN-11",
        "generation/text",
        || {
            Arc::new(Text(|tokenizer, tokens| {
                let special = |token: &u32| decode(tokenizer, &[*token], true).is_empty();
                let end = tokens.iter().position(|t| special(t) && !decode(tokenizer, &[*t], false).is_empty());
                decode(tokenizer, &tokens[..end.unwrap_or(tokens.len())], true)
            }))
        },
    ),
    Fault::new(
        "text-trimmed",
        "white space at the ends of the text is cut off",
        "clause GEN-11",
        "generation/text",
        || Arc::new(Text(|tokenizer, tokens| decode(tokenizer, tokens, true).trim().to_string())),
    ),
    Fault::new(
        "text-of-prompt-too",
        "the text is that of prompt and generated tokens",
        "clause GEN-11",
        "generation/text",
        || {
            Arc::new(Generated(|result, tokenizer| {
                let whole = [result.prompt_tokens.as_slice(), &result.generated_tokens].concat();
                result.generated_text = tokenizer.map_or(String::new(), |t| decode(t, &whole, true));
            }))
        },
    ),
    Fault::new(
        "text-without-tokenizer",
        "without a tokenizer the ids stand for the text",
        "clause GEN-11",
        "generation/no_text",
        || {
            Arc::new(Generated(|result, tokenizer| {
                if tokenizer.is_none() {
                    result.generated_text = result.generated_tokens.iter().map(|t| format!("<{t}>")).collect();
                }
            }))
        },
    ),
    Fault::new(
        "stop-text-within-token",
        "a stop text is looked for within single tokens only",
        "vLLM #3574; mlx-knife #68; SwiftLM PR #132",
        "generation/stop_sequence",
        || {
            Arc::new(StopText(|text, before, stops| {
                let new = text.strip_prefix(before)?;
                find(new, stops).map(|at| before.len() + at)
            }))
        },
    ),
    Fault::new(
        "stop-text-at-end-only",
        "a stop text is looked for at the end of the text only",
        "sglang PR #6511",
        "generation/stop_sequence",
        || {
            Arc::new(StopText(|text, _, stops| {
                stops.iter().find(|stop| text.ends_with(stop.as_str())).map(|stop| text.len() - stop.len())
            }))
        },
    ),
    Fault::new(
        "stop-text-first-only",
        "only the first of several stop texts is honoured",
        "clause GEN-6",
        "generation/stop_sequence",
        || Arc::new(StopText(|text, _, stops| find(text, &stops[..1]))),
    ),
    Fault::new(
        "stop-text-seen-late",
        "a stop text is seen one token after it is complete",
        "vLLM #3574",
        "generation/stop_sequence",
        // Nothing longer than the whole text is cut off.
        || Arc::new(StopText(|text, before, stops| find(before, stops).map(|_| text.len()))),
    ),
    Fault::new(
        "stop-text-never-again",
        "a stop text that began in vain is not looked for inside what was read of it",
        "clause GEN-6: a matcher of one state, without the fallback of Knuth, Morris and Pratt",
        "generation/stop_texts_of_any_length",
        || Arc::new(StopText(|text, _, stops| stops.iter().filter_map(|stop| find_once(text, stop)).min())),
    ),
    Fault::new(
        "stop-text-window",
        "a stop text is looked for in the last nine bytes of the text",
        "clause GEN-6: a window over the newest tokens",
        "generation/stop_texts_of_any_length",
        || {
            Arc::new(StopText(|text, _, stops| {
                let start = text.floor_char_boundary(text.len().saturating_sub(9));
                find(&text[start..], stops).map(|at| start + at)
            }))
        },
    ),
    Fault::new(
        "stop-text-is-stop-token",
        "a stop text is reported as a stop token",
        "clause GEN-6",
        "generation/stop_sequence",
        || {
            Arc::new(Generated(|result, _| {
                if result.finish_reason == FinishReason::StopSequence {
                    result.finish_reason = FinishReason::StopToken;
                }
            }))
        },
    ),
];

fn decode(tokenizer: &Tokenizer, tokens: &[u32], skip_special: bool) -> String {
    tokenizer.decode(tokens, skip_special).unwrap_or_default()
}

fn find(text: &str, stops: &[String]) -> Option<usize> {
    stops.iter().filter_map(|stop| text.find(stop.as_str())).min()
}

/// Reads a text once from left to right, and begins anew behind what did not match.
fn find_once(text: &str, stop: &str) -> Option<usize> {
    let (stop, mut matched) = (stop.as_bytes(), 0);
    for (i, byte) in text.bytes().enumerate() {
        matched = if stop[matched] == byte { matched + 1 } else { usize::from(stop[0] == byte) };
        if matched == stop.len() {
            return Some(i + 1 - stop.len());
        }
    }
    None
}

/// Another text of tokens.
struct Text(fn(&Tokenizer, &[u32]) -> String);

impl Deviation for Text {
    fn text(&self, tokenizer: &Tokenizer, tokens: &[u32]) -> String {
        (self.0)(tokenizer, tokens)
    }
}

/// Another rule for where a stop text begins: from the text, the text one token before, and the stop texts.
struct StopText(fn(&str, &str, &[String]) -> Option<usize>);

impl Deviation for StopText {
    fn stop_text(&self, text: &str, before: &str, config: &GenerationConfig) -> Option<usize> {
        (self.0)(text, before, &config.stop_sequences)
    }
}

/// A result that is changed with the tokenizer at hand.
struct Generated(fn(&mut GenerationResult, Option<&Tokenizer>));

impl Deviation for Generated {
    fn generate(
        &self,
        engine: &mut Naive,
        prompt: &[u32],
        max_tokens: usize,
        config: &GenerationConfig,
    ) -> Result<GenerationResult> {
        let mut result = engine.honest_generate(prompt, max_tokens, config)?;
        (self.0)(&mut result, engine.shared.tokenizer.as_ref());
        Ok(result)
    }
}
