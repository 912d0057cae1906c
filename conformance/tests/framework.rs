//! The framework tested on itself: what becomes of checks that assert nothing, panic, hang, abort, exit or chatter; what
//! the registry, the selection and the isolation promise.
//!
//! The backend is real (the example's oracle); the checks are made to misbehave. Workers are this executable.
#![forbid(unsafe_code)]

#[path = "../examples/oracle_backend/mod.rs"]
mod oracle_backend;

#[path = "framework/misbehaving.rs"]
mod misbehaving;
#[path = "framework/target.rs"]
mod target;

use conformance::case::Check;
use conformance::run::Runner;
use conformance::suite::{Case, Selection, Suite, SuiteError};
use conformance::{CaseResult, Registry, Verdict};
use libtest_mimic::{Arguments, Failed, Trial};
use misbehaving::{Broken, Restless, checks};
use oracle_backend::OracleFactory;
use std::process::ExitCode;
use std::sync::Mutex;

type TestResult = Result<(), Failed>;

fn suite() -> Suite {
    // An error here is told by `main` before any test runs.
    Suite::new(registry()).expect("the registry is sound").with_checks(checks())
}

fn registry() -> Registry {
    Registry::new().with(OracleFactory).with(Broken)
}

/// What workers know: the same and what only one test uses.
fn workers_registry() -> Registry {
    registry().with(Restless)
}

fn workers_checks() -> Vec<Check> {
    let process = conformance::checks::all().into_iter().find(|c| c.name == "determinism/process");
    checks().into_iter().chain(process).collect()
}

fn select(filter: &str) -> Result<Vec<Case>, SuiteError> {
    suite().select(&Selection { filter: Some(filter.to_string()), ..Selection::default() })
}

fn run_in(runner: &Runner, id: &str) -> Result<CaseResult, Failed> {
    let cases = select(id)?;
    let case = cases.iter().find(|case| case.id == id).ok_or_else(|| format!("no case {id}"))?;
    Ok(runner.run(case))
}

fn run(name: &str) -> Result<CaseResult, Failed> {
    run_in(&Runner::new()?, &format!("oracle/tiny/errors/{name}@TST-1"))
}

fn ensure(holds: bool, what: impl std::fmt::Debug) -> TestResult {
    if holds { Ok(()) } else { Err(format!("not so: {what:?}").into()) }
}

fn verdict_is(name: &str, verdict: Verdict, reason_part: &str) -> TestResult {
    let result = run(name)?;
    let reason = result.outcome.reason.clone().unwrap_or_default();
    ensure(result.outcome.verdict == verdict && reason.contains(reason_part), &result)
}

fn passing_counts_what_it_did() -> TestResult {
    let outcome = run("passes")?.outcome;
    ensure(outcome.verdict == Verdict::Pass && outcome.assertions == 1 && outcome.values == 3, &outcome)?;
    ensure(outcome.measurements.get("answer") == Some(&42.0), &outcome)
}

fn failures_keep_what_was_expected_and_seen() -> TestResult {
    let outcome = run("fails_softly")?.outcome;
    ensure(outcome.verdict == Verdict::Fail && outcome.assertions == 5 && outcome.failed_assertions == 4, &outcome)?;
    let texts: Vec<String> = outcome.failures.iter().map(|f| format!("{} | {}", f.expected, f.seen)).collect();
    ensure(texts[0] == "sum = 3 | sum = 2", &texts)?;
    ensure(texts[1].contains("worst at [1] (2.5 for 2.0)") && texts[1].contains("2.5e-1"), &texts)?;
    ensure(texts[2].contains("0x80000000") && texts[2].contains("0x00000000"), &texts)?;
    ensure(outcome.failures.iter().all(|f| f.at.contains("framework/misbehaving.rs:")), &outcome)?;
    let outcome = run("fails_hard")?.outcome;
    ensure(outcome.verdict == Verdict::Fail && outcome.assertions == 1, &outcome)?;
    let outcome = run("fails_much")?.outcome;
    ensure(outcome.failures.len() < 100 && outcome.failed_assertions == 100, &outcome)
}

