//! The worker's side of isolation: one case at a time, in a process that may die of it.
//!
//! The parent starts its own executable again with [`WORKER_ENV`] set and a Unix socket as standard input. Requests and
//! answers are JSON, one a line, both on that socket, so a backend may print whatever it likes: standard output and
//! standard error are kept only as the last words of a worker that dies.

use crate::backend::Registry;
use crate::case::{Check, CheckResult, Stop};
use crate::context::{Context, End, FirstFailure};
use crate::last_words::LastWords;
use crate::model::ModelFixture;
use crate::repro::Schedule;
use crate::verdict::{Outcome, Verdict};
use serde::{Deserialize, Serialize};
use std::cell::RefCell;
use std::io::{BufRead, BufReader, Write};
use std::panic::{AssertUnwindSafe, PanicHookInfo};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

#[cfg(not(unix))]
compile_error!("the suite isolates its cases with Unix sockets");

/// Set to `1` in the environment of a worker.
pub const WORKER_ENV: &str = "CONFORMANCE_WORKER";

/// What the parent asks of a worker.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Request {
    pub serial: u64,
    pub backend: String,
    pub check: String,
    pub model: ModelFixture,
    pub scratch: PathBuf,
    /// End at the first failed assertion.
    pub fail_fast: bool,
    /// When the parent will kill this worker, seconds from now.
    pub deadline_s: f64,
    /// The calls to make, in place of a check.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schedule: Option<Schedule>,
}

/// What a worker answers.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Answer {
    pub serial: u64,
    pub outcome: Outcome,
}

/// Serves cases and returns the exit code if this process is a worker; returns `None` if it is not.
///
/// An executable that starts runs must call this before anything else it does.
pub fn serve_if_asked(registry: &Registry, checks: &[Check]) -> Option<ExitCode> {
    if std::env::var_os(WORKER_ENV).is_none_or(|value| value != "1") {
        return None;
    }
    Some(match serve(registry, checks) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("conformance worker: {error}");
            ExitCode::from(2)
        }
    })
}

fn serve(registry: &Registry, checks: &[Check]) -> std::io::Result<()> {
    use std::os::fd::AsFd;
    let channel = std::io::stdin().as_fd().try_clone_to_owned()?;
    let mut answers = std::os::unix::net::UnixStream::from(channel);
    let requests = BufReader::new(answers.try_clone()?);
    remember_panics();
    let last_words = LastWords::start();
    for line in requests.lines() {
        let request: Request = serde_json::from_str(&line?).map_err(std::io::Error::other)?;
        last_words.by(request.deadline_s);
        let outcome = handle(registry, checks, &request);
        last_words.cancel();
        let mut text = serde_json::to_string(&Answer { serial: request.serial, outcome })?;
        text.push('\n');
        answers.write_all(text.as_bytes())?;
    }
    Ok(())
}

fn handle(registry: &Registry, checks: &[Check], request: &Request) -> Outcome {
    let Ok(factory) = registry.get(&request.backend) else {
        return Outcome::bare(Verdict::Inconclusive, format!("the worker has no backend {}", request.backend));
    };
    if let Some(schedule) = &request.schedule {
        let play = |context: &mut Context<'_>| crate::repro::play(context, schedule);
        return run_in_context(&**factory, &request.model, &request.scratch, request.fail_fast, play);
    }
    let Some(check) = checks.iter().find(|c| c.name == request.check) else {
        return Outcome::bare(Verdict::Inconclusive, format!("the worker has no check {}", request.check));
    };
    run_check(check, &**factory, &request.model, &request.scratch, request.fail_fast)
}

thread_local! {
    static LAST_PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Keeps the message and the place of each panic, beside what the present hook does with it.
fn remember_panics() {
    let present = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info: &PanicHookInfo<'_>| {
        let place = info.location().map_or_else(String::new, |l| format!(" at {}:{}", l.file(), l.line()));
        LAST_PANIC.with_borrow_mut(|last| *last = Some(format!("panicked{place}: {}", payload_text(info.payload()))));
        present(info);
    }));
}

fn payload_text(payload: &(dyn std::any::Any + Send)) -> String {
    payload
        .downcast_ref::<&str>()
        .map(|text| (*text).to_string())
        .or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without a message".to_string())
}

/// Runs one check in this process, or the probe of what the backend declares that it lacks for it. A panic is caught and
/// becomes a crash verdict; an abort or a hang is not survived, which is what workers are for. With `fail_fast` the check
/// ends at its first failed assertion.
pub fn run_check(
    check: &Check,
    factory: &dyn crate::backend::BackendFactory,
    model: &ModelFixture,
    scratch: &Path,
    fail_fast: bool,
) -> Outcome {
    run_in_context(factory, model, scratch, fail_fast, |context| crate::checks::run(check, context))
}

fn run_in_context(
    factory: &dyn crate::backend::BackendFactory,
    model: &ModelFixture,
    scratch: &Path,
    fail_fast: bool,
    run: impl FnOnce(&mut Context<'_>) -> CheckResult,
) -> Outcome {
    let start = Instant::now();
    LAST_PANIC.with_borrow_mut(|last| *last = None);
    let mut context = match std::panic::catch_unwind(AssertUnwindSafe(|| Context::new(factory, model, scratch))) {
        Ok(context) => context.ending_at_first_failure(fail_fast),
        Err(payload) => return Outcome::bare(Verdict::Crash, payload_text(&*payload)),
    };
    let end = match std::panic::catch_unwind(AssertUnwindSafe(|| run(&mut context))) {
        Ok(result) => End::Returned(result),
        Err(payload) if payload.is::<FirstFailure>() => End::Returned(Err(Stop::Failed)),
        Err(payload) => {
            let noted = LAST_PANIC.with_borrow_mut(Option::take);
            End::Panicked(noted.unwrap_or_else(|| format!("panicked: {}", payload_text(&*payload))))
        }
    };
    context.finish(end, start.elapsed())
}
