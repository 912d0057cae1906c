//! The transformer. [`Transformer`] is the packed weights, shared by every caller; [`Run`] is what one caller works with.
//!
//! A token's way through: embedding row → per layer (see `layer.rs`) → final norm → head → logits.

mod attention;
mod cache;
mod layer;
mod load;
mod rope;
mod run;
mod transformer;

pub(crate) use attention::AttentionWeights;
pub(crate) use cache::CpuCache;
pub(crate) use load::LoadOptions;
pub use run::Times;
pub(crate) use run::{Observed, Row, Run, Wanted};
pub(crate) use transformer::Transformer;

#[cfg(all(test, unix))]
mod load_tests;
#[cfg(test)]
mod tests;
