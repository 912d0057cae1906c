//! Running a reproducer.

use super::file::{ReproError, Reproducer};
use crate::case::{Check, DEFAULT_DEADLINE};
use crate::model::PromptShape;
use crate::run::{Job, Runner, Task};
use crate::suite::Suite;
use crate::verdict::Outcome;
use std::time::Duration;

/// How long a schedule may take.
pub(super) const SCHEDULE_DEADLINE: Duration = Duration::from_secs(20);

/// Runs a reproducer on a backend, within the deadline of its check.
///
/// # Errors
/// [`ReproError`] where the suite has no such check or no such model.
pub fn replay(suite: &Suite, runner: &Runner, reproducer: &Reproducer, backend: &str) -> Result<Outcome, ReproError> {
    job_outcome(suite, runner, reproducer, backend, None)
}

/// The same within a deadline of the caller's, where the check's own is longer.
pub(super) fn job_outcome(
    suite: &Suite,
    runner: &Runner,
    reproducer: &Reproducer,
    backend: &str,
    deadline: Option<Duration>,
) -> Result<Outcome, ReproError> {
    let model = reproducer.model()?;
    let within = |own: Duration| deadline.map_or(own, |limit| limit.min(own));
    let job = match reproducer {
        Reproducer::Check(case) => {
            let check = find(suite, &case.check)?;
            Job {
                backend,
                model: &model,
                prompts: case.prompt,
                task: Task::Check(check.name),
                fresh: check.fresh,
                twice: check.twice,
                deadline: within(check.deadline.unwrap_or(DEFAULT_DEADLINE)),
            }
        }
        Reproducer::Schedule(case) => Job {
            backend,
            model: &model,
            prompts: PromptShape::default(),
            task: Task::Schedule(&case.schedule),
            fresh: false,
            twice: false,
            deadline: within(SCHEDULE_DEADLINE),
        },
    };
    Ok(runner.run_job(&job))
}

pub(super) fn find<'a>(suite: &'a Suite, name: &str) -> Result<&'a Check, ReproError> {
    let unknown = || ReproError::UnknownCheck { name: name.to_string() };
    suite.checks().iter().find(|check| check.name == name).ok_or_else(unknown)
}
