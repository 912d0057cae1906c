//! The suite as a test target: every case is one test of `cargo test`.
//!
//! A crate registers its backend in a target with `harness = false`:
//!
//! ```no_run
//! # use conformance::{BackendFactory, Capabilities, ModelFixture, Registry, Semantics};
//! # use bitnet_contracts::{BitNetInference, Result};
//! struct Mine;
//! impl BackendFactory for Mine {
//!     fn name(&self) -> &str { "mine" }
//!     fn capabilities(&self) -> Capabilities { Capabilities::new(Semantics::W158A8) }
//!     fn create(&self, model: &ModelFixture) -> Result<Box<dyn BitNetInference>> {
//!         // load the model in `model.dir()`
//! #       Err(bitnet_contracts::ModelError::FileNotFound { path: model.dir().display().to_string() }.into())
//!     }
//! }
//! fn main() -> std::process::ExitCode {
//!     conformance::main(Registry::new().with(Mine))
//! }
//! ```
//!
//! Filters, `--list`, `--exact`, `--skip`, `--test-threads` and the rest of libtest's options work, and so does nextest.
//! Three environment variables choose what there is to run: [`BACKENDS_ENV`], [`MODELS_ENV`], [`FILTER_ENV`]; a fourth,
//! [`EXPECTATIONS_ENV`], says what is known to fail, [`SHRINK_ENV`] asks for reproducers of what fails, and [`JSON_ENV`]
//! for the report of a whole run.

mod record;

use crate::backend::Registry;
use crate::expectations::{Expectations, Finding};
use crate::report::terminal;
use crate::repro::reproduce;
use crate::run::Runner;
use crate::suite::{Case, Selection, Suite};
use crate::verdict::Verdict;
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use record::{Record, Sink};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

/// Backends to test, by name with commas between; unset or empty for all registered ones. A name that is not
/// registered is an error.
pub const BACKENDS_ENV: &str = "CONFORMANCE_BACKENDS";

/// Models to test on, by name or folder with commas between; unset or empty for the built-in ones.
pub const MODELS_ENV: &str = "CONFORMANCE_MODELS";

/// A part of, or a pattern for, the ids of the cases to make tests of.
pub const FILTER_ENV: &str = "CONFORMANCE_FILTER";

/// An expectations file, see [`crate::expectations`]; unset or empty for none. What fails as it says is ignored, what
/// passes against it fails, and what else is wrong with it fails the test `BACKEND/expectations`.
pub const EXPECTATIONS_ENV: &str = "CONFORMANCE_EXPECTATIONS";

/// Set to `1` to make failing cases smaller and print their reproducers, some seconds each.
pub const SHRINK_ENV: &str = "CONFORMANCE_SHRINK";

/// A file for the report as JSON, as `conformance run --json` writes it. It is written once every case of the suite has
/// run: a run of a part of them leaves none, not even that of an earlier run.
pub const JSON_ENV: &str = "CONFORMANCE_JSON";

/// How long a failing case is made smaller.
const SHRINK_BUDGET: Duration = Duration::from_secs(5);

/// Runs the suite against the registered backends as the `main` of a test target.
pub fn main(registry: Registry) -> ExitCode {
    match Suite::new(registry) {
        Ok(suite) => run(&suite),
        Err(error) => refuse(&error),
    }
}

/// The same for a suite with a choice of checks.
pub fn run(suite: &Suite) -> ExitCode {
    if let Some(code) = crate::worker::serve_if_asked(suite.registry(), suite.checks()) {
        return code;
    }
    let args = Arguments::from_args();
    let selection = selection_from(|name| std::env::var(name).ok());
    let cases = match suite.select(&selection) {
        Ok(cases) => cases,
        Err(error) => return refuse(&error),
    };
    let expectations = match std::env::var_os(EXPECTATIONS_ENV).filter(|path| !path.is_empty()) {
        None => None,
        Some(path) => match Expectations::read(Path::new(&path)) {
            Ok(expectations) => Some(expectations),
            Err(error) => return refuse(&error),
        },
    };
    let findings = match &expectations {
        None => None,
        Some(expectations) => match suite.select(&Selection { filter: None, ..selection }) {
            Ok(whole) => Some(expectations.findings(&whole, &[])),
            Err(error) => return refuse(&error),
        },
    };
    // Listing starts no worker and writes no file.
    let (mut runner, mut record) = (None, None);
    if !args.list {
        match Runner::new() {
            Ok(new) => {
                runner = Some(Arc::new(match &expectations {
                    Some(expectations) => new.expecting(expectations.clone()),
                    None => new,
                }));
            }
            Err(error) => return refuse(&error),
        }
        if let Some(path) = std::env::var_os(JSON_ENV).filter(|path| !path.is_empty()) {
            match Record::begin(path.into()) {
                Ok(new) => record = Some(new),
                Err(error) => return refuse(&error),
            }
        }
    }
    let mut tests = findings.map_or_else(Vec::new, |findings| expectation_trials(&cases, &findings));
    tests.extend(trials(suite, cases, runner, record.as_ref().map(Record::sink)));
    let code = libtest_mimic::run(&args, tests).exit_code();
    let Some(record) = record else { return code };
    let whole = suite.select(&Selection::default());
    let written = whole
        .map_err(|e| e.to_string())
        .and_then(|whole| record.end(&whole, expectations.as_ref()).map_err(|e| e.to_string()));
    match written {
        Ok(()) => code,
        Err(error) => refuse(&error),
    }
}

