//! The reproducer file: one case in at most [`MAX_BYTES`] bytes of JSON.

use super::limits::{self, Excess, MAX_BYTES, MAX_CONTEXT, MAX_VOCAB};
use super::schedule::Schedule;
use crate::backend::Semantics;
use crate::model::{Model, ModelError, PromptShape};
use crate::verdict::{Outcome, Verdict};
use fixtures::Spec;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// The version of the form. It rises whenever an older reader would misread a file.
pub const REPRODUCER_VERSION: u32 = 1;

/// A failure that can be had again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Reproducer {
    /// A check of the suite on a model.
    Check(CheckCase),
    /// A schedule of calls on a synthetic model, held to the oracle.
    Schedule(ScheduleCase),
}

/// A check of the suite on a model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckCase {
    /// [`REPRODUCER_VERSION`].
    pub version: u32,
    /// The backend that failed; another one may be named for a replay.
    pub backend: String,
    /// The check's name.
    pub check: String,
    /// The requirement that it tests.
    pub requirement: String,
    /// The model.
    pub model: ModelChoice,
    /// The prompts that the check makes.
    #[serde(default)]
    pub prompt: PromptShape,
    /// What came of it.
    pub outcome: Observed,
}

/// A schedule of calls on a synthetic model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScheduleCase {
    /// [`REPRODUCER_VERSION`].
    pub version: u32,
    /// The backend that failed; another one may be named for a replay.
    pub backend: String,
    /// What that backend computes. A replay holds its backend to the semantics that it declares itself.
    pub semantics: Semantics,
    /// The model.
    pub model: Synthetic,
    /// The calls.
    pub schedule: Schedule,
    /// What came of it.
    pub outcome: Observed,
}

/// Which model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ModelChoice {
    /// One of the suite's own, by name.
    BuiltIn(String),
    /// A synthetic one.
    Synthetic(Synthetic),
}

/// A synthetic model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Synthetic {
    /// The seed of its weights.
    pub seed: u64,
    /// Its numbers.
    pub spec: Spec,
}

/// What a failing case showed, cut to what the file has room for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Observed {
    /// The verdict.
    pub verdict: Verdict,
    /// What had to be the case.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub expected: String,
    /// What was the case.
    pub seen: String,
}

/// Why a reproducer cannot be written, read or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReproError {
    /// The file cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// More bytes than a reproducer may have.
    #[error("{bytes} bytes, and a reproducer has at most {MAX_BYTES}")]
    TooLarge {
        /// Its size.
        bytes: u64,
    },
    /// The text is not a reproducer.
    #[error("not a reproducer: {reason}")]
    Form {
        /// What is wrong.
        reason: String,
    },
    /// A number beyond its limit.
    #[error("not a reproducer to be run: {0}")]
    Excess(#[from] Excess),
    /// The model does not exist or cannot be made.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The suite has no such check.
    #[error("no check {name:?} in this suite")]
    UnknownCheck {
        /// The name.
        name: String,
    },
}

impl Reproducer {
    /// Reads a reproducer and checks that it asks for nothing absurd.
    ///
    /// # Errors
    /// [`ReproError`] for too many bytes, other JSON, unknown fields, another version and sizes beyond their limits.
    pub fn from_json(text: &str) -> Result<Self, ReproError> {
        if text.len() > MAX_BYTES {
            return Err(ReproError::TooLarge { bytes: text.len() as u64 });
        }
        let form = |reason: String| ReproError::Form { reason };
        let this: Self = serde_json::from_str(text).map_err(|e| form(e.to_string()))?;
        let version = match &this {
            Self::Check(case) => case.version,
            Self::Schedule(case) => case.version,
        };
        if version != REPRODUCER_VERSION {
            return Err(form(format!("version {version}, and this reader knows {REPRODUCER_VERSION}")));
        }
        this.check()?;
        Ok(this)
    }

