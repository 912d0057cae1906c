//! The truth that BitNet b1.58 engines are held to.
//!
//! * [`oracle`]: the forward pass in f64, written for reading, sharing no code with any engine;
//! * [`load`]: golden logits, greedy tokens and traces of the cases in [`cases`], each derived twice, by the oracle and
//!   by Hugging Face transformers, and compiled into this crate;
//! * [`from_folder`]: the same for any small model, by the oracle alone, when it is asked for;
//! * [`metrics`]: how far two rows of logits are apart;
//! * [`regenerate`], [`verify_case`], [`diff`]: what the `golden` command does.
#![forbid(unsafe_code)]

mod cases;
mod data;
mod derive;
mod diff;
mod error;
mod file;
pub mod manifest;
pub mod metrics;
pub mod oracle;
mod regenerate;
mod standard;
mod verify;

pub use cases::{CaseSpec, PromptSpec, Prompts, model, prompts};
pub use data::{Golden, Prompt, Trace, cases, load};
pub use derive::Gap;
pub use diff::{Position, diff};
pub use error::GoldenError;
pub use file::Derivation;
pub use oracle::Semantics;
pub use regenerate::{Progress, regenerate};
pub use standard::{MAX_WORK, from_folder, standard_work};
pub use verify::{FP32_TOLERANCE, Verdict, flip_free_tolerance, verify_case};
