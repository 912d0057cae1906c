//! Faults that real engines have had, one file a class. Each names its source and the check that is there to catch it.

mod architecture;
mod numbers;
mod outputs;
mod weights;

use super::Fault;

/// Every fault, by class.
pub fn all() -> Vec<Fault> {
    let classes: [(&'static str, &'static [Fault]); 4] = [
        ("weights", weights::FAULTS),
        ("architecture", architecture::FAULTS),
        ("numbers", numbers::FAULTS),
        ("outputs", outputs::FAULTS),
    ];
    classes
        .into_iter()
        .flat_map(|(class, faults)| faults.iter().map(move |fault| Fault { class, ..fault.clone() }))
        .collect()
}
