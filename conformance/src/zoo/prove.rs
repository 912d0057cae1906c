//! Runs the suite over both zoos and records who was caught by what.
//!
//! A fault is tried on each check until it is caught there: model after model, each case up to its first failed assertion.
//! Checks of time and memory take seconds, so only faults of time and memory are tried on them. The check that is there for
//! a fault comes first and long ones last, and a fault that two have caught is spared what is long: it is no check's own
//! whatever they say. Honest backends run everything, the plainest ones on more models, those with 16-bit floats on all golden ones, and are judged as any backend is.
//! Nothing runs alone: a check that needed an idle machine would blame busy ones.

use super::proof::{Depth, FaultRow, HonestRow, Proof};
use super::{Fault, HonestVariant, faulty, honest};
use crate::backend::{BackendFactory, Capabilities, Noise, Registry};
use crate::case::{Category, Check, ModelSet};
use crate::checks::probes;
use crate::model::Model;
use crate::run::Runner;
use crate::suite::Case;
use crate::verdict::Verdict;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// The small model that stands for all: three layers, grouped heads, a head of its own, no size a power of two.
pub const MAIN_MODEL: &str = "gqa2-untied-f32";

/// What honest backends are tried on beside it: tied and 16-bit, another RoPE base, two end tokens, dividing scales.
pub const MORE_MODELS: [&str; 3] = ["context-32", "rope-parameters-two-eos", "bitlinear-tied-bf16"];

/// The longest that a case of a proof may take. What hangs is killed here, before its check's own deadline.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// What to prove.
#[derive(Debug, Clone, Default)]
pub struct Choice {
    /// Parts of the names of faults and honest variants to try; empty for all.
    pub backends: Vec<String>,
    /// Parts of the names of checks to run; empty for all.
    pub checks: Vec<String>,
    /// Names of checks to leave out.
    pub without: Vec<String>,
    /// How much of the matrix to fill.
    pub depth: Depth,
}

impl Choice {
    fn takes_backend(&self, name: &str) -> bool {
        self.backends.is_empty() || self.backends.iter().any(|part| name.contains(part.as_str()))
    }

    fn takes_check(&self, name: &str) -> bool {
        let chosen = self.checks.is_empty() || self.checks.iter().any(|part| name.contains(part.as_str()));
        chosen && !self.without.iter().any(|without| without == name)
    }

    /// What it takes of both zoos and of the checks, in words; empty where that is everything. A check that is left out
    /// is one that does not exist, and makes no part of the rest.
    fn part(&self) -> String {
        let words = |what: &str, names: &[String]| (!names.is_empty()).then(|| format!("{what} {}", names.join(", ")));
        let all = [words("backends named", &self.backends), words("checks named", &self.checks)];
        all.into_iter().flatten().collect::<Vec<_>>().join("; ")
    }
}

/// One thing to do: a backend on a check, model after model.
struct Task {
    backend: Arc<dyn BackendFactory>,
    check: Check,
    models: Vec<Arc<Model>>,
    /// The index of the fault, or of the honest variant.
    of: Of,
}

#[derive(Clone, Copy)]
enum Of {
    Fault(usize),
    Honest(usize),
}

