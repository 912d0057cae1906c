//! Choosing the next token: penalties → temperature → top-k → top-p → draw, in f64 on the CPU, in a fixed order.

use std::hash::{BuildHasher, Hasher, RandomState};

use bitnet_contracts::GenerationConfig;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::Logits;

/// The meaning of a seed. It changes when the same seed would give other tokens.
///
/// Version 1: ChaCha8 with the 32-byte key `seed` (little endian), then zeroes; one `u64` a draw, its upper 53 bits divided by 2^53;
/// candidates in order of falling probability, equal ones in order of rising id; the first whose cumulated probability exceeds the
/// number is drawn. Exponentials by `libm`, so that a seed means the same on every platform.
pub const SAMPLER_VERSION: u32 = 1;

/// The state of one generation's sampling.
pub(super) struct Sampler {
    temperature: f64,
    top_k: Option<usize>,
    top_p: Option<f64>,
    repetition: f64,
    frequency: f64,
    presence: f64,
    /// The tokens of prompt and generation, rising, and how often each was seen.
    tokens: Vec<u32>,
    counts: Vec<u32>,
    /// The scores of the step at hand.
    scores: Vec<(u32, f64)>,
    rng: ChaCha8Rng,
}

impl Sampler {
    /// `config` has been validated. Up to `room` tokens will be generated.
    pub(super) fn new(config: &GenerationConfig, prompt: &[u32], room: usize) -> Self {
        let mut key = [0u8; 32];
        // Fresh hash keys are the standard library's randomness: good enough when no seed was asked for.
        let seed = config.seed.unwrap_or_else(|| RandomState::new().build_hasher().finish());
        key[..8].copy_from_slice(&seed.to_le_bytes());
        let mut sampler = Self {
            temperature: if config.do_sample { f64::from(config.temperature) } else { 0.0 },
            top_k: config.top_k,
            top_p: config.top_p.map(f64::from),
            repetition: f64::from(config.repetition_penalty),
            frequency: f64::from(config.frequency_penalty),
            presence: f64::from(config.presence_penalty),
            tokens: Vec::with_capacity(prompt.len() + room),
            counts: Vec::with_capacity(prompt.len() + room),
            scores: Vec::new(),
            rng: ChaCha8Rng::from_seed(key),
        };
        prompt.iter().for_each(|&token| sampler.seen(token));
        sampler
    }

    /// Counts a token of the sequence.
    pub(super) fn seen(&mut self, token: u32) {
        match self.tokens.binary_search(&token) {
            Ok(at) => self.counts[at] += 1,
            Err(at) => {
                self.tokens.insert(at, token);
                self.counts.insert(at, 1);
            }
        }
    }

    /// How many of the largest logits decide the next token, besides those of the tokens seen; None when all do. Up to `forbidden`
    /// tokens are not to be chosen.
    pub(super) fn wanted(&self, forbidden: usize) -> Option<usize> {
        let chosen_from = if self.temperature == 0.0 { 1 } else { self.top_k? };
        // A penalty or a ban can take as many out of the lead as there are tokens that it is for.
        chosen_from.checked_add(self.penalised().len())?.checked_add(forbidden)
    }

    /// The tokens whose scores are not their logits.
    pub(super) fn penalised(&self) -> &[u32] {
        let neutral = self.repetition == 1.0 && self.frequency == 0.0 && self.presence == 0.0;
        if neutral { &[] } else { &self.tokens }
    }

    /// The next token after `logits` (all finite); tokens in `forbidden` are never chosen.
    pub(super) fn next(&mut self, logits: Logits<'_>, forbidden: &[u32]) -> u32 {
        let mut scores = std::mem::take(&mut self.scores);
        scores.clear();
        match logits {
            Logits::All(logits) => scores.extend((0..).zip(logits.iter().map(|&l| f64::from(l)))),
            Logits::Largest(logits) => scores.extend(logits.iter().map(|&(token, l)| (token, f64::from(l)))),
        }
        for (&token, &count) in self.tokens.iter().zip(&self.counts) {
            if let Some(score) = find(&mut scores, token) {
                *score = if *score > 0.0 { *score / self.repetition } else { *score * self.repetition };
                *score -= self.frequency * f64::from(count) + self.presence;
            }
        }
        for &token in forbidden {
            if let Some(score) = find(&mut scores, token) {
                *score = f64::NEG_INFINITY;
            }
        }
        let chosen = if self.temperature == 0.0 {
            argmax(&scores)
        } else {
            candidates(&mut scores, self.temperature, self.top_k, self.top_p);
            self.draw(&scores)
        };
        self.scores = scores;
        chosen
    }

