//! What fuzzing allows on random small networks.

/// Fuzzing, `fp32` semantics: random small networks are worse conditioned than the golden cases, so that this many times
/// [`super::FP32_LOGIT`] is allowed.
pub const FUZZ_FP32_FACTOR: f64 = 4.0;

/// Fuzzing, `w1.58a8`: an activation this near to a rounding tie, in units of one int8 code, may go either way.
pub const FUZZ_TIE: f64 = 5e-4;

/// Fuzzing, `w1.58a8`: where no activation was near a tie, logits may be off by [`super::A8_ROW`], or by this much of the
/// largest logit where that is more.
pub const FUZZ_A8_RELATIVE: f64 = 1e-4;

/// Fuzzing, `w1.58a8`, float32 arithmetic: the squared error of a row in which an activation may have gone the other
/// way, in units of the model's own quantisation gap.
pub const FUZZ_FLIP_GAPS: f64 = 4.0;

/// The same with 16-bit floats somewhere.
pub const FUZZ_COARSE_GAPS: f64 = 16.0;

/// Fuzzing, `fp32` semantics: logits that reach less far than this are held to what is allowed at this reach.
pub const FUZZ_SMALL_REACH: f64 = 10.0;
