//! Faults of the sampler: what may be drawn, with what weight, and how it is drawn.

use super::super::Fault;
use super::super::naive::sampler::{self, nucleus, softmax};
use super::super::naive::{At, Deviation, SplitMix};
use bitnet_contracts::GenerationConfig;
use std::sync::{Arc, Mutex, PoisonError};

pub(super) const FAULTS: &[Fault] = &[
    Fault::new(
        "top-p-extra",
        "top_p keeps one token more than the one that reaches it",
        "transformers #18976; llama.cpp PR #1953",
        "sampling/top_p",
        || Arc::new(Candidates(|scores, config| filtered(scores, config, 1, 0))),
    ),
    Fault::new(
        "top-p-short",
        "top_p drops the token that reaches it",
        "ChatRWKV PR #170; llama.cpp PR #1953",
        "sampling/top_p",
        || Arc::new(Candidates(|scores, config| filtered(scores, config, -1, 0))),
    ),
    Fault::new(
        "top-p-tiny-is-none",
        "a top_p below 0.001 counts as none",
        "candle LogitsProcessor: top_p <= 0 filters nothing",
        "sampling/top_p",
        || {
            Arc::new(Candidates(|scores, config| {
                let top_p = config.top_p.filter(|&p| p >= 1e-3);
                sampler::candidates(scores, &GenerationConfig { top_p, ..config.clone() })
            }))
        },
    ),
    Fault::new(
        "top-p-one-is-default",
        "a top_p of 1 counts as not given, and the default of 0.95 is taken",
        "clause SMP-1",
        "sampling/plain_frequencies",
        || {
            Arc::new(Candidates(|scores, config| {
                let top_p = config.top_p.map(|p| if p == 1.0 { 0.95 } else { p });
                sampler::candidates(scores, &GenerationConfig { top_p, ..config.clone() })
            }))
        },
    ),
    Fault::new(
        "top-k-then-p-unnormalised",
        "top_p counts the mass of all tokens, top_k or not",
        "mlx-lm PR #388; candle TopKThenTopP",
        "sampling/order_of_filters",
        || Arc::new(Candidates(unnormalised)),
    ),
    Fault::new(
        "filters-before-temperature",
        "top_p is taken at temperature 1",
        "clause SMP-5",
        "sampling/order_of_filters",
        || Arc::new(Candidates(filters_before_temperature)),
    ),
    Fault::new("top-k-extra", "top_k keeps k + 1 tokens", "clause SMP-3", "sampling/top_k", || {
        Arc::new(Candidates(|scores, config| filtered(scores, config, 0, 1)))
    }),
    Fault::new(
        "top-k-keeps-ties",
        "top_k keeps every token that is as likely as the last one kept",
        "transformers TopKLogitsWarper compares with the k-th value",
        "sampling/top_k",
        || Arc::new(Candidates(top_k_with_ties)),
    ),
    Fault::new(
        "top-k-wraps",
        "a top_k beyond the vocabulary is taken modulo its size",
        "clause SMP-1",
        "sampling/plain_frequencies",
        || {
            Arc::new(Candidates(|scores, config| {
                let top_k = config.top_k.map(|k| if k > scores.len() { k % scores.len() } else { k });
                sampler::candidates(scores, &GenerationConfig { top_k, ..config.clone() })
            }))
        },
    ),
    Fault::new("temperature-squared", "temperature divides twice", "clause SMP-2", "sampling/temperature", || {
        Arc::new(Candidates(|scores, config| at_temperature(scores, config, config.temperature * config.temperature)))
    }),
    Fault::new(
        "temperature-ignored-with-top-k",
        "with top_k set the temperature is not applied",
        "clause SMP-5",
        "sampling/top_k",
        || {
            Arc::new(Candidates(|scores, config| {
                at_temperature(scores, config, if config.top_k.is_some() { 1.0 } else { config.temperature })
            }))
        },
    ),
    Fault::new(
        "temperature-low-is-greedy",
        "a temperature below 0.3 counts as 0",
        "vLLM takes small temperatures for greedy",
        "sampling/temperature",
        || Arc::new(Greedy(|config| !config.do_sample || config.temperature < 0.3)),
    ),
    Fault::new(
        "temperature-overflows",
        "logits are divided by the temperature in f32 before the largest is subtracted",
        "gemma #562; nanoGPT #738",
        "sampling/extreme_temperature",
        || Arc::new(Candidates(overflowing)),
    ),
    Fault::new(
        "temperature-zero-is-one",
        "a temperature of 0 counts as not given: it samples at 1",
        "nanoGPT PR #739",
        "generation/greedy_is_argmax",
        || Arc::new(ZeroIsOne),
    ),
    Fault::new(
        "do-sample-ignored",
        "do_sample false samples where the temperature is not 0",
        "clause GEN-8",
        "generation/greedy_is_argmax",
        || Arc::new(Greedy(|config| config.temperature == 0.0)),
    ),
    Fault::new(
        "default-greedy",
        "a configuration of defaults is taken for greedy",
        "tpu-inference #1386",
        "sampling/defaults_sample",
        || {
            Arc::new(Greedy(|config| {
                let defaults = GenerationConfig::default();
                let untouched = (config.temperature, config.top_k, config.top_p)
                    == (defaults.temperature, defaults.top_k, defaults.top_p);
                untouched || !config.do_sample || config.temperature == 0.0
            }))
        },
    ),
    Fault::new(
        "ties-highest",
        "greedy takes the highest id among equal maxima",
        "flashinfer PR #3774",
        "sampling/ties",
        || Arc::new(TiesHighest),
    ),
    Fault::new(
        "seed-ignored",
        "every generation takes a new seed",
        "llama.cpp #7381; vLLM #51226",
        "determinism/same_seed",
        || Arc::new(Seed(|_, serial| serial)),
    ),
    Fault::new(
        "seed-constant",
        "every generation takes the same seed",
        "llama.cpp #3460",
        "determinism/seeds_differ",
        || Arc::new(Seed(|_, _| 42)),
    ),
    Fault::new(
        "seed-32-bits",
        "the upper half of a seed is dropped",
        "vLLM PR #2514",
        "determinism/seeds_differ",
        || Arc::new(Seed(|seed, serial| seed.map_or(serial, |s| s & 0xffff_ffff))),
    ),
    Fault::new(
        "no-seed-is-zero",
        "without a seed every generation takes 0",
        "clause SMP-9",
        "sampling/defaults_sample",
        || Arc::new(Seed(|seed, _| seed.unwrap_or(0))),
    ),
    Fault::new(
        "draw-biased",
        "the random number is squared: likely tokens come too often",
        "clause SMP-1",
        "sampling/plain_frequencies",
        || Arc::new(Draw(|kept, rng, _| at(kept, rng.uniform().powi(2)))),
    ),
    Fault::new("draw-never-last", "the last candidate is never drawn", "clause SMP-3", "sampling/top_k", || {
        Arc::new(Draw(|kept, rng, _| sampler::draw(&kept[..(kept.len() - 1).max(1)], rng)))
    }),
    Fault::new("draw-coarse", "the random number has four bits", "clause SMP-1", "sampling/plain_frequencies", || {
        Arc::new(Draw(|kept, rng, _| at(kept, (rng.uniform() * 16.0).floor() / 16.0)))
    }),
    Fault::new(
        "draw-repeats",
        "every step of a generation takes the same random number",
        "tt-inference-server #4002",
        "sampling/every_step",
        || Arc::new(Draw(|kept, rng, _| at(kept, rng.clone().uniform()))),
    ),
    Fault::new(
        "draw-in-pairs",
        "the random number is renewed at every second step",
        "clause SMP-10",
        "sampling/every_step",
        || {
            Arc::new(Draw(|kept, rng, step| {
                let number = rng.clone().uniform();
                if step % 2 == 1 {
                    rng.uniform();
                }
                at(kept, number)
            }))
        },
    ),
    Fault::new(
        "logits-row-off-by-one",
        "a token is drawn from the logits of the position before",
        "llama-cpp-python PR #1179",
        "generation/greedy_is_argmax",
        || Arc::new(RowBefore(Mutex::default())),
    ),
];