    fn draw(&mut self, candidates: &[(u32, f64)]) -> u32 {
        let number = (self.rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let total: f64 = candidates.iter().map(|(_, p)| p).sum();
        let mut cumulated = 0.0;
        for &(token, p) in candidates {
            cumulated += p;
            if cumulated > number * total {
                return token;
            }
        }
        // Rounding may leave the sum a hair below the number: the last candidate owns that hair.
        candidates.last().map_or(0, |&(token, _)| token)
    }
}

/// The score of a token among scores by rising token.
fn find(scores: &mut [(u32, f64)], token: u32) -> Option<&mut f64> {
    let at = match scores.get(token as usize) {
        Some(&(t, _)) if t == token => token as usize,
        _ => scores.binary_search_by_key(&token, |s| s.0).ok()?,
    };
    Some(&mut scores[at].1)
}

/// The token of the largest score; the lowest of equal ones.
fn argmax(scores: &[(u32, f64)]) -> u32 {
    let first = scores.first().copied().unwrap_or((0, f64::NEG_INFINITY));
    scores.iter().fold(first, |best, &s| if s.1 > best.1 { s } else { best }).0
}

/// Leaves the tokens that may be drawn and their weights, by falling weight: `softmax(scores / temperature)`, cut to the `top_k` largest, then
/// to the smallest set whose share of that reaches `top_p` (at least one token).
fn candidates(order: &mut Vec<(u32, f64)>, temperature: f64, top_k: Option<usize>, top_p: Option<f64>) {
    order.retain(|(_, s)| s.is_finite());
    let falling = |a: &(u32, f64), b: &(u32, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    let keep = top_k.unwrap_or(order.len()).min(order.len());
    if keep < order.len() && keep > 0 {
        order.select_nth_unstable_by(keep - 1, falling);
        order.truncate(keep);
    }
    order.sort_unstable_by(falling);
    let largest = order.first().map_or(0.0, |&(_, s)| s);
    for (_, s) in order.iter_mut() {
        // Dividing the difference keeps the exponent in range at any temperature, however small.
        *s = libm::exp((*s - largest) / temperature);
    }
    if let Some(p) = top_p.filter(|&p| p < 1.0) {
        let total: f64 = order.iter().map(|(_, w)| w).sum();
        let mut mass = 0.0;
        let nucleus = order
            .iter()
            .position(|(_, w)| {
                mass += w;
                mass >= p * total
            })
            .map_or(order.len(), |last| last + 1);
        order.truncate(nucleus.max(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranked(scores: &[f64]) -> Vec<(u32, f64)> {
        (0..).zip(scores.iter().copied()).collect()
    }

    fn candidates(
        mut order: Vec<(u32, f64)>,
        temperature: f64,
        top_k: Option<usize>,
        top_p: Option<f64>,
    ) -> Vec<(u32, f64)> {
        super::candidates(&mut order, temperature, top_k, top_p);
        order
    }

    fn logs(p: &[f64]) -> Vec<(u32, f64)> {
        ranked(&p.iter().map(|p| p.ln()).collect::<Vec<_>>())
    }

    fn ids(c: &[(u32, f64)]) -> Vec<u32> {
        c.iter().map(|c| c.0).collect()
    }

    #[test]
    fn the_nucleus_is_the_smallest_set_that_reaches_p() {
        let scores = logs(&[0.1, 0.5, 0.15, 0.25]);
        for (p, expected) in [
            (0.01, vec![1]),
            (0.49, vec![1]),
            (0.51, vec![1, 3]),
            (0.74, vec![1, 3]),
            (0.76, vec![1, 3, 2]),
            (1.0, vec![1, 3, 2, 0]),
        ] {
            assert_eq!(ids(&candidates(scores.clone(), 1.0, None, Some(p))), expected, "{p}");
        }
    }

    #[test]
    fn top_p_counts_the_mass_that_top_k_left() {
        // Of 0.4 and 0.3, the first holds 4/7 = 0.571: enough for 0.55, though only 0.4 of the whole.
        let scores = logs(&[0.4, 0.3, 0.2, 0.1]);
        assert_eq!(ids(&candidates(scores.clone(), 1.0, Some(2), Some(0.55))), [0]);
        assert_eq!(ids(&candidates(scores.clone(), 1.0, Some(2), Some(0.58))), [0, 1]);
    }

    #[test]
    fn ties_go_to_the_lowest_id() {
        assert_eq!(argmax(&ranked(&[1.0, 3.0, 3.0])), 1);
        assert_eq!(ids(&candidates(ranked(&[2.0, 2.0, 2.0, 2.0]), 1.0, Some(2), None)), [0, 1]);
    }

    #[test]
    fn a_tiny_temperature_is_greedy_and_never_nan() {
        let c = candidates(ranked(&[3.0, 3.0 - 1e-3, -50.0]), 1e-38, None, None);
        assert_eq!(c[0], (0, 1.0));
        assert!(c[1..].iter().all(|c| c.1 == 0.0));
    }

    #[test]
    fn penalties_divide_positive_and_multiply_negative_scores() {
        let config = GenerationConfig { repetition_penalty: 2.0, do_sample: false, ..Default::default() };
        // Token 0 falls from 3 to 1.5, token 1 from -0.5 to -1: token 2 wins.
        assert_eq!(Sampler::new(&config, &[0, 1], 0).next(Logits::All(&[3.0, -0.5, 1.6]), &[]), 2);
        // Unseen, token 0 wins; seen once generated, it does not.
        let mut sampler = Sampler::new(&config, &[1], 0);
        assert_eq!(sampler.next(Logits::All(&[3.0, -0.5, 1.6]), &[]), 0);
        sampler.seen(0);
        assert_eq!(sampler.next(Logits::All(&[3.0, -0.5, 1.6]), &[]), 2);
    }

    #[test]
    fn frequency_counts_and_presence_does_not() {
        let base = GenerationConfig { repetition_penalty: 1.0, do_sample: false, ..Default::default() };
        let logits = [3.0, 2.5];
        let frequency = GenerationConfig { frequency_penalty: 0.2, ..base.clone() };
        assert_eq!(Sampler::new(&frequency, &[0, 0], 0).next(Logits::All(&logits), &[]), 0);
        assert_eq!(Sampler::new(&frequency, &[0, 0, 0], 0).next(Logits::All(&logits), &[]), 1);
        let presence = GenerationConfig { presence_penalty: 0.4, ..base };
        assert_eq!(Sampler::new(&presence, &[0, 0, 0], 0).next(Logits::All(&logits), &[]), 0);
    }

    #[test]
    fn a_seed_means_these_tokens_for_ever() {
        let config = GenerationConfig { seed: Some(42), top_k: None, top_p: None, ..Default::default() };
        let mut sampler = Sampler::new(&config, &[], 0);
        let logits: Vec<f32> = (0..100).map(|i| (i % 10) as f32 * 0.1).collect();
        let drawn: Vec<u32> = (0..12).map(|_| sampler.next(Logits::All(&logits), &[])).collect();
        assert_eq!(drawn, EXPECTED);
    }

    /// Sampler version 1, seed 42.
    const EXPECTED: [u32; 12] = [27, 88, 46, 47, 12, 49, 46, 78, 26, 73, 45, 12];

    #[test]
    fn forbidden_tokens_are_never_chosen() {
        for do_sample in [false, true] {
            let config = GenerationConfig { do_sample, seed: Some(1), ..Default::default() };
            let mut sampler = Sampler::new(&config, &[], 0);
            assert!((0..200).all(|_| sampler.next(Logits::All(&[9.0, 8.0, 1.0]), &[0, 1]) == 2));
        }
    }
}
