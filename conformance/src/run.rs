//! The parent's side of isolation: workers, deadlines, and what becomes of a case whose worker dies.

use crate::case::DEFAULT_DEADLINE;
use crate::expectations::Expectations;
use crate::model::{Model, ModelError, ModelFixture, PromptShape};
use crate::processor::Usage;
use crate::repro::Schedule;
use crate::suite::Case;
use crate::verdict::{CaseResult, Outcome, Verdict};
use crate::worker::{Answer, Request, WORKER_ENV};
use std::collections::HashMap;
use std::io::{ErrorKind, PipeReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

/// How much of a dead worker's output is shown.
const TAIL_BYTES: usize = 4096;
/// How long a worker that closed its channel may take to be gone.
const GRACE: Duration = Duration::from_secs(5);

/// Why a run cannot start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// The temporary folder or this executable's own path is not to be had.
    #[error("cannot prepare the run: {0}")]
    Setup(#[from] std::io::Error),
}

/// What a worker is asked to do.
#[derive(Debug, Clone)]
pub struct Job<'a> {
    /// The backend's name.
    pub backend: &'a str,
    /// The model.
    pub model: &'a Model,
    /// The prompts that checks make.
    pub prompts: PromptShape,
    /// What to run on it.
    pub task: Task<'a>,
    /// In a process in which nothing ran before.
    pub fresh: bool,
    /// In two such processes, one after the other: see [`crate::case::Check::twice`].
    pub twice: bool,
    /// How long it may take.
    pub deadline: Duration,
}

