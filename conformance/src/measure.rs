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
