//! What can go wrong with golden data.

use std::path::{Path, PathBuf};

use crate::oracle::OracleError;

/// Error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GoldenError {
    /// No case has this name.
    #[error("unknown case {name:?}; known: {known}")]
    UnknownCase {
        /// The name that was asked for.
        name: String,
        /// The names that exist, separated by commas.
        known: String,
    },
    /// A file of the golden data does not hold what it should.
    #[error("{file}: {reason}")]
    Format {
        /// The file.
        file: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A file or folder could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// A model could not be made.
    #[error(transparent)]
    Fixture(#[from] fixtures::FixtureError),
    /// The oracle could not evaluate a model.
    #[error("{case}: {source}")]
    Oracle {
        /// The case.
        case: String,
        /// The reason.
        source: OracleError,
    },
    /// Two files could not be compared.
    #[error("{0}")]
    Incomparable(String),
}

impl GoldenError {
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| GoldenError::Io { path: path.to_path_buf(), source }
    }

    pub(crate) fn format(file: &str, reason: impl std::fmt::Display) -> Self {
        GoldenError::Format { file: file.to_owned(), reason: reason.to_string() }
    }

    pub(crate) fn oracle(case: &str) -> impl FnOnce(OracleError) -> Self + '_ {
        move |source| GoldenError::Oracle { case: case.to_owned(), source }
    }
}
