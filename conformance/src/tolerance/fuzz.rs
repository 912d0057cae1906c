//! What fuzzing allows on random small networks.

/// Fuzzing, `fp32` semantics: random small networks are worse conditioned than the golden cases, so that besides
/// [`super::FP32_LOGIT`] a logit may be off by this much of the model's own quantisation gap, the largest
/// difference between its two semantics: eight bits of noise there tell what 24 bits of noise may do here.
///
/// Measured over 1,305 random models: sound backends that compute in f64 1e-5 at most. A token that is taken for
/// another one is off by more than the gap.
pub const FUZZ_FP32_OF_GAP: f64 = 1e-3;

/// Fuzzing, `w1.58a8`: an activation this near to a rounding tie, in units of one int8 code, may go either way.
///
/// Measured over 6,409 random models with float32 arithmetic: 62,300 rows without such an activation, and no flip in them.
pub const FUZZ_TIE: f64 = 5e-4;

/// Fuzzing, `w1.58a8`: where no activation was near a tie, logits may be off by [`super::A8_ROW`], or by this much of the
/// largest logit where that is more. Measured as in [`FUZZ_TIE`]: 5e-5 of a logit at most.
pub const FUZZ_A8_RELATIVE: f64 = 1e-4;

/// Fuzzing, `w1.58a8`, float32 arithmetic: the squared error of a row in which an activation may have gone the other
/// way, in units of the model's own quantisation gap.
///
/// Measured as in [`FUZZ_TIE`]: 4.8 at most. Faults show in the other rows, which are half of all.
pub const FUZZ_FLIP_GAPS: f64 = 20.0;

/// The same with 16-bit floats somewhere, where every row is such a row.
pub const FUZZ_COARSE_GAPS: f64 = 40.0;

/// Fuzzing, `fp32` semantics: logits that reach less far than this are held to what is allowed at this reach.
pub const FUZZ_SMALL_REACH: f64 = 10.0;
