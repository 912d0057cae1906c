//! The command line of reproducers: `replay`, `fuzz`, and what `run` does with its failures.

use super::file::{ReproError, Reproducer};
use super::fuzz::{Finding, Fuzzer};
use super::replay::replay;
use super::shrink::{attach, fails};
use crate::report::terminal::shell_quoted;
use crate::run::Runner;
use crate::suite::{Case, Suite};
use crate::verdict::{CaseResult, Outcome, Verdict};
use clap::Args;
use indicatif::ProgressBar;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// How long each of the first failures of a run is made smaller.
const SHRINK_BUDGET: Duration = Duration::from_secs(5);
/// Findings after which fuzzing stops.
const MAX_FINDINGS: usize = 5;

type Failure = Box<dyn std::error::Error>;

/// What a run does with its failures.
#[derive(Debug, Args)]
pub(crate) struct ShrinkArgs {
    /// Make the first failing cases smaller, a few seconds each.
    #[arg(long, value_name = "BOOL", default_value_t = true, num_args = 0..=1, require_equals = true,
          default_missing_value = "true", action = clap::ArgAction::Set)]
    shrink: bool,
    /// Write a reproducer of each failure into this folder.
    #[arg(long, value_name = "DIR")]
    reproducers: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct ReplayArgs {
    /// The reproducer.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// The backend. Default: the one that failed.
    #[arg(long, value_name = "NAME")]
    backend: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct FuzzArgs {
    /// How long. Default: 10 seconds, or no limit with --iterations.
    #[arg(long, value_name = "N")]
    seconds: Option<u64>,
    /// How many iterations at most.
    #[arg(long, value_name = "N")]
    iterations: Option<u64>,
    /// The backend. Default: every registered one.
    #[arg(long, value_name = "NAME")]
    backend: Option<String>,
    /// A second backend, which plays the same schedules.
    #[arg(long, value_name = "BACKEND")]
    against: Option<String>,
    /// What models and calls are drawn from.
    #[arg(long, value_name = "S", default_value_t = 1)]
    seed: u64,
    /// Write a reproducer of each finding into this folder.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

impl ShrinkArgs {
    /// Gives failing results their reproducers and writes those out. Returns what to print: the command that runs each.
    pub(crate) fn apply(
        &self,
        suite: &Suite,
        runner: &Runner,
        cases: &[Case],
        results: &mut [CaseResult],
        program: &str,
    ) -> Result<String, Failure> {
        attach(suite, runner, cases, results, self.shrink.then_some(SHRINK_BUDGET));
        let Some(dir) = &self.reproducers else { return Ok(String::new()) };
        let mut text = String::new();
        for result in results {
            let Some(json) = &result.outcome.reproducer else { continue };
            let path = save(dir, &result.id, json)?;
            writeln!(text, "reproducer: {}", command(program, &path, &result.backend))?;
        }
        Ok(text)
    }
}

/// `conformance replay`: 0 where the case passes, 1 where it still fails, 2 where it cannot be run.
pub(crate) fn replay_command(
    suite: &Suite,
    args: &ReplayArgs,
    print: &mut dyn FnMut(&str),
) -> Result<ExitCode, Failure> {
    let reproducer = Reproducer::read(&args.file)?;
    let backend = args.backend.as_deref().unwrap_or(reproducer.backend());
    suite.registry().get(backend)?;
    let outcome = replay(suite, &Runner::new()?, &reproducer, backend)?;
    let mut text = format!("{}  {backend}  {}\n", outcome.verdict.name().to_uppercase(), args.file.display());
    if !outcome.verdict.is_good() {
        describe(&mut text, &outcome)?;
        let then = reproducer.outcome();
        if !then.expected.is_empty() {
            writeln!(text, "  then      {} expected: {}", reproducer.backend(), then.expected)?;
        }
        writeln!(text, "  then      {} {}: {}", reproducer.backend(), then.verdict, then.seen)?;
    }
    print(&text);
    Ok(match outcome.verdict {
        Verdict::Pass => ExitCode::SUCCESS,
        _ if fails(&outcome) => ExitCode::from(1),
        _ => ExitCode::from(2),
    })
}

fn describe(text: &mut String, outcome: &Outcome) -> std::fmt::Result {
    if let Some(reason) = &outcome.reason {
        writeln!(text, "  reason    {reason}")?;
    }
    if let Some(failure) = outcome.failures.first() {
        writeln!(text, "  expected  {}", failure.expected)?;
        writeln!(text, "  seen      {}", failure.seen)?;
        writeln!(text, "  at        {}", failure.at)?;
    }
    Ok(())
}

/// `conformance fuzz`: 0 where nothing is found, 1 where something is, 2 where nothing was tried.
pub(crate) fn fuzz_command(
    suite: &Suite,
    args: &FuzzArgs,
    program: &str,
    print: &mut dyn FnMut(&str),
) -> Result<ExitCode, Failure> {
    let mut backends = args.backend.as_ref().map_or_else(|| suite.registry().names(), |name| vec![name.clone()]);
    backends.extend(args.against.iter().filter(|name| !backends.contains(name)).cloned().collect::<Vec<_>>());
    for backend in &backends {
        suite.registry().get(backend)?;
    }
    let seconds = args.seconds.or_else(|| args.iterations.is_none().then_some(10));
    let limit = seconds.map(Duration::from_secs);
    let runner = Runner::new()?;
    let mut fuzzer = Fuzzer::new(suite, &runner, backends, args.seed);
    let (clock, bar) = (Instant::now(), ProgressBar::new_spinner());
    let mut found: Vec<Finding> = Vec::new();
    for number in 0..args.iterations.unwrap_or(u64::MAX) {
        if limit.is_some_and(|limit| clock.elapsed() >= limit) || found.len() >= MAX_FINDINGS {
            break;
        }
        let iteration = fuzzer.iteration(number)?;
        bar.set_message(format!("{} iterations · {} findings", number + 1, found.len()));
        bar.tick();
        for finding in fuzzer.findings(&iteration) {
            bar.suspend(|| report(&finding, args.out.as_deref(), program, print))?;
            found.push(finding);
        }
    }
    bar.finish_and_clear();
    let tally = &fuzzer.tally;
    let mut text = format!(
        "fuzz: seed {}, {} iterations, {} rows held to the oracle ({} exactly), {} refusals, {:.1} s\n",
        args.seed,
        tally.iterations,
        tally.rows,
        tally.firm_rows,
        tally.refusals,
        clock.elapsed().as_secs_f64()
    );
    for (backend, worst) in &tally.distances {
        writeln!(text, "fuzz: {backend}: worst row at {worst:.3} of what is allowed")?;
    }
    writeln!(
        text,
        "fuzz: {} findings in {} failures, {} inconclusive",
        found.len(),
        tally.failures,
        tally.inconclusive
    )?;
    print(&text);
    Ok(match (found.is_empty(), tally.rows > 0 && tally.inconclusive == 0) {
        (false, _) => ExitCode::from(1),
        (true, true) => ExitCode::SUCCESS,
        (true, false) => ExitCode::from(2),
    })
}

fn report(finding: &Finding, out: Option<&Path>, program: &str, print: &mut dyn FnMut(&str)) -> Result<(), Failure> {
    let Finding { iteration, backend, outcome, reproducer, .. } = finding;
    let mut text = format!("{}  {backend}  iteration {iteration}\n", outcome.verdict.name().to_uppercase());
    describe(&mut text, outcome)?;
    writeln!(text, "  {}", finding.ranking())?;
    match (reproducer.to_json(), out) {
        (Ok(json), Some(dir)) => {
            let path = save(dir, &format!("fuzz-{backend}-{iteration}"), &json)?;
            writeln!(text, "  repeat    {}", command(program, &path, backend))?;
        }
        (Ok(json), None) => write!(text, "  {json}")?,
        (Err(error), _) => writeln!(text, "  no reproducer: {error}")?,
    }
    print(&text);
    Ok(())
}

fn command(program: &str, path: &Path, backend: &str) -> String {
    format!("{program} replay {} --backend {backend}", shell_quoted(&path.display().to_string()))
}

/// Writes a reproducer under a name made of an id.
fn save(dir: &Path, id: &str, json: &str) -> Result<PathBuf, ReproError> {
    let name: String =
        id.chars().map(|c| if c.is_ascii_alphanumeric() || "-_.@".contains(c) { c } else { '.' }).collect();
    let path = dir.join(format!("{name}.json"));
    let io = |source| ReproError::Io { path: path.clone(), source };
    std::fs::create_dir_all(dir).map_err(io)?;
    std::fs::write(&path, json).map_err(io)?;
    Ok(path)
}
