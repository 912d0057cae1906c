//! Choosing a token: penalties, temperature, top-k, top-p, draw, in that order.

use bitnet_contracts::GenerationConfig;
use std::time::{SystemTime, UNIX_EPOCH};

/// The choice of one token after another.
pub struct Sampler<'a> {
    config: &'a GenerationConfig,
    /// State of SplitMix64.
    state: u64,
}

impl<'a> Sampler<'a> {
    /// A sampler whose draws follow from the configuration's seed, or from the clock where it has none.
    pub fn new(config: &'a GenerationConfig) -> Self {
        let clock = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
        Self { config, state: config.seed.unwrap_or_else(clock) }
    }

    /// The next token after `sequence` (prompt and generated tokens).
    pub fn next(&mut self, logits: &[f32], sequence: &[u32]) -> u32 {
        let mut scores: Vec<f64> = logits.iter().map(|&l| f64::from(l)).collect();
        self.penalise(&mut scores, sequence);
        if !self.config.do_sample || self.config.temperature == 0.0 {
            let best = scores.iter().enumerate().fold(0, |best, (i, s)| if *s > scores[best] { i } else { best });
            return best as u32;
        }
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let temperature = f64::from(self.config.temperature);
        let mut kept: Vec<(usize, f64)> =
            scores.iter().map(|s| ((s - largest) / temperature).exp()).enumerate().collect();
        kept.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        kept.truncate(self.config.top_k.unwrap_or(usize::MAX).max(1));
        let total: f64 = kept.iter().map(|(_, p)| p).sum();
        let nucleus = f64::from(self.config.top_p.unwrap_or(1.0)) * total;
        let mut mass = 0.0;
        let reaches = |(_, p): &(usize, f64)| {
            mass += p;
            mass >= nucleus
        };
        let last = kept.iter().position(reaches).unwrap_or(kept.len() - 1);
        kept.truncate(last + 1);
        let mut left = self.uniform() * kept.iter().map(|(_, p)| p).sum::<f64>();
        for (token, p) in &kept {
            if left < *p {
                return *token as u32;
            }
            left -= p;
        }
        kept[kept.len() - 1].0 as u32
    }

    /// Each token of the sequence counts once for repetition and presence, and as often as it occurs for frequency.
    fn penalise(&self, scores: &mut [f64], sequence: &[u32]) {
        let mut tokens = sequence.to_vec();
        tokens.sort_unstable();
        for run in tokens.chunk_by(|a, b| a == b) {
            let Some(score) = scores.get_mut(run[0] as usize) else { continue };
            let repetition = f64::from(self.config.repetition_penalty);
            *score = if *score > 0.0 { *score / repetition } else { *score * repetition };
            *score -= f64::from(self.config.frequency_penalty) * run.len() as f64;
            *score -= f64::from(self.config.presence_penalty);
        }
    }

    /// A number in 0..1 with 53 random bits.
    fn uniform(&mut self) -> f64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}
