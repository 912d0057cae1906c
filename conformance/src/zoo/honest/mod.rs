//! Engines that are right in another way. The suite must pass every one: a false alarm is a defect like any other.

mod arithmetic;
mod errors;
mod sampling;
mod state;

use super::HonestVariant;
use super::naive::Honest;
use crate::backend::Semantics;
use std::sync::Arc;

/// All of them.
pub fn all() -> Vec<HonestVariant> {
    let plain = [
        HonestVariant {
            name: "plain",
            what: "the naive engine as it is",
            declare: |c| c,
            semantics: Semantics::W158A8,
            make: || Arc::new(Honest),
        },
        HonestVariant {
            name: "plain-fp32",
            what: "the naive engine in fp32 semantics",
            declare: |c| c,
            semantics: Semantics::Fp32,
            make: || Arc::new(Honest),
        },
    ];
    let themes = [arithmetic::VARIANTS, state::VARIANTS, sampling::VARIANTS, errors::VARIANTS];
    plain.iter().chain(themes.into_iter().flatten()).cloned().collect()
}
