//! Reproducers: a failing case made small, written down in two kilobytes, and run again; and the fuzzer that looks for
//! such cases.
//!
//! A [`Reproducer`] names a check and a model, or a [`Schedule`] of calls and a synthetic model. A [`Shrinker`] makes either
//! smaller for as long as the backend fails in the same way: it tries fewer layers, heads, sizes and tokens in a fixed
//! order, each candidate in a worker process, so that crashes and hangs shrink like wrong answers. [`replay`] runs one.
//! A [`Fuzzer`] draws models and schedules from a seed and holds every answer to the oracle.

mod command;
mod draw;
mod file;
mod fuzz;
pub mod limits;
mod play;
mod replay;
mod schedule;
mod shrink;
mod smaller;
mod truth;

pub(crate) use command::{FuzzArgs, ReplayArgs, ShrinkArgs, fuzz_command, replay_command};
pub use file::{CheckCase, ModelChoice, Observed, REPRODUCER_VERSION, ReproError, Reproducer, ScheduleCase, Synthetic};
pub use fuzz::{Finding, FuzzTally, Fuzzer, Iteration};
pub(crate) use play::play;
pub use replay::replay;
pub use schedule::{Call, Form, Forward, Generate, Schedule};
pub use shrink::{Shrinker, attach, reproduce};
