//! Calibration on backends whose errors are known: the golden oracle, which is right, with its logits bent by so much.
#![forbid(unsafe_code)]

#[path = "../examples/oracle_backend/mod.rs"]
mod oracle_backend;

use bitnet_contracts::{
    BitNetInference, Device, GenerationConfig, GenerationResult, InferenceOutput, KVCache, MemoryUsage, ModelConfig,
    QuantizationType, Result as EngineResult, Tensor,
};
use conformance::calibrate::{Evidence, Subject, measure};
use conformance::tolerance::{FP32_LOGIT, FP32_SELF};
use conformance::worker::run_check;
use conformance::{
    BackendFactory, Capabilities, Case, CaseResult, Check, Model, ModelFixture, ModelSet, Semantics, Verdict,
};
use oracle_backend::OracleFactory;
use std::sync::Arc;

/// The oracle with all logits times `1 + by`.
struct Bent {
    name: &'static str,
    by: f64,
    inner: OracleFactory,
}

impl BackendFactory for Bent {
    fn name(&self) -> &str {
        self.name
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::new(Semantics::Fp32)
    }

    fn create(&self, model: &ModelFixture) -> EngineResult<Box<dyn BitNetInference>> {
        Ok(Box::new(BentEngine { by: self.by, inner: self.inner.create(model)? }))
    }
}

struct BentEngine {
    by: f64,
    inner: Box<dyn BitNetInference>,
}

impl BitNetInference for BentEngine {
    fn forward(&mut self, input_ids: &Tensor, kv_cache: Option<&mut KVCache>) -> EngineResult<InferenceOutput> {
        let mut output = self.inner.forward(input_ids, kv_cache)?;
        output.logits = output.logits.affine(1.0 + self.by, 0.0)?;
        Ok(output)
    }

    fn generate(&mut self, prompt: &[u32], max: usize, config: &GenerationConfig) -> EngineResult<GenerationResult> {
        self.inner.generate(prompt, max, config)
    }

    fn generate_deterministic(&mut self, prompt: &[u32], max: usize, seed: u64) -> EngineResult<GenerationResult> {
        self.inner.generate_deterministic(prompt, max, seed)
    }

    fn config(&self) -> &ModelConfig {
        self.inner.config()
    }

    fn device(&self) -> &Device {
        self.inner.device()
    }

    fn supports_quantization(&self, qtype: QuantizationType) -> bool {
        self.inner.supports_quantization(qtype)
    }

    fn memory_usage(&self) -> MemoryUsage {
        self.inner.memory_usage()
    }

    fn reset(&mut self) -> EngineResult<()> {
        self.inner.reset()
    }
}

/// Runs cases in this process: none of these backends can take it down.
fn run(cases: &[Case]) -> Vec<CaseResult> {
    let root = tempfile::tempdir().expect("a folder");
    let one = |case: &Case| {
        let scratch = tempfile::tempdir().expect("a folder");
        let model = case.model.materialize(root.path()).expect("a model");
        CaseResult {
            id: case.id.clone(),
            backend: case.backend.name().to_string(),
            model: case.model.name().to_string(),
            model_argument: case.model.argument(),
            check: case.check.name.to_string(),
            requirement: case.check.id.to_string(),
            clause: case.check.clause.to_string(),
            category: case.check.category,
            exclusive: false,
            outcome: run_check(&case.check, &*case.backend, &model, scratch.path(), false),
        }
    };
    cases.iter().map(one).collect()
}

#[test]
fn the_errors_of_known_backends_are_found_in_spite_of_failed_assertions() {
    let bent = |name, by| Arc::new(Bent { name, by, inner: OracleFactory });
    let mut subjects =
        vec![Subject::registered(bent("straight", 0.0)), Subject::registered(bent("bent-by-rounding", 1e-6))];
    let faults = [("bent-too-little-to-tell", 3e-6), ("bent", 1e-4), ("bent-more", 0.5)];
    subjects.extend(faults.map(|(name, by)| Subject { honest: false, ..Subject::registered(bent(name, by)) }));
    let checks: Vec<_> = conformance::checks::all()
        .into_iter()
        .filter(|c| ["golden/logits", "shape/logits", "kv_cache/chunked_is_whole"].contains(&c.name))
        .collect();
    let wanted = ["context-32", "gqa2-untied-f32"];
    let models: Vec<_> = Model::built_in().into_iter().filter(|m| wanted.contains(&m.name())).map(Arc::new).collect();
    let (honest, faulty) = measure(&subjects, &checks, &models, &run);
    let names: Vec<&str> = honest.checks.iter().map(String::as_str).collect();
    assert_eq!(names, ["golden/logits", "kv_cache/chunked_is_whole"]);

    let found = Evidence::of(&FP32_LOGIT, &honest, &faulty);
    let (worst, nearest) = (found.honest.expect("an honest error"), found.faulty.expect("a faulty error"));
    assert!((0.9e-6..1.2e-6).contains(&worst.error) && worst.by.starts_with("bent-by-rounding/"), "{worst:?}");
    assert!((0.9e-4..1.1e-4).contains(&nearest.error) && nearest.by.starts_with("bent/"), "{nearest:?}");
    // None of them contradicts itself.
    let found = Evidence::of(&FP32_SELF, &honest, &faulty);
    assert!(found.honest.is_some_and(|s| s.error < 1e-6) && found.faulty.is_none());
}

#[test]
fn a_small_folder_is_held_to_the_oracle() {
    let dir = tempfile::tempdir().expect("a folder");
    fixtures::preset("gqa2-untied-f32", 7).expect("a preset").write_to(dir.path()).expect("written");
    let model = Arc::new(Model::folder(dir.path()).expect("a model"));
    assert_eq!(model.golden(), None);
    let golden = |c: &Check| matches!(c.models, ModelSet::Golden);
    let checks: Vec<Check> = conformance::checks::all().into_iter().filter(golden).collect();
    assert!(checks.iter().all(|c| c.models.takes(&model, true) && !c.models.takes(&model, false)));
    let verdicts = |by| {
        let backend: Arc<dyn BackendFactory> = Arc::new(Bent { name: "bent", by, inner: OracleFactory });
        let case = |check: &Check| Case {
            id: check.case_id("bent", model.name()),
            backend: backend.clone(),
            model: model.clone(),
            check: check.clone(),
            lacks: None,
        };
        let results = run(&checks.iter().map(case).collect::<Vec<_>>());
        results.into_iter().map(|r| (r.check, r.outcome.verdict)).collect::<Vec<_>>()
    };
    let right = verdicts(0.0);
    assert!(right.len() >= 2 && right.iter().all(|(_, v)| *v == Verdict::Pass), "{right:?}");
    let wrong = verdicts(1e-3);
    assert!(wrong.contains(&("golden/logits".to_string(), Verdict::Fail)), "{wrong:?}");
}
