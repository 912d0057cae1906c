//! The limits of the memory and service level checks.

/// Resident memory that one call may leave behind on average, in bytes: the lowest of three windows of 100 calls each,
/// after a warm-up, because an allocator that takes a page now and then does not do so in every window.
///
/// Measured with three sound engines on the trained model: 0. A leaked row of its logits is 16,384, a leaked cache of
/// eight positions 32,768.
pub const LEAK_PER_CALL: f64 = 2048.0;

/// The same for making and dropping an engine, as a share of the bytes of its weights. Measured: at most 683 bytes, 0.0002;
/// what a leaked model holds is 1.
pub const LEAK_PER_ENGINE: f64 = 0.25;

/// What a process may grow by over a long session, in what its cache says it holds: a cache that is copied as it grows
/// leaves holes behind. Measured: 3.1 with a cache that is copied for every chunk.
pub const SESSION_FACTOR: f64 = 4.0;

/// The same besides the cache, in bytes: activations, logits and the allocator's own pages. A cache of the trained model
/// that is not owned up to is 2 MiB in f32.
pub const SESSION_SLACK: f64 = 1_500_000.0;

/// How much more than its capacity times 2 x layers x kv heads x head_dim values of eight bytes a cache may hold: room
/// taken ahead of need by a vector that doubles.
pub const CACHE_SLACK: f64 = 2.0;

/// How far `flops_estimate` may be from twice the weights that a token meets, times the tokens, as a factor either way.
/// Measured: 1.004, the rest being attention; a count of multiply-adds as one is a factor of exactly 2.
pub const FLOPS_FACTOR: f64 = 1.9;

/// What `total_time` may say beyond the wall time of the call, as a factor; one millisecond is granted besides.
pub const CLOCK_SLACK: f64 = 1.05;

/// The least share of a call's wall time that `total_time` must own up to, in the best of several calls.
pub const TIME_OWNED: f64 = 0.25;

/// Deterministic generation may cost at most this factor of sampling without a seed (contract: no degradation); the best
/// of interleaved runs. Measured on a busy machine: 0.85 to 1.18 for three backends. An engine that gives up its second
/// thread or its cache for determinism is slower by 2 or more.
pub const DETERMINISTIC_COST: f64 = 1.5;
