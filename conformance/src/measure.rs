//! Names of the measurements that reports and gates know. A check may note others; these mean the same everywhere.

/// Worst Pearson correlation of one position's logits with the golden fp32 logits, over the positions of the case.
pub const WORST_CORRELATION: &str = "worst_correlation_fp32";
/// Time of one decode step, in milliseconds: the median of the check's samples.
pub const TOKEN_LATENCY_MS: &str = "token_latency_ms";
/// Decoded tokens a second.
pub const THROUGHPUT_TPS: &str = "throughput_tps";
/// Milliseconds from the call to the first generated token, after the longest of the check's prompts.
pub const TIME_TO_FIRST_TOKEN_MS: &str = "time_to_first_token_ms";
/// Peak memory of the engine, in bytes.
pub const PEAK_MEMORY_BYTES: &str = "peak_memory_bytes";

/// Series: 1 minus the Pearson correlation of each position's logits with the golden fp32 logits.
pub const SERIES_CORRELATION: &str = "one_minus_correlation_fp32";
/// Series: the largest difference of a logit of each position from the golden of the backend's own semantics.
pub const SERIES_MAX_ABS: &str = "max_abs_own_golden";
/// Series: the same for a prompt that is decoded token by token with a cache.
pub const SERIES_DECODING: &str = "max_abs_own_golden_decoding";

/// How many values a series keeps.
pub const MAX_SERIES: usize = 512;
/// How many readings a sample keeps.
pub const MAX_SAMPLES: usize = 4096;

/// A series as reports keep it: at most [`MAX_SERIES`] values of four significant digits. Of a longer one each stretch
/// leaves its largest value, so that the worst position is always there. What is not finite becomes the largest `f32`.
pub fn series(values: impl IntoIterator<Item = f64>) -> Vec<f32> {
    let values: Vec<f32> = values
        .into_iter()
        .map(|value| {
            let rounded = format!("{value:.3e}").parse::<f32>().unwrap_or(f32::MAX);
            if rounded.is_finite() { rounded } else { f32::MAX }
        })
        .collect();
    let stretch = values.len().div_ceil(MAX_SERIES).max(1);
    values.chunks(stretch).map(|chunk| chunk.iter().copied().fold(f32::MIN, f32::max)).collect()
}

/// Readings as reports keep them: the finite ones, at most [`MAX_SAMPLES`]. Of more, the evenly spaced order statistics
/// are kept, the smallest and the largest among them.
pub fn samples(values: impl IntoIterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.into_iter().filter(|value| value.is_finite()).collect();
    if values.len() <= MAX_SAMPLES {
        return values;
    }
    values.sort_by(f64::total_cmp);
    (0..MAX_SAMPLES).map(|i| values[i * (values.len() - 1) / (MAX_SAMPLES - 1)]).collect()
}
