//! Which file an error is about.
//!
//! Checks of scales, codes and parameters know a name and no file. Where the file is known, it is put behind that name: the contracts'
//! errors have no field of its own for it.

use std::path::Path;

use bitnet_contracts::{ConfigurationError, InferenceError, QuantizationError};

/// `name of file`, as the errors below have it.
pub(super) fn named(path: &Path, name: &str) -> String {
    format!("{name} of {}", path.display())
}

/// The error with its file. Errors of a model name theirs already.
pub(super) fn in_file(path: &Path, mut error: InferenceError) -> InferenceError {
    match &mut error {
        InferenceError::Configuration(
            ConfigurationError::InvalidParameter { parameter: name, .. }
            | ConfigurationError::MissingParameter { parameter: name },
        )
        | InferenceError::Quantization(
            QuantizationError::InvalidScale { tensor: name, .. }
            | QuantizationError::InvalidCode { tensor: name, .. }
            | QuantizationError::LayoutMismatch { tensor: name, .. },
        ) => *name = named(path, name),
        InferenceError::Configuration(
            ConfigurationError::InvalidDimensions { reason, .. } | ConfigurationError::IncompatibleConfig { reason },
        ) => *reason = format!("{}: {reason}", path.display()),
        _ => {}
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;
    use bitnet_contracts::ModelError;

    #[test]
    fn the_name_stays_in_front_and_other_errors_stay_as_they_are() {
        let path = Path::new("folder/a.safetensors");
        let scale = QuantizationError::InvalidScale { tensor: "w".to_string(), value: 0.0 };
        assert_eq!(
            in_file(path, scale.into()).to_string(),
            "Quantization error: Invalid scale in w of folder/a.safetensors: 0"
        );
        let config = ConfigurationError::IncompatibleConfig { reason: "no".to_string() };
        assert!(in_file(path, config.into()).to_string().ends_with(": folder/a.safetensors: no"));
        let model: InferenceError = ModelError::FileNotFound { path: "b".to_string() }.into();
        assert_eq!(in_file(path, model.clone()), model);
    }
}
