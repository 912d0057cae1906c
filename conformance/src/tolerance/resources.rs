//! The limits of the memory and service level checks.

/// How much more than its capacity times 2 x layers x kv heads x head_dim values of eight bytes a cache may hold: room
/// taken ahead of need by a vector that doubles. What the metrics say of a cache may differ from its own word by the same.
pub const CACHE_SLACK: f64 = 2.0;

/// How far `flops_estimate` may be from twice the weights that a token meets, times the tokens, as a factor either way.
/// Measured: 1.004, the rest being attention; a count of multiply-adds as one is a factor of exactly 2.
pub const FLOPS_FACTOR: f64 = 1.9;

/// The share of latencies that must be within the contract: the claim is about the 95th percentile.
pub const LATENCY_SHARE: f64 = 0.95;

/// What a time that an engine tells may be beyond the time around it, as a factor. Measured inside it can never be longer;
/// this is for clocks of another rate.
pub const CLOCK_SLACK: f64 = 1.05;

/// The same for a sum of times, in milliseconds: for clocks of another grain.
pub const CLOCK_STEP_MS: f64 = 0.2;

/// The least share of the caller's time that an engine's figure must own up to, in the median call.
///
/// Measured: honest 0.98 and more with steps of 30 µs; a figure that is zero, another call's, half or without the feed-forward part
/// is 0.63 at most.
pub const TIME_OWNED: f64 = 0.8;

/// The same for prefill and decode together. Measured: honest 0.99; a step that only ends a generation, or the last of the prompt, may be
/// counted with neither.
pub const STAGES_OWNED: f64 = 0.5;

/// The least share of the time to the first token that `prefill` must own up to after a long prompt, in the median call.
/// Measured: honest 0.99; a prefill that was not measured is 0.
pub const PREFILL_OF_FIRST: f64 = 0.5;

/// How far the time to the first of many ids may be from the time of a call for one id, as a factor, in a quarter of a dozen
/// pairs. A first id that is told with the whole call of sixteen is off by 5 and more.
pub const FIRST_FACTOR: f64 = 3.0;

/// How much the share of a component in `total_time` must vary from call to call, relative to the largest: a share that
/// is always the same was not measured. Rounding to nanoseconds makes 1e-4 of it.
pub const SHARE_SPREAD: f64 = 1e-3;

/// Bytes for each parameter, token and position beyond which `memory_bandwidth_usage` cannot be what a pass moved: every
/// parameter eight times in f64. Bytes a second told as GB/s are a thousand million times too many.
pub const TRAFFIC_PER_PARAMETER: f64 = 64.0;

/// Deterministic generation may cost at most this factor of sampling without a seed in the median pair of interleaved
/// generations (contract: no degradation). An engine that gives up its second thread or its cache for determinism is
/// slower by 2 or more.
pub const DETERMINISTIC_COST: f64 = 1.5;

/// Memory that a call may leave behind, in bytes: the lower 99 % bound of the slope over 200 calls.
///
/// Measured with three sound engines: 0. A history of the last thousand metrics, which is no leak, fills by 184 a call;
/// a leaked row of logits of the smallest vocabulary is 388, of `context-32` 508, a leaked cache of three positions 2,304.
pub const LEAK_PER_CALL: f64 = 256.0;

/// The same for a thread-local copy.
pub const LEAK_PER_COPY: f64 = 256.0;

/// The same for an engine, as a share of the bytes of its weights; what a leaked model holds is 1.
pub const LEAK_PER_ENGINE: f64 = 0.02;

/// The same in bytes, where the weights are few. Measured: at most 3,300 for an engine with threads of its own; the weights of
/// the smallest model are 55 thousand.
pub const LEAK_PER_ENGINE_FLOOR: f64 = 16_384.0;

/// What claims on memory may say beyond what the process holds, in bytes: pages of weights that were not touched yet.
pub const RESIDENT_SLACK: f64 = 1_048_576.0;

/// What a process may grow by over many sessions, in what their caches say they hold. Rounding of sizes and holes.
pub const SESSION_FACTOR: f64 = 1.5;

/// The same besides the caches, in bytes.
pub const SESSION_SLACK: f64 = 262_144.0;

/// What an engine may take in memory, in what it says it holds. Measured: 1.00 to 1.02 for three that keep dense weights.
pub const ENGINE_FACTOR: f64 = 1.5;

/// The same besides, in bytes: stacks of its threads and small things. Measured: 60 thousand.
pub const ENGINE_SLACK: f64 = 131_072.0;

/// The same where an engine has a tokenizer as well. Measured: 1.4 million for the trained model's.
pub const TOKENIZER_SLACK: f64 = 8_388_608.0;
