//! The report of a whole run of the test target, for the gate.

use crate::expectations::Expectations;
use crate::report::{Report, json};
use crate::suite::Case;
use crate::verdict::CaseResult;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Instant, SystemTime};

/// The results of a run as they come, and where to put the report of all of them.
///
/// A run of a part leaves no file, and neither does one that is cut short: the file of an earlier run goes first.
pub(super) struct Record {
    path: PathBuf,
    results: Arc<Mutex<HashMap<String, CaseResult>>>,
    started: SystemTime,
    clock: Instant,
}

/// Where a trial leaves its result.
#[derive(Clone)]
pub(super) struct Sink(Arc<Mutex<HashMap<String, CaseResult>>>);

impl Sink {
    pub(super) fn keep(&self, result: &CaseResult) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(result.id.clone(), result.clone());
    }
}

impl Record {
    /// Begins a record that will go to a file, and removes what is there.
    ///
    /// # Errors
    /// The file is there and cannot be removed.
    pub(super) fn begin(path: PathBuf) -> Result<Self, std::io::Error> {
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        Ok(Self { path, results: Arc::default(), started: SystemTime::now(), clock: Instant::now() })
    }

    pub(super) fn sink(&self) -> Sink {
        Sink(self.results.clone())
    }

    /// Writes the report if every case of the whole suite has a result.
    ///
    /// # Errors
    /// [`json::ReportError`].
    pub(super) fn end(self, whole: &[Case], expectations: Option<&Expectations>) -> Result<(), json::ReportError> {
        let elapsed = self.clock.elapsed();
        let mut results = self.results.lock().unwrap_or_else(PoisonError::into_inner);
        let cases: Vec<CaseResult> = whole.iter().filter_map(|case| results.remove(&case.id)).collect();
        if cases.len() < whole.len() {
            return Ok(());
        }
        let mut report = Report::new(whole, cases, self.started, elapsed);
        if let Some(expectations) = expectations {
            report.findings.extend(expectations.findings(whole, &report.cases).into_iter().map(|f| f.text));
            report = report.sealed();
        }
        json::write(&report, &self.path)
    }
}
