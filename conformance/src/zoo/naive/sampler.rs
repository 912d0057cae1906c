//! Choosing a token: penalties, temperature, top-k, top-p, draw, in that order, each step the deviation's to answer.

use super::deviation::Deviation;
use bitnet_contracts::GenerationConfig;

/// SplitMix64 (Steele, Lea and Flood 2014): one number a call, every seed its own stream.
#[derive(Debug, Clone)]
pub struct SplitMix(pub u64);

impl SplitMix {
    /// The next number in 0..1, of 53 random bits.
    pub fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// What one token is chosen from.
pub struct Step<'a> {
    /// How.
    pub config: &'a GenerationConfig,
    /// The generation's own random numbers.
    pub rng: &'a mut SplitMix,
    /// The logits after the last token.
    pub logits: &'a [f32],
    /// Prompt and generated tokens.
    pub sequence: &'a [u32],
    /// How many of them are the prompt.
    pub prompt: usize,
    /// Tokens that may not come.
    pub forbidden: &'a [u32],
}

/// The next token, by a deviation's answers.
pub fn next_token(deviation: &dyn Deviation, step: &mut Step<'_>) -> u32 {
    if let Some(token) = deviation.choose(step) {
        return token;
    }
    let mut scores: Vec<f64> = step.logits.iter().map(|&l| f64::from(l)).collect();
    deviation.penalise(&mut scores, step.sequence, step.prompt, step.config);
    for &token in step.forbidden {
        if let Some(score) = scores.get_mut(token as usize) {
            *score = f64::NEG_INFINITY;
        }
    }
    if deviation.is_greedy(step.config) {
        return deviation.argmax(&scores, step.prompt, step.sequence);
    }
    let kept = deviation.candidates(&scores, step.config);
    deviation.draw(&kept, step.rng, step.sequence.len() - step.prompt)
}

/// The honest penalties: over prompt and generated tokens, repetition, then frequency, then presence.
pub fn penalise(scores: &mut [f64], history: &[u32], config: &GenerationConfig) {
    let mut tokens = history.to_vec();
    tokens.sort_unstable();
    let repetition = f64::from(config.repetition_penalty);
    for run in tokens.chunk_by(|a, b| a == b) {
        let Some(score) = scores.get_mut(run[0] as usize) else { continue };
        *score = if *score > 0.0 { *score / repetition } else { *score * repetition };
        *score -= f64::from(config.frequency_penalty) * run.len() as f64;
        *score -= f64::from(config.presence_penalty);
    }
}

/// Token ids and weights by falling weight, the lower id first among equals: the softmax at a temperature, not normalised.
pub fn softmax(scores: &[f64], temperature: f64) -> Vec<(u32, f64)> {
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mut all: Vec<(u32, f64)> = scores
        .iter()
        .enumerate()
        .filter(|(_, s)| **s > f64::NEG_INFINITY)
        .map(|(i, s)| (i as u32, ((s - largest) / temperature).exp()))
        .collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    all
}

/// Cuts a ranked list to the smallest head whose share of `total` reaches `p`, at least one.
pub fn nucleus(kept: &mut Vec<(u32, f64)>, p: f64, total: f64) {
    let mut mass = 0.0;
    let reached = kept.iter().position(|(_, w)| {
        mass += w;
        mass >= p * total
    });
    kept.truncate(reached.map_or(kept.len(), |last| last + 1).max(1));
}

/// The honest filters.
pub fn candidates(scores: &[f64], config: &GenerationConfig) -> Vec<(u32, f64)> {
    let mut kept = softmax(scores, f64::from(config.temperature));
    kept.truncate(config.top_k.unwrap_or(usize::MAX).max(1));
    if let Some(p) = config.top_p.map(f64::from).filter(|&p| p < 1.0) {
        let total = kept.iter().map(|(_, w)| w).sum();
        nucleus(&mut kept, p, total);
    }
    kept
}

/// The honest draw.
pub fn draw(kept: &[(u32, f64)], rng: &mut SplitMix) -> u32 {
    let mut left = rng.uniform() * kept.iter().map(|(_, w)| w).sum::<f64>();
    for &(token, weight) in kept {
        if left < weight {
            return token;
        }
        left -= weight;
    }
    kept.iter().rev().find(|(_, w)| *w > 0.0).or(kept.last()).map_or(0, |&(token, _)| token)
}
