//! `SPEC.md` and the checks say the same, both ways.

use super::{all, probes};
use crate::backend::Capability;
use crate::case::Category;
use crate::invariance::Axis;
use std::collections::{BTreeMap, BTreeSet};

const SPEC: &str = include_str!("../../SPEC.md");

/// The table rows of the specification: number, then its cells.
fn requirements() -> Vec<(&'static str, Vec<&'static str>)> {
    SPEC.lines()
        .filter_map(|line| {
            let cells: Vec<&str> = line.strip_prefix('|')?.strip_suffix('|')?.split('|').map(str::trim).collect();
            let (category, number) = cells[0].split_once('-')?;
            let named = category.len() == 3 || category == "KV";
            let numbered = named && category.chars().all(|c| c.is_ascii_uppercase()) && number.parse::<u32>().is_ok();
            numbered.then(|| (cells[0], cells[1..].to_vec()))
        })
        .collect()
}

#[test]
fn every_requirement_lists_the_checks_that_test_it() {
    let mut tested: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for check in all() {
        tested.entry(check.id).or_default().insert(check.name.to_string());
    }
    for probe in probes::ALL {
        tested.entry(probe.id).or_default().insert(probe.name.to_string());
    }
    let mut listed: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for (number, cells) in requirements() {
        assert_eq!(cells.len(), 3, "{number}: clause, source and checks");
        assert!(cells.iter().all(|c| !c.is_empty()), "{number}: an empty cell");
        let checks = cells[2].split(',').map(|c| c.trim().trim_matches('`').to_string()).collect();
        assert!(listed.insert(number, checks).is_none(), "{number} stands twice");
    }
    // Each check stands under its own number, and may stand under others that it tests as well.
    let probes = probes::ALL.iter().map(|probe| probe.name.to_string());
    let names: BTreeSet<String> = all().iter().map(|check| check.name.to_string()).chain(probes).collect();
    for (number, checks) in &listed {
        assert!(checks.is_subset(&names), "{number}: a check that is not: {:?}", checks.difference(&names));
    }
    for (number, checks) in &tested {
        assert!(listed.get(number).is_some_and(|l| checks.is_subset(l)), "{number} does not list {checks:?}");
    }
}

#[test]
fn names_are_unique_and_begin_with_their_category() {
    let mut seen = BTreeSet::new();
    for check in all() {
        let rest = check.name.strip_prefix(check.category.name()).and_then(|r| r.strip_prefix('/'));
        assert!(rest.is_some_and(|r| !r.is_empty()), "{}", check.name);
        assert!(seen.insert(check.name), "{} stands twice", check.name);
        assert!(!check.clause.is_empty() && !check.clause.ends_with('.'), "{}: {:?}", check.name, check.clause);
    }
}

#[test]
fn every_category_has_checks() {
    let present: BTreeSet<Category> = all().iter().map(|c| c.category).collect();
    assert_eq!(present, Category::ALL.into_iter().collect());
}

#[test]
fn every_capability_has_its_probe() {
    for capability in Capability::ALL {
        let found = probes::ALL.iter().filter(|probe| probe.capability == capability).count();
        assert_eq!(found, 1, "{capability}");
    }
}

#[test]
fn the_specification_names_the_requirements_that_test_each_axis() {
    for axis in Axis::ALL {
        let mut tested: Vec<&str> = all().iter().filter(|c| c.axis == Some(axis)).map(|c| c.id).collect();
        tested.dedup();
        let row = SPEC.lines().find(|line| line.starts_with(&format!("| {axis} |"))).expect("a row of the table");
        let listed = row.trim_end_matches('|').rsplit('|').next().unwrap_or_default().trim();
        assert_eq!(listed, tested.join(", "), "{axis}");
    }
}