fn a_measurement_that_is_no_number_fails() -> TestResult {
    let outcome = run("measures_nan")?.outcome;
    ensure(outcome.verdict == Verdict::Fail && outcome.measurements["correlation"] == 1.0, &outcome)
}

fn errors_are_told_apart() -> TestResult {
    let outcome = run("expects_errors")?.outcome;
    let seen: Vec<&str> = outcome.failures.iter().map(|f| f.seen.as_str()).collect();
    ensure(outcome.assertions == 3 && seen.len() == 2, &outcome)?;
    ensure(seen[0] == "none succeeded" && seen[1].contains("NumericalInstability"), &seen)
}

fn a_panic_is_that_cases_crash_and_the_worker_goes_on() -> TestResult {
    let runner = Runner::new()?;
    let outcome = run_in(&runner, "oracle/tiny/errors/panics@TST-1")?.outcome;
    let reason = outcome.reason.clone().unwrap_or_default();
    ensure(outcome.verdict == Verdict::Crash && outcome.assertions == 1, &outcome)?;
    ensure(reason.contains("the reason of the panic") && reason.contains("framework/misbehaving.rs:"), &reason)?;
    let next = run_in(&runner, "oracle/tiny/errors/passes@TST-1")?.outcome;
    ensure(next.verdict == Verdict::Pass, &next)
}

fn an_abort_is_that_cases_crash_and_the_run_goes_on() -> TestResult {
    let runner = Runner::new()?;
    let outcome = run_in(&runner, "oracle/tiny/errors/aborts@TST-1")?.outcome;
    let reason = outcome.reason.clone().unwrap_or_default();
    ensure(outcome.verdict == Verdict::Crash && reason.contains("SIGABRT"), &outcome)?;
    ensure(outcome.output_tail.as_deref().is_some_and(|tail| tail.contains("last words")), &outcome)?;
    let outcome = run_in(&runner, "oracle/tiny/errors/exits_well@TST-1")?.outcome;
    let reason = outcome.reason.clone().unwrap_or_default();
    ensure(outcome.verdict == Verdict::Crash && reason.contains("exited with code 0"), &outcome)?;
    let outcome = run_in(&runner, "oracle/tiny/errors/overflows_the_stack@TST-1")?.outcome;
    ensure(outcome.verdict == Verdict::Crash, &outcome)?;
    let next = run_in(&runner, "oracle/tiny/errors/passes@TST-1")?.outcome;
    ensure(next.verdict == Verdict::Pass, &next)
}

fn a_hang_is_that_cases_timeout_and_the_run_goes_on() -> TestResult {
    let runner = Runner::new()?;
    let outcome = run_in(&runner, "oracle/tiny/errors/hangs@TST-1")?.outcome;
    ensure(outcome.verdict == Verdict::Timeout && outcome.duration_s >= 0.4, &outcome)?;
    let said = ["about to hang", "assertions so far: 1, the last at", "the worker computed for 0."];
    let tail = outcome.output_tail.as_deref().unwrap_or_default();
    ensure(said.iter().all(|part| tail.contains(part)), &outcome)?;
    let next = run_in(&runner, "oracle/tiny/errors/passes@TST-1")?.outcome;
    ensure(next.verdict == Verdict::Pass, &next)
}

fn garbage_on_the_outputs_is_not_an_answer() -> TestResult {
    let outcome = run("chatters")?.outcome;
    ensure(outcome.verdict == Verdict::Pass && outcome.output_tail.is_none(), &outcome)
}

fn a_backend_error_where_none_is_due_fails() -> TestResult {
    let runner = Runner::new()?;
    let outcome = run_in(&runner, "broken/tiny/errors/makes_an_engine@TST-1")?.outcome;
    let reason = outcome.reason.clone().unwrap_or_default();
    ensure(outcome.verdict == Verdict::Fail && reason.contains("always"), &outcome)?;
    let outcome = run_in(&runner, "oracle/tiny/errors/makes_an_engine@TST-1")?.outcome;
    ensure(outcome.verdict == Verdict::Pass, &outcome)
}

