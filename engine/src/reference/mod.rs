//! Second opinions: the fp32 semantics of BitNet b1.58 as complete backends, on two other stacks.
//!
//! The fp32 semantics are dense weights (trit times scale), activations that are never quantised, and everything else as in the
//! published model. [`CandleFp32`] computes them on candle's tensor operations, [`NdarrayFp32`] on ndarray, both in f64. Neither
//! shares arithmetic with `kernels` and `forward`, nor with the other: what they share is the reading of files, the bookkeeping of
//! caches and metrics ([`DenseEngine`]), and the decode loop.
//!
//! They are for checking and comparing. Weights take 8 bytes each, and every call copies the keys and values of its cache.

mod candle;
mod engine;
mod ndarray;
mod weights;

#[cfg(test)]
mod tests;

pub use candle::CandleFp32;
pub use engine::DenseEngine;
pub use ndarray::NdarrayFp32;
