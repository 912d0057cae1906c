//! A team of threads that waits in a loop: a decode step has some two hundred parallel sections of a few ten microseconds, between which a
//! thread that sleeps would not be back in time.
//!
//! One section at a time is open. Workers that are awake join it, take parts until there are none, and leave; the caller takes parts
//! too and never waits for a worker that did not join, so a worker that the system holds up delays nobody but by the part it is at. A
//! worker that finds nothing to do for a while sleeps.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

/// Looks at the state, with a pause in between, before a worker gives its processor away: about 20 microseconds.
const SPINS: u32 = 400;
/// Times that it gives it away before it sleeps: about 100 microseconds on an idle machine.
const YIELDS: u32 = 200;

/// In `state`: a section is open. Below it the number of workers in the section, above it the number of the section.
const OPEN: u64 = 1 << 15;
const ACTIVE: u64 = OPEN - 1;

/// The work of a section: `run(i)` for every part below `parts`.
struct Section {
    run: *const (dyn Fn(usize) + Sync),
    parts: usize,
}

struct Shared {
    state: AtomicU64,
    /// Written by the caller while no section is open and no worker is in one; read by workers that have joined.
    section: UnsafeCell<Option<Section>>,
    next: AtomicUsize,
    /// A caller has the team.
    busy: AtomicBool,
    /// What a worker's part panicked with.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    sleeping: AtomicUsize,
    bed: Mutex<()>,
    alarm: Condvar,
    closing: AtomicBool,
}

// SAFETY: `section` is the only field that is not shared on its own terms. It is written by the one caller that holds `busy`, while
// `state` shows no open section and no active worker, and read between a worker's joining and its leaving; joining succeeds only while
// the section is open, and the caller waits for every joined worker to leave before it writes again or returns. The pointer in it leads
// to a `Sync` closure that the caller keeps alive for that time.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

/// Some worker threads.
pub(super) struct Team {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

impl Team {
    /// A team of `workers` threads besides the caller's.
    ///
    /// # Errors
    /// When the system gives no threads.
    pub(super) fn new(workers: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            section: UnsafeCell::new(None),
            next: AtomicUsize::new(0),
            busy: AtomicBool::new(false),
            panic: Mutex::new(None),
            sleeping: AtomicUsize::new(0),
            bed: Mutex::new(()),
            alarm: Condvar::new(),
            closing: AtomicBool::new(false),
        });
        // Made first, so that the workers there are stop when one more cannot be had.
        let mut team = Self { shared, workers: Vec::new() };
        for i in 0..workers {
            let shared = team.shared.clone();
            let worker = std::thread::Builder::new().name(format!("bitnet-{i}")).spawn(move || shared.work())?;
            team.workers.push(worker);
        }
        Ok(team)
    }

    /// Calls `run(i)` for `0..parts`, shared among the team; on the caller's thread alone while another caller has the team.
    ///
    /// # Panics
    /// When a part does, after all parts that were begun have ended.
    pub(super) fn run(&self, parts: usize, run: &(dyn Fn(usize) + Sync)) {
        let shared = &*self.shared;
        if shared.busy.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_err() {
            (0..parts).for_each(run);
            return;
        }
        // SAFETY: this thread holds `busy`, the last section was closed and left by all (`Closing`). The lifetime is dropped from the
        // type only: `Closing` keeps this call from ending, by return or unwinding, before every worker has left the section.
        unsafe {
            let run = std::mem::transmute::<*const (dyn Fn(usize) + Sync), *const (dyn Fn(usize) + Sync)>(run);
            *shared.section.get() = Some(Section { run, parts });
        }
        shared.next.store(0, Ordering::Relaxed);
        let number = (shared.state.load(Ordering::Relaxed) & !(OPEN | ACTIVE)).wrapping_add(2 * OPEN);
        // Sequentially consistent, as is a worker's way to bed: either it sees this section or its sleep is seen here.
        shared.state.store(number | OPEN, Ordering::SeqCst);
        if shared.sleeping.load(Ordering::SeqCst) > 0 {
            drop(lock(&shared.bed));
            shared.alarm.notify_all();
        }
        let closing = Closing(shared);
        shared.parts(parts, run);
        drop(closing);
        if let Some(payload) = lock(&shared.panic).take() {
            resume_unwind(payload);
        }
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::SeqCst);
        drop(lock(&self.shared.bed));
        self.shared.alarm.notify_all();
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

