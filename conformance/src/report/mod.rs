//! What a run found, in the forms people and pipelines read.

pub mod badge;
pub mod content;
pub mod diff;
pub mod environment;
pub mod html;
pub mod invariance;
pub mod json;
pub mod junit;
pub mod levels;
pub mod schema;
pub mod terminal;

pub use environment::{Environment, GitState};

use crate::backend::Capabilities;
use crate::invariance::Summary;
use crate::suite::Case;
use crate::tolerance::STATISTICAL_ASSERTIONS;
use crate::verdict::{CaseResult, Verdict};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The version of the report's form. It rises whenever a reader of the old form would misread the new one.
pub const SCHEMA_VERSION: u32 = 2;

/// A whole run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Report {
    /// [`SCHEMA_VERSION`] of the writer.
    pub schema_version: u32,
    /// The suite's version.
    pub suite_version: String,
    /// The hash of what the run found: [`content::sha256`] says what is hashed. Two runs of one build on one machine
    /// have the same one.
    pub content_sha256: String,
    /// Start of the run, in seconds since 1970 (UTC).
    pub started_unix_s: u64,
    /// Wall time of the run in seconds.
    pub duration_s: f64,
    /// The machine.
    pub environment: Environment,
    /// What each backend declared.
    pub backends: BTreeMap<String, Capabilities>,
    /// What became of each backend's claims of invariance.
    #[serde(default)]
    pub invariance: BTreeMap<String, Summary>,
    /// What is wrong with the run although no case says so: stale expectations, a budget that is spent. A run with
    /// findings has failed.
    #[serde(default)]
    pub findings: Vec<String>,
    /// What backends say of themselves, where they do.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub descriptions: BTreeMap<String, String>,
    /// Sums over the cases.
    pub totals: Totals,
    /// The cases, by backend, model and check.
    pub cases: Vec<CaseResult>,
}

/// Sums over the cases of a run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Totals {
    /// Cases.
    pub cases: u64,
    /// Cases by verdict.
    pub verdicts: BTreeMap<Verdict, u64>,
    /// Assertions that ran.
    pub assertions: u64,
    /// Single values that they compared.
    pub values: u64,
}

impl Totals {
    /// Adds up the cases.
    pub fn of<'a>(cases: impl IntoIterator<Item = &'a CaseResult>) -> Self {
        let mut totals = Self::default();
        for case in cases {
            totals.cases += 1;
            *totals.verdicts.entry(case.outcome.verdict).or_default() += 1;
            totals.assertions += case.outcome.assertions;
            totals.values += case.outcome.values;
        }
        totals
    }

    /// How many cases have a verdict.
    pub fn count(&self, verdict: Verdict) -> u64 {
        self.verdicts.get(&verdict).copied().unwrap_or(0)
    }

    /// Whether every case passed, is a declared absence or is waived, and at least one passed.
    pub fn is_green(&self) -> bool {
        let bad: u64 = self.verdicts.iter().filter(|(v, _)| !v.is_good()).map(|(_, n)| n).sum();
        bad == 0 && self.count(Verdict::Pass) > 0
    }
}

impl Report {
    /// The report of the cases that ran.
    pub fn new(ran: &[Case], cases: Vec<CaseResult>, started: SystemTime, duration: Duration) -> Self {
        let backends: BTreeMap<String, Capabilities> =
            ran.iter().map(|c| (c.backend.name().to_string(), c.backend.capabilities())).collect();
        let checks = crate::checks::all();
        let of = |backend: &str| cases.iter().filter(|c| c.backend == backend).collect::<Vec<_>>();
        let described = |c: &Case| c.backend.description().map(|text| (c.backend.name().to_string(), text));
        let report = Self {
            schema_version: SCHEMA_VERSION,
            suite_version: env!("CARGO_PKG_VERSION").to_string(),
            content_sha256: String::new(),
            started_unix_s: started.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
            duration_s: duration.as_secs_f64(),
            environment: Environment::current(),
            descriptions: ran.iter().filter_map(described).collect(),
            invariance: backends
                .iter()
                .map(|(name, capabilities)| (name.clone(), Summary::of(capabilities, &checks, &of(name))))
                .collect(),
            findings: backends.keys().filter_map(|name| overspent(name, &of(name))).collect(),
            backends,
            totals: Totals::default(),
            cases,
        };
        report.sealed()
    }

    /// The same report with its totals and its hash taken afresh: to be called after a change to its cases.
    #[must_use]
    pub fn sealed(mut self) -> Self {
        self.totals = Totals::of(&self.cases);
        // A value without a JSON form leaves the report without a hash, which no reader accepts.
        self.content_sha256 = content::sha256(&self).unwrap_or_default();
        self
    }

    /// Whether every case is good, at least one passed, and nothing is wrong with the run as a whole.
    pub fn is_green(&self) -> bool {
        self.totals.is_green() && self.findings.is_empty()
    }

    /// The names of the backends that ran, in the order of the cases.
    pub fn backend_names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = Vec::new();
        for case in &self.cases {
            if !names.contains(&case.backend.as_str()) {
                names.push(&case.backend);
            }
        }
        names
    }

    /// The values of a measurement, or of a timing, over the cases of one backend.
    pub fn measurements<'a>(&'a self, backend: &'a str, key: &'a str) -> impl Iterator<Item = f64> + 'a {
        self.cases.iter().filter(move |case| case.backend == backend).filter_map(move |case| {
            let outcome = &case.outcome;
            outcome.measurements.get(key).or_else(|| outcome.timings.get(key)).copied()
        })
    }
}

/// A finding where the statistical assertions of a backend are more than the run's budget for false alarms is shared by.
fn overspent(backend: &str, cases: &[&CaseResult]) -> Option<String> {
    let count: u64 = cases.iter().map(|c| c.outcome.statistical).sum();
    let text = || {
        format!(
            "{backend}: {count} statistical assertions, and the budget for false alarms is shared by at most {STATISTICAL_ASSERTIONS}"
        )
    };
    (count > STATISTICAL_ASSERTIONS).then(text)
}