fn a_claim_without_its_engine_fails_and_no_claim_is_unsupported() -> TestResult {
    let runner = Runner::new()?;
    let claimed = run_in(&runner, "broken/tiny/errors/wants_threads@TST-1")?.outcome;
    ensure(claimed.verdict == Verdict::Fail, &claimed)?;
    let unclaimed = run_in(&runner, "oracle/tiny/errors/wants_threads@TST-1")?.outcome;
    ensure(unclaimed.verdict == Verdict::Unsupported, &unclaimed)
}

fn a_check_may_span_two_processes() -> TestResult {
    let same = run("agrees_with_itself")?.outcome;
    ensure(same.verdict == Verdict::Pass && same.assertions == 3, &same)?;
    let other = run("is_one_process")?.outcome;
    ensure(other.verdict == Verdict::Fail && other.failures.len() == 1, &other)?;
    verdict_is("panics_at_once", Verdict::Crash, "in the first process")
}

fn another_process_shows_where_it_should_not() -> TestResult {
    let suite = Suite::new(workers_registry())?;
    let filter = Some("/determinism/process@".to_string());
    let verdict = |backend: &str| -> Result<Verdict, Failed> {
        let backends = vec![backend.to_string()];
        let cases = suite.select(&Selection { backends, filter: filter.clone(), ..Selection::default() })?;
        Ok(Runner::new()?.run(&cases[0]).outcome.verdict)
    };
    ensure(verdict("oracle")? == Verdict::Pass, "one result in two processes")?;
    ensure(verdict("restless")? == Verdict::Fail, "two results in two processes")
}

fn nothing_is_left_behind() -> TestResult {
    let runner = Runner::new()?;
    let root = runner.root().to_path_buf();
    for name in ["writes_files", "alone", "aborts"] {
        let outcome = run_in(&runner, &format!("oracle/tiny/errors/{name}@TST-1"))?.outcome;
        for folder in &outcome.notes {
            ensure(std::path::Path::new(folder).starts_with(&root), &outcome)?;
        }
        ensure(name == "aborts" || outcome.notes.len() == 2, &outcome)?;
    }
    ensure(std::fs::read_dir(root.join("scratch"))?.next().is_none(), "scratch folders are removed")?;
    ensure(root.join("models/tiny/config.json").is_file(), "models are written once")?;
    drop(runner);
    ensure(!root.exists(), &root)
}

fn a_fresh_case_shares_its_process_with_no_other() -> TestResult {
    let runner = Runner::new()?;
    // Every worker has a folder for temporary files, which tells them apart.
    let worker = |name: &str| {
        run_in(&runner, &format!("oracle/tiny/errors/{name}@TST-1")).map(|result| result.outcome.notes[1].clone())
    };
    let shared = [worker("writes_files")?, worker("writes_files")?];
    ensure(shared[0] == shared[1], &shared)?;
    let own = [worker("own_process")?, worker("own_process")?, worker("alone")?, worker("writes_files")?];
    let unique: std::collections::BTreeSet<&String> = own.iter().collect();
    ensure(unique.len() == own.len() && own[3] == shared[0], &own)
}

fn many_at_once_give_results_in_order() -> TestResult {
    let names = ["passes", "panics", "alone", "aborts", "asserts_nothing", "writes_files", "chatters", "passes"];
    let cases: Vec<Case> = names
        .iter()
        .map(|name| Ok(select(&format!("oracle/tiny/errors/{name}@TST-1"))?.remove(0)))
        .collect::<Result<_, Failed>>()?;
    let told = Mutex::new(Vec::new());
    let results = Runner::new()?.run_all(&cases, 4, &|result| {
        if let Ok(mut told) = told.lock() {
            told.push(result.id.clone());
        }
    });
    let verdicts: Vec<Verdict> = results.iter().map(|r| r.outcome.verdict).collect();
    use Verdict::{Crash, Inconclusive, Pass};
    ensure(verdicts == [Pass, Crash, Pass, Crash, Inconclusive, Pass, Pass, Pass], &verdicts)?;
    let told = told.into_inner()?;
    ensure(told.len() == 8 && told[7].contains("/alone@"), &told)
}

