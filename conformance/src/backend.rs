//! How a backend enters the suite: a factory with an honest description of what it can do, and an explicit registry.
//!
//! Nothing registers itself. A test target names its factories, so the list of backends under test can be read in one
//! place, and a name that was asked for but never registered is an error instead of an empty, green run.

use crate::invariance::{Axis, Invariance, Level};
use crate::model::ModelFixture;
use bitnet_contracts::{BitNetInference, ConfigurationError, InferenceError, QuantizationType, ThreadSafeInference};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Which of the two forward passes a backend computes. The checks hold it to the golden logits of that one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Semantics {
    /// Ternary weights, float activations: the "FP32 reference" of the contracts.
    #[serde(rename = "fp32")]
    Fp32,
    /// Ternary weights, activations quantised to int8 per token: the arithmetic BitNet b1.58 is trained with.
    #[serde(rename = "w1.58a8")]
    W158A8,
}

impl Semantics {
    /// The name used in reports: `fp32` or `w1.58a8`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fp32 => "fp32",
            Self::W158A8 => "w1.58a8",
        }
    }

    /// The same choice in the terms of the oracle.
    pub const fn oracle(self) -> golden::oracle::Semantics {
        match self {
            Self::Fp32 => golden::oracle::Semantics::Fp32,
            Self::W158A8 => golden::oracle::Semantics::W158A8,
        }
    }
}

/// How much rounding a backend adds before its activation quantiser (or, in `fp32` semantics, anywhere).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Noise {
    /// Everything outside the ternary products is at least 32-bit float.
    F32,
    /// Somewhere 16-bit floats are used (KV cache, norms, residual stream): gated on correlation, not on single values.
    Coarse,
}

/// Something that a backend may lack. A check names what it needs; where the backend declares that it lacks it, a probe
/// asks for it all the same, and the honest answer is the typed error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Capability {
    /// `forward` with more than one sequence; without it a `ForwardPassError` or a `ConfigurationError`.
    Batch,
    /// `CreateOptions::output_attentions`; without it a `ConfigurationError`, or outputs that stay None.
    AttentionWeights,
    /// `CreateOptions::output_hidden_states`; without it the same.
    HiddenStates,
    /// `CreateOptions::threads`; without it a `ConfigurationError`.
    Threads,
    /// `CreateOptions::isa`; without it a `ConfigurationError`.
    InstructionSets,
    /// `BackendFactory::create_thread_safe`; without it None.
    ThreadSafe,
    /// Text and stop sequences by the model's tokenizer; without it stop sequences are a `ConfigurationError` or
    /// `MissingTokenizer`, and texts are empty.
    Tokenizer,
}

impl Capability {
    /// Every capability.
    pub const ALL: [Self; 7] = [
        Self::Batch,
        Self::AttentionWeights,
        Self::HiddenStates,
        Self::Threads,
        Self::InstructionSets,
        Self::ThreadSafe,
        Self::Tokenizer,
    ];

    /// The name in reports: what is missing.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Batch => "batches of several sequences",
            Self::AttentionWeights => "attention weights",
            Self::HiddenStates => "hidden states",
            Self::Threads => "a choice of threads",
            Self::InstructionSets => "a choice of instruction sets",
            Self::ThreadSafe => "a thread-safe engine",
            Self::Tokenizer => "a tokenizer",
        }
    }
}

impl std::fmt::Display for Capability {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// What a backend declares about itself. The suite holds the backend to all of it: what is declared absent must be
/// refused, and what is claimed must hold.
///
/// Start from [`Capabilities::new`], which promises only what every backend must do, and add.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[non_exhaustive]
pub struct Capabilities {
    /// The forward pass computed.
    pub semantics: Semantics,
    /// Rounding noise of that forward pass.
    pub noise: Noise,
    /// `create_thread_safe` returns an engine that many threads may call at once.
    pub thread_safe: bool,
    /// `CreateOptions::output_attentions` is honoured.
    pub attention_weights: bool,
    /// `CreateOptions::output_hidden_states` is honoured.
    pub hidden_states: bool,
    /// `CreateOptions::threads` is honoured.
    pub threads: bool,
    /// The model's `tokenizer.json` is used for `generated_text` and stop sequences.
    pub tokenizer: bool,
    /// `forward` takes more than one sequence at a time.
    pub batch: bool,
    /// What leaves the results as they are, and how exactly.
    pub invariance: Invariance,
    /// The instruction sets that `CreateOptions::isa` can force the backend to on this machine, by the backend's names.
    pub instruction_sets: Vec<String>,
    /// What `supports_quantization` answers "yes" to.
    #[serde(with = "quantization_names")]
    #[schemars(with = "Vec<String>")]
    pub quantization: Vec<QuantizationType>,
}

impl Capabilities {
    /// The least a backend can be: one sequence at a time, one thread, nothing optional, I2_S weights.
    pub fn new(semantics: Semantics) -> Self {
        Self {
            semantics,
            noise: Noise::F32,
            thread_safe: false,
            attention_weights: false,
            hidden_states: false,
            threads: false,
            tokenizer: false,
            batch: false,
            invariance: Invariance::default(),
            instruction_sets: Vec::new(),
            quantization: vec![QuantizationType::I2S],
        }
    }

