//! Exact sampling tables: which tokens one draw may give and with what probability, from logits and a configuration.
//!
//! Written from B7 of SPEC.md alone: penalties over prompt and generated tokens, temperature, top-k, top-p (the
//! smallest set whose mass reaches p, at least one token), draw.

use bitnet_contracts::GenerationConfig;

/// Logits after the penalties that `history` (prompt and generated tokens) earns.
pub(super) fn penalised(logits: &[f32], history: &[u32], config: &GenerationConfig) -> Vec<f64> {
    let mut counts = vec![0u32; logits.len()];
    for &token in history {
        if let Some(count) = counts.get_mut(token as usize) {
            *count += 1;
        }
    }
    let repetition = f64::from(config.repetition_penalty);
    let (frequency, presence) = (f64::from(config.frequency_penalty), f64::from(config.presence_penalty));
    logits
        .iter()
        .zip(counts)
        .map(|(&logit, count)| {
            let logit = f64::from(logit);
            if count == 0 {
                return logit;
            }
            // Divides what is positive and multiplies what is negative: both ways down for a penalty above 1.
            let repeated = if logit > 0.0 { logit / repetition } else { logit * repetition };
            repeated - f64::from(count) * frequency - presence
        })
        .collect()
}

/// Token ids by falling value, the lower id first among equals.
pub(super) fn ranked(values: &[f64]) -> Vec<u32> {
    let mut order: Vec<u32> = (0..values.len() as u32).collect();
    order.sort_by(|&a, &b| values[b as usize].total_cmp(&values[a as usize]).then(a.cmp(&b)));
    order
}

/// What one draw may give.
#[derive(Debug, Clone)]
pub(super) struct Table {
    /// The allowed tokens with their probabilities, most probable first. The probabilities sum to 1.
    pub allowed: Vec<(u32, f64)>,
}

impl Table {
    /// The table of a configuration with `do_sample` and a positive temperature.
    pub(super) fn new(logits: &[f32], history: &[u32], config: &GenerationConfig) -> Self {
        let values = penalised(logits, history, config);
        let order = ranked(&values);
        let keep = config.top_k.unwrap_or(usize::MAX).min(order.len());
        let top = values[order[0] as usize];
        let temperature = f64::from(config.temperature);
        let mut allowed: Vec<(u32, f64)> =
            order[..keep].iter().map(|&t| (t, ((values[t as usize] - top) / temperature).exp())).collect();
        normalise(&mut allowed);
        if let Some(p) = config.top_p.map(f64::from).filter(|&p| p < 1.0) {
            let mut mass = 0.0;
            let reached = allowed.iter().position(|&(_, q)| {
                mass += q;
                mass >= p
            });
            allowed.truncate(reached.map_or(allowed.len(), |last| last + 1));
            normalise(&mut allowed);
        }
        Self { allowed }
    }

    /// The probability of a token: 0 where it is not allowed.
    pub(super) fn probability(&self, token: u32) -> f64 {
        self.allowed.iter().find(|(t, _)| *t == token).map_or(0.0, |(_, p)| *p)
    }

    /// The allowed tokens, for messages.
    pub(super) fn tokens(&self) -> Vec<u32> {
        self.allowed.iter().map(|(t, _)| *t).collect()
    }

    /// Half the summed difference of probabilities: 0 for equal tables, 1 for disjoint ones.
    pub(super) fn distance(&self, other: &Self) -> f64 {
        let missing: f64 = other.allowed.iter().filter(|(t, _)| self.probability(*t) == 0.0).map(|(_, p)| p).sum();
        let shared: f64 = self.allowed.iter().map(|(t, p)| (p - other.probability(*t)).abs()).sum();
        (missing + shared) / 2.0
    }

    /// A `top_p` for which the nucleus of this table is its first `keep` tokens, with the threshold in the middle of
    /// the last one's mass, so that no rounding can move it over.
    pub(super) fn nucleus_of(&self, keep: usize) -> f32 {
        let before: f64 = self.allowed[..keep - 1].iter().map(|(_, p)| p).sum();
        (before + self.allowed[keep - 1].1 / 2.0) as f32
    }
}

fn normalise(allowed: &mut [(u32, f64)]) {
    let sum: f64 = allowed.iter().map(|(_, p)| p).sum();
    for (_, p) in allowed {
        *p /= sum;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> GenerationConfig {
        GenerationConfig {
            temperature: 1.0,
            top_k: None,
            top_p: None,
            repetition_penalty: 1.0,
            ..GenerationConfig::default()
        }
    }

    /// Logits whose softmax is 0.5, 0.3, 0.15, 0.05 in the order of ids 2, 0, 3, 1.
    fn logits() -> Vec<f32> {
        [0.3f32, 0.05, 0.5, 0.15].iter().map(|p| p.ln()).collect()
    }

    #[test]
    fn nucleus_is_the_smallest_set_that_reaches_p() {
        let table = |p| Table::new(&logits(), &[], &GenerationConfig { top_p: Some(p), ..config() });
        assert_eq!(table(0.4).tokens(), [2]);
        assert_eq!(table(0.6).tokens(), [2, 0]);
        assert_eq!(table(0.9).tokens(), [2, 0, 3]);
        assert_eq!(table(1.0).tokens(), [2, 0, 3, 1]);
        assert!((table(0.6).probability(0) - 0.375).abs() < 1e-6);
    }

    #[test]
    fn top_p_counts_the_mass_left_by_top_k() {
        // Of the first three, 0.5 is 0.526: 0.51 needs one token after top-k, two without.
        let config = GenerationConfig { top_k: Some(3), top_p: Some(0.51), ..config() };
        assert_eq!(Table::new(&logits(), &[], &config).tokens(), [2]);
        assert_eq!(Table::new(&logits(), &[], &GenerationConfig { top_k: None, ..config }).tokens(), [2, 0]);
    }

    #[test]
    fn nucleus_of_finds_a_threshold_in_the_middle() {
        let all = Table::new(&logits(), &[], &config());
        for keep in 1..=4 {
            let config = GenerationConfig { top_p: Some(all.nucleus_of(keep)), ..config() };
            assert_eq!(Table::new(&logits(), &[], &config).allowed.len(), keep);
        }
    }

    #[test]
    fn penalties_push_down_on_both_sides_of_zero_and_count() {
        let config =
            GenerationConfig { repetition_penalty: 2.0, frequency_penalty: 0.5, presence_penalty: 0.25, ..config() };
        // id 9 is out of range and is passed over.
        assert_eq!(penalised(&[4.0, -4.0, 1.0], &[0, 1, 1, 9], &config), [2.0 - 0.75, -8.0 - 1.25, 1.0]);
    }

    #[test]
    fn distance_runs_from_none_to_disjoint() {
        let a = Table { allowed: vec![(1, 0.5), (2, 0.5)] };
        let b = Table { allowed: vec![(3, 1.0)] };
        assert_eq!((a.distance(&a), a.distance(&b)), (0.0, 1.0));
    }
}
