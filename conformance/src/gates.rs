//! Whether a report is good enough: thresholds from a file, breaches with their reasons.
//!
//! The gate trusts nothing that it was not shown: a report without cases, a required backend or category that is
//! missing, a threshold whose measurement nobody took are breaches.

use crate::case::Category;
use crate::measure;
use crate::report::{Report, Totals};
use crate::suite::Case;
use crate::verdict::Verdict;
use serde::Deserialize;
use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

/// The version of the thresholds file that this suite reads.
pub const THRESHOLDS_VERSION: u32 = 1;

/// A thresholds file.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Thresholds {
    /// [`THRESHOLDS_VERSION`].
    pub version: u32,
    /// What is asked of the run as a whole.
    pub suite: SuiteRules,
    /// What is asked of each backend that must be in the report, by name.
    #[serde(default)]
    pub backends: BTreeMap<String, BackendRules>,
    /// Service levels by name; `default` is the one taken when no name is given.
    pub profiles: BTreeMap<String, Profile>,
}

/// What is asked of the run as a whole.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SuiteRules {
    /// Cases that may fail, crash or time out.
    pub max_failures: u64,
    /// Cases that may come to no verdict.
    pub max_inconclusive: u64,
    /// Cases that must have passed.
    pub min_cases: u64,
    /// Assertions that must have run.
    pub min_assertions: u64,
}

/// What is asked of one backend.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackendRules {
    /// Categories in which it must have passed at least one case.
    pub required_categories: Vec<Category>,
    /// Cases that it must have passed.
    #[serde(default)]
    pub min_cases: u64,
}

/// Service levels, held against the worst measurement of each backend in the report. A level that is left out is not
/// asked for; one that is given must have been measured.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// Milliseconds a token.
    pub max_token_latency_ms: Option<f64>,
    /// Tokens a second.
    pub min_throughput_tps: Option<f64>,
    /// Milliseconds to the first token.
    pub max_time_to_first_token_ms: Option<f64>,
    /// Bytes.
    pub max_memory_bytes: Option<u64>,
    /// Pearson correlation with the fp32 reference, at the worst position.
    pub min_accuracy_correlation: Option<f64>,
}

/// Why no verdict on a report can be given.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GateError {
    /// The thresholds file cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The thresholds file is not one.
    #[error("thresholds: {reason}")]
    Form {
        /// What is wrong.
        reason: String,
    },
    /// No profile of that name.
    #[error("no profile {name:?} in the thresholds; there are {}", known.join(", "))]
    Profile {
        /// The name.
        name: String,
        /// The names there are.
        known: Vec<String>,
    },
}

impl Thresholds {
    /// Reads the text of a thresholds file. Unknown keys are errors: a misspelt threshold must not be one that is
    /// never applied.
    ///
    /// # Errors
    /// [`GateError::Form`].
    pub fn parse(text: &str) -> Result<Self, GateError> {
        let form = |reason: String| GateError::Form { reason };
        let thresholds: Self = toml::from_str(text).map_err(|e| form(e.to_string()))?;
        if thresholds.version != THRESHOLDS_VERSION {
            return Err(form(format!("version {}, and this reader knows {THRESHOLDS_VERSION}", thresholds.version)));
        }
        if !thresholds.profiles.contains_key("default") {
            return Err(form("no profile named default".to_string()));
        }
        for (name, profile) in &thresholds.profiles {
            if profile.floats().iter().any(|level| !level.is_finite()) {
                return Err(form(format!("profile {name} has a level that is not a number")));
            }
        }
        Ok(thresholds)
    }

    /// Reads a thresholds file.
    ///
    /// # Errors
    /// [`GateError::Io`] and [`GateError::Form`].
    pub fn read(path: &Path) -> Result<Self, GateError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| GateError::Io { path: path.to_path_buf(), source })?;
        Self::parse(&text)
    }

    /// Everything in which the report falls short, one sentence each; empty where the gate opens.
    ///
    /// # Errors
    /// [`GateError::Profile`] for a profile that is not in the file.
    pub fn breaches(&self, report: &Report, profile: &str) -> Result<Vec<String>, GateError> {
        let levels = self.profiles.get(profile).ok_or_else(|| GateError::Profile {
            name: profile.to_string(),
            known: self.profiles.keys().cloned().collect(),
        })?;
        let mut breaches: Vec<String> = report.findings.iter().map(|finding| format!("finding: {finding}")).collect();
        self.suite.judge(report, &mut breaches);
        for (name, rules) in &self.backends {
            rules.judge(name, report, &mut breaches);
        }
        for backend in report.backend_names() {
            levels.judge(profile, backend, report, &mut breaches);
        }
        Ok(breaches)
    }
}