/// The candidate at a share of the whole weight.
fn at(kept: &[(u32, f64)], share: f64) -> u32 {
    let mut left = share * kept.iter().map(|(_, w)| w).sum::<f64>();
    let reached = kept.iter().find(|(_, w)| {
        left -= w;
        left < 0.0
    });
    reached.or(kept.last()).map_or(0, |&(token, _)| token)
}

/// The honest filters at another temperature.
fn at_temperature(scores: &[f64], config: &GenerationConfig, temperature: f32) -> Vec<(u32, f64)> {
    sampler::candidates(scores, &GenerationConfig { temperature, ..config.clone() })
}

/// The honest filters with so many tokens more or less behind each.
fn filtered(scores: &[f64], config: &GenerationConfig, more_p: isize, more_k: usize) -> Vec<(u32, f64)> {
    let mut kept = softmax(scores, f64::from(config.temperature));
    kept.truncate(config.top_k.unwrap_or(usize::MAX).saturating_add(more_k));
    if let Some(p) = config.top_p.map(f64::from).filter(|&p| p < 1.0) {
        let (total, mut cut) = (kept.iter().map(|(_, w)| w).sum(), kept.clone());
        nucleus(&mut cut, p, total);
        kept.truncate(cut.len().saturating_add_signed(more_p).max(1));
    }
    kept
}

