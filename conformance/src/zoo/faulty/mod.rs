//! Faults that real engines have had, one file a class. Each names its source and the check that is there to catch it.

mod architecture;
mod batch;
mod cache;
mod claims;
mod concurrency;
mod determinism;
mod errors;
mod files;
mod generation;
mod numbers;
mod outputs;
mod penalties;
mod resources;
mod sampling;
mod state;
mod text;
mod times;
mod weights;

use super::Fault;

/// Every fault, by class.
pub fn all() -> Vec<Fault> {
    let classes: &[(&'static str, &'static [Fault])] = &[
        ("weights", weights::FAULTS),
        ("architecture", architecture::FAULTS),
        ("numbers", numbers::FAULTS),
        ("outputs", outputs::FAULTS),
        ("sampling", sampling::FAULTS),
        ("penalties", penalties::FAULTS),
        ("generation", generation::FAULTS),
        ("text", text::FAULTS),
        ("errors", errors::FAULTS),
        ("files", files::FAULTS),
        ("claims", claims::FAULTS),
        ("resources", resources::FAULTS),
        ("times", times::FAULTS),
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
