//! The claims of invariance and what became of them: axis × backend, with the level of each backend below.

use super::Report;
use crate::invariance::{Axis, Claim, Standing, Summary};

/// The rows of the table: an axis and a cell for each backend, then the level. Empty where no case tests a claim.
pub fn rows(report: &Report) -> Vec<Vec<String>> {
    let backends: Vec<Option<&Summary>> = report.backend_names().iter().map(|b| report.invariance.get(*b)).collect();
    let tested =
        |summary: &&Summary| summary.claims.iter().any(|c| matches!(c.standing, Standing::Held | Standing::Broken));
    if !backends.iter().flatten().any(tested) {
        return Vec::new();
    }
    let of = |axis: Axis, summary: &Option<&Summary>| {
        summary.and_then(|s| s.claims.iter().find(|c| c.axis == axis)).map_or_else(String::new, cell)
    };
    let row = |axis: Axis| std::iter::once(axis.to_string()).chain(backends.iter().map(|s| of(axis, s))).collect();
    let levels = backends.iter().map(|summary| summary.map_or_else(String::new, level));
    let last = std::iter::once("level".to_string()).chain(levels).collect();
    Axis::ALL.map(row).into_iter().chain([last]).collect()
}

fn cell(claim: &Claim) -> String {
    let Some(level) = claim.claimed else { return "-".to_string() };
    match claim.standing {
        Standing::Held => format!("✓ {level}"),
        Standing::Broken => format!("✗ {level}: BROKEN"),
        _ => format!("? {level}: untested ({} of {} checks)", claim.passed, claim.checks),
    }
}

/// A backend's level in words, such as `bitwise on 6 axes`.
pub fn level(summary: &Summary) -> String {
    let broken = || summary.claims.iter().filter(|c| c.standing == Standing::Broken);
    match summary.level {
        Some(level) => format!("{level} on {} axes", summary.covers.len()),
        None if broken().next().is_some() => format!("none: {} claims broken", broken().count()),
        None => "untested".to_string(),
    }
}
