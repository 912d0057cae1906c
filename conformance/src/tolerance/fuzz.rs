//! What fuzzing allows on random small networks.

/// Fuzzing, `fp32` semantics: random small networks are worse conditioned than the golden cases, so that besides
/// [`super::FP32_LOGIT`] a logit may be off by this much of the model's own quantisation gap, the largest
/// difference between its two semantics: eight bits of noise there tell what 24 bits of noise may do here.
///
/// Measured over 1,300 random models: two sound backends that compute in f64 come to 0.05 of what is allowed. A token
/// that is taken for another one is off by more than the gap.
pub const FUZZ_FP32_OF_GAP: f64 = 1e-3;

/// Fuzzing, `w1.58a8`: an activation this near to a rounding tie, in units of one int8 code, may go either way.
///
/// Measured with float32 arithmetic over random models: with 1e-5 in this place 6 models of 1,165 had a row with a flip
/// that none was granted to, with 3e-5 one of 1,115, with 1e-4 none of 1,138, with 5e-4 none of 6,409.
pub const FUZZ_TIE: f64 = 2e-4;

/// Fuzzing, `w1.58a8`: where no activation was near a tie, logits may be off by [`FUZZ_A8_ABS`], or by this much of the
/// largest logit where that is more. Measured as in [`FUZZ_TIE`]: 5e-5 of a logit at most.
pub const FUZZ_A8_RELATIVE: f64 = 1e-4;

/// Fuzzing: the squared error, in units of the model's own quantisation gap, of a row in which an activation may have
/// gone the other way, or which 16-bit floats have come near. Measured with float32 arithmetic: 18 at most, in networks of
/// a few channels. Faults show in the rows above, or past both this and [`FUZZ_FLIP_NMSE`]: a row of another token is off
/// by more than 1.
pub const FUZZ_FLIP_GAPS: f64 = 20.0;

/// The same as a share of the row's sum of squares, allowed where it is more.
pub const FUZZ_FLIP_NMSE: f64 = 0.2;

/// Fuzzing, `fp32` semantics: logits that reach less far than this are held to what is allowed at this reach.
pub const FUZZ_SMALL_REACH: f64 = 10.0;

/// Fuzzing, `w1.58a8`: what a logit may be off by in any case where no activation was near a tie.
pub const FUZZ_A8_ABS: f64 = 1e-3;
