//! What a proof run found: which check kills which fault, and which honest backend was blamed.

use crate::verdict::Verdict;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// How much of the kill matrix a proof fills.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Depth {
    /// Every cell but the long ones of faults that two checks have caught.
    #[default]
    Matrix,
    /// The cell of each fault with the check that is there for it: no word on checks that are spare.
    Killers,
}

/// The kill matrix and the false alarms of one run over both zoos.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Proof {
    /// How much of the matrix was filled.
    #[serde(default)]
    pub depth: Depth,
    /// What was taken of the zoos and the checks, in words; empty for everything.
    #[serde(default)]
    pub part: String,
    /// The checks that ran, by name, in the suite's order.
    pub checks: Vec<String>,
    /// The faulty backends.
    pub faults: Vec<FaultRow>,
    /// The honest backends.
    pub honest: Vec<HonestRow>,
}

/// One faulty backend and what caught it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FaultRow {
    /// The fault's name.
    pub name: String,
    /// Its class, such as `cache` or `sampling`.
    pub class: String,
    /// What is wrong, in one line.
    pub what: String,
    /// Where real engines had it.
    pub source: String,
    /// The check that must catch it.
    pub killer: String,
    /// The checks that caught it and by what verdict.
    pub kills: BTreeMap<String, Verdict>,
    /// The checks that it was tried on and that did not catch it. On the others it was not tried.
    pub passed: BTreeSet<String>,
}

/// One honest backend and the cases that blamed it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HonestRow {
    /// The backend's name.
    pub name: String,
    /// In what it differs from the others.
    pub what: String,
    /// Cases that passed.
    pub passed: u64,
    /// Cases that it declares it cannot do.
    pub unsupported: u64,
    /// Case ids that neither passed nor are declared absent, each with the reason.
    pub alarms: BTreeMap<String, String>,
}

impl Proof {
    /// Faults that no check caught.
    pub fn survivors(&self) -> Vec<&FaultRow> {
        self.faults.iter().filter(|f| f.kills.is_empty()).collect()
    }

    /// Faults that the check named for them did not catch, whatever others did.
    pub fn missed_by_their_killer(&self) -> Vec<&FaultRow> {
        self.faults.iter().filter(|f| !f.kills.contains_key(&f.killer)).collect()
    }

    /// Checks that caught nothing.
    pub fn idle_checks(&self) -> Vec<&str> {
        let killing: BTreeSet<&String> = self.faults.iter().flat_map(|f| f.kills.keys()).collect();
        self.checks.iter().filter(|c| !killing.contains(c)).map(String::as_str).collect()
    }

    /// The faults that one check alone caught.
    pub fn own_kills(&self, check: &str) -> Vec<&FaultRow> {
        self.faults.iter().filter(|f| f.kills.len() == 1 && f.kills.contains_key(check)).collect()
    }

    /// Checks without which every fault would still be caught.
    pub fn without_own_kill(&self) -> Vec<&str> {
        self.checks.iter().map(String::as_str).filter(|check| self.own_kills(check).is_empty()).collect()
    }

    /// Honest backends that were blamed.
    pub fn false_alarms(&self) -> Vec<&HonestRow> {
        self.honest.iter().filter(|h| !h.alarms.is_empty()).collect()
    }

    /// Whether it can say of every check that it is needed: all of both zoos was tried on all checks.
    pub fn is_whole(&self) -> bool {
        self.part.is_empty() && self.depth != Depth::Killers
    }

    /// Whether nothing that was tried speaks against the suite: it holds, or it is a part without a survivor and without a
    /// false alarm.
    pub fn is_good(&self) -> bool {
        match self.is_whole() {
            true => self.holds(),
            false => self.survivors().is_empty() && self.false_alarms().is_empty(),
        }
    }

    /// Whether the suite is proven: no survivor, no false alarm, no check that could go unnoticed, every fault caught by
    /// the check that is there for it.
    pub fn holds(&self) -> bool {
        self.is_whole()
            && !self.faults.is_empty()
            && !self.honest.is_empty()
            && !self.checks.is_empty()
            && self.survivors().is_empty()
            && self.missed_by_their_killer().is_empty()
            && self.without_own_kill().is_empty()
            && self.false_alarms().is_empty()
    }

    /// The same proof as if a check did not exist.
    #[must_use]
    pub fn without(&self, check: &str) -> Self {
        let mut less = self.clone();
        less.checks.retain(|c| c != check);
        for fault in &mut less.faults {
            fault.kills.remove(check);
            fault.passed.remove(check);
        }
        less
    }
}
