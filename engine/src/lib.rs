//! The reference engine of BitNet b1.58: ternary weights, int8 activations.
//!
//! [`CpuEngine`] is the engine; [`reference`](mod@reference) holds second opinions on the fp32 semantics. All implement
//! [`bitnet_contracts::BitNetInference`]. `unsafe` is confined to `kernels` (vector instructions, disjoint writes) and the memory
//! map of `model`.

mod cpu;
mod forward;
mod generate;
mod session;

pub mod backends;
pub mod kernels;
pub mod model;
pub mod reference;
pub mod ternary;

pub use cpu::CpuEngine;
pub use generate::SAMPLER_VERSION;
pub use session::EngineOptions;
