//! `conformance calibrate`: measures the two errors that every tolerance stands between.
//!
//! Checks note the largest error that they held to a tolerance and go on after a failed assertion, so a run over backends
//! that are known to be right or wrong gives the evidence:
//!
//! * the **honest** error is the largest of any honest backend: a registered one on every model, a variant of the zoo on
//!   [`VARIANT_MODELS`];
//! * each faulty backend counts with the largest error that it shows on the models and in the categories on which it is
//!   proven to show, and the **faulty** error is the
//!   smallest of those that are more than [`MIN_SEPARATION`] times the honest one, or, where the limit does not follow
//!   from the two, past the limit. Faults below that do not show in this tolerance, and are for others to catch.
//!
//! An honest error counts as [`RESOLUTION`] at least: where every honest backend on the list happens to compute the same
//! bits, another order of the same f32 sums still may not.

mod command;

pub(crate) use command::{CalibrateArgs, calibrate};

use crate::backend::{BackendFactory, Capabilities};
use crate::case::{Category, Check};
use crate::context::CLOCK_ERROR;
use crate::model::Model;
use crate::suite::Case;
use crate::tolerance::{Entry, MIN_SEPARATION, Rule, Table, Tolerance, middle, rounded};
use crate::verdict::CaseResult;
use crate::zoo::prove::MAIN_MODEL;
use crate::zoo::{Fault, HonestVariant};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

/// The least that an honest error counts as: one rounding to f32.
pub const RESOLUTION: f64 = f32::EPSILON as f64 / 2.0;

/// How much larger than recorded an honest error may be before `--check` fails: other processors round elsewhere.
pub const DRIFT: f64 = 1.5;

/// The models on which honest variants are measured: the trained model, one drawn with PyTorch, and two small ones.
/// Registered backends are measured on all.
pub const VARIANT_MODELS: [&str; 4] = ["tiny", "c02-h256-gqa2-untied", MAIN_MODEL, "context-32"];

/// The longest that a case may take: a fault that hangs shows no error.
const DEADLINE: Duration = Duration::from_secs(30);

/// A backend to measure.
#[derive(Clone)]
pub struct Subject {
    /// The backend.
    pub factory: Arc<dyn BackendFactory>,
    /// Whether it is right.
    pub honest: bool,
    /// The models to measure it on; empty for all.
    pub models: Vec<&'static str>,
    /// The categories to measure it on, if not all.
    pub only: Option<&'static [Category]>,
}

impl Subject {
    /// A registered backend, taken to be right, on every model.
    pub fn registered(factory: Arc<dyn BackendFactory>) -> Self {
        Self { factory, honest: true, models: Vec::new(), only: None }
    }

    /// A variant of the zoo that is right.
    pub fn honest(variant: &HonestVariant) -> Self {
        Self { models: VARIANT_MODELS.to_vec(), ..Self::registered(Arc::new(variant.factory())) }
    }

    /// A fault of the zoo, on the models and categories on which it is proven to show.
    pub fn faulty(fault: &Fault) -> Self {
        let models = fault.model.into_iter().chain([MAIN_MODEL]).collect();
        Self { factory: Arc::new(fault.factory()), honest: false, models, only: fault.only }
    }
}

/// An error and where it was seen, as `backend/model`.
#[derive(Debug, Clone, PartialEq)]
pub struct Seen {
    /// The error, in the tolerance's unit.
    pub error: f64,
    /// The backend and the model.
    pub by: String,
}

/// The largest error of each backend, by tolerance.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Errors {
    by_tolerance: BTreeMap<String, BTreeMap<String, Seen>>,
    /// The checks that held an error to a tolerance.
    pub checks: BTreeSet<String>,
}

impl Errors {
    /// Takes the errors of a case.
    pub fn add(&mut self, result: &CaseResult) {
        let of_clock = result.outcome.timings.iter().filter_map(|(k, v)| Some((k.strip_prefix(CLOCK_ERROR)?, v)));
        for (name, &error) in result.outcome.errors.iter().map(|(k, v)| (k.as_str(), v)).chain(of_clock) {
            self.checks.insert(result.check.clone());
            let seen = Seen { error, by: format!("{}/{}", result.backend, result.model) };
            let kept = self.by_tolerance.entry(name.to_string()).or_default();
            let kept = kept.entry(result.backend.clone()).or_insert_with(|| seen.clone());
            if error > kept.error {
                *kept = seen;
            }
        }
    }

    fn of(&self, tolerance: &str) -> impl Iterator<Item = &Seen> {
        self.by_tolerance.get(tolerance).into_iter().flat_map(BTreeMap::values)
    }
}

