//! The command line, a subcommand a function. A binary registers its backends and hands over.

mod prove;

use crate::backend::Registry;
use crate::calibrate::{CalibrateArgs, calibrate};
use crate::expectations::Expectations;
use crate::gates::{Thresholds, absences};
use crate::report::json::ReportError;
use crate::report::{Report, badge, diff, html, json, junit, schema, terminal};
use crate::run::Runner;
use crate::suite::{Selection, Suite};
use crate::verdict::CaseResult;
use crate::zoo::proof::Proof;
use clap::{Args, Parser, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Instant, SystemTime};

/// Runs the conformance suite for BitNet b1.58 inference engines.
///
/// Without a subcommand this is `run`. Exit codes: 0 all good; 1 a case failed, crashed, timed out, was inconclusive or
/// passed unexpectedly, an expectation is stale, a gate was breached, a proof does not hold, or `diff` found a regression;
/// 2 the command line, a file or the machine does not allow an answer.
#[derive(Debug, Parser)]
#[command(name = "conformance", version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    run: RunArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run cases and report.
    Run(RunArgs),
    /// List the cases, one id a line.
    List(ListArgs),
    /// Hold a JSON report against thresholds.
    Gate(GateArgs),
    /// Measure the worst honest and the nearest faulty error of every tolerance.
    Calibrate(CalibrateArgs),
    /// Hold the suite against backends that must be caught and backends that must pass.
    Prove(prove::ProveArgs),
    /// Show a JSON report, or turn it into other forms.
    Report(ReportArgs),
    /// Show what changed between two JSON reports.
    Diff(DiffArgs),
    /// Print the JSON Schema of reports.
    Schema,
    /// Run a reproducer. Exit codes: 0 it passes, 1 it still fails, 2 it cannot be run.
    Replay(crate::repro::ReplayArgs),
    /// Look for failures with random models and calls, held to the oracle.
    Fuzz(crate::repro::FuzzArgs),
}

#[derive(Debug, Args)]
struct ChoiceArgs {
    /// A backend; may be repeated. Default: every registered one.
    #[arg(long, value_name = "NAME")]
    backend: Vec<String>,
    /// A built-in model, or a folder in the Hugging Face layout; may be repeated. Default: the built-in models.
    #[arg(long, value_name = "NAME|DIR")]
    model: Vec<String>,
    /// A part of the case ids, or a pattern over whole ids (`cpu/*/kv_cache/*`).
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
}

#[derive(Debug, Args)]
struct RunArgs {
    #[command(flatten)]
    choice: ChoiceArgs,
    /// Write the report as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Known failures: what fails as this file says is waived; an entry that is stale, expired or wrong fails the run.
    #[arg(long, value_name = "FILE")]
    expectations: Option<PathBuf>,
    #[command(flatten)]
    forms: FormArgs,
    /// Worker processes. Default: one a processor. Cases that measure time or memory always run alone.
    #[arg(long, value_name = "N")]
    jobs: Option<std::num::NonZeroUsize>,
    #[command(flatten)]
    shrink: crate::repro::ShrinkArgs,
}

