//! The report as JUnit XML: one test suite a backend, one test case a case.

use super::Report;
use super::json::ReportError;
use crate::verdict::{CaseResult, Verdict};
use quick_junit::{NonSuccessKind, TestCase, TestCaseStatus, TestSuite};
use std::path::Path;
use std::time::Duration;

/// The report as XML text.
///
/// # Errors
/// [`ReportError::Form`] where it has no XML form.
pub fn to_string(report: &Report) -> Result<String, ReportError> {
    let mut xml = quick_junit::Report::new("conformance");
    xml.set_time(seconds(report.duration_s));
    for backend in report.backend_names() {
        let mut suite = TestSuite::new(backend);
        let cases: Vec<&CaseResult> = report.cases.iter().filter(|c| c.backend == backend).collect();
        suite.set_time(seconds(cases.iter().map(|c| c.outcome.duration_s).sum()));
        suite.add_test_cases(cases.into_iter().map(test_case));
        xml.add_test_suite(suite);
    }
    xml.to_string().map_err(|e| ReportError::Form { reason: e.to_string() })
}

/// Writes the XML.
///
/// # Errors
/// [`ReportError`].
pub fn write(report: &Report, path: &Path) -> Result<(), ReportError> {
    let text = to_string(report)?;
    std::fs::write(path, text).map_err(|source| ReportError::Io { path: path.to_path_buf(), source })
}

fn seconds(value: f64) -> Duration {
    Duration::try_from_secs_f64(value).unwrap_or_default()
}

fn test_case(case: &CaseResult) -> TestCase {
    let outcome = &case.outcome;
    let mut status = match outcome.verdict {
        Verdict::Pass => TestCaseStatus::success(),
        Verdict::Unsupported | Verdict::Waived => TestCaseStatus::skipped(),
        Verdict::Fail | Verdict::UnexpectedPass => TestCaseStatus::non_success(NonSuccessKind::Failure),
        Verdict::Inconclusive | Verdict::Crash | Verdict::Timeout => TestCaseStatus::non_success(NonSuccessKind::Error),
    };
    let mut lines: Vec<String> = outcome.reason.iter().cloned().collect();
    for failure in &outcome.failures {
        lines.push(format!("expected: {}\nseen: {}\nat: {}", failure.expected, failure.seen, failure.at));
    }
    if let Some(first) = lines.first() {
        status.set_message(first.lines().next().unwrap_or_default());
    }
    if outcome.verdict != Verdict::Pass {
        status.set_type(outcome.verdict.name());
        lines.extend(outcome.output_tail.iter().map(|tail| format!("last output:\n{tail}")));
        if outcome.verdict != Verdict::Unsupported {
            status.set_description(lines.join("\n\n"));
        }
    }
    let mut test = TestCase::new(case.id.clone(), status);
    test.set_classname(format!("{}.{}", case.backend, case.category)).set_time(seconds(outcome.duration_s));
    test.set_assertions(usize::try_from(outcome.assertions).unwrap_or(usize::MAX));
    test
}
