//! The JSON Schema of reports, made from the Rust types. `conformance/report.schema.json` is its published form.

use super::Report;
use super::json::ReportError;

/// The schema as pretty JSON text.
///
/// # Errors
/// [`ReportError::Form`] where it has no JSON form.
pub fn text() -> Result<String, ReportError> {
    let schema = schemars::schema_for!(Report);
    let mut text = serde_json::to_string_pretty(&schema).map_err(|e| ReportError::Form { reason: e.to_string() })?;
    text.push('\n');
    Ok(text)
}