/// What a backend is tried on beside [`MAIN_MODEL`].
#[derive(Clone, Copy)]
enum Beside {
    /// A model of its own, where it has one.
    One(Option<&'static str>),
    /// [`MORE_MODELS`].
    More,
    /// Every golden model where golden logits are asked for: each has rows that may be near an edge of their own.
    Golden,
}

/// The models that a check is tried on.
fn models_for(check: &Check, beside: Beside, all: &[Arc<Model>]) -> Vec<Arc<Model>> {
    if matches!((beside, check.models), (Beside::Golden, ModelSet::Golden)) {
        return all.iter().filter(|m| check.models.takes(m, false)).cloned().collect();
    }
    let (extra, more): (Option<&str>, &[&str]) = match beside {
        Beside::One(extra) => (extra, &[]),
        Beside::More => (None, &MORE_MODELS),
        Beside::Golden => (None, &[]),
    };
    let named = |name: &str| all.iter().find(|m| m.name() == name).cloned();
    let mut names: Vec<&str> = match check.models {
        ModelSet::Only(name) => vec![name],
        _ => extra.into_iter().chain([MAIN_MODEL]).chain(more.iter().copied()).collect(),
    };
    names.dedup();
    let mut models: Vec<Arc<Model>> =
        names.into_iter().filter_map(named).filter(|m| check.models.takes(m, true)).collect();
    if models.is_empty() {
        models.extend(all.iter().filter(|m| check.models.takes(m, false)).take(1).cloned());
    }
    models
}

/// Runs the proof with up to `jobs` cases at once. `done` is told of each finished task and of how many there are.
pub fn run(
    runner: &Runner,
    registry: &Registry,
    choice: &Choice,
    jobs: usize,
    done: &(dyn Fn(usize, usize) + Sync),
) -> Proof {
    let all: Vec<Arc<Model>> = Model::built_in().into_iter().map(Arc::new).collect();
    let checks: Vec<Check> = crate::checks::all().into_iter().filter(|c| choice.takes_check(c.name)).collect();
    let faults: Vec<Fault> = faulty::all().into_iter().filter(|f| choice.takes_backend(f.factory().name())).collect();
    let variants: Vec<HonestVariant> =
        honest::all().into_iter().filter(|v| choice.takes_backend(v.factory().name())).collect();
    let mut proof = Proof {
        depth: choice.depth,
        part: choice.part(),
        checks: names(choice),
        faults: faults.iter().map(fault_row).collect(),
        honest: variants.iter().map(honest_row).collect(),
    };
    let mut tasks = Vec::new();
    let mut add = |factory: Arc<dyn BackendFactory>, of: Of, beside: Beside, only: &dyn Fn(&Check) -> bool| {
        for check in checks.iter().filter(|c| only(c)) {
            let models = models_for(check, beside, &all);
            tasks.push(Task { backend: factory.clone(), check: check.clone(), models, of });
        }
    };
    for (i, fault) in faults.iter().enumerate() {
        if let Ok(factory) = registry.get(&fault.factory().name) {
            let costly = ["times", "resources"].contains(&fault.class);
            let capabilities = factory.capabilities();
            let only = |check: &Check| match fault.only {
                _ if choice.depth == Depth::Killers => column(check, &capabilities) == fault.killer,
                Some(only) => only.contains(&check.category),
                None => costly || !matches!(check.category, Category::Sla | Category::Memory),
            };
            add(factory.clone(), Of::Fault(i), Beside::One(fault.model), &only);
        }
    }
    for (i, variant) in variants.iter().enumerate() {
        if let Ok(factory) = registry.get(&variant.factory().name) {
            let beside = match factory.capabilities().noise {
                _ if variant.name.starts_with("plain") => Beside::More,
                Noise::Coarse => Beside::Golden,
                Noise::F32 => Beside::One(None),
            };
            add(factory.clone(), Of::Honest(i), beside, &|_| true);
        }
    }
    // Honest backends first: nothing is spared them. Then what decides most, so that it is known by the rest.
    let killer = |task: &Task| match task.of {
        Of::Fault(i) => column(&task.check, &task.backend.capabilities()) == faults[i].killer,
        Of::Honest(_) => false,
    };
    tasks.sort_by_cached_key(|task| match task.of {
        Of::Honest(_) => 0,
        Of::Fault(_) if killer(task) => 1,
        Of::Fault(_) if !task.check.long => 2,
        Of::Fault(_) => 3,
    });
    let total = tasks.len();
    let (next, finished) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let shared = Mutex::new(&mut proof);
    let lock = || shared.lock().unwrap_or_else(PoisonError::into_inner);
    let spared = |task: &Task| match task.of {
        Of::Fault(i) if task.check.long => !killer(task) && lock().faults[i].kills.len() > 1,
        _ => false,
    };
    let one = |task: &Task| {
        if !spared(task) {
            let found = attempt(runner, task);
            record(&mut lock(), task, found);
        }
        done(finished.fetch_add(1, Ordering::Relaxed) + 1, total);
    };
    std::thread::scope(|scope| {
        for _ in 0..jobs.max(1) {
            scope.spawn(|| {
                while let Some(task) = tasks.get(next.fetch_add(1, Ordering::Relaxed)) {
                    one(task);
                }
            });
        }
    });
    proof
}

/// The column of the matrix that a check's verdict belongs in: its own, or that of the probe which runs in its place.
fn column(check: &Check, capabilities: &Capabilities) -> &'static str {
    let lacking = check.needs.filter(|needed| !capabilities.has(*needed));
    let probe = lacking.and_then(|lacking| probes::ALL.iter().find(|probe| probe.capability == lacking));
    probe.map_or(check.name, |probe| probe.name)
}

