//! Samplers and decode loops that are right in another way: what the contracts leave open.

use super::super::HonestVariant;
use super::super::naive::{Deviation, Honest, SplitMix, Step, sampler};
use crate::backend::Semantics;
use bitnet_contracts::{FinishReason, GenerationConfig};
use std::sync::Arc;

pub(super) const VARIANTS: &[HonestVariant] = &[
    variant("draw-pcg", "another generator of random numbers: PCG with 32 bits of output", || {
        Arc::new(Draw(|kept, rng| {
            let mut pcg = Pcg::new(next_seed(rng));
            at(kept, f64::from(pcg.next()) / 4_294_967_296.0)
        }))
    }),
    variant("draw-by-id", "the cumulated probabilities run by id, not by weight", || {
        Arc::new(Draw(|kept, rng| {
            let mut kept = kept.to_vec();
            kept.sort_by_key(|&(token, _)| token);
            at(&kept, rng.uniform())
        }))
    }),
    variant("draw-from-the-end", "the cumulated probabilities run from the least likely token", || {
        Arc::new(Draw(|kept, rng| {
            let kept: Vec<(u32, f64)> = kept.iter().rev().copied().collect();
            at(&kept, rng.uniform())
        }))
    }),
    variant(
        "draw-gumbel",
        "the largest of the logarithms of weights with Gumbel noise, one number a candidate",
        || Arc::new(Draw(gumbel)),
    ),
    variant("softmax-f32", "softmax and sums in f32, candidates by partial sort", || Arc::new(SoftmaxF32)),
    variant("resamples", "tokens held back for min_new_tokens are avoided by drawing again", || Arc::new(Resamples)),
    variant("no-own-eos", "with no eos_token_id given, no token is the end of sequence", || Arc::new(NoOwnEos)),
    variant("eos-added", "an eos_token_id given is one more beside the model's own", || Arc::new(EosAdded)),
    variant("keeps-stop-text", "the tokens of a stop text stay in the output", || Arc::new(KeepsStopText)),
    variant("text-with-special", "special tokens are written out in the text", || Arc::new(TextWithSpecial)),
    variant("max-total-is-max-tokens", "max_total_tokens is reported as MaxTokens", || Arc::new(TotalIsMaxTokens)),
];

const fn variant(name: &'static str, what: &'static str, make: fn() -> Arc<dyn Deviation>) -> HonestVariant {
    HonestVariant { name, what, declare: |c| c, semantics: Semantics::W158A8, make }
}

/// A seed for another generator, from the engine's own.
fn next_seed(rng: &mut SplitMix) -> u64 {
    rng.uniform();
    rng.0
}

/// The candidate at a share of the whole weight.
fn at(kept: &[(u32, f64)], share: f64) -> u32 {
    let mut left = share * kept.iter().map(|(_, w)| w).sum::<f64>();
    let reached = kept.iter().filter(|(_, w)| *w > 0.0).find(|(_, w)| {
        left -= w;
        left < 0.0
    });
    let last = kept.iter().rfind(|(_, w)| *w > 0.0);
    reached.or(last).map_or(0, |&(token, _)| token)
}

/// PCG XSH RR 64/32 (O'Neill 2014).
struct Pcg(u64);

impl Pcg {
    fn new(seed: u64) -> Self {
        let mut pcg = Self(seed.wrapping_add(1_442_695_040_888_963_407));
        pcg.next();
        pcg
    }

    fn next(&mut self) -> u32 {
        let old = self.0;
        self.0 = old.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((((old >> 18) ^ old) >> 27) as u32).rotate_right((old >> 59) as u32)
    }
}

fn gumbel(kept: &[(u32, f64)], rng: &mut SplitMix) -> u32 {
    let mut best = (0, f64::NEG_INFINITY);
    for &(token, weight) in kept {
        // Between 0 and 1, both excluded.
        let number = (rng.uniform() + f64::MIN_POSITIVE).min(1.0 - f64::EPSILON);
        let value = weight.ln() - (-number.ln()).ln();
        if value > best.1 {
            best = (token, value);
        }
    }
    best.0
}

