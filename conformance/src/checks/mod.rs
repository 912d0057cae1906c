//! The checks: one file a category, one function a check, one number of `SPEC.md` each.
//!
//! They are written against the contracts alone. Where a backend declares that it lacks what a check needs, a probe of
//! `probes` runs in its place. What they share is in a few places: `support` makes calls, `stats` and `table` are the
//! arithmetic of their verdicts, `edit` makes the models that lie, `truth` says what is right on them.

mod arithmetic;
mod batch;
mod causality;
mod clear_rows;
mod concurrency;
mod determinism;
mod edit;
mod errors;
mod extent;
mod generation;
mod golden;
mod hostile;
mod kv_cache;
mod memory;
mod models;
mod numerics;
mod paths;
mod penalties;
pub mod probes;
mod process;
mod sampling;
mod shape;
mod sla;
mod slope;
mod stats;
mod support;
mod table;
mod text;
mod truth;

use crate::case::Check;
pub(crate) use probes::run;

/// Every check of the suite, in the order of the categories.
pub fn all() -> Vec<Check> {
    let mut all = [
        shape::CHECKS,
        numerics::CHECKS,
        arithmetic::CHECKS,
        golden::CHECKS,
        models::CHECKS,
        clear_rows::CHECKS,
        causality::CHECKS,
        kv_cache::CHECKS,
        determinism::CHECKS,
        batch::CHECKS,
        generation::CHECKS,
        text::CHECKS,
        sampling::CHECKS,
        penalties::CHECKS,
        errors::CHECKS,
        hostile::CHECKS,
        concurrency::CHECKS,
        memory::CHECKS,
        sla::CHECKS,
        extent::CHECKS,
        paths::CHECKS,
    ]
    .concat();
    all.sort_by_key(|check| check.category);
    all
}

#[cfg(test)]
mod spec_tests;
