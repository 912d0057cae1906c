//! What changed between two reports.
//!
//! Timings are not compared: no two runs repeat them, and the gate has limits for them.

use super::{Report, Totals};
use crate::verdict::{CaseResult, Verdict};
use std::collections::BTreeMap;
use std::fmt::{self, Write};

/// By how much a number must move to be worth a line, unless the caller says otherwise.
pub const FACTOR: f64 = 2.0;
/// Errors below this are rounding: they are taken as equal to it.
const FLOOR: f64 = 1e-9;

/// Whether a change is for the worse.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A pass was lost, something bad is new, an error grew, or less is asserted than before.
    Regression,
    /// The opposite.
    Improvement,
    /// Neither.
    Other,
}

/// One thing that is not as it was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Whether it is for the worse.
    pub kind: Kind,
    /// The case.
    pub id: String,
    /// What changed.
    pub what: String,
}

/// Two reports side by side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diff {
    /// What changed, regressions first, each kind by case id.
    pub changes: Vec<Change>,
    /// The totals before and after.
    pub totals: (Totals, Totals),
    /// Whether both runs found the same, to the last bit of what is hashed.
    pub same_content: bool,
}

/// Compares two reports. Numbers are told where they moved by more than `factor`, which is above 1.
pub fn compare(before: &Report, after: &Report, factor: f64) -> Diff {
    let by_id = |report: &'_ Report| -> BTreeMap<String, CaseResult> {
        report.cases.iter().map(|case| (case.id.clone(), case.clone())).collect()
    };
    let (old, new) = (by_id(before), by_id(after));
    let mut changes = Vec::new();
    for (id, was) in &old {
        match new.get(id) {
            Some(is) => compare_case(was, is, factor, &mut changes),
            None => {
                let verdict = was.outcome.verdict;
                let kind = if verdict == Verdict::Pass { Kind::Regression } else { Kind::Other };
                changes.push(Change { kind, id: id.clone(), what: format!("vanished, was {}", verdict.words()) });
            }
        }
    }
    for (id, is) in new.iter().filter(|(id, _)| !old.contains_key(*id)) {
        let verdict = is.outcome.verdict;
        let kind = if verdict.is_good() { Kind::Other } else { Kind::Regression };
        changes.push(Change { kind, id: id.clone(), what: format!("appeared, is {}", verdict.words()) });
    }
    changes.sort_by(|a, b| (a.kind, &a.id).cmp(&(b.kind, &b.id)));
    Diff {
        changes,
        totals: (Totals::of(&before.cases), Totals::of(&after.cases)),
        same_content: before.content_sha256 == after.content_sha256,
    }
}

/// Passing is best, then what is declared or expected, then everything else.
fn rank(verdict: Verdict) -> u8 {
    match verdict {
        Verdict::Pass => 0,
        verdict if verdict.is_good() => 1,
        _ => 2,
    }
}

fn compare_case(was: &CaseResult, is: &CaseResult, factor: f64, changes: &mut Vec<Change>) {
    let mut push = |kind: Kind, what: String| changes.push(Change { kind, id: is.id.clone(), what });
    let (old, new) = (&was.outcome, &is.outcome);
    if old.verdict != new.verdict {
        let kind = match rank(new.verdict).cmp(&rank(old.verdict)) {
            std::cmp::Ordering::Greater => Kind::Regression,
            std::cmp::Ordering::Less => Kind::Improvement,
            std::cmp::Ordering::Equal => Kind::Other,
        };
        push(kind, format!("{} → {}", old.verdict.words(), new.verdict.words()));
    }
    // Cases that measure time repeat until they are sure, so what they count says nothing.
    if !is.exclusive && old.verdict == new.verdict {
        for (what, old, new) in
            [("assertions", old.assertions, new.assertions), ("values compared", old.values, new.values)]
        {
            if let Some(grown) = moved(old as f64, new as f64, factor) {
                let kind = if grown { Kind::Other } else { Kind::Regression };
                push(kind, format!("{what}: {old} → {new}"));
            }
        }
    }
    for (key, old, new) in shared(&old.errors, &new.errors) {
        if let Some(grown) = moved(old.abs(), new.abs(), factor) {
            let kind = if grown { Kind::Regression } else { Kind::Improvement };
            push(kind, format!("error {key}: {old:.3e} → {new:.3e}"));
        }
    }
    for (key, old, new) in shared(&old.measurements, &new.measurements) {
        // A correlation is told by its distance from 1.
        if key.contains("correlation") {
            if let Some(grown) = moved((1.0 - old).abs(), (1.0 - new).abs(), factor) {
                let kind = if grown { Kind::Regression } else { Kind::Improvement };
                push(kind, format!("{key}: {old:.6} → {new:.6}"));
            }
        } else if moved(old.abs(), new.abs(), factor).is_some() {
            push(Kind::Other, format!("{key}: {old:.4} → {new:.4}"));
        }
    }
}

/// The numbers that both maps have.
fn shared<'a>(
    old: &'a BTreeMap<String, f64>,
    new: &'a BTreeMap<String, f64>,
) -> impl Iterator<Item = (&'a str, f64, f64)> {
    old.iter().filter_map(|(key, old)| new.get(key).map(|new| (key.as_str(), *old, *new)))
}

/// Whether a magnitude moved by more than a factor, and if so whether it grew.
fn moved(old: f64, new: f64, factor: f64) -> Option<bool> {
    let (old, new) = (old.max(FLOOR), new.max(FLOOR));
    if new > old * factor {
        Some(true)
    } else if old > new * factor {
        Some(false)
    } else {
        None
    }
}

impl Diff {
    /// The changes of one kind.
    pub fn of(&self, kind: Kind) -> impl Iterator<Item = &Change> {
        self.changes.iter().filter(move |change| change.kind == kind)
    }

    /// Whether anything is worse than before.
    pub fn is_regression(&self) -> bool {
        self.of(Kind::Regression).next().is_some()
    }
}

impl fmt::Display for Diff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (kind, title) in
            [(Kind::Regression, "worse"), (Kind::Improvement, "better"), (Kind::Other, "otherwise changed")]
        {
            let lines: Vec<&Change> = self.of(kind).collect();
            if !lines.is_empty() {
                writeln!(f, "{title} ({}):", lines.len())?;
            }
            for change in lines {
                writeln!(f, "  {}  {}", change.id, change.what)?;
            }
        }
        let (old, new) = &self.totals;
        let mut line = format!("cases {} → {}", old.cases, new.cases);
        for verdict in Verdict::ALL.iter().filter(|v| old.count(**v) + new.count(**v) > 0) {
            write!(line, " · {} {} → {}", verdict.words(), old.count(*verdict), new.count(*verdict))?;
        }
        writeln!(f, "{line}")?;
        writeln!(f, "assertions {} → {} · values {} → {}", old.assertions, new.assertions, old.values, new.values)?;
        writeln!(f, "content: {}", if self.same_content { "the same" } else { "not the same" })
    }
}
