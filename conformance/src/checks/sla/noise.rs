//! The caller's stopwatch, and what the machine did to it: the time of a fixed piece of work beside every measurement,
//! and the time for which the process had work and no processor.

use super::decide::{Sample, percentile};
use crate::case::Context;
use crate::processor::{Waits, longest_wait, waits};
use std::time::{Duration, Instant};

/// Milliseconds, exactly.
pub(super) fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// A stopwatch for samples that share one limit.
pub(super) struct Stopwatch {
    limit: f64,
    /// Whether waiting for a processor is looked up: from the first sample beyond the limit on, for it costs time.
    watching: bool,
    spins: Vec<f64>,
}

impl Stopwatch {
    /// A stopwatch for samples that should be at most `limit` milliseconds.
    pub(super) fn new(limit: f64) -> Self {
        Self { limit, watching: false, spins: Vec::new() }
    }

    /// Times `work`, in milliseconds for each of its `units`, beside a fixed piece of work.
    pub(super) fn time<T>(&mut self, units: usize, work: impl FnOnce() -> T) -> (T, Sample) {
        self.spins.push(spin());
        let before = if self.watching { waits("self") } else { Waits::new() };
        let clock = Instant::now();
        let made = work();
        let wall = millis(clock.elapsed());
        let withheld = if self.watching { longest_wait(&before, &waits("self")) } else { 0.0 };
        let units = units.max(1) as f64;
        let sample = Sample { wall: wall / units, own: (wall - withheld).max(0.0) / units };
        self.watching |= sample.wall > self.limit;
        (made, sample)
    }

    /// Notes the machine's noise in the report: how long the fixed work took, and how far its slow end is from that.
    pub(super) fn report(&self, ctx: &mut Context<'_>) {
        let median = percentile(&self.spins, 0.5);
        if median > 0.0 {
            ctx.timing("noise_median_ms", median);
            ctx.timing("noise_p95_over_median", percentile(&self.spins, 0.95) / median);
        }
    }
}

/// The fixed piece of work: a chain of steps that nothing can shorten. Some tens of microseconds.
fn spin() -> f64 {
    let clock = Instant::now();
    let mut state = std::hint::black_box(1u64);
    for _ in 0..10_000 {
        state = (state ^ (state >> 29)).wrapping_mul(0x5851_f42d_4c95_7f2d);
    }
    std::hint::black_box(state);
    millis(clock.elapsed())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn watching_begins_with_the_first_sample_beyond_the_limit() {
        let mut idle = Stopwatch::new(f64::INFINITY);
        idle.time(1, || ());
        assert!(!idle.watching);
        let mut watch = Stopwatch::new(10.0);
        let ((), sample) = watch.time(2, || std::thread::sleep(Duration::from_millis(30)));
        assert!(watch.watching && sample.wall >= 15.0 && sample.own == sample.wall, "{sample:?}");
    }
}