/// What a run measured of one tolerance.
#[derive(Debug, Clone, PartialEq)]
pub struct Evidence {
    /// The worst honest error; `None` where no honest backend was held to the tolerance.
    pub honest: Option<Seen>,
    /// The nearest faulty error; `None` where no fault shows.
    pub faulty: Option<Seen>,
}

impl Evidence {
    /// The evidence for a tolerance.
    pub fn of(tolerance: &Tolerance, honest: &Errors, faulty: &Errors) -> Self {
        let worst = honest.of(tolerance.name()).max_by(|a, b| a.error.total_cmp(&b.error));
        let honest = worst.map(|s| Seen { error: s.error.max(RESOLUTION), by: s.by.clone() });
        let fixed = tolerance.entry().filter(|e| e.rule != Rule::Evidence).map(|e| e.limit);
        let floor = honest.as_ref().map_or(f64::INFINITY, |s| MIN_SEPARATION * s.error);
        let shows = |s: &&Seen| fixed.map_or(s.error >= floor, |limit| s.error > limit) && s.error < f64::MAX;
        let faulty = faulty.of(tolerance.name()).filter(shows).min_by(|a, b| a.error.total_cmp(&b.error)).cloned();
        Self { honest, faulty }
    }

    /// An entry with this evidence in place of its own, as far as there is any, and the limit that follows by its rule.
    pub fn applied(&self, entry: &Entry) -> Entry {
        let mut entry = entry.clone();
        if let Some(seen) = &self.honest {
            (entry.honest, entry.honest_by) = (Some(rounded(seen.error, 3)), Some(seen.by.clone()));
        }
        if let Some(seen) = &self.faulty {
            (entry.faulty, entry.faulty_by) = (Some(rounded(seen.error, 3)), Some(seen.by.clone()));
        }
        if let (Rule::Evidence, Some(honest), Some(faulty)) = (entry.rule, entry.honest, entry.faulty) {
            entry.limit = middle(honest, faulty);
        }
        entry
    }
}

/// The models on which a check measures a backend; one at least.
fn models_for<'a>(subject: &Subject, check: &Check, models: &'a [Arc<Model>]) -> Vec<&'a Arc<Model>> {
    let wanted = |name: &str| subject.models.is_empty() || subject.models.contains(&name);
    let taken: Vec<_> =
        models.iter().filter(|m| wanted(m.name()) && check.models.takes(m, !subject.models.is_empty())).collect();
    if taken.is_empty() { models.iter().find(|m| check.models.takes(m, false)).into_iter().collect() } else { taken }
}

fn cases_of(subject: &Subject, check: &Check, models: &[&Arc<Model>]) -> Vec<Case> {
    let lacking = check.needs.is_some_and(|capability| !subject.factory.capabilities().has(capability));
    if lacking || subject.only.is_some_and(|only| !only.contains(&check.category)) {
        return Vec::new();
    }
    let mut check = check.clone();
    check.deadline = Some(check.deadline.map_or(DEADLINE, |d| d.min(DEADLINE)));
    let case = |model: &&Arc<Model>| Case {
        id: check.case_id(subject.factory.name(), model.name()),
        backend: subject.factory.clone(),
        model: Arc::clone(model),
        check: check.clone(),
        lacks: None,
    };
    models.iter().map(case).collect()
}

/// Runs backends and collects their errors, honest and faulty. `run` runs cases.
///
/// Which checks hold errors to a tolerance depends on what a backend declares: every check is run once for each
/// declaration of an honest backend. Those that did are then run for every backend on its models.
pub fn measure(
    subjects: &[Subject],
    checks: &[Check],
    models: &[Arc<Model>],
    run: &dyn Fn(&[Case]) -> Vec<CaseResult>,
) -> (Errors, Errors) {
    let (mut honest, mut faulty) = (Errors::default(), Errors::default());
    let mut declared: Vec<Capabilities> = Vec::new();
    let mut first = Vec::new();
    for subject in subjects.iter().filter(|s| s.honest) {
        let capabilities = subject.factory.capabilities();
        if !declared.contains(&capabilities) {
            declared.push(capabilities);
            let one = |c| cases_of(subject, c, &models_for(subject, c, models)[..1]);
            let possible = checks.iter().filter(|c| !models_for(subject, c, models).is_empty());
            first.extend(possible.flat_map(one));
        }
    }
    run(&first).iter().for_each(|result| honest.add(result));
    let known: Vec<&Check> = checks.iter().filter(|c| honest.checks.contains(c.name)).collect();
    for (of_honest, errors) in [(true, &mut honest), (false, &mut faulty)] {
        let of = subjects.iter().filter(|s| s.honest == of_honest);
        let cases: Vec<Case> =
            of.flat_map(|s| known.iter().flat_map(|c| cases_of(s, c, &models_for(s, c, models)))).collect();
        run(&cases).iter().for_each(|result| errors.add(result));
    }
    (honest, faulty)
}