    /// Declares the rounding noise.
    #[must_use]
    pub fn with_noise(mut self, noise: Noise) -> Self {
        self.noise = noise;
        self
    }

    /// Declares that `create_thread_safe` works.
    #[must_use]
    pub fn with_thread_safe(mut self) -> Self {
        self.thread_safe = true;
        self
    }

    /// Declares attention weights on demand.
    #[must_use]
    pub fn with_attention_weights(mut self) -> Self {
        self.attention_weights = true;
        self
    }

    /// Declares hidden states on demand.
    #[must_use]
    pub fn with_hidden_states(mut self) -> Self {
        self.hidden_states = true;
        self
    }

    /// Declares that the number of threads can be chosen.
    #[must_use]
    pub fn with_threads(mut self) -> Self {
        self.threads = true;
        self
    }

    /// Declares text output through the model's tokenizer.
    #[must_use]
    pub fn with_tokenizer(mut self) -> Self {
        self.tokenizer = true;
        self
    }

    /// Declares batches of more than one sequence.
    #[must_use]
    pub fn with_batch(mut self) -> Self {
        self.batch = true;
        self
    }

    /// Declares results that do not depend, by a single bit, on chunking, batch, threads, instruction set or process.
    #[must_use]
    pub fn with_bitwise(self) -> Self {
        self.with_invariance(Invariance::bitwise())
    }

    /// Declares what leaves the results as they are, in place of what the contracts ask of everybody.
    #[must_use]
    pub fn with_invariance(mut self, invariance: Invariance) -> Self {
        self.invariance = invariance;
        self
    }

    /// Declares the instruction sets that the backend can be forced to on this machine.
    #[must_use]
    pub fn with_instruction_sets(mut self, names: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.instruction_sets = names.into_iter().map(Into::into).collect();
        self
    }

    /// Whether the backend declares that it has a capability.
    pub fn has(&self, capability: Capability) -> bool {
        match capability {
            Capability::Batch => self.batch,
            Capability::AttentionWeights => self.attention_weights,
            Capability::HiddenStates => self.hidden_states,
            Capability::Threads => self.threads,
            Capability::InstructionSets => !self.instruction_sets.is_empty(),
            Capability::ThreadSafe => self.thread_safe,
            Capability::Tokenizer => self.tokenizer,
        }
    }

    /// The level claimed on an axis; `None` where nothing is claimed or the backend has nothing to vary.
    pub fn claim(&self, axis: Axis) -> Option<Level> {
        let claims = &self.invariance;
        match axis {
            Axis::Runs => Some(Level::Bitwise),
            Axis::Threads => claims.threads.filter(|_| self.has(Capability::Threads)),
            Axis::Batch => claims.batch.filter(|_| self.has(Capability::Batch)),
            Axis::Chunking => claims.chunking,
            Axis::InstructionSet => claims.instruction_set.filter(|_| self.has(Capability::InstructionSets)),
            Axis::Process => claims.process,
            Axis::Device => claims.device,
        }
    }

    /// Declares the supported quantisation types, in place of I2_S alone.
    #[must_use]
    pub fn with_quantization(mut self, types: &[QuantizationType]) -> Self {
        self.quantization = types.to_vec();
        self
    }
}

/// How an engine is to be built. The default asks for nothing special, and every backend must accept it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CreateOptions {
    /// Worker threads of the engine; `None` leaves the choice to the backend.
    pub threads: Option<usize>,
    /// Fill `InferenceOutput::attention_weights`.
    pub output_attentions: bool,
    /// Fill `InferenceOutput::hidden_states`.
    pub output_hidden_states: bool,
    /// Compute with this instruction set, by the backend's name for it; `None` leaves the choice to the backend.
    pub isa: Option<String>,
}

impl CreateOptions {
    /// Asks for a number of threads.
    #[must_use]
    pub fn with_threads(mut self, threads: usize) -> Self {
        self.threads = Some(threads);
        self
    }

    /// Asks for an instruction set.
    #[must_use]
    pub fn with_isa(mut self, name: impl Into<String>) -> Self {
        self.isa = Some(name.into());
        self
    }

    /// Asks for attention weights.
    #[must_use]
    pub fn with_attentions(mut self) -> Self {
        self.output_attentions = true;
        self
    }

    /// Asks for hidden states.
    #[must_use]
    pub fn with_hidden_states(mut self) -> Self {
        self.output_hidden_states = true;
        self
    }
}

/// A backend under test: a name, a declaration, and the means to build an engine on a model.
pub trait BackendFactory: Send + Sync {
    /// The name in case ids and on the command line: lower-case letters, digits, `-`, `_` and `.`.
    fn name(&self) -> &str;

    /// What the backend declares about itself.
    fn capabilities(&self) -> Capabilities;

    /// One line for the report on what is behind the name: version, kernels, device. The provided method says nothing.
    fn description(&self) -> Option<String> {
        None
    }