fn selections_that_mean_nothing_are_errors() -> TestResult {
    let suite = suite();
    let of = |backends: &[&str], models: &[&str], filter: Option<&str>| {
        let owned = |names: &[&str]| names.iter().map(|n| (*n).to_string()).collect();
        let selection =
            Selection { backends: owned(backends), models: owned(models), filter: filter.map(str::to_string) };
        suite.select(&selection).map(|cases| cases.len()).map_err(|e| e.to_string())
    };
    let unknown = of(&["gpu"], &[], None);
    ensure(unknown == Err("no backend \"gpu\"; registered: oracle, broken".to_string()), &unknown)?;
    ensure(of(&[], &["huge"], None).is_err_and(|e| e.contains("tiny")), "unknown model")?;
    ensure(of(&[], &[], Some("no such case")).is_err(), "nothing selected")?;
    ensure(of(&[], &[], Some("[*")).is_err(), "bad pattern")?;
    let one = of(&["oracle"], &["tiny"], Some("oracle/tiny/errors/passes@TST-1"));
    ensure(one == Ok(1), &one)?;
    let pattern = of(&[], &[], Some("*/tiny/*/passes@*"));
    ensure(pattern == Ok(2), &pattern)
}

fn models_are_taken_as_the_checks_say() -> TestResult {
    let models_of = |name: &str, models: &[&str]| -> Result<Vec<String>, Failed> {
        let selection = Selection {
            backends: vec!["oracle".to_string()],
            models: models.iter().map(|m| (*m).to_string()).collect(),
            filter: Some(format!("/{name}@")),
        };
        match suite().select(&selection) {
            Ok(cases) => Ok(cases.iter().map(|c| c.model.name().to_string()).collect()),
            Err(SuiteError::Nothing) => Ok(Vec::new()),
            Err(error) => Err(error.into()),
        }
    };
    let built_in = suite().models().len();
    ensure(models_of("passes", &[])? == ["tiny"], "any means tiny")?;
    ensure(models_of("passes", &["context-32", "tiny"])? == ["context-32", "tiny"], "any means the chosen ones")?;
    ensure(models_of("on_every_model", &[])?.len() == built_in, "every means all")?;
    ensure(models_of("on_one_model", &[])? == ["c02-h256-gqa2-untied"], "only means one")?;
    ensure(models_of("on_one_model", &["tiny"])?.is_empty(), "only means no other")?;
    let untied = models_of("on_untied_models", &[])?;
    ensure(untied.contains(&"c02-h256-gqa2-untied".to_string()) && !untied.contains(&"tiny".to_string()), &untied)?;
    let golden = models_of("on_golden_models", &[])?;
    ensure(golden.len() == golden::cases().len() && golden.contains(&"tiny".to_string()), &golden)
}

fn a_folder_of_the_users_own_is_a_model() -> TestResult {
    let folder = fixtures::preset("context-32", 7)?.folder()?;
    let selection = Selection {
        backends: vec!["oracle".to_string()],
        models: vec![folder.path().display().to_string()],
        filter: Some("makes_an_engine".to_string()),
    };
    let cases = suite().select(&selection)?;
    ensure(cases.len() == 1 && cases[0].id == "oracle/context-32/errors/makes_an_engine@TST-1", &cases[0].id)?;
    let result = Runner::new()?.run(&cases[0]);
    ensure(result.outcome.verdict == Verdict::Pass, &result)?;
    let command = conformance::report::terminal::reproduce(&result, "conformance");
    ensure(command.contains(&format!("--model {}", folder.path().display())), &command)
}