/// What a job runs.
#[derive(Debug, Clone, Copy)]
pub enum Task<'a> {
    /// The check of this name.
    Check(&'a str),
    /// These calls, held to the oracle.
    Schedule(&'a Schedule),
}

/// Runs cases in worker processes. All workers and files of a run are gone when this is dropped.
pub struct Runner {
    executable: PathBuf,
    idle: Mutex<Vec<Worker>>,
    models: Mutex<HashMap<String, ModelFixture>>,
    /// Held for reading by ordinary cases, for writing by a case that must run alone.
    alone: RwLock<()>,
    serial: AtomicU64,
    expectations: Option<Expectations>,
    fail_fast: bool,
    // Last: workers are gone before their files are.
    root: tempfile::TempDir,
}

impl Runner {
    /// A runner whose workers are this executable, which must call [`crate::worker::serve_if_asked`] first.
    ///
    /// # Errors
    /// [`RunError::Setup`].
    pub fn new() -> Result<Self, RunError> {
        let root = tempfile::Builder::new().prefix("conformance-").tempdir()?;
        for folder in ["models", "scratch", "own", "tmp"] {
            std::fs::create_dir(root.path().join(folder))?;
        }
        Ok(Self {
            executable: std::env::current_exe()?,
            idle: Mutex::default(),
            models: Mutex::default(),
            alone: RwLock::new(()),
            serial: AtomicU64::new(0),
            expectations: None,
            fail_fast: false,
            root,
        })
    }

    /// Judges every case by what is expected of it as well.
    #[must_use]
    pub fn expecting(mut self, expectations: Expectations) -> Self {
        self.expectations = Some(expectations);
        self
    }

    /// Ends every case at its first failed assertion: enough to know that there is one.
    #[must_use]
    pub fn ending_at_first_failure(mut self) -> Self {
        self.fail_fast = true;
        self
    }

    /// The folder that holds everything this run writes.
    pub fn root(&self) -> &Path {
        self.root.path()
    }

    /// Runs all cases with up to `jobs` at once and calls `done` after each. Cases that must run alone come last. The
    /// results are in the order of the cases.
    pub fn run_all(&self, cases: &[Case], jobs: usize, done: &(dyn Fn(&CaseResult) + Sync)) -> Vec<CaseResult> {
        let slots: Vec<Mutex<Option<CaseResult>>> = cases.iter().map(|_| Mutex::new(None)).collect();
        let one = |index: usize| {
            let result = self.run(&cases[index]);
            done(&result);
            *slots[index].lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
        };
        let (alone, beside): (Vec<usize>, Vec<usize>) = (0..cases.len()).partition(|&i| cases[i].check.exclusive);
        let next = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..jobs.clamp(1, beside.len().max(1)) {
                scope.spawn(|| {
                    while let Some(&index) = beside.get(next.fetch_add(1, Ordering::Relaxed)) {
                        one(index);
                    }
                });
            }
        });
        alone.into_iter().for_each(one);
        slots.into_iter().filter_map(|slot| slot.into_inner().unwrap_or_else(PoisonError::into_inner)).collect()
    }

    /// Runs one case. Safe to call from many threads: a case that must run alone waits for the others and holds new
    /// ones back.
    pub fn run(&self, case: &Case) -> CaseResult {
        let outcome = if case.check.exclusive {
            let _gate = self.alone.write().unwrap_or_else(PoisonError::into_inner);
            self.in_worker(&Job::of(case))
        } else {
            let _gate = self.alone.read().unwrap_or_else(PoisonError::into_inner);
            self.in_worker(&Job::of(case))
        };
        let mut result = CaseResult {
            id: case.id.clone(),
            backend: case.backend.name().to_string(),
            model: case.model.name().to_string(),
            model_argument: case.model.argument(),
            check: case.check.name.to_string(),
            requirement: case.check.id.to_string(),
            clause: case.check.clause.to_string(),
            category: case.check.category,
            exclusive: case.check.exclusive,
            outcome,
        };
        if let Some(expectations) = &self.expectations {
            expectations.judge(&mut result);
        }
        result
    }

    /// Runs one job beside others.
    pub fn run_job(&self, job: &Job<'_>) -> Outcome {
        let _gate = self.alone.read().unwrap_or_else(PoisonError::into_inner);
        self.in_worker(job)
    }

    fn in_worker(&self, job: &Job<'_>) -> Outcome {
        let start = Instant::now();
        let mut outcome = match self.try_in_worker(job) {
            Ok(outcome) => outcome,
            Err(reason) => Outcome::bare(Verdict::Inconclusive, reason),
        };
        if outcome.duration_s == 0.0 {
            outcome.duration_s = start.elapsed().as_secs_f64();
        }
        outcome
    }

    fn try_in_worker(&self, job: &Job<'_>) -> Result<Outcome, String> {
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        let scratch = self.root().join("scratch").join(serial.to_string());
        std::fs::create_dir(&scratch).map_err(|e| format!("no scratch folder: {e}"))?;
        // A model of one job's own goes with it: there may be thousands.
        let own = self.root().join("own").join(serial.to_string());
        let model = if job.model.is_synthetic() { job.model.materialize(&own) } else { self.fixture(job.model) };
        let mut model = model.map_err(|e| e.to_string())?;
        model.config.prompts = job.prompts;
        let mut outcome = self.ask(job, &model, &scratch)?;
        if job.twice && outcome.verdict == Verdict::Inconclusive {
            let first = outcome;
            outcome = self.ask(job, &model, &scratch)?;
            outcome.assertions += first.assertions;
            outcome.values += first.values;
            outcome.duration_s += first.duration_s;
        }
        // Ignored on failure: the whole tree goes at the end of the run.
        let _ = std::fs::remove_dir_all(&scratch);
        let _ = std::fs::remove_dir_all(&own);
        Ok(outcome)
    }

    fn ask(&self, job: &Job<'_>, model: &ModelFixture, scratch: &Path) -> Result<Outcome, String> {
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        let fresh = job.fresh || job.twice;
        let (check, schedule) = match job.task {
            Task::Check(name) => (name.to_string(), None),
            Task::Schedule(schedule) => (String::new(), Some(schedule.clone())),
        };
        let idle = if fresh { None } else { self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop() };
        let mut worker = match idle {
            Some(worker) => worker,
            None => self.start_worker(serial).map_err(|e| format!("cannot start a worker: {e}"))?,
        };
        let request = Request {
            serial,
            backend: job.backend.to_string(),
            check,
            model: model.clone(),
            scratch: scratch.to_path_buf(),
            fail_fast: self.fail_fast,
            deadline_s: job.deadline.as_secs_f64(),
            schedule,
        };
        let deadline = job.deadline;
        let before = Usage::of(worker.child.id());
        let worker_tmp = worker.tmp.clone();
        let mut outcome = match worker.ask(&request, deadline) {
            Ok(answer) if answer.serial == serial => {
                if !fresh {
                    self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(worker);
                }
                answer.outcome
            }
            Ok(answer) => worker.bury(format!("the worker answered request {} with {}", serial, answer.serial)),
            Err(Silence::Deadline) => worker.stop_at_deadline(deadline, &before),
            Err(Silence::Closed) => worker.post_mortem(),
            Err(Silence::Garbled(what)) => worker.bury(what),
        };
        let places = [(scratch, "SCRATCH"), (&*worker_tmp, "TMP"), (self.root(), "RUN")];
        hide_places(&mut outcome, &places);
        Ok(outcome)
    }

    /// The model's folder, written when its first case asks for it.
    fn fixture(&self, model: &Model) -> Result<ModelFixture, ModelError> {
        let mut models = self.models.lock().unwrap_or_else(PoisonError::into_inner);
        let key = model.argument();
        if let Some(model) = models.get(&key) {
            return Ok(model.clone());
        }
        let model = model.materialize(&self.root().join("models"))?;
        models.insert(key, model.clone());
        Ok(model)
    }

    fn start_worker(&self, serial: u64) -> std::io::Result<Worker> {
        let tmp = self.root().join("tmp").join(serial.to_string());
        std::fs::create_dir(&tmp)?;
        let (ours, theirs) = UnixStream::pair()?;
        let (reader, writer) = std::io::pipe()?;
        let child = Command::new(&self.executable)
            .env(WORKER_ENV, "1")
            .env("TMPDIR", &tmp)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(writer.try_clone()?)
            .stderr(writer)
            .spawn()?;
        Ok(Worker { child, channel: ours, received: Vec::new(), tail: Tail::follow(reader), tmp })
    }
}

