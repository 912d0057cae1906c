//! Backends and checks that are made to misbehave.

use super::oracle_backend::OracleFactory;
use bitnet_contracts::{
    BitNetInference, Device, ForwardPassError, GenerationConfig, GenerationResult, InferenceError, InferenceOutput,
    KVCache, MemoryUsage, ModelConfig, QuantizationType, Result as EngineResult, Tensor,
};
use conformance::case::{Category, Check, CheckResult, Context, ModelSet, Stop};
use conformance::{BackendFactory, Capabilities, Capability, ModelFixture, Semantics};
use std::time::Duration;

/// A backend that cannot be built, beside the real one.
pub(super) struct Broken;

impl BackendFactory for Broken {
    fn name(&self) -> &str {
        "broken"
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::new(Semantics::Fp32).with_thread_safe()
    }

    fn create(&self, _: &ModelFixture) -> EngineResult<Box<dyn BitNetInference>> {
        Err(InferenceError::ForwardPass(ForwardPassError::NumericalInstability { details: "always".to_string() }))
    }
}

/// The oracle with logits that depend on the process, as they would on an address or on a hash map's order.
pub(super) struct Restless;

struct RestlessEngine(Box<dyn BitNetInference>);

impl BackendFactory for Restless {
    fn name(&self) -> &str {
        "restless"
    }

    fn capabilities(&self) -> Capabilities {
        OracleFactory.capabilities()
    }

    fn create(&self, model: &ModelFixture) -> EngineResult<Box<dyn BitNetInference>> {
        Ok(Box::new(RestlessEngine(OracleFactory.create(model)?)))
    }
}

impl BitNetInference for RestlessEngine {
    fn forward(&mut self, ids: &Tensor, cache: Option<&mut KVCache>) -> EngineResult<InferenceOutput> {
        let mut output = self.0.forward(ids, cache)?;
        let off = f64::from(std::process::id()) * 1e-6;
        output.logits = output.logits.affine(1.0, off)?;
        Ok(output)
    }

    fn generate(&mut self, prompt: &[u32], most: usize, config: &GenerationConfig) -> EngineResult<GenerationResult> {
        self.0.generate(prompt, most, config)
    }

    fn generate_deterministic(&mut self, prompt: &[u32], most: usize, seed: u64) -> EngineResult<GenerationResult> {
        self.0.generate_deterministic(prompt, most, seed)
    }

    fn config(&self) -> &ModelConfig {
        self.0.config()
    }

    fn device(&self) -> &Device {
        self.0.device()
    }

    fn supports_quantization(&self, qtype: QuantizationType) -> bool {
        self.0.supports_quantization(qtype)
    }

    fn memory_usage(&self) -> MemoryUsage {
        self.0.memory_usage()
    }

    fn reset(&mut self) -> EngineResult<()> {
        self.0.reset()
    }
}

const fn check(name: &'static str, run: fn(&mut Context<'_>) -> CheckResult) -> Check {
    Check::new("TST-1", name, Category::Errors, "a check of the framework's own tests", run)
}

