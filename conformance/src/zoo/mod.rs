//! Backends that must be caught and backends that must pass: what proves that the suite can tell them apart.
//!
//! [`faulty::all`] lists faults that real engines have had, each a [`naive::Deviation`] of one complete, plain engine;
//! [`honest::all`] lists engines that are right in another way. [`prove::run`] holds the whole suite against both.

pub mod faulty;
pub mod honest;
pub mod naive;
pub mod proof;
pub mod prove;

#[cfg(test)]
mod tests;

use crate::backend::{BackendFactory, Capabilities, CreateOptions, Registry, Semantics};
use crate::case::Category;
use crate::model::ModelFixture;
use bitnet_contracts::{
    BitNetInference, ForwardPassMetrics, GenerationConfig, GenerationResult, MemoryUsage, Result, ThreadSafeInference,
};
use naive::{Call, Deviation, Naive};
use std::sync::Arc;

/// One fault: an engine that is wrong in one way.
#[derive(Clone)]
pub struct Fault {
    /// Its name; the backend is called `faulty-NAME`.
    pub name: &'static str,
    /// What it is about: the name of the file that it stands in.
    pub class: &'static str,
    /// What is wrong, in one line.
    pub what: &'static str,
    /// Where real engines had it, or the clause that it breaks.
    pub source: &'static str,
    /// The check that is there to catch it.
    pub killer: &'static str,
    /// The function that its engine computes where it is right.
    pub semantics: Semantics,
    /// A built-in model on which it shows, where the proof's own do not do.
    pub model: Option<&'static str>,
    /// The categories it is tried on, where trying it on all takes too long: it is slow, and right.
    pub only: Option<&'static [Category]>,
    /// Changes what its engine declares.
    pub declare: fn(Capabilities) -> Capabilities,
    /// The deviation.
    pub build: Build,
}

/// How a deviation is made.
#[derive(Clone, Copy)]
pub enum Build {
    /// One of its own.
    New(fn() -> Arc<dyn Deviation>),
    /// The honest one, but for a change to the metrics of every pass.
    Metrics(fn(&mut ForwardPassMetrics, &Call)),
    /// But for a change to every memory figure.
    Memory(fn(&mut MemoryUsage)),
    /// But for a change to every result of a generation.
    Result(fn(&mut GenerationResult)),
}

impl Build {
    fn make(self) -> Arc<dyn Deviation> {
        match self {
            Self::New(make) => make(),
            change => Arc::new(Lie(change)),
        }
    }
}

/// An honest engine that lies when it is asked.
struct Lie(Build);

impl Deviation for Lie {
    fn metrics(&self, metrics: &mut ForwardPassMetrics, call: &Call) {
        if let Build::Metrics(change) = self.0 {
            change(metrics, call);
        }
    }

    fn memory(&self, usage: &mut MemoryUsage) {
        if let Build::Memory(change) = self.0 {
            change(usage);
        }
    }

    fn result(&self, result: &mut GenerationResult, _: &GenerationConfig) {
        if let Build::Result(change) = self.0 {
            change(result);
        }
    }
}

impl Fault {
    /// A fault of the `w1.58a8` engine that shows on any model.
    pub const fn new(
        name: &'static str,
        what: &'static str,
        source: &'static str,
        killer: &'static str,
        make: fn() -> Arc<dyn Deviation>,
    ) -> Self {
        Self::with(name, what, source, killer, Build::New(make))
    }

    /// The same from any [`Build`].
    pub const fn with(
        name: &'static str,
        what: &'static str,
        source: &'static str,
        killer: &'static str,
        build: Build,
    ) -> Self {
        let (semantics, declare) = (Semantics::W158A8, (|c| c) as fn(Capabilities) -> Capabilities);
        Self { name, class: "", what, source, killer, semantics, model: None, only: None, declare, build }
    }

    /// The same in the other semantics.
    #[must_use]
    pub const fn fp32(mut self) -> Self {
        self.semantics = Semantics::Fp32;
        self
    }

    /// Names a model on which it shows.
    #[must_use]
    pub const fn on(mut self, model: &'static str) -> Self {
        self.model = Some(model);
        self
    }

    /// Tries it on some categories only.
    #[must_use]
    pub const fn only(mut self, categories: &'static [Category]) -> Self {
        self.only = Some(categories);
        self
    }

    /// Changes what is declared.
    #[must_use]
    pub const fn declaring(mut self, declare: fn(Capabilities) -> Capabilities) -> Self {
        self.declare = declare;
        self
    }

    /// The backend.
    pub fn factory(&self) -> ZooFactory {
        ZooFactory {
            name: format!("faulty-{}", self.name),
            capabilities: (self.declare)(ZooFactory::all_capabilities(self.semantics)),
            build: self.build,
        }
    }
}

/// One honest engine that differs from the others.
#[derive(Clone)]
pub struct HonestVariant {
    /// Its name; the backend is called `honest-NAME`.
    pub name: &'static str,
    /// In what it differs.
    pub what: &'static str,
    /// What it declares, from everything that the naive engine can do.
    pub declare: fn(Capabilities) -> Capabilities,
    /// The function that it computes.
    pub semantics: Semantics,
    /// The deviation.
    pub make: fn() -> Arc<dyn Deviation>,
}

impl HonestVariant {
    /// The backend.
    pub fn factory(&self) -> ZooFactory {
        ZooFactory {
            name: format!("honest-{}", self.name),
            capabilities: (self.declare)(ZooFactory::all_capabilities(self.semantics)),
            build: Build::New(self.make),
        }
    }
}

/// Makes the engines of one inhabitant of either zoo.
pub struct ZooFactory {
    name: String,
    capabilities: Capabilities,
    build: Build,
}

impl ZooFactory {
    /// Everything that the naive engine can do.
    pub fn all_capabilities(semantics: Semantics) -> Capabilities {
        Capabilities::new(semantics)
            .with_thread_safe()
            .with_attention_weights()
            .with_hidden_states()
            .with_threads()
            .with_tokenizer()
            .with_batch()
            .with_instruction_sets(["scalar", "paired"])
            .with_bitwise()
    }

    fn load(&self, model: &ModelFixture, options: &CreateOptions) -> Result<Naive> {
        Naive::load(model, &self.capabilities, options, self.build.make())
    }
}

impl BackendFactory for ZooFactory {
    fn name(&self) -> &str {
        &self.name
    }

    fn capabilities(&self) -> Capabilities {
        self.capabilities.clone()
    }

    fn create(&self, model: &ModelFixture) -> Result<Box<dyn BitNetInference>> {
        self.create_with(model, &CreateOptions::default())
    }

    fn create_with(&self, model: &ModelFixture, options: &CreateOptions) -> Result<Box<dyn BitNetInference>> {
        Ok(Box::new(self.load(model, options)?))
    }

    fn create_thread_safe(&self, model: &ModelFixture) -> Option<Result<Arc<dyn ThreadSafeInference>>> {
        let wanted = self.build.make().thread_safe(&self.capabilities);
        wanted.then(|| {
            let engine = self.load(model, &CreateOptions::default());
            engine.map(|engine| Arc::new(engine) as Arc<dyn ThreadSafeInference>)
        })
    }
}

/// A registry extended by every inhabitant of both zoos: what a worker of a proof must know.
#[must_use]
pub fn with_zoo(registry: Registry) -> Registry {
    let registry = faulty::all().iter().fold(registry, |registry, fault| registry.with(fault.factory()));
    honest::all().iter().fold(registry, |registry, variant| registry.with(variant.factory()))
}
