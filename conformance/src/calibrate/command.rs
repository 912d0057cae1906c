//! The command: what it runs, what it prints, what it writes.

use super::{Evidence, Subject, backend, measure, regressions, rewrite};
use crate::case::Check;
use crate::run::Runner;
use crate::suite::{Case, Suite};
use crate::tolerance::{self, ALL, Entry, Rule, Table};
use crate::verdict::CaseResult;
use crate::zoo::{faulty, honest};
use clap::Args;
use comfy_table::presets;
use indicatif::ProgressBar;
use std::path::PathBuf;
use std::process::ExitCode;

/// The arguments of `conformance calibrate`.
#[derive(Debug, Args)]
pub(crate) struct CalibrateArgs {
    /// Write the figures, and the limits that follow from them, into the table.
    #[arg(long, conflicts_with = "check")]
    write: bool,
    /// A part of the name of a backend to measure; may be repeated. Default: all.
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["check", "write"])]
    backend: Vec<String>,
    /// Measure the honest backends and the faults that the table names, and fail where its evidence no longer holds.
    #[arg(long)]
    check: bool,
    /// Measure the tolerances of the clock and of memory as well: run the checks that must run alone.
    #[arg(long)]
    clock: bool,
    /// The table.
    #[arg(long, value_name = "FILE", default_value = "conformance/tolerances.toml")]
    file: PathBuf,
    /// Worker processes. Default: one a processor.
    #[arg(long, value_name = "N")]
    jobs: Option<std::num::NonZeroUsize>,
}

/// Every backend that is known to be right or to be wrong: the registered ones and both zoos.
fn subjects(suite: &Suite) -> Vec<Subject> {
    let registered = suite.registry().factories().iter().cloned().map(Subject::registered);
    let honest = honest::all().iter().map(Subject::honest).collect::<Vec<_>>();
    let faulty = faulty::all().iter().map(Subject::faulty).collect::<Vec<_>>();
    registered.chain(honest).chain(faulty).collect()
}

/// Measures, prints, and writes or judges the table.
pub(crate) fn calibrate(
    suite: &Suite,
    args: &CalibrateArgs,
    bar: &ProgressBar,
) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let text = std::fs::read_to_string(&args.file).map_err(|e| format!("{}: {e}", args.file.display()))?;
    let mut table = tolerance::parse(&text)?;
    // A figure of the clock is one only if the checks that must run alone are among those that measure it.
    table.retain(|_, entry| args.clock || !entry.clock);
    let mut subjects = subjects(suite);
    let takes = |name: &str| args.backend.is_empty() || args.backend.iter().any(|part| name.contains(part.as_str()));
    subjects.retain(|s| takes(s.factory.name()));
    if args.check {
        let named: Vec<&str> = table.values().filter_map(|e| e.faulty_by.as_deref()).map(backend).collect();
        subjects.retain(|s| s.honest || named.contains(&s.factory.name()));
    }
    let jobs = args.jobs.map_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get()), |n| n.get());
    let runner = Runner::new()?;
    let run = |cases: &[Case]| -> Vec<CaseResult> {
        bar.set_length(bar.length().unwrap_or(0) + cases.len() as u64);
        runner.run_all(cases, jobs, &|result: &CaseResult| {
            bar.set_message(result.id.clone());
            bar.inc(1);
            // A pipeline shows no bar, and wants a sign of life.
            if bar.is_hidden() && bar.position().is_multiple_of(1000) {
                println!("{} of {}", bar.position(), bar.length().unwrap_or(0));
            }
        })
    };
    let checks: Vec<Check> = suite.checks().iter().filter(|c| args.clock || !c.exclusive).cloned().collect();
    let (honest, faulty) = measure(&subjects, &checks, suite.models(), &run);
    bar.finish_and_clear();
    let known = ALL.iter().filter(|t| table.contains_key(t.name()));
    let measured: Vec<(&str, Evidence)> = known.map(|t| (t.name(), Evidence::of(t, &honest, &faulty))).collect();
    println!("{}", render(&table, &measured));
    if args.check {
        let found = regressions(&table, &honest, &faulty);
        found.iter().for_each(|what| println!("no longer holds: {what}"));
        return Ok(if found.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(1) });
    }
    let applied: Table = measured
        .iter()
        .filter_map(|(name, evidence)| Some(((*name).to_string(), evidence.applied(table.get(*name)?))))
        .collect();
    let mut sound = true;
    for (name, entry) in &applied {
        for fault in entry.faults() {
            sound = false;
            println!("{name}: {fault}");
        }
    }
    if args.write {
        std::fs::write(&args.file, rewrite(&text, &applied))?;
    }
    Ok(if sound { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

/// The figures of the run beside the limits of the table.
fn render(table: &Table, measured: &[(&str, Evidence)]) -> String {
    let mut out = comfy_table::Table::new();
    out.load_style(presets::UTF8_FULL_CONDENSED);
    out.set_header(["tolerance", "rule", "limit", "follows", "worst honest", "by", "nearest faulty", "by", "ratio"]);
    let number = |value: Option<f64>| value.map_or_else(|| "-".to_string(), |v| format!("{v:.2e}"));
    for (name, evidence) in measured {
        let Some(entry): Option<&Entry> = table.get(*name) else { continue };
        let (honest, faulty) = (&evidence.honest, &evidence.faulty);
        let text = |seen: &Option<super::Seen>| seen.as_ref().map_or_else(|| "-".to_string(), |s| s.by.clone());
        let ratio = honest.as_ref().zip(faulty.as_ref()).map(|(h, f)| f.error / h.error);
        let follows = (entry.rule == Rule::Evidence).then(|| evidence.applied(entry).limit);
        out.add_row([
            (*name).to_string(),
            format!("{:?}", entry.rule).to_lowercase(),
            number(Some(entry.limit)),
            number(follows),
            number(honest.as_ref().map(|s| s.error)),
            text(honest),
            number(faulty.as_ref().map(|s| s.error)),
            text(faulty),
            ratio.map_or_else(|| "-".to_string(), |r| format!("{r:.1}")),
        ]);
    }
    out.to_string()
}
