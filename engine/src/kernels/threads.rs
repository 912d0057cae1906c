//! The threads of one engine. How work is cut never changes a result: every output value is computed by one thread, in one order.

use std::fmt;
use std::sync::Arc;

use bitnet_contracts::{ConfigurationError, DeviceError, Result};

use super::columns::Columns;
use super::team::Team;

/// The most threads an engine takes.
const MAX_THREADS: usize = 1024;

/// A team of threads; with one thread, everything runs on the caller's.
#[derive(Clone)]
pub struct Threads {
    team: Option<Arc<Team>>,
    count: usize,
}

impl fmt::Debug for Threads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Threads({})", self.count)
    }
}

impl Threads {
    /// A team of `count` threads, or of as many as the process may use when None.
    ///
    /// # Errors
    /// `ConfigurationError::InvalidParameter` for 0 or an absurd number, `DeviceError` when the system gives no threads.
    pub fn new(count: Option<usize>) -> Result<Self> {
        let count = match count {
            Some(n) if n == 0 || n > MAX_THREADS => {
                return Err(ConfigurationError::InvalidParameter {
                    parameter: "threads".to_string(),
                    value: n.to_string(),
                    valid_range: format!("1 to {MAX_THREADS}"),
                }
                .into());
            }
            Some(n) => n,
            None => std::thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS),
        };
        if count == 1 {
            return Ok(Self { team: None, count });
        }
        let team = Team::new(count - 1)
            .map_err(|e| DeviceError::DeviceNotAvailable { device: format!("{count} CPU threads: {e}") })?;
        Ok(Self { team: Some(Arc::new(team)), count })
    }

    /// Number of threads.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Calls `f(i)` for `0..parts`, in parallel when `worth` says that the section is long enough to pay for it.
    pub(crate) fn for_each(&self, parts: usize, worth: bool, f: impl Fn(usize) + Sync) {
        match &self.team {
            Some(team) if worth && parts > 1 => team.run(parts, &f),
            _ => (0..parts).for_each(f),
        }
    }

    /// Calls `f(i, chunk)` for every `size`-long chunk of `data`.
    pub(crate) fn for_each_chunk<T: Send>(
        &self,
        data: &mut [T],
        size: usize,
        worth: bool,
        f: impl Fn(usize, &mut [T]) + Sync,
    ) {
        let len = data.len();
        let places = Columns::new(data, len);
        self.for_each(len.div_ceil(size), worth, |i| {
            // SAFETY: chunks do not overlap, each part is one, and `data` stays borrowed until all parts have run.
            f(i, unsafe { places.slice(0, i * size, size.min(len - i * size)) })
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_threads_are_refused() {
        assert!(Threads::new(Some(0)).is_err());
        assert!(Threads::new(Some(usize::MAX)).is_err());
    }

    #[test]
    fn every_part_runs_once() {
        for count in [1, 3] {
            let threads = Threads::new(Some(count)).unwrap();
            let mut data = vec![0u32; 1001];
            threads.for_each_chunk(&mut data, 10, true, |i, c| c.iter_mut().for_each(|x| *x += i as u32));
            assert!(data.iter().enumerate().all(|(j, &x)| x as usize == j / 10));
        }
    }
}