/// Puts names in place of temporary folders in what a case says of itself: no two runs have the same ones, and none is
/// there when somebody reads it.
fn hide_places(outcome: &mut Outcome, places: &[(&Path, &str)]) {
    let failures = outcome.failures.iter_mut().flat_map(|f| [&mut f.expected, &mut f.seen]);
    for text in outcome.reason.iter_mut().chain(failures) {
        for (place, name) in places {
            *text = text.replace(&*place.to_string_lossy(), name);
        }
    }
}

impl<'a> Job<'a> {
    fn of(case: &'a Case) -> Self {
        Self {
            backend: case.backend.name(),
            model: &case.model,
            prompts: PromptShape::default(),
            task: Task::Check(case.check.name),
            fresh: case.check.fresh,
            twice: case.check.twice,
            deadline: case.check.deadline.unwrap_or(DEFAULT_DEADLINE),
        }
    }
}

/// Why a worker did not answer.
enum Silence {
    Deadline,
    Closed,
    Garbled(String),
}

struct Worker {
    child: Child,
    channel: UnixStream,
    received: Vec<u8>,
    tail: Tail,
    tmp: PathBuf,
}

impl Worker {
    fn ask(&mut self, request: &Request, deadline: Duration) -> Result<Answer, Silence> {
        let garbled = |what: String| Silence::Garbled(what);
        let mut line = serde_json::to_vec(request).map_err(|e| garbled(format!("request: {e}")))?;
        line.push(b'\n');
        let end = Instant::now() + deadline;
        self.channel.set_write_timeout(Some(deadline)).map_err(|e| garbled(e.to_string()))?;
        self.channel.write_all(&line).map_err(|_| Silence::Closed)?;
        let mut chunk = [0u8; 16 * 1024];
        loop {
            if let Some(at) = self.received.iter().position(|&b| b == b'\n') {
                let line: Vec<u8> = self.received.drain(..=at).collect();
                return serde_json::from_slice(&line)
                    .map_err(|e| garbled(format!("the worker's answer cannot be read: {e}")));
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Silence::Deadline);
            }
            self.channel.set_read_timeout(Some(left)).map_err(|e| garbled(e.to_string()))?;
            match self.channel.read(&mut chunk) {
                Ok(0) => return Err(Silence::Closed),
                Ok(n) => self.received.extend_from_slice(&chunk[..n]),
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    return Err(Silence::Deadline);
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Err(Silence::Closed),
            }
        }
    }

    /// One that was kept from computing has not been tried. What the processors did is said with the last output, for no two
    /// runs repeat it.
    fn stop_at_deadline(mut self, deadline: Duration, before: &Usage) -> Outcome {
        let share = Usage::of(self.child.id()).since(before);
        self.kill();
        let seconds = deadline.as_secs_f64();
        let mut outcome = if share.is_some_and(|share| share.is_starved(seconds)) {
            let reason = format!("no answer within {seconds:.1} s, for most of which there was no processor for it");
            Outcome::bare(Verdict::Inconclusive, reason)
        } else {
            Outcome::bare(Verdict::Timeout, format!("no answer within {seconds:.1} s; the worker was killed"))
        };
        let share = share.map(|share| {
            format!(
                "the worker computed for {:.1} s of {seconds:.1} s, and waited for a processor for {:.1} s",
                share.computed, share.withheld
            )
        });
        let said: Vec<String> = self.tail.text().into_iter().chain(share).collect();
        outcome.output_tail = (!said.is_empty()).then(|| said.join("\n"));
        outcome
    }

    /// The channel is closed: waits for the process and says how it ended.
    fn post_mortem(mut self) -> Outcome {
        let end = Instant::now() + GRACE;
        let reason = loop {
            match self.child.try_wait() {
                Ok(Some(status)) => break describe(status),
                Ok(None) if Instant::now() < end => std::thread::sleep(Duration::from_millis(5)),
                Ok(None) => break "the worker closed its channel and went on running".to_string(),
                Err(e) => break format!("the worker is gone: {e}"),
            }
        };
        self.bury(reason)
    }

    fn bury(mut self, reason: String) -> Outcome {
        self.kill();
        let mut outcome = Outcome::bare(Verdict::Crash, reason);
        outcome.output_tail = self.tail.text();
        outcome
    }

    fn kill(&mut self) {
        // Both fail only where the process is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.kill();
        let _ = std::fs::remove_dir_all(&self.tmp);
    }
}

