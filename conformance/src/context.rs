//! What a check works with: engines of the backend under test, golden data, and assertions that count themselves.

mod compare;

use crate::backend::{BackendFactory, Capabilities, CreateOptions};
use crate::case::{CheckResult, Stop};
use crate::invariance::{Axis, Level};
use crate::last_words;
use crate::model::{ModelFacts, ModelFixture};
use crate::verdict::{Failure, Outcome, Verdict};
use bitnet_contracts::{BitNetInference, InferenceError, ThreadSafeInference};
use golden::{Golden, GoldenError};
use std::collections::{BTreeMap, HashMap};
use std::fmt::Display;
use std::panic::Location;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

/// How many failed assertions of one case are kept with their texts; all are counted.
pub const MAX_FAILURES: usize = 20;

/// How many of them may come from one place: one cause often fails the same assertion for every input.
pub const MAX_ALIKE: usize = 4;

/// Before the name of a tolerance in the `timings` of an outcome: errors of the clock, which no two runs repeat.
pub const CLOCK_ERROR: &str = "tolerance.";

/// Everything a check may use: the backend, the model, golden data, and the assertions.
pub struct Context<'a> {
    factory: &'a dyn BackendFactory,
    model: &'a ModelFixture,
    capabilities: Capabilities,
    scratch: &'a Path,
    assertions: u64,
    values: u64,
    statistical: u64,
    failed: u64,
    failures: Vec<Failure>,
    measurements: BTreeMap<String, f64>,
    timings: BTreeMap<String, f64>,
    errors: BTreeMap<String, f64>,
    series: BTreeMap<String, Vec<f32>>,
    samples: BTreeMap<String, Vec<f64>>,
    notes: Vec<String>,
    fail_fast: bool,
}

/// What a check is unwound with at its first failed assertion, where nobody asks for more.
pub(crate) struct FirstFailure;

impl<'a> Context<'a> {
    /// A context for one run of one check. `scratch` is an existing folder that the check may write to; the caller
    /// removes it.
    pub fn new(factory: &'a dyn BackendFactory, model: &'a ModelFixture, scratch: &'a Path) -> Self {
        Self {
            capabilities: factory.capabilities(),
            factory,
            model,
            scratch,
            assertions: 0,
            values: 0,
            statistical: 0,
            failed: 0,
            failures: Vec::new(),
            measurements: BTreeMap::new(),
            timings: BTreeMap::new(),
            errors: BTreeMap::new(),
            series: BTreeMap::new(),
            samples: BTreeMap::new(),
            notes: Vec::new(),
            fail_fast: false,
        }
    }

    /// Ends the check at its first failed assertion.
    #[must_use]
    pub(crate) fn ending_at_first_failure(mut self, yes: bool) -> Self {
        self.fail_fast = yes;
        self
    }

