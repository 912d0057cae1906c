//! `golden`: makes, checks and compares golden logits.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use comfy_table::{Table, presets::UTF8_FULL_CONDENSED};
use golden::{GoldenError, cases, diff, manifest, prompts, regenerate, verify_case};
use indicatif::{ProgressBar, ProgressStyle};

/// Golden logits for BitNet b1.58: two derivations, made, checked and compared.
#[derive(Parser)]
#[command(version, after_help = "Exit codes: 0 good, 1 a check failed, 2 wrong usage or unusable files.")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Recompute the oracle's files and the manifest; a rerun gives the same bytes.
    Regenerate {
        /// Data folder to write [default: the data of this source tree].
        #[arg(long)]
        out: Option<PathBuf>,
        /// Only this case (may be repeated).
        #[arg(long)]
        case: Vec<String>,
    },
    /// Recompute the oracle, compare it with the committed data, and compare the two derivations.
    Verify {
        /// Only this case (may be repeated).
        #[arg(long)]
        case: Vec<String>,
    },
    /// Compare two files of logits position by position, worst first.
    Diff {
        /// Golden file, or a file with a tensor `logits` f32 [batch, seq, vocab].
        a: PathBuf,
        /// What A is held to.
        b: PathBuf,
        /// Tensor of A, when it holds several.
        #[arg(long)]
        tensor_a: Option<String>,
        /// Tensor of B, when it holds several.
        #[arg(long)]
        tensor_b: Option<String>,
        /// Positions to show.
        #[arg(long, default_value_t = 20)]
        top: usize,
        /// Exit with 1 if any logit differs by more.
        #[arg(long)]
        max_abs: Option<f64>,
    },
    /// List the cases.
    List,
    /// Write the model of every case as a checkpoint folder, which is what transformers/make_golden.py reads.
    Export {
        /// Folder to write; one folder per case is made in it.
        #[arg(long)]
        out: PathBuf,
        /// Only this case (may be repeated).
        #[arg(long)]
        case: Vec<String>,
    },
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Regenerate { out, case } => regenerate_command(out, &case),
        Command::Verify { case } => verify_command(case),
        Command::Diff { a, b, tensor_a, tensor_b, top, max_abs } => {
            diff_command(&a, &b, tensor_a.as_deref(), tensor_b.as_deref(), top, max_abs)
        }
        Command::List => list_command(),
        Command::Export { out, case } => export_command(&out, case),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}

/// Names to work on: the ones asked for, which must exist, or all.
fn chosen(asked: Vec<String>) -> Result<Vec<String>, GoldenError> {
    let prompts = prompts()?;
    for name in &asked {
        prompts.case(name)?;
    }
    Ok(if asked.is_empty() { cases().iter().map(|c| (*c).to_owned()).collect() } else { asked })
}

fn bar(template: &str) -> ProgressBar {
    let bar = ProgressBar::no_length();
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar
}

fn regenerate_command(out: Option<PathBuf>, only: &[String]) -> Result<bool, GoldenError> {
    let source_tree = Path::new(env!("CARGO_MANIFEST_DIR")).join("data");
    let out = match out {
        Some(out) => out,
        None if source_tree.is_dir() => source_tree,
        None => {
            return Err(GoldenError::Incomparable(
                "the source tree is not here any more: say where to write with --out".into(),
            ));
        }
    };
    let bar = bar("{msg:30} [{bar:40}] {pos}/{len} positions {eta}");
    let manifest = regenerate(&out, only, &mut |p| {
        bar.set_length(p.total);
        bar.set_message(p.case.to_owned());
        bar.set_position(p.done);
    })?;
    bar.finish_and_clear();
    println!("{} cases in {}", manifest.cases.len(), out.display());
    Ok(true)
}