/// Another way to draw.
struct Draw(fn(&[(u32, f64)], &mut SplitMix) -> u32);

impl Deviation for Draw {
    fn draw(&self, kept: &[(u32, f64)], rng: &mut SplitMix, _: usize) -> u32 {
        (self.0)(kept, rng)
    }
}

/// The filters in f32, without a full sort where top_k is set.
struct SoftmaxF32;

impl Deviation for SoftmaxF32 {
    fn candidates(&self, scores: &[f64], config: &GenerationConfig) -> Vec<(u32, f64)> {
        let mut kept: Vec<(u32, f32)> = (0u32..).zip(scores.iter().map(|&s| s as f32)).collect();
        let falling = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        if let Some(k) = config.top_k.filter(|&k| k < kept.len()) {
            kept.select_nth_unstable_by(k - 1, falling);
            kept.truncate(k);
        }
        kept.sort_unstable_by(falling);
        let largest = kept.first().map_or(0.0, |k| k.1);
        let mut kept: Vec<(u32, f32)> =
            kept.into_iter().map(|(token, s)| (token, ((s - largest) / config.temperature).exp())).collect();
        if let Some(p) = config.top_p.filter(|&p| p < 1.0) {
            let total: f32 = kept.iter().map(|(_, w)| w).sum();
            let mut mass = 0.0;
            let reached = kept.iter().position(|(_, w)| {
                mass += w / total;
                mass >= p
            });
            kept.truncate(reached.map_or(kept.len(), |last| last + 1));
        }
        kept.into_iter().map(|(token, weight)| (token, f64::from(weight))).collect()
    }
}

/// Draws with nothing held back until a token comes that may come; after many vain draws the others are held back.
struct Resamples;

impl Deviation for Resamples {
    fn choose(&self, step: &mut Step<'_>) -> Option<u32> {
        for _ in 0..20 {
            let Step { config, logits, sequence, prompt, .. } = *step;
            let mut free = Step { config, rng: &mut *step.rng, logits, sequence, prompt, forbidden: &[] };
            let token = sampler::next_token(&Honest, &mut free);
            if !step.forbidden.contains(&token) {
                return Some(token);
            }
        }
        None
    }
}

/// Only what the caller names ends a text.
struct NoOwnEos;

impl Deviation for NoOwnEos {
    fn end_of_sequence(&self, config: &GenerationConfig, _: &[u32]) -> Vec<u32> {
        config.eos_token_id.into_iter().collect()
    }
}

/// What the caller names and what the model names end a text.
struct EosAdded;

impl Deviation for EosAdded {
    fn end_of_sequence(&self, config: &GenerationConfig, own: &[u32]) -> Vec<u32> {
        config.eos_token_id.into_iter().chain(own.iter().copied()).collect()
    }
}

struct TextWithSpecial;

impl Deviation for TextWithSpecial {
    fn text(&self, tokenizer: &tokenizers::Tokenizer, tokens: &[u32]) -> String {
        tokenizer.decode(tokens, false).unwrap_or_default()
    }
}

/// A stop text ends the text and is the end of it.
struct KeepsStopText;

impl Deviation for KeepsStopText {
    fn stop_text(&self, text: &str, _: &str, config: &GenerationConfig) -> Option<usize> {
        config.stop_sequences.iter().any(|stop| text.contains(stop.as_str())).then_some(text.len())
    }
}

/// A total that the caller sets is a limit of tokens like any other; the context's end is still said.
struct TotalIsMaxTokens;

impl Deviation for TotalIsMaxTokens {
    fn result(&self, result: &mut bitnet_contracts::GenerationResult, config: &GenerationConfig) {
        let total = result.prompt_tokens.len() + result.generated_tokens.len();
        if result.finish_reason == FinishReason::ContextFull && total >= config.max_total_tokens {
            result.finish_reason = FinishReason::MaxTokens;
        }
    }
}
