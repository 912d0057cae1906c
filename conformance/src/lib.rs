//! The conformance suite for BitNet b1.58 inference engines.
//!
//! A backend enters through a [`BackendFactory`] and a [`Registry`]; [`main`] turns every (backend × model × check) into
//! one test of `cargo test`, [`cli::main`] into one case of a report. Each case runs in a worker process, so that a
//! crash or a hang is that case's verdict and not the run's end. Requirements are numbered in `SPEC.md`, and case ids
//! carry the number: `cpu/tiny/kv_cache/truncate_then_replay@KV-3`.
//!
//! The library knows the contracts, the golden data and the fixtures, and no engine.
#![forbid(unsafe_code)]

pub mod backend;
pub mod calibrate;
pub mod case;
pub mod checks;
pub mod cli;
mod context;
pub mod expectations;
pub mod gates;
pub mod harness;
pub mod invariance;
mod last_words;
pub mod measure;
pub mod model;
mod processor;
pub mod report;
pub mod repro;
pub mod run;
pub mod suite;
pub mod tolerance;
pub mod verdict;
pub mod worker;
pub mod zoo;

pub use backend::{BackendFactory, Capabilities, Capability, CreateOptions, Noise, Registry, RegistryError, Semantics};
pub use case::{Category, Check, CheckResult, Context, ModelSet, Stop};
pub use expectations::Expectations;
pub use harness::main;
pub use invariance::{Axis, Invariance, Level};
pub use model::{Model, ModelFacts, ModelFixture, PromptShape};
pub use suite::{Case, Selection, Suite, SuiteError};
pub use verdict::{CaseResult, Failure, Outcome, Verdict};