/// What the environment chooses; `get` reads a variable.
pub fn selection_from(get: impl Fn(&str) -> Option<String>) -> Selection {
    let list = |name: &str| -> Vec<String> {
        let text = get(name).unwrap_or_default();
        text.split(',').map(str::trim).filter(|part| !part.is_empty()).map(str::to_string).collect()
    };
    Selection {
        backends: list(BACKENDS_ENV),
        models: list(MODELS_ENV),
        filter: get(FILTER_ENV).filter(|text| !text.is_empty()),
    }
}

/// One trial a case; those that must run alone come last.
fn trials(suite: &Suite, cases: Vec<Case>, runner: Option<Arc<Runner>>, sink: Option<Sink>) -> Vec<Trial> {
    let shrink = std::env::var_os(SHRINK_ENV).is_some_and(|value| value == "1");
    let suite = Arc::new(suite.clone());
    let (alone, mut ordered): (Vec<Case>, Vec<Case>) = cases.into_iter().partition(|c| c.check.exclusive);
    ordered.extend(alone);
    ordered
        .into_iter()
        .map(|case| {
            let (suite, runner, sink) = (suite.clone(), runner.clone(), sink.clone());
            Trial::ignorable_test(case.id.clone(), move || {
                judge(&case, runner.as_deref(), sink.as_ref(), shrink.then_some(&*suite))
            })
        })
        .collect()
}

/// One trial a backend for what is wrong with the expectations of its cases; the first has those of no backend as well.
fn expectation_trials(cases: &[Case], findings: &[Finding]) -> Vec<Trial> {
    let mut backends: Vec<&str> = cases.iter().map(|case| case.backend.name()).collect();
    backends.dedup();
    let owner = |finding: &Finding| {
        let name = finding.id.split('/').next().unwrap_or_default();
        backends.iter().position(|backend| *backend == name).unwrap_or(0)
    };
    let trial =
        |(index, backend): (usize, &&str)| {
            let own: Vec<&str> = findings.iter().filter(|f| owner(f) == index).map(|f| f.text.as_str()).collect();
            let text = own.join("\n");
            Trial::test(format!("{backend}/expectations"), move || {
                if text.is_empty() { Ok(()) } else { Err(text.as_str().into()) }
            })
        };
    backends.iter().enumerate().map(trial).collect()
}

fn judge(
    case: &Case,
    runner: Option<&Runner>,
    sink: Option<&Sink>,
    shrink_in: Option<&Suite>,
) -> Result<Completion, Failed> {
    let runner = runner.ok_or("tests are only listed, not run")?;
    let result = runner.run(case);
    if let Some(sink) = sink {
        sink.keep(&result);
    }
    match result.outcome.verdict {
        Verdict::Pass => Ok(Completion::Completed),
        verdict @ (Verdict::Unsupported | Verdict::Waived) => {
            let reason = result.outcome.reason.as_deref().unwrap_or_default();
            Ok(Completion::ignored_with(format!("{verdict}: {reason}")))
        }
        _ => {
            let budget = (!case.check.exclusive).then_some(SHRINK_BUDGET);
            let smaller = shrink_in.and_then(|suite| reproduce(suite, runner, case, &result.outcome, budget));
            let smaller = smaller.map_or_else(String::new, |json| format!("  smaller   {json}"));
            Err(format!("{}  repeat    {}\n{smaller}", terminal::details(&result), repeat(&case.id)).into())
        }
    }
}

/// The command that runs one test again: by cargo where cargo started this, else by this executable's path.
fn repeat(id: &str) -> String {
    let id = terminal::shell_quoted(id);
    let exe = std::env::current_exe().unwrap_or_default();
    // target/debug/deps/NAME-0123456789abcdef
    let stem = exe.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    let target = stem.rsplit_once('-').filter(|(_, hash)| hash.len() == 16).map(|(name, _)| name);
    match (std::env::var("CARGO_PKG_NAME"), target) {
        (Ok(package), Some(target)) => format!("cargo test -p {package} --test {target} -- --exact {id}"),
        _ => format!("{} --exact {id}", terminal::shell_quoted(&exe.to_string_lossy())),
    }
}

fn refuse(error: &dyn std::fmt::Display) -> ExitCode {
    eprintln!("conformance: {error}");
    ExitCode::from(2)
}
