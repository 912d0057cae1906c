//! The reference engine of BitNet b1.58: ternary weights, int8 activations.
//!
//! [`CpuEngine`] is the engine; [`reference`](mod@reference) holds second opinions on the fp32 semantics. All implement
//! [`bitnet_contracts::BitNetInference`]. `unsafe` is confined to `kernels` (vector instructions, disjoint writes) and the memory
//! map of `model`.
//!
//! ```
//! use bitnet_contracts::{BitNetInference, GenerationConfig};
//! use bitnet_engine::{CpuEngine, EngineOptions};
//!
//! # fn main() -> bitnet_contracts::Result<()> {
//! let mut engine = CpuEngine::embedded(&EngineOptions::default())?;
//! let prompt = engine.tokenizer().expect("the embedded model has one").encode("Once upon a time")?;
//! let result = engine.generate(&prompt, 40, &GenerationConfig { seed: Some(1), ..Default::default() })?;
//! println!("{}", result.generated_text);
//! # assert!(!result.generated_tokens.is_empty());
//! # Ok(())
//! # }
//! ```

#![deny(unsafe_code)]

mod cpu;
mod forward;
mod generate;
mod session;

#[doc(hidden)]
pub mod alone;
pub mod backends;
#[allow(unsafe_code)]
pub mod kernels;
pub mod model;
pub mod reference;
pub mod ternary;

pub use cpu::{CpuEngine, StepBytes};
pub use forward::Times;
pub use generate::SAMPLER_VERSION;
pub use session::EngineOptions;
