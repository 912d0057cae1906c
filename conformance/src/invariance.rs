//! What a backend claims leaves its results as they are, how exactly, and what came of the claims.
//!
//! A claim is a cell of a table: what is varied ([`Axis`]) × how little it shows ([`Level`]). The checks test each cell
//! as it is claimed, and a [`Summary`] adds up their verdicts.

use crate::backend::Capabilities;
use crate::case::Check;
use crate::verdict::{CaseResult, Verdict};
use serde::{Deserialize, Serialize};
use std::fmt;

/// What is varied while model, tokens and configuration stay the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Axis {
    /// Another call, with other calls before it, or another engine. The contracts demand the same bits of everybody.
    Runs,
    /// The number of threads.
    Threads,
    /// The other sequences of a batch, their number and order.
    Batch,
    /// The way a sequence is cut into calls with a cache.
    Chunking,
    /// The instruction set that the kernels use.
    InstructionSet,
    /// Another process: another address space, another start.
    Process,
    /// Another device of one kind. No backend of one device can be tested on it.
    Device,
}

impl Axis {
    /// Every axis, in the order reports show them.
    pub const ALL: [Self; 7] =
        [Self::Runs, Self::Threads, Self::Batch, Self::Chunking, Self::InstructionSet, Self::Process, Self::Device];

    /// The name in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Runs => "runs",
            Self::Threads => "threads",
            Self::Batch => "batch composition",
            Self::Chunking => "chunking",
            Self::InstructionSet => "instruction set",
            Self::Process => "process",
            Self::Device => "device",
        }
    }
}

impl fmt::Display for Axis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// How little a change may show, from the weakest claim to the strongest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// Logits agree within what the backend's semantics and noise allow.
    Statistical,
    /// The same, and the most likely token is the same wherever it leads by more than the backend's own noise.
    ArgmaxStable,
    /// Every bit of the logits is the same, and so is every token drawn from them.
    Bitwise,
}

impl Level {
    /// The name in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Statistical => "statistical",
            Self::ArgmaxStable => "argmax-stable",
            Self::Bitwise => "bitwise",
        }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The claims of a backend, one an axis. `None` claims nothing: results are then held to [`Level::Statistical`], which
/// the contracts demand of any two evaluations of one sequence. A claim about something that the backend does not have,
/// such as threads, counts for nothing. Repeated runs are not a matter of claims: see [`Axis::Runs`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Invariance {
    /// See [`Axis::Threads`].
    pub threads: Option<Level>,
    /// See [`Axis::Batch`].
    pub batch: Option<Level>,
    /// See [`Axis::Chunking`].
    pub chunking: Option<Level>,
    /// See [`Axis::InstructionSet`].
    pub instruction_set: Option<Level>,
    /// See [`Axis::Process`].
    pub process: Option<Level>,
    /// See [`Axis::Device`].
    pub device: Option<Level>,
}

impl Default for Invariance {
    /// What the contracts ask of everybody: one seed, one result, whatever the number of threads and in every process;
    /// the same logits within rounding for any batch, any chunking and any instruction set.
    fn default() -> Self {
        Self {
            threads: Some(Level::Bitwise),
            batch: Some(Level::Statistical),
            chunking: Some(Level::Statistical),
            instruction_set: Some(Level::Statistical),
            process: Some(Level::Bitwise),
            device: None,
        }
    }
}

impl Invariance {
    /// Every bit, on every axis but the device.
    pub fn bitwise() -> Self {
        let bitwise = Some(Level::Bitwise);
        Self {
            threads: bitwise,
            batch: bitwise,
            chunking: bitwise,
            instruction_set: bitwise,
            process: bitwise,
            device: None,
        }
    }
}

/// What became of one claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Standing {
    /// Every check that tests it ran and passed.
    Held,
    /// A check that tests it failed, crashed or timed out, waived or not.
    Broken,
    /// Not every check that tests it came to a verdict: nothing is known.
    Untested,
    /// Nothing is claimed, or there is nothing to vary.
    Unclaimed,
}

/// One cell: an axis, the level claimed on it, and what became of the claim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Claim {
    /// What is varied.
    pub axis: Axis,
    /// The level that is claimed.
    pub claimed: Option<Level>,
    /// What became of it.
    pub standing: Standing,
    /// Checks that passed, on every model they ran on.
    pub passed: u64,
    /// Checks of the suite that test the axis and that the backend is able to take.
    pub checks: u64,
}

/// The claims of one backend added up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Summary {
    /// The weakest level among the claims that hold; none where a claim is broken or none was tested.
    pub level: Option<Level>,
    /// The axes that hold, which are those that the level speaks of.
    pub covers: Vec<Axis>,
    /// All cells.
    pub claims: Vec<Claim>,
}

impl Summary {
    /// Adds up what the cases of one backend say of its claims. `checks` are those of the whole suite: a claim is held
    /// only if all that test it have passed.
    pub fn of(capabilities: &Capabilities, checks: &[Check], cases: &[&CaseResult]) -> Self {
        let claims: Vec<Claim> = Axis::ALL.map(|axis| Claim::of(axis, capabilities, checks, cases)).into();
        let held = || claims.iter().filter(|c| c.standing == Standing::Held);
        let broken = claims.iter().any(|c| c.standing == Standing::Broken);
        Self {
            level: if broken { None } else { held().filter_map(|c| c.claimed).min() },
            covers: held().map(|c| c.axis).collect(),
            claims,
        }
    }
}

impl Claim {
    fn of(axis: Axis, capabilities: &Capabilities, checks: &[Check], cases: &[&CaseResult]) -> Self {
        let claimed = capabilities.claim(axis);
        let able = |check: &&Check| check.needs.is_none_or(|capability| capabilities.has(capability));
        let (mut passed, mut total, mut broken) = (0, 0, false);
        for check in checks.iter().filter(|c| c.axis == Some(axis)).filter(able) {
            let verdicts = || cases.iter().filter(|c| c.check == check.name).map(|c| c.outcome.verdict);
            let good = |v: Verdict| matches!(v, Verdict::Pass | Verdict::UnexpectedPass);
            total += 1;
            passed += u64::from(verdicts().next().is_some() && verdicts().all(good));
            broken |=
                verdicts().any(|v| matches!(v, Verdict::Fail | Verdict::Crash | Verdict::Timeout | Verdict::Waived));
        }
        let standing = match claimed {
            None => Standing::Unclaimed,
            Some(_) if broken => Standing::Broken,
            Some(_) if total > 0 && passed == total => Standing::Held,
            Some(_) => Standing::Untested,
        };
        Self { axis, claimed, standing, passed, checks: total }
    }
}