/// Ends a section when dropped.
struct Closing<'a>(&'a Shared);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        let Self(shared) = self;
        // Nobody joins any more, and nobody who has joined begins another part.
        shared.next.store(usize::MAX / 2, Ordering::Relaxed);
        shared.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0;
        while shared.state.load(Ordering::Acquire) & ACTIVE != 0 {
            spins += 1;
            if spins < SPINS {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
        if std::thread::panicking() {
            // One panic is enough for a caller; it is not the next one's.
            lock(&shared.panic).take();
        }
        shared.busy.store(false, Ordering::Release);
    }
}

impl Shared {
    /// Takes parts until there are none.
    fn parts(&self, parts: usize, run: &(dyn Fn(usize) + Sync)) {
        loop {
            let part = self.next.fetch_add(1, Ordering::Relaxed);
            if part >= parts {
                return;
            }
            run(part);
        }
    }

    /// A worker's life.
    fn work(&self) {
        let (mut done, mut idle) = (0, 0);
        while !self.closing.load(Ordering::Relaxed) {
            let state = self.state.load(Ordering::Acquire);
            if self.is_new(state, done) {
                if self.state.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                    done = state & !(OPEN | ACTIVE);
                    idle = 0;
                    self.join_in();
                }
            } else if idle < SPINS + YIELDS {
                idle += 1;
                if idle < SPINS {
                    std::hint::spin_loop();
                } else {
                    std::thread::yield_now();
                }
            } else {
                let mut bed = lock(&self.bed);
                self.sleeping.fetch_add(1, Ordering::SeqCst);
                while !self.closing.load(Ordering::SeqCst) && !self.is_new(self.state.load(Ordering::SeqCst), done) {
                    bed = self.alarm.wait(bed).unwrap_or_else(|e| e.into_inner());
                }
                self.sleeping.fetch_sub(1, Ordering::SeqCst);
                idle = 0;
            }
        }
    }

    /// Whether `state` has a section open that is not number `done`.
    fn is_new(&self, state: u64, done: u64) -> bool {
        state & OPEN != 0 && state & !(OPEN | ACTIVE) != done
    }

    /// A joined worker's parts, then its leaving.
    fn join_in(&self) {
        // SAFETY: this worker is counted in `state`, so the caller waits for it: section and closure stay as they are until it has
        // left, and the caller's writes came before the store that opened the section.
        let section = unsafe { (*self.section.get()).as_ref() };
        if let Some(&Section { run, parts }) = section {
            // SAFETY: as above.
            let run = unsafe { &*run };
            if let Err(payload) = catch_unwind(AssertUnwindSafe(|| self.parts(parts, run))) {
                *lock(&self.panic) = Some(payload);
            }
        }
        self.state.fetch_sub(1, Ordering::Release);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    #[test]
    fn every_part_runs_once_in_every_section() {
        for workers in [0, 1, 3] {
            let team = Team::new(workers).unwrap();
            for parts in (0..40).chain([1000]) {
                let counts: Vec<AtomicU32> = (0..parts).map(|_| AtomicU32::new(0)).collect();
                team.run(parts, &|i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1), "{workers} workers, {parts} parts");
            }
        }
    }

    /// Sections right behind each other and after naps, from several callers at once, some within another.
    #[test]
    fn callers_share_a_team() {
        let team = Team::new(2).unwrap();
        let total = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for caller in 0..4u64 {
                let (team, total) = (&team, &total);
                scope.spawn(move || {
                    for round in 0..300 {
                        team.run(7, &|i| {
                            team.run(3, &|j| {
                                total.fetch_add((i * j) as u64 + caller, Ordering::Relaxed);
                            });
                        });
                        if round % 100 == 99 {
                            std::thread::sleep(std::time::Duration::from_millis(3));
                        }
                    }
                });
            }
        });
        let section: u64 = (0..7u64).map(|i| (0..3).map(|j| i * j).sum::<u64>()).sum();
        assert_eq!(total.into_inner(), 4 * 300 * section + 300 * 21 * (1 + 2 + 3));
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_team_goes_on() {
        let team = Team::new(2).unwrap();
        for bad in [0, 5, 63] {
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                team.run(64, &|i| {
                    if i == bad {
                        std::panic::panic_any(i);
                    }
                    std::thread::sleep(std::time::Duration::from_micros(50));
                })
            }));
            assert_eq!(outcome.unwrap_err().downcast_ref::<usize>(), Some(&bad));
            let sum = AtomicU64::new(0);
            team.run(10, &|i| {
                sum.fetch_add(i as u64, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 45);
        }
    }
}
