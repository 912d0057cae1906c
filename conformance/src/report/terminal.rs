//! The report on a terminal: the grid, every failure with the command that repeats it, the sums, the service levels.

use super::{Report, Totals, levels};
use crate::case::Category;
use crate::verdict::{CaseResult, Verdict};
use comfy_table::{Attribute, Cell, CellAlignment, Color, Table, presets};
use std::fmt::Write;

/// How a run looks on a terminal.
#[derive(Debug, Clone)]
pub struct Style {
    /// Use colours.
    pub colour: bool,
    /// The command that repeats a case is this, followed by `run` and its choice.
    pub program: String,
}

/// The whole report as text.
pub fn render(report: &Report, style: &Style) -> String {
    let mut text = String::new();
    let environment = &report.environment;
    // Writing to a String cannot fail.
    let _ = writeln!(
        text,
        "{} · {} threads · {} · {}{}",
        environment.cpu,
        environment.threads,
        environment.instruction_sets.join(" "),
        environment.os,
        if environment.optimised { "" } else { " · not optimised" },
    );
    let _ = writeln!(text, "{}\n", grid(report, style));
    let bad: Vec<&CaseResult> = report.cases.iter().filter(|c| !c.outcome.verdict.is_good()).collect();
    for case in &bad {
        text.push_str(&failure(case, style));
        text.push('\n');
    }
    for finding in &report.findings {
        let _ = writeln!(text, "FINDING  {finding}");
    }
    text.push_str(&waived(report));
    text.push_str(&unsupported(report));
    text.push_str(&totals(&report.totals, report.duration_s));
    text.push_str(&invariance(report, style));
    text.push_str(&service_levels(report, style));
    text
}

/// Backend × category: how many cases passed, and what became of the others.
fn grid(report: &Report, style: &Style) -> Table {
    let backends = report.backend_names();
    let mut table = new_table(style);
    let header = |name: &str| bold(Cell::new(name), style);
    table.set_header(std::iter::once(header("category")).chain(backends.iter().map(|b| header(b))));
    let present = Category::ALL.iter().filter(|c| report.cases.iter().any(|case| case.category == **c));
    for category in present {
        let mut row = vec![Cell::new(category)];
        for backend in &backends {
            let of = Totals::of(report.cases.iter().filter(|c| c.backend == *backend && c.category == *category));
            row.push(summary_cell(&of, style));
        }
        table.add_row(row);
    }
    let mut row = vec![bold(Cell::new("all"), style)];
    for backend in &backends {
        let of = Totals::of(report.cases.iter().filter(|c| c.backend == *backend));
        row.push(bold(summary_cell(&of, style), style));
    }
    table.add_row(row);
    table
}

fn new_table(style: &Style) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    if style.colour {
        table.enforce_styling();
    } else {
        table.force_no_tty();
    }
    table
}

fn bold(cell: Cell, style: &Style) -> Cell {
    if style.colour { cell.add_attribute(Attribute::Bold) } else { cell }
}

fn summary_cell(totals: &Totals, style: &Style) -> Cell {
    let words: Vec<String> = Verdict::ALL
        .iter()
        .filter(|v| totals.count(**v) > 0)
        .map(|v| match v {
            v if v.is_good() => format!("{} {}", totals.count(*v), v.words()),
            v => format!("{} {}", totals.count(*v), v.words().to_uppercase()),
        })
        .collect();
    let cell =
        Cell::new(if words.is_empty() { "-".to_string() } else { words.join(", ") }).set_alignment(CellAlignment::Left);
    if !style.colour || totals.cases == 0 {
        return cell;
    }
    let bad = Verdict::ALL.iter().any(|v| !v.is_good() && totals.count(*v) > 0);
    match (bad, totals.count(Verdict::Pass)) {
        (true, _) => cell.fg(Color::Red),
        (false, 0) => cell.fg(Color::Yellow),
        (false, _) => cell.fg(Color::Green),
    }
}

/// One case that is not green: what was expected, what was seen, and how to see it again.
pub fn failure(case: &CaseResult, style: &Style) -> String {
    let mut text = details(case);
    let _ = writeln!(text, "  repeat    {}", reproduce(case, &style.program));
    text
}

