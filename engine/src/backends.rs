//! The backends of this crate by name.

use bitnet_contracts::{BitNetInference, ConfigurationError, Result};

use crate::model::ModelSource;
use crate::reference::{CandleFp32, NdarrayFp32};
use crate::{CpuEngine, EngineOptions};

/// A backend that is compiled in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backend {
    /// The name that commands take.
    pub name: &'static str,
    /// `w1.58a8` (int8 activations) or `fp32` (float activations).
    pub semantics: &'static str,
    /// One line about it.
    pub description: &'static str,
}

/// All backends, the engine proper first.
pub const BACKENDS: [Backend; 3] = [
    Backend {
        name: "cpu",
        semantics: "w1.58a8",
        description: "packed ternary weights, int8 activations, integer kernels",
    },
    Backend {
        name: "candle-fp32",
        semantics: "fp32",
        description: "dense weights in f64 arithmetic on candle's operations",
    },
    Backend { name: "ndarray-fp32", semantics: "fp32", description: "dense weights in f64 arithmetic on ndarray" },
];

/// Opens `source` with the backend called `name`.
///
/// # Errors
/// `ConfigurationError::InvalidParameter` for an unknown name, else what the backend's loading reports.
pub fn open(name: &str, source: &ModelSource, options: &EngineOptions) -> Result<Box<dyn BitNetInference>> {
    match name {
        "cpu" => Ok(Box::new(CpuEngine::open(source, options)?)),
        "candle-fp32" => Ok(Box::new(CandleFp32::open(source, options)?)),
        "ndarray-fp32" => Ok(Box::new(NdarrayFp32::open(source, options)?)),
        other => Err(ConfigurationError::InvalidParameter {
            parameter: "backend".to_string(),
            value: other.to_string(),
            valid_range: BACKENDS.map(|b| b.name).join(", "),
        }
        .into()),
    }
}
