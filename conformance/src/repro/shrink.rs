//! Making a failing case smaller.
//!
//! Candidates are tried in a fixed order, each in a worker with a short deadline, and kept where the backend fails in
//! the same way: with the same verdict, at the same assertion. A smaller model can break an assumption of a check
//! instead of showing the fault; where another backend passes the case, it must pass every candidate too.

use super::file::{CheckCase, ModelChoice, Observed, REPRODUCER_VERSION, Reproducer, Synthetic};
use super::replay::{find, job_outcome};
use super::schedule::{Call, Form, Schedule};
use super::smaller::{starts, steps};
use crate::case::{Check, ModelSet};
use crate::model::{Model, PromptShape};
use crate::run::Runner;
use crate::suite::{Case, Suite};
use crate::verdict::{CaseResult, Outcome, Verdict};
use fixtures::Spec;
use std::time::{Duration, Instant};

/// How many failing cases of a run are made smaller; the others name the model that they failed on.
const SHRUNK_A_RUN: usize = 5;
/// How long one candidate may take.
const CANDIDATE_DEADLINE: Duration = Duration::from_secs(2);
/// How often all steps are gone through.
const ROUNDS: usize = 3;

/// Gives each failing result of a run its reproducer; the first few are made smaller, for up to `budget` each where
/// there is one.
pub fn attach(suite: &Suite, runner: &Runner, cases: &[Case], results: &mut [CaseResult], budget: Option<Duration>) {
    let mut shrunk = 0;
    for result in results.iter_mut().filter(|r| fails(&r.outcome)) {
        let Some(case) = cases.iter().find(|case| case.id == result.id) else { continue };
        let budget = budget.filter(|_| shrunk < SHRUNK_A_RUN && !case.check.exclusive);
        shrunk += usize::from(budget.is_some());
        result.outcome.reproducer = reproduce(suite, runner, case, &result.outcome, budget);
    }
}

/// The reproducer of one failing case, made smaller where there is a budget for it. None where it cannot be written
/// down: the model is a folder of the caller's, and no synthetic one shows the failure.
pub fn reproduce(
    suite: &Suite,
    runner: &Runner,
    case: &Case,
    outcome: &Outcome,
    budget: Option<Duration>,
) -> Option<String> {
    if !fails(outcome) {
        return None;
    }
    let start = Reproducer::Check(CheckCase {
        version: REPRODUCER_VERSION,
        backend: case.backend.name().to_string(),
        check: case.check.name.to_string(),
        requirement: case.check.id.to_string(),
        model: ModelChoice::BuiltIn(case.model.name().to_string()),
        prompt: PromptShape::default(),
        outcome: Observed::of(outcome),
    });
    let found = match budget {
        None => start,
        Some(budget) => {
            let mut shrinker = Shrinker::new(suite, runner, start, outcome, budget);
            shrinker.shrink_check(&case.model);
            shrinker.best
        }
    };
    if case.model.is_folder() && found.synthetic().is_none() {
        return None;
    }
    found.to_json().ok()
}

/// Whether an outcome is one that a reproducer can be asked to show again.
pub(super) fn fails(outcome: &Outcome) -> bool {
    matches!(outcome.verdict, Verdict::Fail | Verdict::Crash | Verdict::Timeout)
}

/// How a case fails: what must stay the same while it gets smaller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Signature(Verdict, String);

impl Signature {
    pub(super) fn of(outcome: &Outcome) -> Self {
        let reason = outcome.reason.as_deref().unwrap_or_default();
        let place = match (outcome.verdict, outcome.failures.first()) {
            (Verdict::Timeout, _) => String::new(),
            // The place of a panic, or the signal.
            (Verdict::Crash, _) => reason.split(": ").next().unwrap_or_default().to_string(),
            (_, Some(failure)) => failure.at.clone(),
            // An error's kind: its words without paths and numbers.
            (_, None) => {
                let plain = |word: &&str| word.chars().all(|c| c.is_alphabetic() || ":,.".contains(c));
                reason.split_whitespace().filter(plain).take(8).collect::<Vec<_>>().join(" ")
            }
        };
        Self(outcome.verdict, place)
    }
}

