//! The report as JSON: what the gate reads, and what tools may read.

use super::{Report, SCHEMA_VERSION, Totals, content};
use std::collections::HashSet;
use std::path::{Path, PathBuf};

/// Why a report file cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReportError {
    /// The file cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The text is not a report.
    #[error("not a conformance report: {reason}")]
    Form {
        /// What is wrong.
        reason: String,
    },
}

/// The report as text.
///
/// # Errors
/// [`ReportError::Form`] where a value has no JSON form.
pub fn to_string(report: &Report) -> Result<String, ReportError> {
    let form = |e: serde_json::Error| ReportError::Form { reason: e.to_string() };
    let mut text = serde_json::to_string_pretty(report).map_err(form)?;
    text.push('\n');
    Ok(text)
}

/// Reads a report and checks that it agrees with itself.
///
/// # Errors
/// [`ReportError::Form`] for other text, another schema version, repeated case ids, sums that are not the sums,
/// or a content that is not the one that was hashed.
pub fn from_str(text: &str) -> Result<Report, ReportError> {
    let form = |reason: String| ReportError::Form { reason };
    let value: serde_json::Value = serde_json::from_str(text).map_err(|e| form(e.to_string()))?;
    match value.get("schema_version").and_then(serde_json::Value::as_u64) {
        Some(version) if version == u64::from(SCHEMA_VERSION) => {}
        Some(version) => return Err(form(format!("schema version {version}, and this reader knows {SCHEMA_VERSION}"))),
        None => return Err(form("no schema_version".to_string())),
    }
    let report: Report = serde_json::from_value(value).map_err(|e| form(e.to_string()))?;
    let mut ids = HashSet::new();
    if let Some(case) = report.cases.iter().find(|case| !ids.insert(case.id.as_str())) {
        return Err(form(format!("two cases have the id {}", case.id)));
    }
    if Totals::of(&report.cases) != report.totals {
        return Err(form("the totals are not the sums over the cases".to_string()));
    }
    if content::sha256(&report)? != report.content_sha256 {
        return Err(form("content_sha256 is not the hash of its content".to_string()));
    }
    Ok(report)
}

/// Writes a report.
///
/// # Errors
/// [`ReportError`].
pub fn write(report: &Report, path: &Path) -> Result<(), ReportError> {
    let text = to_string(report)?;
    std::fs::write(path, text).map_err(|source| ReportError::Io { path: path.to_path_buf(), source })
}

/// Reads a report from a file, as [`from_str`].
///
/// # Errors
/// [`ReportError`].
pub fn read(path: &Path) -> Result<Report, ReportError> {
    let text = std::fs::read_to_string(path).map_err(|source| ReportError::Io { path: path.to_path_buf(), source })?;
    from_str(&text)
}
