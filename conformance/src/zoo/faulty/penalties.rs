//! Faults of the penalties: what they count, their sign, their order.

use super::super::Fault;
use super::super::naive::{Deviation, Step, sampler};
use bitnet_contracts::GenerationConfig;
use std::sync::Arc;

pub(super) const FAULTS: &[Fault] = &[
    Fault::new(
        "repetition-sign",
        "the repetition penalty divides negative logits too, which makes them likelier",
        "transformers #2302; NeMo #8194; higgs PR #32",
        "sampling/repetition_penalty",
        || Arc::new(Penalties(|scores, sequence, _, config| divide_all(scores, sequence, config))),
    ),
    Fault::new(
        "repetition-each-time",
        "the repetition penalty is applied once for every occurrence",
        "candle apply_repeat_penalty",
        "sampling/repetition_penalty",
        || {
            Arc::new(Penalties(|scores, sequence, _, config| {
                let repetition = f64::from(config.repetition_penalty);
                for &token in sequence {
                    if let Some(score) = scores.get_mut(token as usize) {
                        *score = if *score > 0.0 { *score / repetition } else { *score * repetition };
                    }
                }
                sampler::penalise(scores, sequence, &GenerationConfig { repetition_penalty: 1.0, ..config.clone() });
            }))
        },
    ),
    Fault::new(
        "penalties-skip-prompt",
        "penalties count generated tokens only",
        "candle apply_repeat_penalty",
        "sampling/penalty_scope",
        || {
            Arc::new(Penalties(|scores, sequence, prompt, config| {
                sampler::penalise(scores, &sequence[prompt..], config);
            }))
        },
    ),
    Fault::new(
        "penalties-skip-generated",
        "penalties count the prompt only",
        "clause SMP-7",
        "sampling/penalty_scope",
        || {
            Arc::new(Penalties(|scores, sequence, prompt, config| {
                sampler::penalise(scores, &sequence[..prompt], config);
            }))
        },
    ),
    Fault::new(
        "penalties-last-64",
        "penalties look back by 64 tokens",
        "llama.cpp repeat_last_n and candle repeat_last_n default to 64",
        "sampling/penalty_scope",
        || {
            Arc::new(Penalties(|scores, sequence, _, config| {
                sampler::penalise(scores, &sequence[sequence.len().saturating_sub(64)..], config);
            }))
        },
    ),
    Fault::new(
        "presence-before-repetition",
        "frequency and presence penalties are subtracted before the repetition penalty",
        "clause SMP-7",
        "sampling/frequency_and_presence",
        || {
            Arc::new(Penalties(|scores, sequence, _, config| {
                let rest = GenerationConfig { repetition_penalty: 1.0, ..config.clone() };
                sampler::penalise(scores, sequence, &rest);
                let (frequency_penalty, presence_penalty) = (0.0, 0.0);
                let first = GenerationConfig { frequency_penalty, presence_penalty, ..config.clone() };
                sampler::penalise(scores, sequence, &first);
            }))
        },
    ),
    Fault::new(
        "frequency-as-presence",
        "the frequency penalty is subtracted once, however often a token was seen",
        "clause SMP-8",
        "sampling/frequency_and_presence",
        || {
            Arc::new(Penalties(|scores, sequence, _, config| {
                let presence_penalty = config.presence_penalty + config.frequency_penalty;
                let config = GenerationConfig { presence_penalty, frequency_penalty: 0.0, ..config.clone() };
                sampler::penalise(scores, sequence, &config);
            }))
        },
    ),
    Fault::new(
        "presence-as-frequency",
        "the presence penalty is subtracted for every occurrence",
        "clause SMP-8",
        "sampling/frequency_and_presence",
        || {
            Arc::new(Penalties(|scores, sequence, _, config| {
                let frequency_penalty = config.presence_penalty + config.frequency_penalty;
                let config = GenerationConfig { presence_penalty: 0.0, frequency_penalty, ..config.clone() };
                sampler::penalise(scores, sequence, &config);
            }))
        },
    ),
    Fault::new(
        "presence-clamped",
        "a negative presence penalty counts as 0",
        "clause SMP-8",
        "sampling/frequency_and_presence",
        || {
            Arc::new(Penalties(|scores, sequence, _, config| {
                let presence_penalty = config.presence_penalty.max(0.0);
                sampler::penalise(scores, sequence, &GenerationConfig { presence_penalty, ..config.clone() });
            }))
        },
    ),
    Fault::new(
        "filters-before-penalties",
        "top_k and top_p are taken from the logits before penalties",
        "clause SMP-8",
        "sampling/frequency_and_presence",
        || Arc::new(FiltersFirst),
    ),
    Fault::new(
        "greedy-without-penalties",
        "greedy generation knows no penalties",
        "clause SMP-7",
        "sampling/penalty_scope",
        || {
            Arc::new(Penalties(|scores, sequence, _, config| {
                if config.do_sample {
                    sampler::penalise(scores, sequence, config);
                }
            }))
        },
    ),
];

fn divide_all(scores: &mut [f64], sequence: &[u32], config: &GenerationConfig) {
    let mut seen = sequence.to_vec();
    seen.sort_unstable();
    seen.dedup();
    for token in seen {
        if let Some(score) = scores.get_mut(token as usize) {
            *score /= f64::from(config.repetition_penalty);
        }
    }
    sampler::penalise(scores, sequence, &GenerationConfig { repetition_penalty: 1.0, ..config.clone() });
}

/// Penalties by another rule: scores, sequence, how much of it is the prompt, configuration.
struct Penalties(fn(&mut [f64], &[u32], usize, &GenerationConfig));

impl Deviation for Penalties {
    fn penalise(&self, scores: &mut [f64], sequence: &[u32], prompt: usize, config: &GenerationConfig) {
        (self.0)(scores, sequence, prompt, config);
    }
}

/// The tokens that the filters keep of the logits as they were, with their penalised weights.
struct FiltersFirst;

impl Deviation for FiltersFirst {
    fn choose(&self, step: &mut Step<'_>) -> Option<u32> {
        let config = step.config;
        if self.is_greedy(config) || (config.top_k.is_none() && config.top_p.is_none()) || config.top_k == Some(1) {
            return None;
        }
        let raw: Vec<f64> = step.logits.iter().map(|&l| f64::from(l)).collect();
        let mut scores = raw.clone();
        sampler::penalise(&mut scores, step.sequence, config);
        let kept = sampler::candidates(&raw, config);
        let mut weighted = sampler::softmax(&scores, f64::from(config.temperature));
        weighted.retain(|(token, _)| kept.iter().any(|(k, _)| k == token) && !step.forbidden.contains(token));
        Some(sampler::draw(&weighted, step.rng))
    }
}