/// The search for a smaller case that fails in the same way.
pub struct Shrinker<'a> {
    suite: &'a Suite,
    runner: &'a Runner,
    backend: String,
    /// A backend that passes the case.
    control: Option<String>,
    signature: Signature,
    until: Instant,
    /// The smallest case so far.
    pub best: Reproducer,
}

impl<'a> Shrinker<'a> {
    /// A search that starts from a failing case and its outcome and ends after `budget` at the latest, one candidate
    /// more or less.
    pub fn new(suite: &'a Suite, runner: &'a Runner, start: Reproducer, outcome: &Outcome, budget: Duration) -> Self {
        Self {
            suite,
            runner,
            backend: start.backend().to_string(),
            control: None,
            signature: Signature::of(outcome),
            until: Instant::now() + budget,
            best: start,
        }
    }

    /// Looks for another registered backend that passes the case as it is.
    fn find_control(&mut self) {
        let others = self.suite.registry().names().into_iter().filter(|name| *name != self.backend);
        self.control = others.into_iter().find(|name| self.passes(name, &self.best));
    }

    fn passes(&self, backend: &str, case: &Reproducer) -> bool {
        let limit = Some(self.until.saturating_duration_since(Instant::now()).max(CANDIDATE_DEADLINE));
        let outcome = job_outcome(self.suite, self.runner, case, backend, limit);
        outcome.is_ok_and(|outcome| outcome.verdict == Verdict::Pass)
    }

    /// Tries a candidate and keeps it where it fails in the same way.
    fn attempt(&mut self, mut candidate: Reproducer) -> bool {
        if candidate == self.best || Instant::now() >= self.until || candidate.check().is_err() {
            return false;
        }
        let outcome = job_outcome(self.suite, self.runner, &candidate, &self.backend, Some(CANDIDATE_DEADLINE));
        let Ok(outcome) = outcome else { return false };
        if Signature::of(&outcome) != self.signature {
            return false;
        }
        if self.control.as_deref().is_some_and(|control| !self.passes(control, &candidate)) {
            return false;
        }
        *candidate.outcome_mut() = Observed::of(&outcome);
        self.best = candidate;
        true
    }

    /// Makes the case of a check smaller: the model first, then the prompts.
    pub fn shrink_check(&mut self, model: &Model) {
        let Reproducer::Check(case) = &self.best else { return };
        let Ok(check) = find(self.suite, &case.check).cloned() else { return };
        // Golden data belongs to one model and to its own prompts.
        if matches!(check.models, ModelSet::Golden) {
            return;
        }
        self.find_control();
        if self.may_change_model(&check) {
            starts(model).into_iter().any(|start| self.attempt_model(&check, start));
        }
        self.rounds(|this| this.shrink_model(&check) | this.shrink_prompts());
    }

    /// Makes a schedule smaller: fewer calls, shorter ones, then the model.
    pub fn shrink_schedule(&mut self) {
        self.rounds(|this| {
            let calls = this.drop_calls() | this.shorten_calls();
            let model = this.best.synthetic().map(|m| steps(&m.spec)).unwrap_or_default();
            calls
                | this.each_step(model.len(), |this, step, smaller| this.attempt_spec(step, smaller))
                | this.plain_tokens()
        });
    }

    fn rounds(&mut self, mut round: impl FnMut(&mut Self) -> bool) {
        for _ in 0..ROUNDS {
            if !round(self) {
                return;
            }
        }
    }

    /// A check that knows the facts of one model by heart says nothing on another, unless another backend passes there.
    fn may_change_model(&self, check: &Check) -> bool {
        match check.models {
            ModelSet::Only(_) => self.control.is_some(),
            _ => true,
        }
    }

    fn attempt_model(&mut self, check: &Check, model: Synthetic) -> bool {
        let facts = |spec: &Spec| Model::synthetic("synthetic", spec, 0).facts().clone();
        if matches!(check.models, ModelSet::Where(fits) if !fits(&facts(&model.spec))) {
            return false;
        }
        let mut candidate = self.best.clone();
        candidate.set_synthetic(model);
        self.attempt(candidate)
    }

