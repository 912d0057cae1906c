//! A check, the context it runs in, and the assertions it makes.
//!
//! A check is a plain function over a [`Context`]. It asks the context for engines, asserts through it, and returns.
//! Assertions never panic: each one is counted, a failed one is kept with what was expected and what was seen, and the
//! check goes on unless it asks to stop (`?` on [`Context::require`] or on an engine's result). A check that comes back
//! without a single assertion is inconclusive, never passed.

pub use crate::context::{CLOCK_ERROR, Context, MAX_FAILURES};

use crate::backend::Capability;
use crate::invariance::Axis;
use crate::model::{Model, ModelFacts, TINY};
use bitnet_contracts::InferenceError;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt::Display;
use std::time::Duration;

/// The deadline of a case whose check does not set its own.
pub const DEFAULT_DEADLINE: Duration = Duration::from_secs(60);

/// What a check is about: the columns of the report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Category {
    /// Shapes, types and devices of inputs and outputs; configuration.
    Shape,
    /// NaN, infinities, finiteness, ranges.
    Numerics,
    /// Logits and tokens against golden data.
    Golden,
    /// No position sees a later one.
    Causality,
    /// Cached and whole evaluation agree; reset, truncate, overflow, foreign caches.
    KvCache,
    /// Same input, same bits: calls, seeds, threads.
    Determinism,
    /// A sequence in a batch equals the sequence alone.
    Batch,
    /// Limits, stop rules, results of generation.
    Generation,
    /// Penalties, temperature, top-k, top-p, seeds.
    Sampling,
    /// Input validation and the error taxonomy.
    Errors,
    /// Hostile model folders and inputs.
    Hostile,
    /// Many callers at once.
    Concurrency,
    /// Memory figures and growth.
    Memory,
    /// Service levels: latency, throughput.
    Sla,
}

impl Category {
    /// Every category, in the order reports show them.
    pub const ALL: [Self; 14] = [
        Self::Shape,
        Self::Numerics,
        Self::Golden,
        Self::Causality,
        Self::KvCache,
        Self::Determinism,
        Self::Batch,
        Self::Generation,
        Self::Sampling,
        Self::Errors,
        Self::Hostile,
        Self::Concurrency,
        Self::Memory,
        Self::Sla,
    ];

    /// The name: the first part of the names of its checks.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Shape => "shape",
            Self::Numerics => "numerics",
            Self::Golden => "golden",
            Self::Causality => "causality",
            Self::KvCache => "kv_cache",
            Self::Determinism => "determinism",
            Self::Batch => "batch",
            Self::Generation => "generation",
            Self::Sampling => "sampling",
            Self::Errors => "errors",
            Self::Hostile => "hostile",
            Self::Concurrency => "concurrency",
            Self::Memory => "memory",
            Self::Sla => "sla",
        }
    }
}

