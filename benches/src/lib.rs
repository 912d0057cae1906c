//! Benchmarks of the reference engine: `cargo bench -p benches`.
//!
//! Every benchmark checks its output before it is timed. Whole-model figures on models of any size come from `bitnet bench`.
//! [`cases`] holds what is measured, for the benches that time it and for `kernel_once`, whose instructions are counted.

#![forbid(unsafe_code)]

pub mod cases;