    fn shrink_model(&mut self, check: &Check) -> bool {
        let count = self.best.synthetic().map_or(0, |m| steps(&m.spec).len());
        self.each_step(count, |this, step, candidate| {
            let Synthetic { seed, spec } = this.best.synthetic().cloned()?;
            let smaller = steps(&spec).into_iter().nth(step)?.into_iter().nth(candidate)?;
            Some(this.attempt_model(check, Synthetic { seed, spec: smaller }))
        })
    }

    fn attempt_spec(&mut self, step: usize, candidate: usize) -> Option<bool> {
        let Reproducer::Schedule(case) = &self.best else { return None };
        let smaller = steps(&case.model.spec).into_iter().nth(step)?.into_iter().nth(candidate)?;
        let mut case = case.clone();
        // A token outside the vocabulary stays outside, one inside stays inside.
        let (old, new) = (case.model.spec.vocab as u32, smaller.vocab as u32);
        let moved = |t: u32| if t >= old { t - old + new } else { t % new };
        case.schedule.tokens_mut().for_each(|t| *t = moved(*t));
        case.model.spec = smaller;
        Some(self.attempt(Reproducer::Schedule(case)))
    }

    /// For each step, the candidates in order until one is kept. `attempt` gives None where there is no such candidate.
    fn each_step(&mut self, steps: usize, mut attempt: impl FnMut(&mut Self, usize, usize) -> Option<bool>) -> bool {
        let mut kept = false;
        for step in 0..steps {
            for candidate in 0.. {
                match attempt(self, step, candidate) {
                    Some(false) if Instant::now() < self.until => {}
                    Some(true) => {
                        kept = true;
                        break;
                    }
                    _ => break,
                }
            }
        }
        kept
    }

    fn shrink_prompts(&mut self) -> bool {
        let Reproducer::Check(case) = &self.best else { return false };
        let now = case.prompt;
        let shape = |change: &dyn Fn(&mut PromptShape)| {
            let mut shape = now;
            change(&mut shape);
            shape
        };
        let mut candidates = Vec::new();
        for alphabet in [1, 2, 4, 8] {
            if now.alphabet.is_none_or(|a| alphabet < a) {
                candidates.push(shape(&|s| s.alphabet = Some(alphabet)));
                candidates.push(shape(&|s| (s.alphabet, s.salt) = (Some(alphabet), 1)));
            }
        }
        let mut kept = self.first_prompts(candidates);
        let longest = [1, 2, 3, 4, 6, 8, 12, 16, 24].into_iter();
        let Reproducer::Check(CheckCase { prompt: now, .. }) = self.best else { return kept };
        let most = self.best.synthetic().map_or(usize::MAX, |m| m.spec.context).min(now.longest.unwrap_or(usize::MAX));
        let shorter = longest.filter(|&l| l < most);
        kept |= self.first_prompts(shorter.map(|l| PromptShape { longest: Some(l), ..now }).collect());
        kept
    }

    /// Keeps the first of these shapes that fails in the same way.
    fn first_prompts(&mut self, shapes: Vec<PromptShape>) -> bool {
        shapes.into_iter().any(|prompt| {
            let Reproducer::Check(case) = &self.best else { return false };
            self.attempt(Reproducer::Check(CheckCase { prompt, ..case.clone() }))
        })
    }

    fn attempt_schedule(&mut self, change: impl FnOnce(&mut Schedule)) -> bool {
        let Reproducer::Schedule(case) = &self.best else { return false };
        let mut case = case.clone();
        change(&mut case.schedule);
        self.attempt(Reproducer::Schedule(case))
    }

    fn calls(&self) -> usize {
        match &self.best {
            Reproducer::Schedule(case) => case.schedule.calls.len(),
            Reproducer::Check(_) => 0,
        }
    }