fn unnormalised(scores: &[f64], config: &GenerationConfig) -> Vec<(u32, f64)> {
    let mut kept = softmax(scores, f64::from(config.temperature));
    let total = kept.iter().map(|(_, w)| w).sum();
    kept.truncate(config.top_k.unwrap_or(usize::MAX));
    if let Some(p) = config.top_p {
        nucleus(&mut kept, f64::from(p), total);
    }
    kept
}

fn filters_before_temperature(scores: &[f64], config: &GenerationConfig) -> Vec<(u32, f64)> {
    let kept = at_temperature(scores, config, 1.0);
    let mut hot = softmax(scores, f64::from(config.temperature));
    hot.truncate(kept.len());
    hot
}

fn top_k_with_ties(scores: &[f64], config: &GenerationConfig) -> Vec<(u32, f64)> {
    let all = softmax(scores, f64::from(config.temperature));
    let Some(last) = config.top_k.and_then(|k| all.get(k.max(1) - 1)).map(|&(_, weight)| weight) else {
        return sampler::candidates(scores, config);
    };
    let tied = all.iter().filter(|(_, weight)| *weight >= last).count();
    sampler::candidates(scores, &GenerationConfig { top_k: Some(tied), ..config.clone() })
}

fn overflowing(scores: &[f64], config: &GenerationConfig) -> Vec<(u32, f64)> {
    let divided: Vec<f32> = scores.iter().map(|&s| s as f32 / config.temperature).collect();
    let largest = divided.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if largest.is_finite() {
        return sampler::candidates(scores, config);
    }
    // Infinity minus infinity is no number, and the draw falls through to the first token.
    vec![(0, 1.0)]
}

/// Candidates by another rule.
struct Candidates(Filter);

/// From scores to the tokens that may be drawn, with their weights.
type Filter = fn(&[f64], &GenerationConfig) -> Vec<(u32, f64)>;

impl Deviation for Candidates {
    fn candidates(&self, scores: &[f64], config: &GenerationConfig) -> Vec<(u32, f64)> {
        (self.0)(scores, config)
    }
}

/// Another rule for when to be greedy.
struct Greedy(fn(&GenerationConfig) -> bool);

impl Deviation for Greedy {
    fn is_greedy(&self, config: &GenerationConfig) -> bool {
        (self.0)(config)
    }
}

/// A temperature of 0 is replaced, which is what a check against division by zero may do.
struct ZeroIsOne;

impl Deviation for ZeroIsOne {
    fn is_greedy(&self, config: &GenerationConfig) -> bool {
        !config.do_sample
    }

    fn candidates(&self, scores: &[f64], config: &GenerationConfig) -> Vec<(u32, f64)> {
        at_temperature(scores, config, if config.temperature == 0.0 { 1.0 } else { config.temperature })
    }
}

/// A maximum that is replaced by what equals it, as with `max_by` over an iterator.
struct TiesHighest;

impl Deviation for TiesHighest {
    fn argmax(&self, scores: &[f64], _: usize, _: &[u32]) -> u32 {
        scores.iter().enumerate().fold(0, |best, (i, s)| if *s >= scores[best] { i } else { best }) as u32
    }
}

/// Another seed than the one asked for, from that and from the number of generations before.
struct Seed(fn(Option<u64>, u64) -> u64);

impl Deviation for Seed {
    fn seed(&self, config: &GenerationConfig, serial: u64) -> u64 {
        (self.0)(config.seed, serial)
    }
}

/// Another way to draw.
struct Draw(fn(&[(u32, f64)], &mut SplitMix, usize) -> u32);

impl Deviation for Draw {
    fn draw(&self, kept: &[(u32, f64)], rng: &mut SplitMix, step: usize) -> u32 {
        (self.0)(kept, rng, step)
    }
}

/// In a generation, each row of logits comes one position late.
struct RowBefore(Mutex<Vec<f32>>);

impl Deviation for RowBefore {
    fn logits(&self, at: &At<'_>, _: u32, logits: &mut [f32]) {
        if at.call.generating {
            let mut before = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let row = logits.to_vec();
            if at.position > 0 && before.len() == row.len() {
                logits.copy_from_slice(&before);
            }
            *before = row;
        }
    }
}
