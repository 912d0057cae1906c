//! The zoo, the checks and `SPEC.md` say the same, in all directions.

use super::{faulty, honest};
use std::collections::{BTreeMap, BTreeSet};

const SPEC: &str = include_str!("../../SPEC.md");

/// The faults by the check that is there to catch them.
fn by_killer() -> BTreeMap<String, BTreeSet<String>> {
    let mut all: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for fault in faulty::all() {
        all.entry(fault.killer.to_string()).or_default().insert(fault.name.to_string());
    }
    all
}

#[test]
fn names_are_unique_and_plain() {
    let mut seen = BTreeSet::new();
    let names = faulty::all().into_iter().map(|f| (f.name, f.what, f.source));
    let names = names.chain(honest::all().into_iter().map(|v| (v.name, v.what, "honest")));
    for (name, what, source) in names {
        let plain = name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-');
        assert!(plain && !name.is_empty(), "{name}");
        assert!(seen.insert(name), "{name} stands twice");
        assert!(!what.is_empty() && !what.contains('\n') && !source.is_empty(), "{name}: {what:?}, {source:?}");
    }
}

#[test]
fn every_check_has_a_fault_and_every_fault_a_check() {
    let probes = crate::checks::probes::ALL.iter().map(|p| p.name.to_string());
    let checks: BTreeSet<String> = crate::checks::all().iter().map(|c| c.name.to_string()).chain(probes).collect();
    let killers: BTreeSet<String> = by_killer().into_keys().collect();
    assert_eq!(killers, checks);
}

#[test]
fn the_specification_lists_the_faults_of_every_check() {
    let listed: BTreeMap<String, BTreeSet<String>> = SPEC
        .lines()
        .filter_map(|line| {
            let (check, faults) = line.strip_prefix("| `")?.strip_suffix(" |")?.split_once("` | ")?;
            let faults = faults.split(", ").map(|f| f.trim_matches('`').to_string()).collect();
            Some((check.to_string(), faults))
        })
        .collect();
    for (check, faults) in by_killer() {
        let faults: Vec<String> = faults.into_iter().map(|f| format!("`{f}`")).collect();
        let row = format!("| `{check}` | {} |", faults.join(", "));
        assert!(SPEC.lines().any(|line| line == row), "SPEC.md lacks the row\n{row}");
    }
    assert_eq!(listed, by_killer(), "SPEC.md lists a check or a fault that does not exist");
}

#[test]
fn every_class_and_both_zoos_are_inhabited() {
    let classes: BTreeSet<&str> = faulty::all().iter().map(|f| f.class).collect();
    assert!(classes.len() >= 10, "{classes:?}");
    assert!(faulty::all().len() >= 60 && honest::all().len() >= 8);
}
