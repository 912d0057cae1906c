//! Faults that real engines have had, one file a class. Each names its source and the check that is there to catch it.

mod architecture;
mod batch;
mod cache;
mod claims;
mod coarse;
mod concurrency;
mod determinism;
mod errors;
mod extent;
mod files;
mod generation;
mod numbers;
mod outputs;
mod paths;
mod penalties;
mod resources;
mod rows;
mod sampling;
mod state;
mod text;
mod times;
mod weights;

use super::Fault;
use super::naive::{Deviation, Naive};
use crate::case::Category;
use bitnet_contracts::{GenerationConfig, GenerationResult, Result};
use std::sync::Arc;

/// What a forward pass that is another function, and the same one everywhere, shows in: all else compares it with itself.
const FORWARD: &[Category] = &[Category::Shape, Category::Numerics, Category::Golden, Category::Causality];

/// What a forward pass that is not the same function everywhere shows in.
const STATEFUL: &[Category] =
    &[Category::Numerics, Category::Golden, Category::KvCache, Category::Determinism, Category::Batch];

/// What has to do with batches.
const BATCHES: &[Category] =
    &[Category::Shape, Category::Numerics, Category::Golden, Category::KvCache, Category::Determinism, Category::Batch];

type Make = fn() -> Arc<dyn Deviation>;

/// Another way through a whole generation.
struct Generates(fn(&mut Naive, &[u32], usize, &GenerationConfig) -> Result<GenerationResult>);

impl Deviation for Generates {
    fn generate(
        &self,
        engine: &mut Naive,
        prompt: &[u32],
        max_tokens: usize,
        config: &GenerationConfig,
    ) -> Result<GenerationResult> {
        (self.0)(engine, prompt, max_tokens, config)
    }
}

/// A generation with a configuration that is changed before it is used.
struct Configured(fn(&mut GenerationConfig));

impl Deviation for Configured {
    fn generate(
        &self,
        engine: &mut Naive,
        prompt: &[u32],
        max_tokens: usize,
        config: &GenerationConfig,
    ) -> Result<GenerationResult> {
        let mut config = config.clone();
        (self.0)(&mut config);
        engine.honest_generate(prompt, max_tokens, &config)
    }
}

/// A forward pass that is another function, and the same one everywhere.
const fn forward(
    name: &'static str,
    what: &'static str,
    source: &'static str,
    killer: &'static str,
    make: Make,
) -> Fault {
    Fault::new(name, what, source, killer, make).only(FORWARD)
}

/// A forward pass that depends on how it is called.
const fn stateful(
    name: &'static str,
    what: &'static str,
    source: &'static str,
    killer: &'static str,
    make: Make,
) -> Fault {
    Fault::new(name, what, source, killer, make).only(STATEFUL)
}

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
        ("coarse", coarse::FAULTS),
        ("rows", rows::FAULTS),
        ("extent", extent::FAULTS),
        ("paths", paths::FAULTS),
        ("concurrency", concurrency::FAULTS),
    ];
    classes
        .iter()
        .flat_map(|(class, faults)| faults.iter().map(move |fault| Fault { class, ..fault.clone() }))
        .collect()
}
