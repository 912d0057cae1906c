//! The kill matrix: which check catches which fault.

use crate::verdict::Verdict;
use crate::zoo::proof::{Depth, FaultRow, HonestRow, Proof};
use serde::Serialize;

/// A proof as the page shows it.
#[derive(Serialize)]
pub(super) struct Matrix<'a> {
    good: bool,
    /// The proof claims something of every check.
    whole: bool,
    /// What was tried, where that is not everything.
    part: String,
    faults: usize,
    checks: usize,
    honest_backends: usize,
    groups: Vec<(&'a str, usize)>,
    columns: Vec<Column<'a>>,
    classes: Vec<Class<'a>>,
    survivors: Vec<&'a str>,
    missed: Vec<(&'a str, &'a str)>,
    idle: Vec<&'a str>,
    without_own: Vec<&'a str>,
    honest: &'a [HonestRow],
    alarms: usize,
}

/// A check.
#[derive(Serialize)]
struct Column<'a> {
    name: &'a str,
    what: &'a str,
    first: bool,
    kills: usize,
    own: Vec<&'a str>,
}

/// Faults of one class.
#[derive(Serialize)]
struct Class<'a> {
    name: &'a str,
    rows: Vec<Row<'a>>,
}

/// A fault.
#[derive(Serialize)]
struct Row<'a> {
    name: &'a str,
    what: &'a str,
    source: &'a str,
    killer: &'a str,
    kills: usize,
    cells: Vec<Cell>,
}

/// A fault under a check.
#[derive(Serialize)]
struct Cell {
    /// `kill`, `only` for the one kill of a fault, either with `named` for the check that is there for it; `missed` where
    /// that check did not see it; `untried` where the fault was not tried on the check; empty for nothing.
    class: String,
    words: &'static str,
}

pub(super) fn matrix(proof: &Proof) -> Matrix<'_> {
    let category = |check: &'_ str| check.split_once('/').map_or(check.len(), |(category, _)| category.len());
    let mut groups: Vec<(&str, usize)> = Vec::new();
    let mut columns = Vec::new();
    for check in &proof.checks {
        let of = &check[..category(check)];
        let first = groups.last().is_none_or(|(name, _)| *name != of);
        match groups.last_mut() {
            Some((_, count)) if !first => *count += 1,
            _ => groups.push((of, 1)),
        }
        columns.push(Column {
            name: check,
            what: check.split_once('/').map_or(check.as_str(), |(_, what)| what),
            first,
            kills: proof.faults.iter().filter(|f| f.kills.contains_key(check)).count(),
            own: proof.own_kills(check).iter().map(|f| f.name.as_str()).collect(),
        });
    }
    let mut classes: Vec<Class<'_>> = Vec::new();
    for fault in &proof.faults {
        let row = row(fault, &proof.checks, proof.is_whole());
        match classes.iter_mut().find(|class| class.name == fault.class) {
            Some(class) => class.rows.push(row),
            None => classes.push(Class { name: &fault.class, rows: vec![row] }),
        }
    }
    Matrix {
        good: proof.is_good(),
        whole: proof.is_whole(),
        part: part(proof),
        faults: proof.faults.len(),
        checks: proof.checks.len(),
        honest_backends: proof.honest.len(),
        groups,
        columns,
        classes,
        survivors: proof.survivors().iter().map(|f| f.name.as_str()).collect(),
        missed: proof.missed_by_their_killer().iter().map(|f| (f.name.as_str(), f.killer.as_str())).collect(),
        idle: proof.idle_checks(),
        without_own: proof.without_own_kill(),
        honest: &proof.honest,
        alarms: proof.false_alarms().iter().map(|row| row.alarms.len()).sum(),
    }
}

/// What a part of a proof is a part of, in words.
fn part(proof: &Proof) -> String {
    let killers = (proof.depth == Depth::Killers).then_some("each fault on the check that is there for it alone");
    killers.into_iter().chain((!proof.part.is_empty()).then_some(proof.part.as_str())).collect::<Vec<_>>().join("; ")
}

fn row<'a>(fault: &'a FaultRow, checks: &[String], whole: bool) -> Row<'a> {
    let cell = |check: &String| {
        let named = *check == fault.killer;
        let class = match (fault.kills.contains_key(check), named) {
            (true, _) => {
                let kind = if fault.kills.len() == 1 { "only" } else { "kill" };
                if named { format!("{kind} named") } else { kind.to_string() }
            }
            // A proof of everything has no excuse.
            (false, true) if whole || fault.passed.contains(check) => "missed".to_string(),
            (false, false) if fault.passed.contains(check) => String::new(),
            (false, _) => "untried".to_string(),
        };
        let words = match class.as_str() {
            "untried" => "not tried",
            _ => fault.kills.get(check).map_or("not seen", |verdict| Verdict::words(*verdict)),
        };
        Cell { class, words }
    };
    Row {
        name: &fault.name,
        what: &fault.what,
        source: &fault.source,
        killer: &fault.killer,
        kills: fault.kills.len(),
        cells: checks.iter().map(cell).collect(),
    }
}
