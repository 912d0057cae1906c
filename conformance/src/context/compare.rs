//! Assertions that compare: two values, two lists, an error and its tolerance.

use super::{CLOCK_ERROR, Context};
use crate::tolerance::Tolerance;
use std::fmt::{Debug, Display};
use std::panic::Location;

impl Context<'_> {
    /// Asserts that two things are equal.
    #[track_caller]
    pub fn check_eq<T: PartialEq<U> + Debug, U: Debug>(&mut self, what: impl Display, seen: T, expected: U) -> bool {
        self.values += 1;
        self.assert(Location::caller(), seen == expected, || {
            (format!("{what} = {expected:?}"), format!("{what} = {seen:?}"))
        })
    }

    /// Asserts that two lists are equal, element by element; a failure names the first difference.
    #[track_caller]
    pub fn check_slices<T: PartialEq + Debug>(&mut self, what: impl Display, seen: &[T], expected: &[T]) -> bool {
        let at = Location::caller();
        self.values += expected.len() as u64;
        if seen.len() != expected.len() {
            return self.assert(at, false, || lengths(&what, seen.len(), expected.len()));
        }
        let first = seen.iter().zip(expected).position(|(s, e)| s != e);
        self.assert(at, first.is_none(), || match first {
            Some(i) => (format!("{what}[{i}] = {:?}", expected[i]), format!("{what}[{i}] = {:?}", seen[i])),
            None => (String::new(), String::new()),
        })
    }

    /// Asserts that two lists of floats are the same bit for bit (so NaN equals itself, and 0.0 differs from -0.0).
    #[track_caller]
    pub fn check_bits(&mut self, what: impl Display, seen: &[f32], expected: &[f32]) -> bool {
        let at = Location::caller();
        self.values += expected.len() as u64;
        if seen.len() != expected.len() {
            return self.assert(at, false, || lengths(&what, seen.len(), expected.len()));
        }
        let differ = seen.iter().zip(expected).filter(|(s, e)| s.to_bits() != e.to_bits()).count();
        let first = seen.iter().zip(expected).position(|(s, e)| s.to_bits() != e.to_bits());
        self.assert(at, first.is_none(), || match first {
            Some(i) => (
                format!("{what} the same bit for bit: [{i}] = {:?} (0x{:08x})", expected[i], expected[i].to_bits()),
                format!(
                    "[{i}] = {:?} (0x{:08x}), and {differ} of {} values differ",
                    seen[i],
                    seen[i].to_bits(),
                    seen.len()
                ),
            ),
            None => (String::new(), String::new()),
        })
    }

    /// Asserts that an error is within its tolerance, and notes it as the tolerance's evidence. NaN is within nothing.
    #[track_caller]
    pub fn check_within(&mut self, what: impl Display, error: f64, tolerance: &Tolerance) -> bool {
        self.values += 1;
        self.within(Location::caller(), error, tolerance, || what.to_string())
    }

    /// Asserts that the largest difference of two lists of floats, in units of `scale`, is within its tolerance.
    #[track_caller]
    pub fn check_close_within(
        &mut self,
        what: impl Display,
        seen: &[f32],
        expected: &[f32],
        scale: f64,
        tolerance: &Tolerance,
    ) -> bool {
        let at = Location::caller();
        self.values += expected.len() as u64;
        if seen.len() != expected.len() {
            return self.assert(at, false, || lengths(&what, seen.len(), expected.len()));
        }
        let (i, gap) = worst_gap(seen, expected);
        // What is equal is within anything, in any unit, zero included.
        let error = if gap == 0.0 { 0.0 } else { gap / scale };
        let value = |list: &[f32]| list.get(i).copied().unwrap_or(0.0);
        self.within(at, error, tolerance, || {
            format!("{what}, worst at [{i}] ({:?} for {:?})", value(seen), value(expected))
        })
    }

    /// Notes an error as evidence for a tolerance, without an assertion: the largest is kept.
    pub fn note_error(&mut self, error: f64, tolerance: &Tolerance) {
        // JSON has no infinity, and a maximum would lose a NaN.
        let error = if error.is_nan() { f64::MAX } else { error.clamp(0.0, f64::MAX) };
        let on_the_clock = tolerance.entry().is_some_and(|e| e.clock);
        let (map, key) = match on_the_clock {
            true => (&mut self.timings, format!("{CLOCK_ERROR}{}", tolerance.name())),
            false => (&mut self.errors, tolerance.name().to_string()),
        };
        let kept = map.get(&key).map_or(error, |old| old.max(error));
        map.insert(key, kept);
    }

    fn within(
        &mut self,
        at: &'static Location<'static>,
        error: f64,
        tolerance: &Tolerance,
        what: impl FnOnce() -> String,
    ) -> bool {
        self.note_error(error, tolerance);
        let (limit, unit) = (tolerance.limit(), tolerance.unit());
        self.assert(at, error <= limit, || {
            let what = what();
            (format!("{what}: at most {limit:e} {unit} ({})", tolerance.name()), format!("{what}: {error:e}"))
        })
    }

    /// Asserts `seen <= limit`. NaN fails.
    #[track_caller]
    pub fn check_at_most(&mut self, what: impl Display, seen: f64, limit: f64) -> bool {
        self.values += 1;
        self.assert(Location::caller(), seen <= limit, || {
            (format!("{what} at most {limit}"), format!("{what} = {seen}"))
        })
    }

    /// Asserts `seen >= limit`. NaN fails.
    #[track_caller]
    pub fn check_at_least(&mut self, what: impl Display, seen: f64, limit: f64) -> bool {
        self.values += 1;
        self.assert(Location::caller(), seen >= limit, || {
            (format!("{what} at least {limit}"), format!("{what} = {seen}"))
        })
    }
}

fn lengths(what: &impl Display, seen: usize, expected: usize) -> (String, String) {
    (format!("{what} has {expected} elements"), format!("{what} has {seen} elements"))
}

/// The largest difference of two lists and its place; a NaN is further than anything.
fn worst_gap(seen: &[f32], expected: &[f32]) -> (usize, f64) {
    let mut worst = (0, 0.0);
    for (i, (s, e)) in seen.iter().zip(expected).enumerate() {
        let gap = (f64::from(*s) - f64::from(*e)).abs();
        let gap = if gap.is_nan() { f64::INFINITY } else { gap };
        if gap > worst.1 {
            worst = (i, gap);
        }
    }
    worst
}
