//! A complete, plain engine that asks a [`Deviation`] at every point where engines are known to go their own way.
//!
//! With the default answers it is right: the golden oracle's steps in f32, one token after another, every product a sum of
//! integers. A faulty backend is this engine with one answer that is wrong, an honest one differs where engines may differ.

mod arithmetic;
mod cache;
mod deviation;
mod engine;
mod forward;
mod generate;
pub mod sampler;
mod weights;

pub use cache::{NaiveCache, Sequence};
pub use deviation::{At, Call, Deviation, Honest, Site};
pub use engine::{Evaluated, Naive};
pub use forward::Pass;
pub use sampler::{SplitMix, Step};
pub use weights::{LayerWeights, Ternary, Weights};