/// The checks and probes of a choice.
fn names(choice: &Choice) -> Vec<String> {
    let checks = crate::checks::all().into_iter().map(|c| c.name).filter(|name| choice.takes_check(name));
    let probes = probes::ALL.iter().map(|p| p.name).filter(|name| choice.takes_check(name));
    checks.chain(probes).map(str::to_string).collect()
}

fn fault_row(fault: &Fault) -> FaultRow {
    FaultRow {
        name: fault.name.to_string(),
        class: fault.class.to_string(),
        what: fault.what.to_string(),
        source: fault.source.to_string(),
        killer: fault.killer.to_string(),
        kills: BTreeMap::new(),
        passed: BTreeSet::new(),
    }
}

fn honest_row(variant: &HonestVariant) -> HonestRow {
    let (name, what) = (variant.name.to_string(), variant.what.to_string());
    HonestRow { name, what, passed: 0, unsupported: 0, alarms: BTreeMap::new() }
}

/// The outcomes of one task: case id, verdict, and the reason where it is not good.
struct Found {
    /// The check, or the probe that ran in its place.
    name: &'static str,
    cases: Vec<(String, Verdict, String)>,
}

fn attempt(runner: &Runner, task: &Task) -> Found {
    let capabilities = task.backend.capabilities();
    let lacks = task.check.needs.filter(|needed| !capabilities.has(*needed));
    let mut found = Found { name: column(&task.check, &capabilities), cases: Vec::new() };
    for model in &task.models {
        let mut check = task.check.clone();
        check.exclusive = false;
        check.deadline = Some(check.deadline.map_or(DEADLINE, |d| d.min(DEADLINE)));
        let id = check.case_id(task.backend.name(), model.name());
        let case = Case { id, backend: task.backend.clone(), model: model.clone(), check, lacks };
        let result = runner.run(&case);
        let outcome = result.outcome;
        let failure = outcome.failures.first().map(|f| format!("expected {}, seen {} ({})", f.expected, f.seen, f.at));
        let reason = outcome.reason.into_iter().chain(failure).collect::<Vec<_>>().join("; ");
        let caught = matches!(task.of, Of::Fault(_)) && is_kill(outcome.verdict);
        found.cases.push((result.id, outcome.verdict, reason));
        if caught {
            break;
        }
    }
    found
}

/// Whether a verdict says that something is wrong with the backend. What could not be decided is no accusation.
fn is_kill(verdict: Verdict) -> bool {
    matches!(verdict, Verdict::Fail | Verdict::Crash | Verdict::Timeout | Verdict::UnexpectedPass)
}

fn record(proof: &mut Proof, task: &Task, found: Found) {
    for (id, verdict, reason) in found.cases {
        match task.of {
            Of::Fault(i) if is_kill(verdict) => {
                proof.faults[i].passed.remove(found.name);
                proof.faults[i].kills.insert(found.name.to_string(), verdict);
            }
            Of::Fault(i) => {
                proof.faults[i].passed.insert(found.name.to_string());
            }
            Of::Honest(i) => {
                let row = &mut proof.honest[i];
                match verdict {
                    Verdict::Pass => row.passed += 1,
                    Verdict::Unsupported => row.unsupported += 1,
                    _ => {
                        row.alarms.insert(id, format!("{verdict}: {reason}"));
                    }
                }
            }
        }
    }
}