    /// Builds an engine on the model of the fixture, with default options.
    ///
    /// # Errors
    /// Whatever keeps the backend from loading this model.
    fn create(&self, model: &ModelFixture) -> bitnet_contracts::Result<Box<dyn BitNetInference>>;

    /// Builds an engine with options. The provided method knows the default options only.
    ///
    /// # Errors
    /// `InferenceError::Configuration` for an option that the backend does not have, else as [`Self::create`].
    fn create_with(
        &self,
        model: &ModelFixture,
        options: &CreateOptions,
    ) -> bitnet_contracts::Result<Box<dyn BitNetInference>> {
        if *options == CreateOptions::default() {
            return self.create(model);
        }
        Err(InferenceError::Configuration(ConfigurationError::IncompatibleConfig {
            reason: format!("backend {} has no options, and was asked for {options:?}", self.name()),
        }))
    }

    /// Builds an engine that many threads may use at once, or `None` where the backend has none.
    fn create_thread_safe(
        &self,
        _model: &ModelFixture,
    ) -> Option<bitnet_contracts::Result<Arc<dyn ThreadSafeInference>>> {
        None
    }
}

/// Why a registry, or a choice from it, is not usable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// Two factories have one name.
    #[error("two backends are registered as {name:?}")]
    Duplicate {
        /// The name.
        name: String,
    },
    /// A name that would make case ids ambiguous.
    #[error("backend name {name:?} is not usable: use lower-case letters, digits, '-', '_' and '.'")]
    InvalidName {
        /// The name.
        name: String,
    },
    /// A name was asked for that nobody registered.
    #[error("no backend {name:?}; registered: {}", known.join(", "))]
    Unknown {
        /// The name asked for.
        name: String,
        /// The registered names, in order.
        known: Vec<String>,
    },
    /// There is no backend at all.
    #[error("no backend is registered")]
    Empty,
}

/// The backends under test, in the order of registration.
#[derive(Clone, Default)]
pub struct Registry {
    factories: Vec<Arc<dyn BackendFactory>>,
    fault: Option<RegistryError>,
}

impl Registry {
    /// A registry with nothing in it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a backend. A bad or repeated name is remembered and reported by [`Self::validate`], which every entry
    /// point of the suite calls first, so that registrations can be chained.
    #[must_use]
    pub fn with(mut self, factory: impl BackendFactory + 'static) -> Self {
        let name = factory.name().to_string();
        let usable = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '_' | '.');
        let fault = if name.is_empty() || !name.chars().all(usable) {
            Some(RegistryError::InvalidName { name })
        } else if self.factories.iter().any(|f| f.name() == name) {
            Some(RegistryError::Duplicate { name })
        } else {
            self.factories.push(Arc::new(factory));
            None
        };
        self.fault = self.fault.or(fault);
        self
    }

    /// Checks that all registrations were sound and that there is at least one.
    ///
    /// # Errors
    /// The first faulty registration, or [`RegistryError::Empty`].
    pub fn validate(&self) -> Result<(), RegistryError> {
        match &self.fault {
            Some(fault) => Err(fault.clone()),
            None if self.factories.is_empty() => Err(RegistryError::Empty),
            None => Ok(()),
        }
    }

    /// The registered names, in order.
    pub fn names(&self) -> Vec<String> {
        self.factories.iter().map(|f| f.name().to_string()).collect()
    }

    /// The registered factories, in order.
    pub fn factories(&self) -> &[Arc<dyn BackendFactory>] {
        &self.factories
    }

    /// The factory of a name.
    ///
    /// # Errors
    /// [`RegistryError::Unknown`] with the list of names.
    pub fn get(&self, name: &str) -> Result<&Arc<dyn BackendFactory>, RegistryError> {
        self.factories
            .iter()
            .find(|f| f.name() == name)
            .ok_or_else(|| RegistryError::Unknown { name: name.to_string(), known: self.names() })
    }

    /// The registry cut down to the given names, in the registry's order. An empty list keeps everything.
    ///
    /// # Errors
    /// [`RegistryError::Unknown`] for a name that is not registered.
    pub fn select(&self, names: &[String]) -> Result<Self, RegistryError> {
        for name in names {
            self.get(name)?;
        }
        let keep = |f: &&Arc<dyn BackendFactory>| names.is_empty() || names.iter().any(|n| n == f.name());
        Ok(Self { factories: self.factories.iter().filter(keep).cloned().collect(), fault: self.fault.clone() })
    }
}

/// Quantisation types by name, so that reports can be read back without the contracts depending on this crate.
mod quantization_names {
    use bitnet_contracts::QuantizationType;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(types: &[QuantizationType], to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(types.iter().map(|t| format!("{t:?}")))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<QuantizationType>, D::Error> {
        let known = [QuantizationType::I2S, QuantizationType::TL1, QuantizationType::TL2];
        Vec::<String>::deserialize(from)?
            .into_iter()
            .map(|name| {
                known
                    .iter()
                    .find(|t| format!("{t:?}") == name)
                    .cloned()
                    .ok_or_else(|| D::Error::custom(format!("unknown quantisation type {name:?}")))
            })
            .collect()
    }
}