fn verify_command(only: Vec<String>) -> Result<bool, GoldenError> {
    let bar = bar("{spinner} {msg:30} {pos} positions {elapsed}");
    let mut table = table(&[
        "case",
        "rows",
        "fp32 max",
        "w1.58a8 flip-free",
        "within 1e-5",
        "their max",
        "all max",
        "worst Pearson",
        "verdict",
    ]);
    let mut breaches = Vec::new();
    let (mut rows, mut flip_free) = (0, 0);
    for case in chosen(only)? {
        bar.set_message(case.clone());
        let verdict = verify_case(&case, &mut || bar.inc(1))?;
        let gap = verdict.gap;
        rows += gap.rows;
        flip_free += gap.w158a8_flip_free_rows;
        table.add_row([
            case.clone(),
            gap.rows.to_string(),
            format!("{:.1e}", gap.fp32_max_abs),
            format!("{:.1} %", 100.0 * gap.flip_free_share()),
            format!("{} of {}", gap.w158a8_flip_free_within_1e5, gap.w158a8_flip_free_rows),
            format!("{:.1e}", gap.w158a8_flip_free_max_abs),
            format!("{:.1e}", gap.w158a8_max_abs),
            format!("{:.6}", gap.w158a8_worst_pearson),
            if verdict.breaches.is_empty() { "good".to_owned() } else { "BREACH".to_owned() },
        ]);
        breaches.extend(verdict.breaches.into_iter().map(|b| format!("{case}: {b}")));
    }
    bar.finish_and_clear();
    println!("{table}");
    println!(
        "w1.58a8: {flip_free} of {rows} positions ({:.1} %) without a rounding flip",
        100.0 * f64::from(flip_free as u32) / f64::from(rows.max(1) as u32)
    );
    for breach in &breaches {
        eprintln!("breach: {breach}");
    }
    Ok(breaches.is_empty())
}

fn diff_command(
    a: &Path,
    b: &Path,
    tensor_a: Option<&str>,
    tensor_b: Option<&str>,
    top: usize,
    limit: Option<f64>,
) -> Result<bool, GoldenError> {
    let positions = diff(a, b, tensor_a, tensor_b)?;
    let mut table = table(&["tensor", "seq", "pos", "max abs", "Pearson", "KL (nats)", "NMSE", "slope", "top-1"]);
    for p in positions.iter().take(top) {
        table.add_row([
            p.tensor.clone(),
            p.sequence.to_string(),
            p.position.to_string(),
            format!("{:.3e}", p.max_abs),
            format!("{:.7}", p.pearson),
            format!("{:.3e}", p.kl),
            format!("{:.3e}", p.nmse),
            format!("{:.6}", p.slope),
            if p.top1_agrees { "same" } else { "differs" }.to_owned(),
        ]);
    }
    println!("{table}");
    let agree = positions.iter().filter(|p| p.top1_agrees).count();
    let worst = positions.first().map_or(0.0, |p| p.max_abs);
    println!("{} positions, largest difference {worst:.3e}, same top-1 at {agree}", positions.len());
    Ok(limit.is_none_or(|limit| worst <= limit))
}

fn list_command() -> Result<bool, GoldenError> {
    let manifest = manifest::committed()?;
    let mut table = table(&["case", "model", "sha256", "prompts", "positions"]);
    for case in &manifest.cases {
        let source = match case.model.seed {
            Some(seed) => format!("{}, seed {seed}", case.model.source),
            None => case.model.source.clone(),
        };
        let names: Vec<&str> = case.prompts.keys().map(String::as_str).collect();
        table.add_row([
            case.case.clone(),
            source,
            case.model.sha256.chars().take(12).collect(),
            names.join(" "),
            case.gap.rows.to_string(),
        ]);
    }
    println!("{table}");
    Ok(true)
}

fn export_command(out: &Path, only: Vec<String>) -> Result<bool, GoldenError> {
    for case in chosen(only)? {
        golden::model(&case)?.write_to(&out.join(&case))?;
        println!("{}", out.join(&case).display());
    }
    Ok(true)
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED).set_header(header.to_vec());
    table
}