fn hang(ctx: &mut Context<'_>) -> CheckResult {
    println!("about to hang");
    ctx.check(true, "a hang", "a hang");
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

fn overflow_the_stack(depth: u64) -> u64 {
    let block = std::hint::black_box([depth; 512]);
    if depth == u64::MAX { 0 } else { overflow_the_stack(depth + 1) + block[7] }
}

fn write_files(ctx: &mut Context<'_>) -> CheckResult {
    std::fs::write(ctx.scratch().join("scratch"), "x")?;
    std::fs::write(std::env::temp_dir().join("temporary"), "x")?;
    ctx.note(ctx.scratch().display().to_string());
    ctx.note(std::env::temp_dir().display().to_string());
    ctx.check(true, "", "");
    Ok(())
}

/// Compares what the first of two processes left with what the second has.
fn compare_processes(ctx: &mut Context<'_>, own: &str) -> CheckResult {
    let file = ctx.scratch().join("first");
    ctx.check(true, "", "");
    let Ok(first) = std::fs::read_to_string(&file) else {
        std::fs::write(&file, own)?;
        return Err(Stop::Inconclusive("the first of two".to_string()));
    };
    ctx.check_eq("what both processes have", own, first.as_str());
    Ok(())
}

pub(super) fn checks() -> Vec<Check> {
    let mut hanging = check("errors/hangs", hang);
    hanging.deadline = Some(Duration::from_millis(400));
    vec![
        check("errors/passes", |ctx| {
            ctx.check_slices("tokens", &[1, 2, 3], &[1, 2, 3]);
            ctx.measure("answer", 42.0);
            Ok(())
        }),
        check("errors/asserts_nothing", |_| Ok(())),
        check("errors/fails_softly", |ctx| {
            ctx.check_eq("sum", 1 + 1, 3);
            ctx.check_close_within("logits", &[1.0, 2.5], &[1.0, 2.0], 2.0, &conformance::tolerance::FP32_LOGIT);
            ctx.check_bits("bits", &[0.0], &[-0.0]);
            ctx.check_at_most("gap", f64::NAN, 1.0);
            ctx.check(true, "holds", "holds");
            Ok(())
        }),
        check("errors/fails_hard", |ctx| {
            ctx.require(false, "a thing", "no thing")?;
            ctx.check(false, "never", "reached");
            Ok(())
        }),
        check("errors/fails_much", |ctx| {
            for i in 0..100 {
                ctx.check_eq("i", i, -1);
            }
            Ok(())
        }),
        check("errors/measures_nan", |ctx| {
            ctx.check(true, "", "");
            ctx.measure_min("correlation", 1.0);
            ctx.measure_min("correlation", f64::NAN);
            Ok(())
        }),
        check("errors/panics", |ctx| {
            ctx.check(true, "", "");
            panic!("the reason of the panic")
        }),
        check("errors/aborts", |_| {
            eprintln!("last words");
            std::process::abort()
        }),
        check("errors/exits_well", |_| std::process::exit(0)),
        check("errors/overflows_the_stack", |ctx| {
            let sum = overflow_the_stack(0);
            ctx.check(sum > 0, "a sum", sum);
            Ok(())
        }),
        hanging,
        check("errors/chatters", |ctx| {
            for _ in 0..2000 {
                println!("{{\"serial\":0,\"outcome\":{{\"verdict\":\"fail\"}}}}");
                eprint!("no end of line, ");
            }
            ctx.check(true, "", "");
            Ok(())
        }),
        check("errors/gives_up", |_| Err(Stop::Inconclusive("too noisy".to_string()))),
        check("errors/fails_then_gives_up", |ctx| {
            ctx.check(false, "a", "b");
            Err(Stop::Inconclusive("too noisy".to_string()))
        }),
        check("errors/makes_an_engine", |ctx| {
            let engine = ctx.engine()?;
            ctx.check_eq("vocabulary", engine.config().vocab_size, ctx.facts().vocab_size);
            Ok(())
        }),
        check("errors/wants_threads", |ctx| {
            ctx.thread_safe()?;
            ctx.check(true, "", "");
            Ok(())
        }),
        check("errors/needs_attention", |_| Ok(())).needs(Capability::AttentionWeights),
        check("errors/expects_errors", |ctx| {
            let made: EngineResult<()> = Err(ForwardPassError::InvalidInput { reason: "r".to_string() }.into());
            let is_input =
                |e: &InferenceError| matches!(e, InferenceError::ForwardPass(ForwardPassError::InvalidInput { .. }));
            ctx.expect_error("right", made, is_input, "InvalidInput");
            ctx.expect_error("none", Ok(()), is_input, "InvalidInput");
            let other = ForwardPassError::NumericalInstability { details: "d".to_string() };
            ctx.expect_error("wrong", EngineResult::<()>::Err(other.into()), is_input, "InvalidInput");
            Ok(())
        }),
        check("errors/agrees_with_itself", |ctx| compare_processes(ctx, "the same")).twice(),
        check("errors/is_one_process", |ctx| compare_processes(ctx, &std::process::id().to_string())).twice(),
        check("errors/panics_at_once", |_| panic!("in the first process")).twice(),
        check("errors/writes_files", write_files),
        check("errors/alone", write_files).exclusive(),
        check("errors/own_process", write_files).fresh(),
        check("errors/on_every_model", |_| Ok(())).on(ModelSet::Every),
        check("errors/on_one_model", |_| Ok(())).on(ModelSet::Only("c02-h256-gqa2-untied")),
        check("errors/on_untied_models", |_| Ok(())).on(ModelSet::Where(|facts| !facts.tied)),
        check("errors/on_golden_models", |_| Ok(())).on(ModelSet::Golden),
    ]
}
