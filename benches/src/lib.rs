//! Benchmarks of the reference engine: `cargo bench -p benches`.
//!
//! Every benchmark checks its output before it is timed. Whole-model figures on models of any size come from `bitnet bench`.

#![forbid(unsafe_code)]