/// The text of a table with the figures of `entries` in it, each after its limit. Everything else stays as it is,
/// comments too.
pub fn rewrite(text: &str, entries: &Table) -> String {
    let mut out = String::with_capacity(text.len());
    let mut entry: Option<&Entry> = None;
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
            entry = entries.get(name);
        }
        match (entry, line.split('=').next().unwrap_or_default().trim()) {
            (Some(entry), "limit") => out.push_str(&figures(entry)),
            (Some(_), "honest" | "honest_by" | "faulty" | "faulty_by") => {}
            _ => {
                out.push_str(line);
                out.push('\n');
            }
        }
    }
    out
}

/// The lines of an entry from `limit` to `faulty_by`, as far as it has them.
fn figures(entry: &Entry) -> String {
    let quoted = |text: &Option<String>| text.as_ref().map(|t| format!("{t:?}"));
    let values = [
        ("limit", Some(figure(entry.limit))),
        ("honest", entry.honest.map(figure)),
        ("honest_by", quoted(&entry.honest_by)),
        ("faulty", entry.faulty.map(figure)),
        ("faulty_by", quoted(&entry.faulty_by)),
    ];
    values.into_iter().filter_map(|(key, value)| Some(format!("{key} = {}\n", value?))).collect()
}

/// A figure as TOML has it: a float, short.
fn figure(value: f64) -> String {
    if (1e-2..1e6).contains(&value) { format!("{value:?}") } else { format!("{value:e}") }
}

/// What has changed for the worse since the table was written; empty where it still holds. `faulty` holds at least the
/// faults that the table names.
pub fn regressions(table: &Table, honest: &Errors, faulty: &Errors) -> Vec<String> {
    let mut found = Vec::new();
    for (name, entry) in table {
        if matches!(entry.rule, Rule::Grant) {
            continue;
        }
        let Some(worst) = honest.of(name).max_by(|a, b| a.error.total_cmp(&b.error)) else {
            // The checks that must run alone may have been left out.
            if !entry.clock {
                found.push(format!("{name}: no honest backend was held to it"));
            }
            continue;
        };
        let error = worst.error.max(RESOLUTION);
        if error > entry.limit {
            found.push(format!("{name}: {} is honest and off by {error:.3e}, past {:e}", worst.by, entry.limit));
        }
        // Figures of the clock are never the same twice.
        if let Some(recorded) = entry.honest.filter(|recorded| !entry.clock && error > DRIFT * recorded) {
            found.push(format!("{name}: {} is off by {error:.3e}, recorded is {recorded:e}", worst.by));
        }
        let Some(fault) = entry.faulty_by.as_deref().map(backend).filter(|_| entry.rule != Rule::Statistical) else {
            continue;
        };
        let Some(seen) = faulty.of(name).find(|s| backend(&s.by) == fault) else {
            found.push(format!("{name}: {fault} was not held to it"));
            continue;
        };
        if seen.error <= entry.limit {
            found.push(format!("{name}: {fault} is off by {:.3e} only, within {:e}", seen.error, entry.limit));
        } else if entry.rule == Rule::Evidence && seen.error < MIN_SEPARATION * error {
            let times = seen.error / error;
            found.push(format!("{name}: {fault} is only {times:.2} times as far off as {}", worst.by));
        }
    }
    found
}