fn repeated_ids_are_an_error() -> TestResult {
    let twice = suite().with_checks(checks().into_iter().chain(checks()).collect());
    ensure(matches!(twice.select(&Selection::default()), Err(SuiteError::DuplicateId { .. })), "duplicate id")
}

fn registries_that_mean_nothing_are_errors() -> TestResult {
    let error = |registry: Registry| registry.validate().map_err(|e| e.to_string());
    ensure(error(registry()).is_ok(), "two backends")?;
    ensure(error(Registry::new()).is_err(), "no backend")?;
    ensure(error(registry().with(OracleFactory)).is_err_and(|e| e.contains("oracle")), "one name twice")?;
    ensure(Suite::new(registry().with(Broken)).is_err(), "a suite on a faulty registry")
}

fn main() -> ExitCode {
    let suite = suite();
    if let Some(code) = conformance::worker::serve_if_asked(&workers_registry(), &workers_checks()) {
        return code;
    }
    if let Ok(word) = std::env::var("FRAMEWORK_AS_TARGET") {
        let checks = checks().into_iter().filter(|check| check.name.contains(&word)).collect();
        return conformance::harness::run(&suite.with_checks(checks));
    }
    let trials = vec![
        Trial::test("zero_assertions_are_inconclusive", || {
            verdict_is("asserts_nothing", Verdict::Inconclusive, "no assertion")
        }),
        Trial::test("a_check_may_give_up", || verdict_is("gives_up", Verdict::Inconclusive, "too noisy")),
        Trial::test("giving_up_does_not_hide_a_failure", || verdict_is("fails_then_gives_up", Verdict::Fail, "")),
        Trial::test("a_missing_capability_is_unsupported", || {
            verdict_is("needs_attention", Verdict::Unsupported, "attention weights")
        }),
        Trial::test("passing_counts_what_it_did", passing_counts_what_it_did),
        Trial::test("failures_keep_what_was_expected_and_seen", failures_keep_what_was_expected_and_seen),
        Trial::test("a_measurement_that_is_no_number_fails", a_measurement_that_is_no_number_fails),
        Trial::test("errors_are_told_apart", errors_are_told_apart),
        Trial::test("a_panic_is_that_cases_crash", a_panic_is_that_cases_crash_and_the_worker_goes_on),
        Trial::test("an_abort_is_that_cases_crash", an_abort_is_that_cases_crash_and_the_run_goes_on),
        Trial::test("a_hang_is_that_cases_timeout", a_hang_is_that_cases_timeout_and_the_run_goes_on),
        Trial::test("garbage_on_the_outputs_is_not_an_answer", garbage_on_the_outputs_is_not_an_answer),
        Trial::test("a_backend_error_where_none_is_due_fails", a_backend_error_where_none_is_due_fails),
        Trial::test("claims_are_held_to", a_claim_without_its_engine_fails_and_no_claim_is_unsupported),
        Trial::test("a_check_may_span_two_processes", a_check_may_span_two_processes),
        Trial::test("another_process_shows", another_process_shows_where_it_should_not),
        Trial::test("nothing_is_left_behind", nothing_is_left_behind),
        Trial::test("a_fresh_case_shares_its_process_with_no_other", a_fresh_case_shares_its_process_with_no_other),
        Trial::test("many_at_once_give_results_in_order", many_at_once_give_results_in_order),
        Trial::test("selections_that_mean_nothing_are_errors", selections_that_mean_nothing_are_errors),
        Trial::test("models_are_taken_as_the_checks_say", models_are_taken_as_the_checks_say),
        Trial::test("a_folder_of_the_users_own_is_a_model", a_folder_of_the_users_own_is_a_model),
        Trial::test("repeated_ids_are_an_error", repeated_ids_are_an_error),
        Trial::test("registries_that_mean_nothing_are_errors", registries_that_mean_nothing_are_errors),
        Trial::test("a_test_target_lists_filters_and_judges", target::a_test_target_lists_filters_and_judges),
        Trial::test("only_a_whole_run_leaves_a_report", target::only_a_whole_run_of_a_test_target_leaves_a_report),
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}
