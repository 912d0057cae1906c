//! The contracts of a BitNet b1.58 inference engine.
//!
//! This crate says *what an engine is*; it holds no engine. A backend implements [`BitNetInference`] (and
//! [`ThreadSafeInference`] where many callers may share it), takes its settings from [`ModelConfig`] and
//! [`GenerationConfig`], answers with [`InferenceOutput`] and [`GenerationResult`], and reports every failure as an
//! [`InferenceError`] that carries its own [`ErrorContext`].
//!
//! | Module | Holds |
//! |---|---|
//! | [`inference`] | the trait every backend implements |
//! | [`config`] | the shape of a model, its validation and its size budgets |
//! | [`generation`] | what to generate, and what came out |
//! | [`output`] | the result of one forward pass and its checks |
//! | [`metrics`], [`memory`] | what a pass cost in time and in bytes |
//! | [`kv_cache`] | the backend-neutral handle on remembered keys and values |
//! | [`validation`] | checks made before any arithmetic starts |
//! | [`concurrency`] | sharing one engine between threads |
//! | [`sla`] | service levels and the monitor that holds an engine to them |
//! | [`system`] | readings of the machine: memory, processors, threads, uptime |
//! | [`error`] | the error tree, with context, severity and recovery advice |
//!
//! Everything is also available at the crate root, together with the three `candle_core` types that appear in the
//! signatures, so that `use bitnet_contracts::*;` is all a backend needs.
//!
//! No function of this crate panics, whatever its arguments: sizes are computed with checked or saturating
//! arithmetic, floats are tested for finiteness before they are compared, and time is subtracted with care.

#![forbid(unsafe_code)]

pub mod concurrency;
pub mod config;
pub mod error;
pub mod generation;
pub mod inference;
pub mod kv_cache;
pub mod memory;
pub mod metrics;
pub mod output;
pub mod sla;
pub mod system;
pub mod validation;

pub use candle_core::{DType, Device, Tensor};

pub use concurrency::{ConcurrentInferenceEngine, MAX_WORKERS, ThreadSafeInference};
pub use config::{ModelConfig, QuantizationType};
pub use error::{
    ConfigurationError, DeviceError, ErrorContext, ErrorContextInfo, ErrorSeverity, ForwardPassError, GenerationError,
    InferenceError, MemoryError, ModelError, OutputValidationError, QuantizationError, RecoveryAction, Result,
    TokenizationError,
};
pub use generation::{FinishReason, GenerationConfig, GenerationResult, GenerationTiming};
pub use inference::BitNetInference;
pub use kv_cache::{CacheOwner, CacheStorage, KVCache};
pub use memory::MemoryUsage;
pub use metrics::{EfficiencyMetrics, ForwardPassMetrics};
pub use output::InferenceOutput;
pub use sla::{PerformanceContract, PerformanceMonitor, PerformanceStats, PerformanceViolation, ViolationType};
pub use system::{SystemState, available_cpu_memory};
pub use validation::{InputValidator, StandardInputValidator};