/// The backend of `backend/model`.
pub fn backend(by: &str) -> &str {
    by.split('/').next().unwrap_or(by)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tolerance::{A8_MARGIN, FP32_LOGIT, TIME_WITHIN, parse};

    /// Errors of one tolerance by backend.
    fn errors(name: &str, of: &[(&str, f64)]) -> Errors {
        let by_backend = of
            .iter()
            .map(|(backend, error)| ((*backend).to_string(), Seen { error: *error, by: format!("{backend}/tiny") }));
        Errors { by_tolerance: BTreeMap::from([(name.to_string(), by_backend.collect())]), ..Errors::default() }
    }

    #[test]
    fn the_nearest_fault_is_the_smallest_that_stands_clear_of_the_worst_honest_error() {
        let honest = errors("a8_margin", &[("h1", 0.1), ("h2", 0.2)]);
        let faulty = errors("a8_margin", &[("f1", 0.0), ("f2", 0.79), ("f3", 0.81), ("f4", 5.0), ("f5", f64::MAX)]);
        let evidence = Evidence::of(&A8_MARGIN, &honest, &faulty);
        assert_eq!(evidence.honest.map(|s| (s.error, s.by)), Some((0.2, "h2/tiny".to_string())));
        assert_eq!(evidence.faulty.map(|s| (s.error, s.by)), Some((0.81, "f3/tiny".to_string())));
        let exact = Evidence::of(&A8_MARGIN, &errors("a8_margin", &[("h1", 0.0)]), &faulty);
        assert_eq!(exact.honest.map(|s| s.error), Some(RESOLUTION), "bits that agree by chance");
        let none = Evidence::of(&FP32_LOGIT, &honest, &faulty);
        assert_eq!(none, Evidence { honest: None, faulty: None });
    }

    #[test]
    fn where_the_limit_stands_by_itself_the_nearest_fault_is_the_smallest_past_it() {
        let limit = TIME_WITHIN.limit();
        let of = |error: f64| [("f1", 0.9 * limit), ("f2", error), ("f3", 40.0 * limit)];
        let faulty = errors("time_within", &of(1.1 * limit));
        let evidence = Evidence::of(&TIME_WITHIN, &errors("time_within", &[("h", 0.95 * limit)]), &faulty);
        assert_eq!(evidence.faulty.map(|s| s.by), Some("f2/tiny".to_string()), "it need not be far from the honest");
    }

    const TEXT: &str = "# about\n\n[a8_margin]\nunit = \"u\" # of it\nwhat = 'w'\nrule = 'evidence'\nlimit = 1.0\nhonest = 0.5\n\
        honest_by = 'h/m'\nfaulty = 2.0\nfaulty_by = 'f/m'\n\n[other]\nunit = 'u'\nwhat = 'w'\nrule = 'grant'\n\
        why = 'limit = 3'\nlimit = 3.0\n";

    #[test]
    fn a_rewritten_table_holds_the_figures_and_keeps_the_rest() {
        let table = parse(TEXT).expect("a table");
        assert_eq!(rewrite(TEXT, &Table::new()), TEXT);
        let seen = |error, by: &str| Some(Seen { error, by: by.to_string() });
        let evidence = Evidence { honest: seen(1.23456e-6, "a/x"), faulty: seen(4.0e-4, "b/y") };
        let entry = evidence.applied(&table["a8_margin"]);
        assert_eq!((entry.honest, entry.faulty, entry.limit), (Some(1.23e-6), Some(4e-4), 2.2e-5));
        let text = rewrite(TEXT, &Table::from([("a8_margin".to_string(), entry.clone())]));
        let again = parse(&text).expect("a table");
        assert_eq!((&again["a8_margin"], &again["other"]), (&entry, &table["other"]));
        let others = |text: &str| -> Vec<String> {
            text.lines().filter(|l| !l.starts_with(['l', 'h', 'f'])).map(str::to_string).collect()
        };
        assert_eq!(others(&text), others(TEXT));
        assert!(entry.faults().is_empty());
    }

    #[test]
    fn what_no_check_is_held_to_stays_as_it_is_and_first_figures_come_after_the_limit() {
        let table = parse(TEXT).expect("a table");
        let none = Evidence { honest: None, faulty: None };
        assert_eq!(none.applied(&table["other"]), table["other"]);
        let other = Table::from([("other".to_string(), table["other"].clone())]);
        assert_eq!(regressions(&other, &Errors::default(), &Errors::default()), [""; 0]);
        let first = Evidence { honest: Some(Seen { error: 0.25, by: "a/x".to_string() }), faulty: None };
        let text = rewrite(TEXT, &Table::from([("other".to_string(), first.applied(&table["other"]))]));
        assert!(text.ends_with("limit = 3.0\nhonest = 0.25\nhonest_by = \"a/x\"\n"), "{text}");
    }

    #[test]
    fn a_check_finds_what_no_longer_holds() {
        let table = parse(&TEXT.replace("a8_margin", "m")).expect("a table");
        let judge = |honest: f64, faulty: f64| {
            regressions(&table, &errors("m", &[("h", honest)]), &errors("m", &[("f", faulty)]))
        };
        assert!(judge(0.5, 2.1).is_empty());
        assert!(judge(0.7, 3.0).is_empty());
        assert_eq!(judge(0.76, 4.0).len(), 1, "{:?}", judge(0.76, 4.0));
        assert!(judge(0.5, 1.9)[0].contains("only 3.80 times"));
        assert!(judge(0.2, 0.9)[0].contains("within 1e0"));
        assert_eq!(judge(1.1, 9.0).len(), 2, "past the limit and past the record");
        assert!(regressions(&table, &Errors::default(), &Errors::default())[0].contains("no honest backend"));
        let other = errors("m", &[("g", 9.0)]);
        assert!(regressions(&table, &errors("m", &[("h", 0.5)]), &other)[0].contains("f was not held to it"));
    }
}