/// The same without the command, for test harnesses that have their own.
pub fn details(case: &CaseResult) -> String {
    let outcome = &case.outcome;
    let mut text = String::new();
    let _ = writeln!(text, "{}  {}", outcome.verdict.words().to_uppercase(), case.id);
    let _ = writeln!(text, "  clause    {}: {}", case.requirement, case.clause);
    if let Some(reason) = &outcome.reason {
        let _ = writeln!(text, "  reason    {}", indented(reason));
    }
    for failure in &outcome.failures {
        let _ = writeln!(text, "  expected  {}", indented(&failure.expected));
        let _ = writeln!(text, "  seen      {}", indented(&failure.seen));
        let _ = writeln!(text, "  at        {}", failure.at);
    }
    let hidden = outcome.failed_assertions.saturating_sub(outcome.failures.len() as u64);
    if hidden > 0 {
        let _ = writeln!(text, "  and       {hidden} more assertions that did not hold");
    }
    for note in &outcome.notes {
        let _ = writeln!(text, "  note      {}", indented(note));
    }
    if let Some(tail) = &outcome.output_tail {
        let _ = writeln!(text, "  output    {}", indented(tail));
    }
    text
}

fn indented(text: &str) -> String {
    text.trim_end().replace('\n', "\n            ")
}

/// The command that runs this one case again.
pub fn reproduce(case: &CaseResult, program: &str) -> String {
    format!(
        "{program} run --backend {} --model {} --filter {}",
        case.backend,
        shell_quoted(&case.model_argument),
        shell_quoted(&case.id)
    )
}

/// Quotes a word for a POSIX shell where it needs it.
pub fn shell_quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./@:=+,".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_string();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// The cases that an expectation lets fail, one line each.
fn waived(report: &Report) -> String {
    let mut text = String::new();
    for case in report.cases.iter().filter(|c| c.outcome.verdict == Verdict::Waived) {
        let _ = writeln!(text, "waived: {}: {}", case.id, case.outcome.reason.as_deref().unwrap_or("no reason given"));
    }
    text
}

/// Which declared absences were probed in place of a check, one line a reason.
fn unsupported(report: &Report) -> String {
    let mut reasons: Vec<(&str, &str, u64)> = Vec::new();
    for case in report.cases.iter().filter(|c| c.outcome.verdict == Verdict::Unsupported) {
        let why = case.outcome.reason.as_deref().unwrap_or("not declared");
        match reasons.iter_mut().find(|(backend, reason, _)| *backend == case.backend && *reason == why) {
            Some((_, _, count)) => *count += 1,
            None => reasons.push((&case.backend, why, 1)),
        }
    }
    let mut text = String::new();
    for (backend, why, count) in reasons {
        let _ = writeln!(text, "unsupported: {backend}: {why} ({count} cases)");
    }
    text
}

fn totals(totals: &Totals, duration_s: f64) -> String {
    let verdicts: Vec<String> = Verdict::ALL
        .iter()
        .filter(|v| totals.count(**v) > 0)
        .map(|v| format!("{} {}", totals.count(*v), v.words()))
        .collect();
    format!(
        "{} cases: {} · {} assertions · {} values compared · {duration_s:.1} s\n",
        totals.cases,
        verdicts.join(", "),
        grouped(totals.assertions),
        grouped(totals.values),
    )
}

/// A number with thin groups of three digits: 1234567 as `1,234,567`.
pub(super) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// What each backend claims leaves its results as they are, and whether that held.
fn invariance(report: &Report, style: &Style) -> String {
    let rows = super::invariance::rows(report);
    if rows.is_empty() {
        return String::new();
    }
    let mut table = new_table(style);
    table.set_header(std::iter::once("invariance").chain(report.backend_names()));
    for row in rows {
        table.add_row(row);
    }
    format!("\n{table}\n")
}

/// The service levels that were measured, beside the gate and the target.
fn service_levels(report: &Report, style: &Style) -> String {
    let readings = levels::readings(report);
    let mut table = new_table(style);
    table.set_header(["backend", "service level", "measured", "gate", "target (2B model)"]);
    for reading in &readings {
        let show = reading.level.show;
        let verdict = |limit: f64| {
            let mark = if reading.meets(limit) { "✓" } else { "✗" };
            format!("{mark} {} {}", show(limit), reading.distance(limit)).trim_end().to_string()
        };
        let (gate, target) = (verdict(reading.level.gate), verdict(reading.level.target));
        table.add_row([reading.backend, reading.level.name, &show(reading.seen), &gate, &target]);
    }
    if readings.is_empty() { String::new() } else { format!("\n{table}\n") }
}