#[derive(Debug, Args)]
struct FormArgs {
    /// Write the report as JUnit XML.
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
    /// Write the report as one HTML page.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Write the verdict as an SVG badge.
    #[arg(long, value_name = "FILE")]
    badge: Option<PathBuf>,
    /// Show the kill matrix of this proof on the HTML page.
    #[arg(long, value_name = "PROOF.json", requires = "html")]
    proof: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct ReportArgs {
    #[command(flatten)]
    forms: FormArgs,
    /// The report, as written by `run --json`.
    #[arg(value_name = "REPORT.json")]
    report: PathBuf,
}

#[derive(Debug, Args)]
struct DiffArgs {
    /// How far a number must move to be told, as a factor.
    #[arg(long, value_name = "X", default_value_t = diff::FACTOR)]
    factor: f64,
    /// The report to compare with.
    #[arg(value_name = "BEFORE.json")]
    before: PathBuf,
    /// The report to judge.
    #[arg(value_name = "AFTER.json")]
    after: PathBuf,
}

#[derive(Debug, Args)]
struct ListArgs {
    #[command(flatten)]
    choice: ChoiceArgs,
    /// Show the clause of each case, and why it would not run.
    #[arg(long)]
    long: bool,
}

#[derive(Debug, Args)]
struct GateArgs {
    /// The thresholds.
    #[arg(long, value_name = "FILE")]
    thresholds: PathBuf,
    /// The profile of service levels.
    #[arg(long, value_name = "NAME", default_value = "default")]
    profile: String,
    /// Refuse a report that lacks a case of a run without any choice.
    #[arg(long)]
    whole: bool,
    /// The report, as written by `run --json`.
    #[arg(value_name = "REPORT.json")]
    report: PathBuf,
}

impl From<ChoiceArgs> for Selection {
    fn from(args: ChoiceArgs) -> Self {
        Self { backends: args.backend, models: args.model, filter: args.filter }
    }
}

type Failure = Box<dyn std::error::Error>;

/// Runs the command line against the registered backends as the `main` of a binary.
pub fn main(registry: Registry) -> ExitCode {
    let result = Suite::new(registry).map_err(Failure::from).and_then(|suite| {
        // A worker may be asked for any inhabitant of the zoos as well.
        let everybody = crate::zoo::with_zoo(suite.registry().clone());
        if let Some(code) = crate::worker::serve_if_asked(&everybody, suite.checks()) {
            return Ok(code);
        }
        let cli = Cli::parse();
        // The inhabitants of the zoos run where they are named, and never by default.
        let suite_of = |choice: &ChoiceArgs| match choice.backend.iter().any(|name| suite.registry().get(name).is_err())
        {
            true => Suite::new(everybody.clone()),
            false => Ok(suite.clone()),
        };
        match cli.command.unwrap_or(Command::Run(cli.run)) {
            Command::Run(args) => run(&suite_of(&args.choice)?, args),
            Command::List(args) => list(&suite_of(&args.choice)?, args),
            Command::Gate(args) => gate(&suite, &args),
            Command::Calibrate(args) => calibrate(&suite, &args, &progress_bar(0)),
            Command::Prove(args) => prove::prove(&everybody, args),
            Command::Report(args) => report(&args),
            Command::Diff(args) => compare(&args),
            Command::Schema => {
                print(&schema::text()?);
                Ok(ExitCode::SUCCESS)
            }
            Command::Replay(args) => crate::repro::replay_command(&suite, &args, &mut print),
            Command::Fuzz(args) => crate::repro::fuzz_command(&suite, &args, &style().program, &mut print),
        }
    });
    result.unwrap_or_else(|error| {
        eprintln!("conformance: {error}");
        ExitCode::from(2)
    })
}

fn run(suite: &Suite, args: RunArgs) -> Result<ExitCode, Failure> {
    let proof = args.forms.proof()?;
    let selection: Selection = args.choice.into();
    let cases = suite.select(&selection)?;
    let expectations = args.expectations.as_deref().map(Expectations::read).transpose()?;
    let style = style();
    let jobs = args.jobs.map_or_else(|| std::thread::available_parallelism().map_or(1, usize::from), usize::from);
    let mut runner = Runner::new()?;
    if let Some(expectations) = &expectations {
        runner = runner.expecting(expectations.clone());
    }
    let bar = progress_bar(cases.len() as u64);
    let bad = std::sync::atomic::AtomicU64::new(0);
    let (started, clock) = (SystemTime::now(), Instant::now());
    let mut results = runner.run_all(&cases, jobs, &|result: &CaseResult| {
        if !result.outcome.verdict.is_good() {
            let count = 1 + bad.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            bar.println(format!("{:<12} {}", result.outcome.verdict.name().to_uppercase(), result.id));
            bar.set_prefix(format!("{count} not good · "));
        }
        bar.set_message(result.id.clone());
        bar.inc(1);
    });
    bar.finish_and_clear();
    let elapsed = clock.elapsed();
    let reproducers = args.shrink.apply(suite, &runner, &cases, &mut results, &style.program)?;
    drop(runner);
    let mut report = Report::new(&cases, results, started, elapsed);
    if let Some(expectations) = &expectations {
        let whole = suite.select(&Selection { filter: None, ..selection })?;
        report.findings.extend(expectations.findings(&whole, &report.cases).into_iter().map(|f| f.text));
        report = report.sealed();
    }
    if let Some(path) = &args.json {
        json::write(&report, path)?;
    }
    args.forms.write(&report, proof.as_ref(), &style)?;
    print(&terminal::render(&report, &style));
    print(&reproducers);
    Ok(if report.is_green() { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

impl FormArgs {
    /// The proof to show, read before a run that may take minutes.
    fn proof(&self) -> Result<Option<Proof>, ReportError> {
        self.proof.as_deref().map(read_proof).transpose()
    }

    fn write(&self, report: &Report, proof: Option<&Proof>, style: &terminal::Style) -> Result<(), ReportError> {
        if let Some(path) = &self.junit {
            junit::write(report, path)?;
        }
        if let Some(path) = &self.html {
            html::write(report, proof, &style.program, path)?;
        }
        if let Some(path) = &self.badge {
            badge::write(report, path)?;
        }
        Ok(())
    }
}

fn read_proof(path: &Path) -> Result<Proof, ReportError> {
    let text = std::fs::read_to_string(path).map_err(|source| ReportError::Io { path: path.to_path_buf(), source })?;
    let form = |e: serde_json::Error| ReportError::Form { reason: format!("{}: {e}", path.display()) };
    serde_json::from_str(&text).map_err(form)
}

/// Shows a report, or writes it in the forms that were asked for.
fn report(args: &ReportArgs) -> Result<ExitCode, Failure> {
    let report = json::read(&args.report)?;
    let style = style();
    args.forms.write(&report, args.forms.proof()?.as_ref(), &style)?;
    let forms = &args.forms;
    if forms.junit.is_none() && forms.html.is_none() && forms.badge.is_none() {
        print(&terminal::render(&report, &style));
    }
    Ok(ExitCode::SUCCESS)
}

fn compare(args: &DiffArgs) -> Result<ExitCode, Failure> {
    if !(args.factor.is_finite() && args.factor > 1.0) {
        return Err(format!("--factor {} is not above 1", args.factor).into());
    }
    let (before, after) = (json::read(&args.before)?, json::read(&args.after)?);
    let diff = diff::compare(&before, &after, args.factor);
    print(&diff.to_string());
    Ok(if diff.is_regression() { ExitCode::from(1) } else { ExitCode::SUCCESS })
}

fn list(suite: &Suite, args: ListArgs) -> Result<ExitCode, Failure> {
    let mut text = String::new();
    for case in suite.select(&args.choice.into())? {
        text.push_str(&case.id);
        if args.long {
            text.push_str(&format!("\t{}", case.check.clause));
            if let Some(missing) = case.lacks {
                text.push_str(&format!("\tunsupported: {missing}"));
            }
        }
        text.push('\n');
    }
    print(&text);
    Ok(ExitCode::SUCCESS)
}

fn gate(suite: &Suite, args: &GateArgs) -> Result<ExitCode, Failure> {
    let thresholds = Thresholds::read(&args.thresholds)?;
    let report = json::read(&args.report)?;
    let mut breaches = thresholds.breaches(&report, &args.profile)?;
    if args.whole {
        breaches.extend(absences(&report, &suite.select(&Selection::default())?));
    }
    let mut text = String::new();
    for breach in &breaches {
        text.push_str(&format!("breach: {breach}\n"));
    }
    let word = if breaches.is_empty() { "passed" } else { "refused" };
    text.push_str(&format!(
        "gate {word}: {} cases, {} assertions, profile {}\n",
        report.totals.cases, report.totals.assertions, args.profile
    ));
    print(&text);
    Ok(if breaches.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

fn style() -> terminal::Style {
    terminal::Style {
        colour: std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none(),
        program: std::env::args().next().map_or_else(|| "conformance".to_string(), |p| terminal::shell_quoted(&p)),
    }
}

/// A bar on standard error, which draws nothing where that is no terminal.
fn progress_bar(length: u64) -> ProgressBar {
    let bar = ProgressBar::new(length);
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} · {elapsed} · {prefix}{wide_msg}") {
        bar.set_style(style);
    }
    bar
}

/// Prints to standard output. A reader that has seen enough (`| head`) is no error.
fn print(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}
