//! Faults that real engines have had, one file a class. Each names its source and the check that is there to catch it.

mod architecture;
mod batch;
mod cache;
mod concurrency;
mod determinism;
mod state;

use super::Fault;

/// Every fault, by class.
pub fn all() -> Vec<Fault> {
    let classes: &[(&'static str, &'static [Fault])] = &[
        ("architecture", architecture::FAULTS),
        ("cache", cache::FAULTS),
        ("state", state::FAULTS),
        ("determinism", determinism::FAULTS),
        ("batch", batch::FAULTS),
        ("concurrency", concurrency::FAULTS),
    ];
    classes
        .iter()
        .flat_map(|(class, faults)| faults.iter().map(move |fault| Fault { class, ..fault.clone() }))
        .collect()
}
