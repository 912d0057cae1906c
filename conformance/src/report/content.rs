//! The hash over what a run found, apart from when, where and how fast it found it.

use super::Report;
use super::json::ReportError;
use crate::backend::Capabilities;
use crate::case::Category;
use crate::verdict::{CaseResult, Failure, Verdict};
use serde::Serialize;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;

/// What is hashed of a report, in this order: as compact JSON, the fields as they stand here, maps by key, cases in the
/// order of the report.
#[derive(Serialize)]
struct Content<'a> {
    schema_version: u32,
    suite_version: &'a str,
    backends: &'a BTreeMap<String, Capabilities>,
    cases: Vec<CaseContent<'a>>,
}

/// What is hashed of a case.
#[derive(Serialize)]
struct CaseContent<'a> {
    id: &'a str,
    backend: &'a str,
    model: &'a str,
    check: &'a str,
    requirement: &'a str,
    clause: &'a str,
    category: Category,
    exclusive: bool,
    verdict: Verdict,
    measurements: &'a BTreeMap<String, f64>,
    repeatable: Option<Repeatable<'a>>,
}

/// What is hashed besides of a case that does not measure time or memory.
#[derive(Serialize)]
struct Repeatable<'a> {
    reason: Option<&'a str>,
    failures: &'a [Failure],
    failed_assertions: u64,
    assertions: u64,
    values: u64,
    errors: &'a BTreeMap<String, f64>,
    series: &'a BTreeMap<String, Vec<f32>>,
}

impl<'a> From<&'a CaseResult> for CaseContent<'a> {
    fn from(case: &'a CaseResult) -> Self {
        let outcome = &case.outcome;
        Self {
            id: &case.id,
            backend: &case.backend,
            model: &case.model,
            check: &case.check,
            requirement: &case.requirement,
            clause: &case.clause,
            category: case.category,
            exclusive: case.exclusive,
            verdict: outcome.verdict,
            measurements: &outcome.measurements,
            repeatable: (!case.exclusive).then_some(Repeatable {
                reason: outcome.reason.as_deref(),
                failures: &outcome.failures,
                failed_assertions: outcome.failed_assertions,
                assertions: outcome.assertions,
                values: outcome.values,
                errors: &outcome.errors,
                series: &outcome.series,
            }),
        }
    }
}

/// The hash of a report's content: SHA-256 in lower-case hexadecimal over a compact JSON text of
///
/// - the schema version, the suite's version and what each backend declares;
/// - of every case, in order: id, backend, model, check, requirement, clause, category, whether it ran alone, verdict
///   and measurements;
/// - of every case that did not run alone, besides: reason, failures, the numbers of assertions, of failed ones and of
///   values, the worst errors by tolerance, and the series.
///
/// It leaves out what no two runs repeat: start, durations, timings, samples, notes, the last output of dead workers,
/// reproducers (how far a case is shrunk depends on the time there was), and of cases that run alone, because they
/// measure time or memory, all that they count and quote. It leaves out where the run was (environment, the backends'
/// descriptions, the path that chooses a model) and the totals, which follow from the cases. So two runs of one build
/// on one machine have one hash, and so have two builds that differ in nothing the suite sees.
///
/// # Errors
/// [`ReportError::Form`] where a value has no JSON form.
pub fn sha256(report: &Report) -> Result<String, ReportError> {
    let content = Content {
        schema_version: report.schema_version,
        suite_version: &report.suite_version,
        backends: &report.backends,
        cases: report.cases.iter().map(CaseContent::from).collect(),
    };
    let text = serde_json::to_vec(&content).map_err(|e| ReportError::Form { reason: e.to_string() })?;
    Ok(Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect())
}
