//! The cases in lists: failures, absences, how much each asserted, and all of them.

use super::overview::{present, section_id};
use crate::case::Category;
use crate::report::terminal::{grouped, reproduce};
use crate::report::{Report, Totals};
use crate::verdict::{CaseResult, Failure, Verdict};
use serde::Serialize;

/// A case that is not good.
#[derive(Serialize)]
pub(super) struct FailureView<'a> {
    anchor: String,
    id: &'a str,
    class: &'static str,
    words: &'static str,
    requirement: &'a str,
    clause: &'a str,
    reason: Option<&'a str>,
    failures: &'a [Failure],
    hidden: u64,
    notes: &'a [String],
    tail: Option<&'a str>,
    command: String,
    reproducer: Option<&'a str>,
}

/// The id of the entry of a case that is not good.
fn anchor(case: &CaseResult) -> String {
    format!("failure-{}", super::slug(&case.id))
}

pub(super) fn failures<'a>(report: &'a Report, program: &str) -> Vec<FailureView<'a>> {
    let bad = report.cases.iter().filter(|case| !case.outcome.verdict.is_good());
    bad.map(|case| {
        let outcome = &case.outcome;
        FailureView {
            anchor: anchor(case),
            id: &case.id,
            class: outcome.verdict.name(),
            words: outcome.verdict.words(),
            requirement: &case.requirement,
            clause: &case.clause,
            reason: outcome.reason.as_deref(),
            failures: &outcome.failures,
            hidden: outcome.failed_assertions.saturating_sub(outcome.failures.len() as u64),
            notes: &outcome.notes,
            tail: outcome.output_tail.as_deref(),
            command: reproduce(case, program),
            reproducer: outcome.reproducer.as_deref(),
        }
    })
    .collect()
}

/// Cases that were not held to their requirement, for one reason.
#[derive(Serialize)]
pub(super) struct Absent<'a> {
    words: &'static str,
    class: &'static str,
    backend: &'a str,
    reason: &'a str,
    cases: Vec<&'a str>,
}

pub(super) fn absent(report: &Report) -> Vec<Absent<'_>> {
    let mut found: Vec<Absent<'_>> = Vec::new();
    for verdict in [Verdict::Waived, Verdict::Unsupported] {
        for case in report.cases.iter().filter(|c| c.outcome.verdict == verdict) {
            let reason = case.outcome.reason.as_deref().unwrap_or("no reason given");
            let same =
                |a: &&mut Absent<'_>| a.words == verdict.words() && a.backend == case.backend && a.reason == reason;
            match found.iter_mut().find(same) {
                Some(entry) => entry.cases.push(&case.id),
                None => found.push(Absent {
                    words: verdict.words(),
                    class: verdict.name(),
                    backend: &case.backend,
                    reason,
                    cases: vec![&case.id],
                }),
            }
        }
    }
    found
}

/// How much was asserted, so that an empty check cannot pass for a strict one.
#[derive(Serialize)]
pub(super) struct Vacuity<'a> {
    rows: Vec<VacuityRow>,
    /// Cases that asserted nothing though their backend does not declare that it lacks what they need.
    empty: Vec<&'a str>,
}

/// One category.
#[derive(Serialize)]
struct VacuityRow {
    category: &'static str,
    cases: u64,
    assertions: String,
    values: String,
    least: u64,
    median: u64,
    at_zero: usize,
    unsupported: u64,
    /// The length of the bar: values compared, on a logarithmic scale from 1 to the largest category.
    percent: f64,
}

pub(super) fn vacuity(report: &Report) -> Vacuity<'_> {
    let of = |category: Category| report.cases.iter().filter(move |c| c.category == category);
    let most = present(report).map(|c| Totals::of(of(c)).values).max().unwrap_or(1);
    let rows = present(report)
        .map(|category| {
            let totals = Totals::of(of(category));
            let ran = of(category).filter(|c| c.outcome.verdict != Verdict::Unsupported);
            let mut assertions: Vec<u64> = ran.map(|c| c.outcome.assertions).collect();
            assertions.sort_unstable();
            VacuityRow {
                category: category.name(),
                cases: totals.cases,
                assertions: grouped(totals.assertions),
                values: grouped(totals.values),
                least: assertions.first().copied().unwrap_or(0),
                median: assertions.get(assertions.len() / 2).copied().unwrap_or(0),
                at_zero: of(category).filter(|c| c.outcome.assertions == 0).count(),
                unsupported: totals.count(Verdict::Unsupported),
                percent: 100.0 * (1.0 + totals.values as f64).ln() / (1.0 + most as f64).ln(),
            }
        })
        .collect();
    let empty = |c: &&CaseResult| c.outcome.assertions == 0 && c.outcome.verdict != Verdict::Unsupported;
    Vacuity { rows, empty: report.cases.iter().filter(empty).map(|c| c.id.as_str()).collect() }
}

/// All cases of a backend.
#[derive(Serialize)]
pub(super) struct Section<'a> {
    id: String,
    backend: &'a str,
    lists: Vec<List<'a>>,
}

/// Those of one category.
#[derive(Serialize)]
struct List<'a> {
    id: String,
    category: &'static str,
    cases: usize,
    bad: usize,
    rows: Vec<CaseRow<'a>>,
}

/// One case in a list.
#[derive(Serialize)]
struct CaseRow<'a> {
    model: &'a str,
    what: &'a str,
    requirement: &'a str,
    clause: &'a str,
    class: &'static str,
    words: &'static str,
    anchor: Option<String>,
    assertions: String,
    values: String,
    empty: bool,
    milliseconds: String,
}

pub(super) fn sections(report: &Report) -> Vec<Section<'_>> {
    report
        .backend_names()
        .into_iter()
        .map(|backend| {
            let list = |category: Category| {
                let chosen: Vec<&CaseResult> =
                    report.cases.iter().filter(|c| c.backend == backend && c.category == category).collect();
                List {
                    id: section_id(backend, Some(category)),
                    category: category.name(),
                    cases: chosen.len(),
                    bad: chosen.iter().filter(|c| !c.outcome.verdict.is_good()).count(),
                    rows: chosen.into_iter().map(case_row).collect(),
                }
            };
            let lists = present(report).map(list).filter(|list| list.cases > 0).collect();
            Section { id: section_id(backend, None), backend, lists }
        })
        .collect()
}

fn case_row(case: &CaseResult) -> CaseRow<'_> {
    let outcome = &case.outcome;
    CaseRow {
        model: &case.model,
        what: case.check.split_once('/').map_or(case.check.as_str(), |(_, what)| what),
        requirement: &case.requirement,
        clause: &case.clause,
        class: outcome.verdict.name(),
        words: outcome.verdict.words(),
        anchor: (!outcome.verdict.is_good()).then(|| anchor(case)),
        assertions: grouped(outcome.assertions),
        values: grouped(outcome.values),
        empty: outcome.assertions == 0,
        milliseconds: format!("{:.0}", outcome.duration_s * 1e3),
    }
}