/// The cases of a suite that a report lacks, a sentence each backend that they belong to.
pub fn absences(report: &Report, suite: &[Case]) -> Vec<String> {
    let there: HashSet<&str> = report.cases.iter().map(|case| case.id.as_str()).collect();
    let mut absent: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for case in suite.iter().filter(|case| !there.contains(case.id.as_str())) {
        absent.entry(case.backend.name()).or_default().push(&case.id);
    }
    let sentence = |(backend, ids): (&str, Vec<&str>)| {
        format!("backend {backend}: {} cases of the suite are not in the report, {} first", ids.len(), ids[0])
    };
    absent.into_iter().map(sentence).collect()
}

impl SuiteRules {
    fn judge(&self, report: &Report, breaches: &mut Vec<String>) {
        // Counted afresh: the sums in a report are for readers.
        let totals = Totals::of(&report.cases);
        if totals.cases == 0 {
            breaches.push("the report has no cases".to_string());
        }
        // Every verdict is judged, so that one added later cannot slip through.
        let (mut failures, mut inconclusive) = (0, 0);
        for (verdict, count) in &totals.verdicts {
            match verdict {
                Verdict::Pass | Verdict::Unsupported | Verdict::Waived => {}
                Verdict::Inconclusive => inconclusive += count,
                Verdict::Fail | Verdict::Crash | Verdict::Timeout | Verdict::UnexpectedPass => failures += count,
            }
        }
        let mut at_most = |what: &str, seen: u64, limit: u64| {
            if seen > limit {
                breaches.push(format!("{seen} {what}, at most {limit} allowed"));
            }
        };
        at_most("cases failed, crashed, timed out or passed unexpectedly", failures, self.max_failures);
        at_most("cases inconclusive", inconclusive, self.max_inconclusive);
        let mut at_least = |what: &str, seen: u64, limit: u64| {
            if seen < limit {
                breaches.push(format!("{seen} {what}, at least {limit} required"));
            }
        };
        at_least("cases passed", totals.count(Verdict::Pass), self.min_cases);
        at_least("assertions ran", totals.assertions, self.min_assertions);
    }
}

impl BackendRules {
    fn judge(&self, name: &str, report: &Report, breaches: &mut Vec<String>) {
        let passed: Vec<Category> = report
            .cases
            .iter()
            .filter(|c| c.backend == name && c.outcome.verdict == Verdict::Pass)
            .map(|c| c.category)
            .collect();
        if !report.cases.iter().any(|c| c.backend == name) {
            breaches.push(format!("backend {name} is required and not in the report"));
            return;
        }
        if (passed.len() as u64) < self.min_cases {
            breaches.push(format!(
                "backend {name}: {} cases passed, at least {} required",
                passed.len(),
                self.min_cases
            ));
        }
        for category in self.required_categories.iter().filter(|c| !passed.contains(c)) {
            breaches.push(format!("backend {name}: no case of category {category} passed"));
        }
    }
}

impl Profile {
    fn floats(&self) -> Vec<f64> {
        [
            self.max_token_latency_ms,
            self.min_throughput_tps,
            self.max_time_to_first_token_ms,
            self.min_accuracy_correlation,
        ]
        .into_iter()
        .flatten()
        .collect()
    }

    fn judge(&self, profile: &str, backend: &str, report: &Report, breaches: &mut Vec<String>) {
        let mut judge = |what: &str, key: &str, limit: Option<f64>, high_is_bad: bool| {
            let Some(limit) = limit else { return };
            let worst = report.measurements(backend, key).reduce(|a, b| if (a > b) == high_is_bad { a } else { b });
            let side = if high_is_bad { "at most" } else { "at least" };
            match worst {
                None => breaches.push(format!("backend {backend}: {what} was not measured ({key}; profile {profile})")),
                Some(seen) if high_is_bad && seen <= limit || !high_is_bad && seen >= limit => {}
                Some(seen) => {
                    breaches
                        .push(format!("backend {backend}: {what} {seen}, {side} {limit} allowed by profile {profile}"));
                }
            }
        };
        judge("token latency in ms", measure::TOKEN_LATENCY_MS, self.max_token_latency_ms, true);
        judge("throughput in tokens/s", measure::THROUGHPUT_TPS, self.min_throughput_tps, false);
        judge("time to first token in ms", measure::TIME_TO_FIRST_TOKEN_MS, self.max_time_to_first_token_ms, true);
        let memory = self.max_memory_bytes.map(|bytes| bytes as f64);
        judge("peak memory in bytes", measure::PEAK_MEMORY_BYTES, memory, true);
        judge("correlation with fp32", measure::WORST_CORRELATION, self.min_accuracy_correlation, false);
    }
}
