//! The project's own backends, registered for the command line and for `cargo test`. The suite's library never sees
//! them.

use bitnet_contracts::{BitNetInference, ConfigurationError, QuantizationType, Result, ThreadSafeInference};
use bitnet_engine::kernels::Isa;
use bitnet_engine::reference::{CandleFp32, NdarrayFp32};
use bitnet_engine::{CpuEngine, EngineOptions};
use conformance::{BackendFactory, Capabilities, CreateOptions, ModelFixture, Registry, Semantics};
use std::sync::Arc;

/// All of them.
pub fn registry() -> Registry {
    Registry::new().with(Cpu).with(Candle).with(Ndarray)
}

fn engine_options(options: &CreateOptions) -> Result<EngineOptions> {
    let mut engine = EngineOptions::default();
    engine.threads = options.threads;
    engine.isa = options.isa.as_deref().map(str::parse).transpose()?;
    engine.output_attentions = options.output_attentions;
    engine.output_hidden_states = options.output_hidden_states;
    Ok(engine)
}

/// Refuses an option that a backend takes and makes nothing of.
fn refuse(option: &str, asked: bool) -> Result<()> {
    let reason = format!("this backend has no choice of {option}");
    if asked { Err(ConfigurationError::IncompatibleConfig { reason }.into()) } else { Ok(()) }
}

/// The engine: integer arithmetic on packed ternary weights.
struct Cpu;

impl BackendFactory for Cpu {
    fn name(&self) -> &str {
        "cpu"
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::new(Semantics::W158A8)
            .with_thread_safe()
            .with_attention_weights()
            .with_hidden_states()
            .with_threads()
            .with_tokenizer()
            .with_batch()
            .with_bitwise()
            .with_instruction_sets(Isa::available().into_iter().map(Isa::name))
            .with_quantization(&[QuantizationType::I2S, QuantizationType::TL1, QuantizationType::TL2])
    }

    fn description(&self) -> Option<String> {
        let isa = Isa::from_environment().ok()?;
        Some(format!("bitnet-engine {}, {} kernels", env!("CARGO_PKG_VERSION"), isa.name()))
    }

    fn create(&self, model: &ModelFixture) -> Result<Box<dyn BitNetInference>> {
        self.create_with(model, &CreateOptions::default())
    }

    fn create_with(&self, model: &ModelFixture, options: &CreateOptions) -> Result<Box<dyn BitNetInference>> {
        Ok(Box::new(CpuEngine::load(model.dir(), &engine_options(options)?)?))
    }

    fn create_thread_safe(&self, model: &ModelFixture) -> Option<Result<Arc<dyn ThreadSafeInference>>> {
        let engine = CpuEngine::load(model.dir(), &EngineOptions::default());
        Some(engine.map(|engine| Arc::new(engine) as Arc<dyn ThreadSafeInference>))
    }
}

/// What both references declare.
fn reference_capabilities() -> Capabilities {
    Capabilities::new(Semantics::Fp32)
        .with_thread_safe()
        .with_attention_weights()
        .with_hidden_states()
        .with_tokenizer()
        .with_batch()
        .with_quantization(&[QuantizationType::I2S])
}

/// A reference on candle's operations.
struct Candle;

impl BackendFactory for Candle {
    fn name(&self) -> &str {
        "candle-fp32"
    }

    fn capabilities(&self) -> Capabilities {
        reference_capabilities().with_threads()
    }

    fn create(&self, model: &ModelFixture) -> Result<Box<dyn BitNetInference>> {
        self.create_with(model, &CreateOptions::default())
    }

    fn create_with(&self, model: &ModelFixture, options: &CreateOptions) -> Result<Box<dyn BitNetInference>> {
        refuse("instruction sets", options.isa.is_some())?;
        Ok(Box::new(CandleFp32::load(model.dir(), &engine_options(options)?)?))
    }

    fn create_thread_safe(&self, model: &ModelFixture) -> Option<Result<Arc<dyn ThreadSafeInference>>> {
        let engine = CandleFp32::load(model.dir(), &EngineOptions::default());
        Some(engine.map(|engine| Arc::new(engine) as Arc<dyn ThreadSafeInference>))
    }
}

/// A reference on ndarray.
struct Ndarray;

impl BackendFactory for Ndarray {
    fn name(&self) -> &str {
        "ndarray-fp32"
    }

    fn capabilities(&self) -> Capabilities {
        reference_capabilities()
    }

    fn create(&self, model: &ModelFixture) -> Result<Box<dyn BitNetInference>> {
        self.create_with(model, &CreateOptions::default())
    }

    fn create_with(&self, model: &ModelFixture, options: &CreateOptions) -> Result<Box<dyn BitNetInference>> {
        refuse("instruction sets", options.isa.is_some())?;
        refuse("threads", options.threads.is_some())?;
        Ok(Box::new(NdarrayFp32::load(model.dir(), &engine_options(options)?)?))
    }

    fn create_thread_safe(&self, model: &ModelFixture) -> Option<Result<Arc<dyn ThreadSafeInference>>> {
        let engine = NdarrayFp32::load(model.dir(), &EngineOptions::default());
        Some(engine.map(|engine| Arc::new(engine) as Arc<dyn ThreadSafeInference>))
    }
}