    /// Leaves out runs of calls, long ones first, later ones first.
    fn drop_calls(&mut self) -> bool {
        let mut kept = false;
        let mut size = self.calls() / 2;
        while size > 0 {
            let mut end = self.calls();
            while end >= size && self.calls() > 1 {
                let gone = end - size..end;
                kept |= self.attempt_schedule(|s| drop(s.calls.drain(gone)));
                end = (end - size).min(self.calls());
            }
            size /= 2;
        }
        kept
    }

    /// One sequence for a batch, u32 for other forms, fewer tokens: of each call, the last ones first.
    fn shorten_calls(&mut self) -> bool {
        let mut kept = false;
        for index in (0..self.calls()).rev() {
            let changes: [fn(&mut Call) -> bool; 7] = [
                |call| with_ids(call, |ids| ids.truncate(1)),
                |call| with_ids(call, |ids| ids.iter_mut().for_each(|row| row.truncate(1))),
                |call| with_ids(call, |ids| ids.iter_mut().for_each(|row| row.truncate(row.len().div_ceil(2)))),
                |call| {
                    with_ids(call, |ids| {
                        ids.iter_mut().for_each(|row| row.truncate(row.len().saturating_sub(1).max(1)))
                    })
                },
                |call| with_ids(call, |ids| ids.iter_mut().for_each(|row| drop(row.drain(..row.len() / 2)))),
                fewer_new_tokens,
                |call| match call {
                    Call::Forward(forward) => std::mem::replace(&mut forward.form, Form::U32) != Form::U32,
                    _ => false,
                },
            ];
            for change in changes {
                kept |= self.attempt_schedule(|s| {
                    if let Some(call) = s.calls.get_mut(index) {
                        change(call);
                    }
                });
            }
        }
        kept | self.plain_caches()
    }

    /// Leaves out caches that no call uses, and gives the others the room that they need.
    fn plain_caches(&mut self) -> bool {
        let Reproducer::Schedule(case) = &self.best else { return false };
        let caches = case.schedule.caches.len();
        let mut kept = false;
        for index in (0..caches).rev() {
            kept |= self.attempt_schedule(|s| {
                if s.calls.iter().any(|call| cache_of(call) == Some(index)) {
                    return;
                }
                s.caches.remove(index);
                for call in &mut s.calls {
                    if let Some(cache) = cache_of_mut(call)
                        && *cache > index
                    {
                        *cache -= 1;
                    }
                }
            });
        }
        kept
    }

    /// Tokens of low ids, which are easier to read.
    fn plain_tokens(&mut self) -> bool {
        let Reproducer::Schedule(case) = &self.best else { return false };
        let vocab = case.model.spec.vocab as u32;
        [1, 2, 4, 8, 16]
            .into_iter()
            .filter(|&few| few < vocab)
            .any(|few| self.attempt_schedule(|s| s.tokens_mut().filter(|t| **t < vocab).for_each(|t| *t %= few)))
    }
}

fn with_ids(call: &mut Call, change: impl FnOnce(&mut Vec<Vec<u32>>)) -> bool {
    match call {
        Call::Forward(forward) => change(&mut forward.ids),
        Call::Greedy(generate) | Call::Sample { generate, .. } => {
            let mut ids = vec![std::mem::take(&mut generate.prompt)];
            change(&mut ids);
            generate.prompt = ids.pop().unwrap_or_default();
        }
        Call::Truncate { .. } | Call::Clear { .. } | Call::Reset {} => return false,
    }
    true
}

fn fewer_new_tokens(call: &mut Call) -> bool {
    match call {
        Call::Greedy(generate) | Call::Sample { generate, .. } => {
            generate.tokens = generate.tokens.div_ceil(2);
            true
        }
        _ => false,
    }
}

fn cache_of(call: &Call) -> Option<usize> {
    match call {
        Call::Forward(forward) => forward.cache,
        Call::Truncate { cache, .. } | Call::Clear { cache } => Some(*cache),
        _ => None,
    }
}

fn cache_of_mut(call: &mut Call) -> Option<&mut usize> {
    match call {
        Call::Forward(forward) => forward.cache.as_mut(),
        Call::Truncate { cache, .. } | Call::Clear { cache } => Some(cache),
        _ => None,
    }
}