    /// The backend under test.
    pub fn factory(&self) -> &'a dyn BackendFactory {
        self.factory
    }

    /// The model, on disk.
    pub fn model(&self) -> &'a ModelFixture {
        self.model
    }

    /// The model's facts from its `config.json`.
    pub fn facts(&self) -> &'a ModelFacts {
        &self.model.config
    }

    /// What the backend declares.
    pub fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    /// The level at which results are held to be the same along an axis: the claim, or the least where there is none.
    pub fn level(&self, axis: Axis) -> Level {
        self.capabilities.claim(axis).unwrap_or(Level::Statistical)
    }

    /// A folder of this case's own to write files to; removed afterwards.
    pub fn scratch(&self) -> &'a Path {
        self.scratch
    }

    /// A fresh engine with default options.
    ///
    /// # Errors
    /// The backend's error ends the check as a failure.
    pub fn engine(&self) -> Result<Box<dyn BitNetInference>, Stop> {
        self.factory.create(self.model).map_err(|e| Stop::Unexpected(format!("create failed: {e}")))
    }

    /// A fresh engine with options.
    ///
    /// # Errors
    /// The backend's error ends the check as a failure: ask only for what the backend declares.
    pub fn engine_with(&self, options: &CreateOptions) -> Result<Box<dyn BitNetInference>, Stop> {
        self.factory
            .create_with(self.model, options)
            .map_err(|e| Stop::Unexpected(format!("create_with({options:?}) failed: {e}")))
    }

    /// A fresh engine for many threads.
    ///
    /// # Errors
    /// Fails a backend that declares `thread_safe` and returns none; unsupported where it declares nothing.
    pub fn thread_safe(&self) -> Result<Arc<dyn ThreadSafeInference>, Stop> {
        match self.factory.create_thread_safe(self.model) {
            Some(engine) => engine.map_err(|e| Stop::Unexpected(format!("create_thread_safe failed: {e}"))),
            None if self.capabilities.thread_safe => Err(Stop::Unexpected(
                "the backend declares thread_safe, and create_thread_safe returned None".to_string(),
            )),
            None => Err(Stop::Unsupported("the backend has no thread-safe engine".to_string())),
        }
    }

    /// The golden data of this model: what is committed for it, or else what the oracle makes of its weights. Loaded or
    /// made once per process.
    ///
    /// # Errors
    /// Inconclusive where it cannot be read, or the model is too large for the oracle or not covered by it: a golden
    /// check without golden data decides nothing.
    pub fn golden(&self) -> Result<Arc<Golden>, Stop> {
        let Some(case) = self.model.golden.as_deref() else {
            if !self.facts().within_the_oracle() {
                let name = self.model.name();
                return Err(Stop::Inconclusive(format!(
                    "model {name} has no golden data and is too large to make some"
                )));
            }
            let dir = self.model.dir();
            return load_golden(&dir.to_string_lossy(), || golden::from_folder(self.model.name(), dir));
        };
        let golden = load_golden(case, || golden::load(case))?;
        match &self.model.weights_sha256 {
            Some(hash) if *hash != golden.model_sha256 => Err(Stop::Inconclusive(format!(
                "golden case {case} was made from weights {}, and the model has {hash}",
                golden.model_sha256
            ))),
            _ => Ok(golden),
        }
    }

    /// Another built-in model, written into this case's scratch folder.
    ///
    /// # Errors
    /// Inconclusive where it cannot be made.
    pub fn other_model(&self, name: &str) -> Result<ModelFixture, Stop> {
        ModelFixture::built_in(name, self.scratch).map_err(|e| Stop::Inconclusive(e.to_string()))
    }

    /// Notes a number for the report and the gates. A repeated key keeps the value given last.
    ///
    /// A number that is not finite is no measurement: it fails the case.
    #[track_caller]
    pub fn measure(&mut self, key: &str, value: f64) {
        self.measure_with(key, value, |_, new| new, Location::caller());
    }

    /// Notes a number and keeps the largest given under this key.
    #[track_caller]
    pub fn measure_max(&mut self, key: &str, value: f64) {
        self.measure_with(key, value, f64::max, Location::caller());
    }

    /// Notes a number and keeps the smallest given under this key.
    #[track_caller]
    pub fn measure_min(&mut self, key: &str, value: f64) {
        self.measure_with(key, value, f64::min, Location::caller());
    }

    fn measure_with(&mut self, key: &str, value: f64, keep: fn(f64, f64) -> f64, at: &'static Location<'static>) {
        if !value.is_finite() {
            self.assert(at, false, || (format!("measurement {key} is a finite number"), format!("{key} = {value}")));
            return;
        }
        let kept = self.measurements.get(key).map_or(value, |old| keep(*old, value));
        self.measurements.insert(key.to_string(), kept);
    }

    /// Notes a number that depends on the clock or on the process's memory: no two runs repeat it, and the report keeps
    /// it apart from what they do repeat. A repeated key keeps the value given last.
    #[track_caller]
    pub fn timing(&mut self, key: &str, value: f64) {
        if value.is_finite() {
            self.timings.insert(key.to_string(), value);
        } else {
            let seen = || (format!("timing {key} is a finite number"), format!("{key} = {value}"));
            self.assert(Location::caller(), false, seen);
        }
    }

    /// Notes errors by position for the report's plots, in the order of the positions. See [`crate::measure::series`]
    /// for what becomes of long lists and of values that are not finite.
    pub fn series(&mut self, key: &str, values: impl IntoIterator<Item = f64>) {
        self.series.insert(key.to_string(), crate::measure::series(values));
    }

    /// Notes single readings of the clock or of the process's memory, for the report's histograms. Repeated calls add to
    /// what is there; see [`crate::measure::samples`] for what is kept of many.
    pub fn samples(&mut self, key: &str, values: impl IntoIterator<Item = f64>) {
        let kept = self.samples.entry(key.to_string()).or_default();
        *kept = crate::measure::samples(kept.drain(..).chain(values));
    }

    /// Leaves a remark in the report.
    pub fn note(&mut self, text: impl Into<String>) {
        self.notes.push(text.into());
    }

    /// Counts values that an assertion compared, where it could not see them itself.
    pub fn compared(&mut self, values: usize) {
        self.values += values as u64;
    }

    /// Asserts that something holds. Returns whether it did; the check goes on either way.
    #[track_caller]
    pub fn check(&mut self, holds: bool, expected: impl Display, seen: impl Display) -> bool {
        self.values += 1;
        self.assert(Location::caller(), holds, || (expected.to_string(), seen.to_string()))
    }

    /// Asserts what an honest backend may fail by bad luck, with a probability of at most
    /// [`crate::tolerance::FALSE_ALARM`]. Such assertions are counted: a run has a budget for them.
    #[track_caller]
    pub fn check_chance(&mut self, holds: bool, expected: impl Display, seen: impl Display) -> bool {
        self.statistical += 1;
        self.check(holds, expected, seen)
    }

    /// Asserts that something holds, and ends the check where it does not.
    ///
    /// # Errors
    /// [`Stop::Failed`], for `?`.
    #[track_caller]
    pub fn require(&mut self, holds: bool, expected: impl Display, seen: impl Display) -> CheckResult {
        if self.check(holds, expected, seen) { Ok(()) } else { Err(Stop::Failed) }
    }

    /// Asserts that a call succeeded and hands out its value.
    #[track_caller]
    pub fn check_ok<T, E: Display>(&mut self, what: impl Display, result: Result<T, E>) -> Option<T> {
        let at = Location::caller();
        self.values += 1;
        match result {
            Ok(value) => {
                self.assert(at, true, || (String::new(), String::new()));
                Some(value)
            }
            Err(error) => {
                self.assert(at, false, || (format!("{what} succeeds"), format!("{what} failed: {error}")));
                None
            }
        }
    }

    /// Asserts that a call failed with an error that `matches` accepts; `name` says which one that is, for instance
    /// `ForwardPassError::InvalidInput`.
    #[track_caller]
    pub fn expect_error<T>(
        &mut self,
        what: impl Display,
        result: Result<T, InferenceError>,
        matches: impl FnOnce(&InferenceError) -> bool,
        name: &str,
    ) -> bool {
        let at = Location::caller();
        self.values += 1;
        match result {
            Ok(_) => self.assert(at, false, || (format!("{what} fails with {name}"), format!("{what} succeeded"))),
            Err(error) => {
                let right = matches(&error);
                self.assert(at, right, || {
                    (format!("{what} fails with {name}"), format!("{what} failed with {error:?}"))
                })
            }
        }
    }

    /// Assertions that ran so far.
    pub fn assertions(&self) -> u64 {
        self.assertions
    }

    /// Assertions that did not hold so far.
    pub fn failed(&self) -> u64 {
        self.failed
    }

    fn assert(
        &mut self,
        at: &'static Location<'static>,
        holds: bool,
        texts: impl FnOnce() -> (String, String),
    ) -> bool {
        self.assertions += 1;
        last_words::asserted(self.assertions, at);
        if !holds {
            self.failed += 1;
            let at = format!("{}:{}", at.file(), at.line());
            let alike = self.failures.iter().filter(|failure| failure.at == at).count();
            if self.failures.len() < MAX_FAILURES && alike < MAX_ALIKE {
                let (expected, seen) = texts();
                self.failures.push(Failure { expected: clip(expected), seen: clip(seen), at });
            }
            if self.fail_fast {
                std::panic::resume_unwind(Box::new(FirstFailure));
            }
        }
        holds
    }

    /// Closes the books: the verdict that follows from how the check ended and from what it asserted.
    pub(crate) fn finish(self, end: End, duration: Duration) -> Outcome {
        let (verdict, reason) = match end {
            End::Panicked(message) => (Verdict::Crash, Some(message)),
            End::Returned(Err(Stop::Unexpected(error))) => (Verdict::Fail, Some(error)),
            _ if self.failed > 0 => (Verdict::Fail, None),
            End::Returned(Err(Stop::Failed)) => {
                (Verdict::Fail, Some("the check stopped at a failed assertion that it did not record".to_string()))
            }
            End::Returned(Err(Stop::Unsupported(why))) => (Verdict::Unsupported, Some(why)),
            End::Returned(Err(Stop::UnexpectedPass(why))) => (Verdict::UnexpectedPass, Some(why)),
            End::Returned(Err(Stop::Inconclusive(why))) => (Verdict::Inconclusive, Some(why)),
            End::Returned(Ok(())) if self.assertions == 0 => {
                (Verdict::Inconclusive, Some("the check made no assertion".to_string()))
            }
            End::Returned(Ok(())) => (Verdict::Pass, None),
        };
        Outcome {
            verdict,
            reason: reason.map(clip),
            failures: self.failures,
            failed_assertions: self.failed,
            assertions: self.assertions,
            values: self.values,
            statistical: self.statistical,
            measurements: self.measurements,
            timings: self.timings,
            errors: self.errors,
            series: self.series,
            samples: self.samples,
            notes: self.notes,
            output_tail: None,
            reproducer: None,
            duration_s: duration.as_secs_f64(),
        }
    }
}

/// How the function of a check ended.
pub(crate) enum End {
    Returned(CheckResult),
    Panicked(String),
}

/// Keeps texts of failures readable: a debug print of a whole tensor is cut.
fn clip(text: String) -> String {
    const LIMIT: usize = 2000;
    if text.len() <= LIMIT {
        return text;
    }
    let end = (0..=LIMIT).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0);
    format!("{} … ({} bytes more)", &text[..end], text.len() - end)
}

/// Golden data by its key: the name of a case or a folder, which nobody writes to while the process lives.
fn load_golden(key: &str, load: impl FnOnce() -> Result<Golden, GoldenError>) -> Result<Arc<Golden>, Stop> {
    static LOADED: OnceLock<Mutex<HashMap<String, Arc<Golden>>>> = OnceLock::new();
    let loaded = LOADED.get_or_init(Mutex::default);
    let mut loaded = loaded.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(golden) = loaded.get(key) {
        return Ok(golden.clone());
    }
    let golden = Arc::new(load()?);
    loaded.insert(key.to_string(), golden.clone());
    Ok(golden)
}