    /// Reads a reproducer from a file, of which no more is read than one may have.
    ///
    /// # Errors
    /// As [`Self::from_json`], and [`ReproError::Io`].
    pub fn read(path: &Path) -> Result<Self, ReproError> {
        use std::io::Read;
        let io = |source| ReproError::Io { path: path.to_path_buf(), source };
        let file = std::fs::File::open(path).map_err(io)?;
        let mut bytes = Vec::new();
        file.take(MAX_BYTES as u64 + 1).read_to_end(&mut bytes).map_err(io)?;
        if bytes.len() > MAX_BYTES {
            let bytes = std::fs::metadata(path).map_or(bytes.len() as u64, |m| m.len().max(bytes.len() as u64));
            return Err(ReproError::TooLarge { bytes });
        }
        let text = String::from_utf8(bytes).map_err(|e| ReproError::Form { reason: e.to_string() })?;
        Self::from_json(&text)
    }

    /// The text of the file. What was expected and seen is cut as far as the size demands.
    ///
    /// # Errors
    /// [`ReproError::TooLarge`] where the case itself does not fit.
    pub fn to_json(&self) -> Result<String, ReproError> {
        let mut bytes = 0;
        for room in [400, 200, 100, 40, 0] {
            let mut cut = self.clone();
            cut.outcome_mut().clip(room);
            let mut text = serde_json::to_string(&cut).map_err(|e| ReproError::Form { reason: e.to_string() })?;
            text.push('\n');
            if text.len() <= MAX_BYTES {
                return Ok(text);
            }
            bytes = text.len() as u64;
        }
        Err(ReproError::TooLarge { bytes })
    }

    /// Checks sizes: what [`Self::from_json`] does after parsing.
    pub(super) fn check(&self) -> Result<(), ReproError> {
        if let Some(model) = self.synthetic() {
            limits::check_spec(&model.spec)?;
            model.spec.check().map_err(|e| ReproError::Form { reason: e.to_string() })?;
        }
        match self {
            Self::Check(case) => {
                limits::at_most("prompt.alphabet", case.prompt.alphabet.unwrap_or(0), MAX_VOCAB)?;
                limits::at_most("prompt.longest", case.prompt.longest.unwrap_or(0), MAX_CONTEXT)?;
            }
            Self::Schedule(case) => case.schedule.check()?,
        }
        Ok(())
    }

    /// The backend that failed.
    pub fn backend(&self) -> &str {
        match self {
            Self::Check(case) => &case.backend,
            Self::Schedule(case) => &case.backend,
        }
    }

    /// What came of the case when the file was written.
    pub fn outcome(&self) -> &Observed {
        match self {
            Self::Check(case) => &case.outcome,
            Self::Schedule(case) => &case.outcome,
        }
    }

    pub(super) fn outcome_mut(&mut self) -> &mut Observed {
        match self {
            Self::Check(case) => &mut case.outcome,
            Self::Schedule(case) => &mut case.outcome,
        }
    }

    /// The synthetic model, where it is one.
    pub fn synthetic(&self) -> Option<&Synthetic> {
        match self {
            Self::Check(CheckCase { model: ModelChoice::Synthetic(model), .. }) => Some(model),
            Self::Check(_) => None,
            Self::Schedule(case) => Some(&case.model),
        }
    }

    pub(super) fn set_synthetic(&mut self, model: Synthetic) {
        match self {
            Self::Check(case) => case.model = ModelChoice::Synthetic(model),
            Self::Schedule(case) => case.model = model,
        }
    }

    /// The model to run on.
    pub(super) fn model(&self) -> Result<Model, ModelError> {
        match self {
            Self::Check(CheckCase { model: ModelChoice::BuiltIn(name), .. }) => Model::named(name),
            Self::Check(CheckCase { model: ModelChoice::Synthetic(model), .. })
            | Self::Schedule(ScheduleCase { model, .. }) => Ok(Model::synthetic("synthetic", &model.spec, model.seed)),
        }
    }
}

impl Observed {
    /// Of a case that was not run yet.
    pub(super) fn none() -> Self {
        Self { verdict: Verdict::Inconclusive, expected: String::new(), seen: String::new() }
    }

    /// What an outcome shows first.
    pub(super) fn of(outcome: &Outcome) -> Self {
        let (expected, seen) = match outcome.failures.first() {
            Some(failure) => (failure.expected.clone(), failure.seen.clone()),
            None => (String::new(), outcome.reason.clone().unwrap_or_default()),
        };
        Self { verdict: outcome.verdict, expected, seen }
    }

    fn clip(&mut self, room: usize) {
        for text in [&mut self.expected, &mut self.seen] {
            if text.len() > room {
                let end = (0..=room).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0);
                text.truncate(end);
                text.push('…');
            }
        }
    }
}