/// How a process ended, in words.
fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("the worker exited with code {code}"),
        (None, Some(signal)) => {
            let name = match signal {
                4 => " (SIGILL)",
                6 => " (SIGABRT)",
                7 => " (SIGBUS)",
                8 => " (SIGFPE)",
                9 => " (SIGKILL, perhaps for want of memory)",
                11 => " (SIGSEGV)",
                15 => " (SIGTERM)",
                _ => "",
            };
            format!("the worker was ended by signal {signal}{name}")
        }
        (None, None) => "the worker ended".to_string(),
    }
}

/// The last bytes of a worker's output, read as they come so that the pipe never fills.
struct Tail {
    bytes: Arc<Mutex<Vec<u8>>>,
    reader: std::thread::JoinHandle<()>,
}

impl Tail {
    fn follow(mut pipe: PipeReader) -> Self {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let kept = bytes.clone();
        let reader = std::thread::spawn(move || {
            let mut chunk = [0u8; 4096];
            while let Ok(n) = pipe.read(&mut chunk) {
                if n == 0 {
                    break;
                }
                let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                kept.extend_from_slice(&chunk[..n]);
                let excess = kept.len().saturating_sub(TAIL_BYTES);
                kept.drain(..excess);
            }
        });
        Self { bytes, reader }
    }

    /// What a dead worker said last. Waits a moment for the pipe to run dry; a child of the worker may hold it open.
    fn text(&self) -> Option<String> {
        let end = Instant::now() + Duration::from_millis(500);
        while !self.reader.is_finished() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(2));
        }
        let bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let text = String::from_utf8_lossy(&bytes).trim().to_string();
        (!text.is_empty()).then_some(text)
    }
}
