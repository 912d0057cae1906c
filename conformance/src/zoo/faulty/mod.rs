//! Faults that real engines have had, one file a class. Each names its source and the check that is there to catch it.

mod architecture;
mod claims;
mod resources;
mod times;

use super::Fault;

/// Every fault, by class.
pub fn all() -> Vec<Fault> {
    let classes: [(&'static str, &'static [Fault]); 4] = [
        ("architecture", architecture::FAULTS),
        ("claims", claims::FAULTS),
        ("resources", resources::FAULTS),
        ("times", times::FAULTS),
    ];
    classes
        .into_iter()
        .flat_map(|(class, faults)| faults.iter().map(move |fault| Fault { class, ..fault.clone() }))
        .collect()
}
