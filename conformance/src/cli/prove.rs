//! `conformance prove`.

use super::{Failure, print, progress_bar};
use crate::backend::Registry;
use crate::run::Runner;
use crate::zoo::proof::{Depth, Proof};
use crate::zoo::prove::{Choice, run};
use clap::Args;
use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

#[derive(Debug, Args)]
pub(super) struct ProveArgs {
    /// A part of the name of a fault or honest variant; may be repeated. Default: all.
    #[arg(long, value_name = "TEXT")]
    backend: Vec<String>,
    /// A part of the name of a check; may be repeated. Default: all.
    #[arg(long, value_name = "TEXT")]
    check: Vec<String>,
    /// The name of a check to leave out, as if it did not exist; may be repeated.
    #[arg(long, value_name = "CHECK")]
    without: Vec<String>,
    /// Try each fault on the check that is there for it and on no other: a minute, and no word on checks that are spare.
    #[arg(long)]
    killers: bool,
    /// Write the proof as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Take the proof from a file instead of running it.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["backend", "check", "killers"])]
    recorded: Option<PathBuf>,
    /// List the checks and probes of the proof, one a line, and do nothing else.
    #[arg(long)]
    checks: bool,
    /// Worker processes. Default: one a processor.
    #[arg(long, value_name = "N")]
    jobs: Option<std::num::NonZeroUsize>,
}

pub(super) fn prove(registry: &Registry, args: ProveArgs) -> Result<ExitCode, Failure> {
    let begin = Instant::now();
    let proof = match &args.recorded {
        Some(path) => {
            let proof: Proof = serde_json::from_str(&std::fs::read_to_string(path)?)?;
            args.without.iter().fold(proof, |proof, check| proof.without(check))
        }
        None => {
            let jobs =
                args.jobs.map_or_else(|| std::thread::available_parallelism().map_or(1, usize::from), usize::from);
            let (backends, checks, without) = (args.backend, args.check, args.without);
            let depth = if args.killers { Depth::Killers } else { Depth::Matrix };
            let choice = Choice { backends, checks, without, depth };
            let runner = Runner::new()?.ending_at_first_failure();
            let bar = progress_bar(1);
            let proof = run(&runner, registry, &choice, jobs, &|done, total| {
                bar.set_length(total as u64);
                bar.set_position(done as u64);
                // A pipeline shows no bar, and wants a sign of life.
                if bar.is_hidden() && done.is_multiple_of(1000) {
                    print(&format!("{done} of {total} tried, {:.0} s\n", begin.elapsed().as_secs_f64()));
                }
            });
            bar.finish_and_clear();
            proof
        }
    };
    if args.checks {
        print(&proof.checks.iter().map(|check| format!("{check}\n")).collect::<String>());
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_string_pretty(&proof)? + "\n")?;
    }
    print(&summary(&proof));
    print(&format!("{:.1} s\n", begin.elapsed().as_secs_f64()));
    Ok(if proof.is_good() { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

/// The kill matrix by fault, and everything that keeps the proof from holding. A part of a proof says nothing of checks
/// that kill nothing.
fn summary(proof: &Proof) -> String {
    let mut text = String::new();
    for fault in &proof.faults {
        let others = fault.kills.keys().filter(|k| **k != fault.killer).count();
        let by = if fault.kills.contains_key(&fault.killer) { fault.killer.as_str() } else { "NOT its killer" };
        let _ = match fault.kills.len() {
            0 => writeln!(text, "SURVIVES  {} ({})", fault.name, fault.what),
            1 => writeln!(text, "killed    {} by {by} alone", fault.name),
            _ => writeln!(text, "killed    {} by {by} and {others} more: {}", fault.name, list(fault.kills.keys())),
        };
    }
    for honest in &proof.honest {
        let _ = writeln!(
            text,
            "{}    {}: {} passed, {} unsupported, {} blamed",
            if honest.alarms.is_empty() { "honest" } else { "BLAMED" },
            honest.name,
            honest.passed,
            honest.unsupported,
            honest.alarms.len()
        );
        for (case, reason) in &honest.alarms {
            let _ = writeln!(text, "  {case}: {reason}");
        }
    }
    for fault in proof.missed_by_their_killer() {
        let _ = writeln!(text, "MISSED    {} is not caught by {}, which is there for it", fault.name, fault.killer);
    }
    if proof.is_whole() {
        for check in proof.idle_checks() {
            let _ = writeln!(text, "IDLE      {check} catches nothing");
        }
        for check in proof.without_own_kill() {
            let _ = writeln!(text, "SPARE     {check}: no fault is caught by it alone");
        }
    }
    let _ = write!(
        text,
        "{} faults, {} survivors · {} honest backends, {} blamed",
        proof.faults.len(),
        proof.survivors().len(),
        proof.honest.len(),
        proof.false_alarms().len(),
    );
    if proof.is_whole() {
        let spare = proof.without_own_kill().len();
        let _ = write!(text, " · {} checks, {spare} without a kill of their own", proof.checks.len());
    }
    text.push('\n');
    text
}

fn list<'a>(names: impl Iterator<Item = &'a String>) -> String {
    names.map(String::as_str).collect::<Vec<_>>().join(" ")
}
