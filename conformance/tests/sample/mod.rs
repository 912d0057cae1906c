//! Reports that nobody ran, for the tests of what is made of reports.
#![allow(dead_code, reason = "each test target takes what it needs")]

use conformance::case::Category;
use conformance::measure;
use conformance::report::Report;
use conformance::verdict::{CaseResult, Failure, Outcome, Verdict};
use std::collections::BTreeMap;

pub fn case(backend: &str, category: Category, name: &str, verdict: Verdict) -> CaseResult {
    let check = format!("{category}/{name}");
    let mut outcome = Outcome::bare(verdict, "a reason");
    outcome.assertions = 10;
    outcome.values = 1000;
    outcome.duration_s = 0.25;
    if verdict == Verdict::Pass {
        outcome.reason = None;
    }
    if verdict == Verdict::Fail {
        outcome.failed_assertions = 1;
        let text = |t: &str| t.to_string();
        outcome.failures =
            vec![Failure { expected: text("logit <= 1 & \"so\""), seen: text("logit = \u{1}2"), at: text("x.rs:7") }];
    }
    CaseResult {
        id: format!("{backend}/tiny/{check}@TST-1"),
        backend: backend.to_string(),
        model: "tiny".to_string(),
        model_argument: "tiny".to_string(),
        check,
        requirement: "TST-1".to_string(),
        clause: "a clause".to_string(),
        category,
        exclusive: false,
        outcome,
    }
}

/// Two backends; `alpha` passes everything and is measured, `beta` is the same.
pub fn good_cases() -> Vec<CaseResult> {
    let mut cases = Vec::new();
    for backend in ["alpha", "beta"] {
        for category in [Category::Golden, Category::KvCache, Category::Sla] {
            cases.push(case(backend, category, "one", Verdict::Pass));
        }
        let sla = cases.last_mut().expect("just pushed");
        sla.outcome.measurements = BTreeMap::from([
            (measure::TOKEN_LATENCY_MS.to_string(), 20.0),
            (measure::THROUGHPUT_TPS.to_string(), 50.0),
            (measure::PEAK_MEMORY_BYTES.to_string(), 1e9),
            (measure::WORST_CORRELATION.to_string(), 0.995),
            (measure::TIME_TO_FIRST_TOKEN_MS.to_string(), 30.0),
        ]);
    }
    cases.push(case("beta", Category::Concurrency, "many", Verdict::Unsupported));
    cases
}

pub fn report(cases: Vec<CaseResult>) -> Report {
    Report::new(&[], cases, std::time::UNIX_EPOCH, std::time::Duration::from_secs(3))
}
