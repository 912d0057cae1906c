//! What came of a case: the verdicts and the record that reports are made of.

use crate::case::Category;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The outcome of one case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Verdict {
    /// At least one assertion ran and all held.
    Pass,
    /// An assertion did not hold, or the backend returned an error where none was due.
    Fail,
    /// The backend declares that it lacks what the check needs, and refuses it as it must.
    Unsupported,
    /// Nothing was asserted, or the check found that it cannot decide.
    Inconclusive,
    /// A panic, an abort, a signal or an early exit.
    Crash,
    /// The deadline passed; the worker was killed.
    Timeout,
    /// The case fails as an entry of the expectations file says it does: known, with a reason and a date of expiry.
    Waived,
    /// An entry of the expectations file says that the case fails, or the backend declares that it cannot, and it passes.
    UnexpectedPass,
}

impl Verdict {
    /// Every verdict, in the order reports show them.
    pub const ALL: [Self; 8] = [
        Self::Pass,
        Self::Fail,
        Self::Crash,
        Self::Timeout,
        Self::UnexpectedPass,
        Self::Inconclusive,
        Self::Waived,
        Self::Unsupported,
    ];

    /// The name in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Fail => "fail",
            Self::Unsupported => "unsupported",
            Self::Inconclusive => "inconclusive",
            Self::Crash => "crash",
            Self::Timeout => "timeout",
            Self::Waived => "waived",
            Self::UnexpectedPass => "unexpected_pass",
        }
    }

    /// The name as people read it.
    pub const fn words(self) -> &'static str {
        match self {
            Self::UnexpectedPass => "unexpected pass",
            _ => self.name(),
        }
    }

    /// Whether a run with this verdict in it may still be called green: only passes, declared absences
    /// and waivers.
    pub const fn is_good(self) -> bool {
        matches!(self, Self::Pass | Self::Unsupported | Self::Waived)
    }
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// One assertion that did not hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Failure {
    /// What had to be the case.
    pub expected: String,
    /// What was the case.
    pub seen: String,
    /// The assertion, as `file:line` of the check.
    pub at: String,
}

/// One case of a run: what it was, and what came of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct CaseResult {
    /// The stable id: `BACKEND/MODEL/CATEGORY/WHAT@NUMBER`.
    pub id: String,
    /// The backend.
    pub backend: String,
    /// The model's name.
    pub model: String,
    /// What `--model` takes to choose that model: its name or its folder.
    pub model_argument: String,
    /// The check's name: `CATEGORY/WHAT`.
    pub check: String,
    /// The requirement in SPEC.md.
    pub requirement: String,
    /// The requirement in one line.
    pub clause: String,
    /// The category.
    pub category: Category,
    /// Whether the case ran alone because it measures time or memory. What such a case counts and quotes is not the
    /// same in every run.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub exclusive: bool,
    /// What came of it.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// What a check left behind, whatever its end.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Outcome {
    /// The verdict.
    pub verdict: Verdict,
    /// Why, where the verdict needs a word: the panic message, the missing capability, the deadline.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The assertions that did not hold: the first ones, see [`crate::case::MAX_FAILURES`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failures: Vec<Failure>,
    /// How many assertions did not hold, kept or not.
    #[serde(default)]
    pub failed_assertions: u64,
    /// How many assertions ran.
    pub assertions: u64,
    /// How many single values (logits, tokens, bytes) those assertions compared.
    pub values: u64,
    /// How many of the assertions an honest backend may fail by bad luck, each with a probability of at most
    /// [`crate::tolerance::FALSE_ALARM`].
    #[serde(default, skip_serializing_if = "is_zero")]
    pub statistical: u64,
    /// Numbers measured on the way, by the names of [`crate::measure`]: the same in every run on one machine.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub measurements: BTreeMap<String, f64>,
    /// Numbers of the clock and of the process's memory, which no two runs repeat.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub timings: BTreeMap<String, f64>,
    /// The largest error that each tolerance was held against, by the tolerance's name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub errors: BTreeMap<String, f64>,
    /// Errors by position, such as one a row of logits: the same in every run on one machine.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub series: BTreeMap<String, Vec<f32>>,
    /// Single readings behind the timings, such as the time of every decoded token, which no two runs repeat.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub samples: BTreeMap<String, Vec<f64>>,
    /// Remarks of the check.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// The last output of a worker that died in this case.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_tail: Option<String>,
    /// The smallest case found that fails likewise, as the JSON text that `conformance replay` takes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reproducer: Option<String>,
    /// Wall time in seconds.
    pub duration_s: f64,
}

fn is_zero(count: &u64) -> bool {
    *count == 0
}

impl Outcome {
    /// An outcome with nothing asserted: the start for crashes, timeouts and unsupported cases.
    pub fn bare(verdict: Verdict, reason: impl Into<String>) -> Self {
        Self {
            verdict,
            reason: Some(reason.into()),
            failures: Vec::new(),
            failed_assertions: 0,
            assertions: 0,
            values: 0,
            statistical: 0,
            measurements: BTreeMap::new(),
            timings: BTreeMap::new(),
            errors: BTreeMap::new(),
            series: BTreeMap::new(),
            samples: BTreeMap::new(),
            notes: Vec::new(),
            output_tail: None,
            reproducer: None,
            duration_s: 0.0,
        }
    }
}
