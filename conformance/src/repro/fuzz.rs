//! Differential fuzzing: random models, random calls, and the oracle as the judge.

use super::draw::{self, Draw};
use super::file::{Observed, REPRODUCER_VERSION, ReproError, Reproducer, ScheduleCase};
use super::play::{DISTANCE, FIRM_ROWS, REFUSALS, ROWS};
use super::replay::replay;
use super::shrink::{Shrinker, Signature, fails};
use crate::run::Runner;
use crate::suite::Suite;
use crate::verdict::Outcome;
use std::time::Duration;

/// How long one finding is made smaller, unless the caller says otherwise.
const SHRINK_BUDGET: Duration = Duration::from_secs(15);

/// A source of iterations: the same seed gives the same models and calls.
pub struct Fuzzer<'a> {
    suite: &'a Suite,
    runner: &'a Runner,
    backends: Vec<String>,
    seed: u64,
    known: Vec<(String, Signature)>,
    /// How long one finding is made smaller.
    pub shrink_budget: Duration,
    /// What all iterations so far did.
    pub tally: FuzzTally,
}

/// What a number of iterations did.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct FuzzTally {
    /// Iterations.
    pub iterations: u64,
    /// Failures, those that look like an earlier one included.
    pub failures: u64,
    /// Iterations that came to no verdict.
    pub inconclusive: u64,
    /// Rows of logits that were held to the oracle.
    pub rows: u64,
    /// Those that had to be met exactly, within rounding.
    pub firm_rows: u64,
    /// Calls that were refused, as they had to be.
    pub refusals: u64,
    /// For each backend the worst row's distance from the oracle, in units of what is allowed.
    pub distances: Vec<(String, f64)>,
}

/// One model and schedule, and what each backend made of it.
pub struct Iteration {
    /// Its number, from 0.
    pub number: u64,
    /// The outcomes, in the order of the backends.
    pub outcomes: Vec<(String, Outcome)>,
    case: Reproducer,
}

/// A failure that does not look like an earlier one.
pub struct Finding {
    /// The iteration.
    pub iteration: u64,
    /// The backend that fails.
    pub backend: String,
    /// What came of the whole schedule.
    pub outcome: Outcome,
    /// The smallest case that fails likewise.
    pub reproducer: Reproducer,
    /// How far each backend was from the oracle in this iteration, in units of what is allowed.
    pub distances: Vec<(String, f64)>,
}

impl<'a> Fuzzer<'a> {
    /// A fuzzer for registered backends. All of them play each schedule.
    pub fn new(suite: &'a Suite, runner: &'a Runner, backends: Vec<String>, seed: u64) -> Self {
        let tally =
            FuzzTally { distances: backends.iter().map(|b| (b.clone(), 0.0)).collect(), ..FuzzTally::default() };
        Self { suite, runner, backends, seed, known: Vec::new(), shrink_budget: SHRINK_BUDGET, tally }
    }

    /// Draws and plays one iteration.
    ///
    /// # Errors
    /// [`ReproError`] where a backend is not registered.
    pub fn iteration(&mut self, number: u64) -> Result<Iteration, ReproError> {
        let mut draw = Draw::of(self.seed, number);
        let model = draw::model(&mut draw);
        let schedule = draw::schedule(&mut draw, &model.spec);
        let case = Reproducer::Schedule(ScheduleCase {
            version: REPRODUCER_VERSION,
            backend: String::new(),
            semantics: crate::backend::Semantics::Fp32,
            model,
            schedule,
            outcome: Observed::none(),
        });
        let mut outcomes = Vec::new();
        for backend in &self.backends {
            outcomes.push((backend.clone(), replay(self.suite, self.runner, &case, backend)?));
        }
        self.count(&outcomes);
        Ok(Iteration { number, outcomes, case })
    }

    fn count(&mut self, outcomes: &[(String, Outcome)]) {
        self.tally.iterations += 1;
        for (backend, outcome) in outcomes {
            let sum = |key: &str| outcome.measurements.get(key).map_or(0, |n| *n as u64);
            self.tally.rows += sum(ROWS);
            self.tally.firm_rows += sum(FIRM_ROWS);
            self.tally.refusals += sum(REFUSALS);
            self.tally.failures += u64::from(fails(outcome));
            self.tally.inconclusive += u64::from(!fails(outcome) && !outcome.verdict.is_good());
            if let Some((_, worst)) = self.tally.distances.iter_mut().find(|(name, _)| name == backend) {
                *worst = worst.max(distance(outcome));
            }
        }
    }

    /// The failures of an iteration that do not look like earlier ones, each made as small as the time allows.
    pub fn findings(&mut self, iteration: &Iteration) -> Vec<Finding> {
        let distances: Vec<_> = iteration.outcomes.iter().map(|(name, o)| (name.clone(), distance(o))).collect();
        let mut findings = Vec::new();
        for (backend, outcome) in iteration.outcomes.iter().filter(|(_, outcome)| fails(outcome)) {
            let look = (backend.clone(), Signature::of(outcome));
            if self.known.contains(&look) {
                continue;
            }
            self.known.push(look);
            let mut case = iteration.case.clone();
            if let (Reproducer::Schedule(case), Ok(factory)) = (&mut case, self.suite.registry().get(backend)) {
                case.backend = backend.clone();
                case.semantics = factory.capabilities().semantics;
                case.outcome = Observed::of(outcome);
            }
            let mut shrinker = Shrinker::new(self.suite, self.runner, case, outcome, self.shrink_budget);
            shrinker.shrink_schedule();
            findings.push(Finding {
                iteration: iteration.number,
                backend: backend.clone(),
                outcome: outcome.clone(),
                reproducer: shrinker.best,
                distances: distances.clone(),
            });
        }
        findings
    }
}

impl Finding {
    /// How far each backend was from the oracle, in words: which of them is to be believed.
    pub fn ranking(&self) -> String {
        let mut order = self.distances.clone();
        order.sort_by(|a, b| a.1.total_cmp(&b.1));
        let words = order.iter().map(|(name, far)| format!("{name} {far:.3e}"));
        let words = words.collect::<Vec<_>>().join(" < ");
        format!("distance from the oracle, in units of what is allowed: {words}")
    }
}

fn distance(outcome: &Outcome) -> f64 {
    outcome.measurements.get(DISTANCE).copied().unwrap_or(0.0)
}
