//! Readings of the machine: memory, processors, threads, uptime.

use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use sysinfo::{CGroupLimits, MemoryRefreshKind, Pid, Process, ProcessRefreshKind, ProcessesToUpdate, System};

use crate::{MemoryError, Result};

/// For how long [`SystemState::current`] takes the readings of control groups, its slowest part, to be current.
const LIMITS_KEPT: Duration = Duration::from_secs(1);

/// The machine and this process at one moment.
///
/// Taken whenever an error is put into context, so it is cheap: a few small files of the kernel, no scan of other
/// processes. A figure that the platform does not tell is 0, or `None` for the thread count.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SystemState {
    /// Memory that this process can still get, in bytes, within the limit of its container.
    pub available_memory: usize,
    /// Memory in use on the machine, or in the container if one limits the process, in bytes.
    pub used_memory: usize,
    /// Resident memory of this process, in bytes.
    pub process_memory: usize,
    /// Processors that this process may use.
    pub cpu_count: usize,
    /// Threads of this process; `None` where the platform does not tell.
    pub thread_count: Option<usize>,
    /// Time since this process started, in whole seconds.
    pub uptime: Duration,
}

impl SystemState {
    /// Reads the machine now. Never fails: what cannot be read stays 0.
    ///
    /// What a container leaves may be up to a second old, so that a burst of errors costs little.
    pub fn current() -> Self {
        // The number of processors takes as long to read as the memory does, and hardly ever changes.
        static CPU_COUNT: LazyLock<usize> =
            LazyLock::new(|| std::thread::available_parallelism().map_or(0, usize::from));
        let cpu_count = *CPU_COUNT;
        let thread_count = thread_count();
        let Some(reading) = Reading::take(recent_limits) else {
            return Self { cpu_count, thread_count, ..Self::default() };
        };
        Self {
            available_memory: saturate(reading.available()),
            used_memory: saturate(reading.used()),
            process_memory: saturate(reading.process_memory),
            cpu_count,
            thread_count,
            uptime: Duration::from_secs(reading.process_run_time),
        }
    }
}

/// Memory that this process can still get on the CPU, in bytes.
///
/// The smaller of what the machine has available and what the process's control group (version 1 or 2, its parents
/// included) leaves: the group's limit less its resident memory. Cached file pages count as available, since the
/// kernel gives them back before it refuses an allocation.
///
/// # Errors
/// `MemoryError::AllocationFailed` when the platform does not tell its memory.
pub fn available_cpu_memory() -> Result<usize> {
    match Reading::take(limits_now) {
        Some(reading) => Ok(saturate(reading.available())),
        None => Err(MemoryError::AllocationFailed {
            size_bytes: 0,
            reason: "the available memory of this platform cannot be read".to_string(),
        }
        .into()),
    }
}

/// Raw figures, in bytes and seconds.
struct Reading {
    host_available: u64,
    host_used: u64,
    limits: Vec<CGroupLimits>,
    process_memory: u64,
    process_run_time: u64,
}

impl Reading {
    /// `None` when the platform does not tell its memory at all.
    fn take(limits: impl FnOnce(&System, Option<&Process>) -> Vec<CGroupLimits>) -> Option<Self> {
        let mut system = System::new().ok()?;
        system.refresh_memory_specifics(MemoryRefreshKind::nothing().with_ram());
        if system.total_memory() == 0 {
            return None;
        }
        let pid = Pid::from_u32(std::process::id());
        let only_memory = ProcessRefreshKind::nothing().with_memory().without_tasks();
        system.refresh_processes_specifics(ProcessesToUpdate::Some(&[pid]), false, only_memory);
        let process = system.process(pid);
        Some(Self {
            host_available: system.available_memory(),
            host_used: system.used_memory(),
            limits: limits(&system, process),
            process_memory: process.map_or(0, |p| p.memory()),
            process_run_time: process.map_or(0, |p| p.run_time()),
        })
    }

    fn available(&self) -> u64 {
        self.limits.iter().map(|limit| limit.total_memory.saturating_sub(limit.rss)).fold(self.host_available, u64::min)
    }

    fn used(&self) -> u64 {
        self.limits.iter().min_by_key(|limit| limit.total_memory).map_or(self.host_used, |limit| limit.rss)
    }
}

/// The limits that control groups put on this process.
fn limits_now(system: &System, process: Option<&Process>) -> Vec<CGroupLimits> {
    // Inside a container the limit sits at the root that the process sees; a service manager's limit sits on the
    // process's own group.
    system.cgroup_limits().into_iter().chain(process.and_then(Process::cgroup_limits)).collect()
}

/// The same, read at most once in [`LIMITS_KEPT`].
fn recent_limits(system: &System, process: Option<&Process>) -> Vec<CGroupLimits> {
    static KEPT: Mutex<Option<(Instant, Vec<CGroupLimits>)>> = Mutex::new(None);
    // Plain data: a panic while it was held cannot have left it half written.
    let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    match &*kept {
        Some((read_at, limits)) if read_at.elapsed() < LIMITS_KEPT => limits.clone(),
        _ => {
            let limits = limits_now(system, process);
            *kept = Some((Instant::now(), limits.clone()));
            limits
        }
    }
}

/// Threads of this process, as the kernel counts them.
#[cfg(target_os = "linux")]
fn thread_count() -> Option<usize> {
    threads_of_status(&std::fs::read_to_string("/proc/self/status").ok()?)
}

#[cfg(not(target_os = "linux"))]
fn thread_count() -> Option<usize> {
    None
}

/// The `Threads:` line of a Linux process status.
#[cfg(target_os = "linux")]
fn threads_of_status(status: &str) -> Option<usize> {
    status.lines().find_map(|line| line.strip_prefix("Threads:"))?.trim().parse().ok()
}

/// The value as a `usize`, or the largest one.
fn saturate(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(host_available: u64, limits: &[(u64, u64)]) -> Reading {
        let limits = limits
            .iter()
            .map(|&(total_memory, rss)| CGroupLimits { total_memory, rss, ..CGroupLimits::default() })
            .collect();
        Reading { host_available, host_used: 7, limits, process_memory: 0, process_run_time: 0 }
    }

    #[test]
    fn the_tightest_limit_decides() {
        assert_eq!(reading(1000, &[]).available(), 1000);
        assert_eq!(reading(1000, &[(600, 100)]).available(), 500);
        assert_eq!(reading(1000, &[(600, 100), (300, 50)]).available(), 250);
        // A container larger than what the machine has left does not make memory.
        assert_eq!(reading(100, &[(600, 100)]).available(), 100);
        // A group over its limit has nothing left, not 2^64.
        assert_eq!(reading(1000, &[(100, 600)]).available(), 0);
    }

    #[test]
    fn used_memory_is_the_containers_where_there_is_one() {
        assert_eq!(reading(1000, &[]).used(), 7);
        assert_eq!(reading(1000, &[(600, 100), (300, 50)]).used(), 50);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn thread_line_is_found_among_others() {
        assert_eq!(threads_of_status("Name:\tx\nThreads:\t12\nSigQ:\t3/4\n"), Some(12));
        assert_eq!(threads_of_status("Name:\tx\n"), None);
    }
}