impl Display for Category {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// Which models a check runs on.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum ModelSet {
    /// The check holds for every model. A default run takes the trained fixture model for all of them; a run with
    /// `--model` takes the models named there, a user's own folder included.
    Any,
    /// The check holds for every model, and a default run tries it on every built-in one.
    Every,
    /// Every model that has golden data, and each model that the user names if the oracle can make it some
    /// ([`ModelFacts::within_the_oracle`]).
    Golden,
    /// One built-in model, whose facts the check knows by heart.
    Only(&'static str),
    /// Every model whose facts satisfy the function; a default run tries all built-in ones that do.
    Where(fn(&ModelFacts) -> bool),
}

impl ModelSet {
    /// Whether the check makes a case with this model. `chosen` says that the model was named by the user; otherwise it
    /// is one of the built-in models of a default run.
    pub fn takes(&self, model: &Model, chosen: bool) -> bool {
        match self {
            Self::Any => chosen || model.name() == TINY,
            Self::Every => true,
            Self::Golden => model.golden().is_some() || chosen && model.facts().within_the_oracle(),
            Self::Only(name) => model.name() == *name && !model.is_folder(),
            Self::Where(fits) => fits(model.facts()),
        }
    }
}

/// Why a check stopped before its end.
#[derive(Debug)]
#[non_exhaustive]
pub enum Stop {
    /// A required assertion did not hold; it is recorded already.
    Failed,
    /// The backend returned an error where none was due.
    Unexpected(String),
    /// The check needs something that this backend or model lacks.
    Unsupported(String),
    /// The backend declares that it cannot do what it does, and does it right.
    UnexpectedPass(String),
    /// The check ran and found that it cannot decide (noise, say).
    Inconclusive(String),
}

impl From<InferenceError> for Stop {
    fn from(error: InferenceError) -> Self {
        Self::Unexpected(error.to_string())
    }
}

impl From<candle_core::Error> for Stop {
    fn from(error: candle_core::Error) -> Self {
        Self::Unexpected(format!("tensor operation failed: {error}"))
    }
}

impl From<golden::GoldenError> for Stop {
    fn from(error: golden::GoldenError) -> Self {
        Self::Inconclusive(format!("golden data: {error}"))
    }
}

impl From<crate::model::ModelError> for Stop {
    fn from(error: crate::model::ModelError) -> Self {
        Self::Inconclusive(error.to_string())
    }
}

impl From<std::io::Error> for Stop {
    fn from(error: std::io::Error) -> Self {
        Self::Inconclusive(format!("the check could not work with its files: {error}"))
    }
}

/// What a check returns: `Ok` when it came to its end, whatever its assertions said.
pub type CheckResult = Result<(), Stop>;

/// One requirement's test, run once per backend and model.
#[derive(Debug, Clone)]
pub struct Check {
    /// The requirement's number in SPEC.md, such as `KV-3`. Several checks may test one requirement.
    pub id: &'static str,
    /// `category/what_it_does`, unique in the suite.
    pub name: &'static str,
    /// The report's column; its name is the first part of `name`.
    pub category: Category,
    /// The requirement in one line.
    pub clause: &'static str,
    /// The models it runs on.
    pub models: ModelSet,
    /// What the backend must be capable of; where it declares that it is not, the probe of that capability runs in
    /// place of the check.
    pub needs: Option<Capability>,
    /// The claim of invariance that it tests.
    pub axis: Option<Axis>,
    /// The test.
    pub run: fn(&mut Context<'_>) -> CheckResult,
    /// The time it may take, where [`DEFAULT_DEADLINE`] is not right.
    pub deadline: Option<Duration>,
    /// Nothing else may run beside it: it measures time.
    pub exclusive: bool,
    /// It runs in two fresh processes, one after the other, with one scratch folder: the first leaves there what the
    /// second compares with, and is inconclusive.
    pub twice: bool,
    /// It has a worker process of its own, in which nothing ran before: it measures memory.
    pub fresh: bool,
    /// It takes much longer than most: a proof tries it only on faults that no two other checks have caught.
    pub long: bool,
}

impl Check {
    /// A check that runs on any model ([`ModelSet::Any`]) for every backend, beside others, within the default deadline.
    pub const fn new(
        id: &'static str,
        name: &'static str,
        category: Category,
        clause: &'static str,
        run: fn(&mut Context<'_>) -> CheckResult,
    ) -> Self {
        Self {
            id,
            name,
            category,
            clause,
            models: ModelSet::Any,
            needs: None,
            axis: None,
            run,
            deadline: None,
            exclusive: false,
            twice: false,
            fresh: false,
            long: false,
        }
    }

    /// Chooses the models.
    #[must_use]
    pub const fn on(mut self, models: ModelSet) -> Self {
        self.models = models;
        self
    }

    /// Says what the backend must be capable of.
    #[must_use]
    pub const fn needs(mut self, capability: Capability) -> Self {
        self.needs = Some(capability);
        self
    }

    /// Says which claim of invariance it tests.
    #[must_use]
    pub const fn tests(mut self, axis: Axis) -> Self {
        self.axis = Some(axis);
        self
    }

    /// Sets the deadline.
    #[must_use]
    pub const fn within(mut self, seconds: u64) -> Self {
        self.deadline = Some(Duration::from_secs(seconds));
        self
    }

    /// Runs alone, with no other case beside it, and in a process of its own.
    #[must_use]
    pub const fn exclusive(mut self) -> Self {
        self.exclusive = true;
        self.fresh()
    }

    /// Runs in a process of its own, beside others.
    #[must_use]
    pub const fn fresh(mut self) -> Self {
        self.fresh = true;
        self
    }

    /// Runs in two processes, of which the second compares with what the first left in the scratch folder.
    #[must_use]
    pub const fn twice(mut self) -> Self {
        self.twice = true;
        self
    }

    /// Takes much longer than most checks.
    #[must_use]
    pub const fn long(mut self) -> Self {
        self.long = true;
        self
    }

    /// The id of the case that this check makes with a backend and a model: `BACKEND/MODEL/CATEGORY/WHAT@NUMBER`.
    ///
    /// Ids are stable: they depend on nothing but these names, and the part after `@` is the requirement in SPEC.md.
    pub fn case_id(&self, backend: &str, model: &str) -> String {
        format!("{backend}/{model}/{}@{}", self.name, self.id)
    }
}
