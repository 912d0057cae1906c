//! What backends declare, held against what they do: absences are probed, and claims of invariance are tested at their
//! level.
//!
//! The backends are the example's oracle with one thing changed. Checks run in this process.
#![forbid(unsafe_code)]

#[path = "../examples/oracle_backend/mod.rs"]
mod oracle_backend;
#[cfg(feature = "own-backends")]
#[path = "../src/bin/own_backends/mod.rs"]
mod own_backends;

use bitnet_contracts::{
    BitNetInference, ConcurrentInferenceEngine, DType, Device, ForwardPassError, GenerationConfig, GenerationResult,
    InferenceError, InferenceOutput, KVCache, MemoryUsage, ModelConfig, ModelError, QuantizationType, Result, Tensor,
    ThreadSafeInference,
};
use conformance::invariance::{Axis, Invariance, Level, Standing, Summary};
use conformance::report::Report;
use conformance::suite::{Selection, Suite};
use conformance::tolerance::{FALSE_ALARM, RUN_FALSE_ALARM, STATISTICAL_ASSERTIONS};
use conformance::verdict::{CaseResult, Outcome, Verdict};
use conformance::worker::run_check;
use conformance::{BackendFactory, Capabilities, Category, CreateOptions, ModelFixture, Noise, Registry, Semantics};
use oracle_backend::OracleFactory;
use rstest::rstest;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

/// What is changed in the answers of the oracle.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Lie {
    None,
    /// A batch is refused with a `ForwardPassError`.
    RefusesBatch,
    /// A batch is refused with another error.
    RefusesBatchOddly,
    /// Every row of a batch has the logits of the first.
    FirstRowForAll,
    /// Logits in a batch are off by this much at one place a row.
    Rounds(f32),
    /// In a batch the second most likely token becomes the most likely.
    SwapsTop,
    /// Attention weights are there and are no weights.
    Attention,
    /// Hidden states are there and are not the head's input.
    HiddenStates,
    /// Stop sequences are passed over.
    IgnoresStopSequences,
    /// Text comes from nowhere.
    Babbles,
}

struct Engine {
    inner: Box<dyn BitNetInference>,
    lie: Lie,
}

impl Engine {
    /// Changes the logits of a batch, row by row.
    fn change(&self, output: &mut InferenceOutput) -> Result<()> {
        let (batch, seq, vocab) = output.logits.dims3()?;
        let mut data = output.logits.flatten_all()?.to_vec1::<f32>()?;
        let size = seq * vocab;
        for (i, row) in (0..batch * seq).enumerate() {
            let row = &mut data[row * vocab..(row + 1) * vocab];
            let top = (0..vocab).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap_or(0);
            let second = (0..vocab).filter(|&t| t != top).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap_or(0);
            match self.lie {
                Lie::Rounds(by) => row[i % vocab] += by,
                Lie::SwapsTop => row.swap(top, second),
                _ => {}
            }
        }
        if self.lie == Lie::FirstRowForAll {
            for row in 1..batch {
                data.copy_within(0..size, row * size);
            }
        }
        output.logits = Tensor::from_vec(data, (batch, seq, vocab), &Device::Cpu)?;
        Ok(())
    }
}

impl BitNetInference for Engine {
    fn forward(&mut self, input_ids: &Tensor, kv_cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        let batch = input_ids.dims().first().copied().unwrap_or(0);
        match self.lie {
            Lie::RefusesBatch if batch > 1 => {
                return Err(ForwardPassError::InvalidInput { reason: "one at a time".to_string() }.into());
            }
            Lie::RefusesBatchOddly if batch > 1 => {
                return Err(error());
            }
            _ => {}
        }
        let mut output = self.inner.forward(input_ids, kv_cache)?;
        let (rows, positions, _) = output.logits.dims3()?;
        if rows > 1 {
            self.change(&mut output)?;
        }
        if self.lie == Lie::Attention {
            output.attention_weights =
                Some(vec![Tensor::ones((1, 1, positions, positions), DType::F32, &Device::Cpu)?]);
        }
        if self.lie == Lie::HiddenStates {
            let shape = (rows, positions, self.config().hidden_size);
            output.hidden_states = Some(Tensor::ones(shape, DType::F32, &Device::Cpu)?);
        }
        Ok(output)
    }

    fn generate(&mut self, prompt: &[u32], max_tokens: usize, config: &GenerationConfig) -> Result<GenerationResult> {
        let mut config = config.clone();
        if self.lie == Lie::IgnoresStopSequences {
            config.stop_sequences.clear();
        }
        let mut result = self.inner.generate(prompt, max_tokens, &config)?;
        if self.lie == Lie::Babbles {
            result.generated_text = "once upon a time".to_string();
        }
        Ok(result)
    }

    fn generate_deterministic(&mut self, prompt: &[u32], max_tokens: usize, seed: u64) -> Result<GenerationResult> {
        self.generate(prompt, max_tokens, &GenerationConfig { seed: Some(seed), ..GenerationConfig::default() })
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

    fn reset(&mut self) -> Result<()> {
        self.inner.reset()
    }
}

/// What becomes of options.
#[derive(Debug, Clone, Copy)]
enum Options {
    /// Refused as they must be.
    Refused,
    /// Refused with an error of another kind.
    RefusedOddly,
    /// Taken, all of them.
    Taken,
    /// One instruction set is taken, and nothing else.
    OneSet,
}

/// A factory of [`Engine`]s.
struct Factory {
    capabilities: Capabilities,
    lie: Lie,
    options: Options,
    /// What `create_thread_safe` gives.
    thread_safe: Option<bool>,
}

impl Factory {
    fn new(capabilities: Capabilities, lie: Lie) -> Self {
        Self { capabilities, lie, options: Options::Refused, thread_safe: None }
    }
}

fn error() -> InferenceError {
    ModelError::ValidationFailed { reason: "not this one".to_string() }.into()
}

impl BackendFactory for Factory {
    fn name(&self) -> &str {
        "changed"
    }

    fn capabilities(&self) -> Capabilities {
        self.capabilities.clone()
    }

    fn create(&self, model: &ModelFixture) -> Result<Box<dyn BitNetInference>> {
        Ok(Box::new(Engine { inner: OracleFactory.create(model)?, lie: self.lie }))
    }

    fn create_with(&self, model: &ModelFixture, options: &CreateOptions) -> Result<Box<dyn BitNetInference>> {
        match self.options {
            Options::Refused => OracleFactory.create_with(model, options),
            Options::RefusedOddly => Err(error()),
            Options::OneSet if options.isa.as_deref() != Some("portable") => OracleFactory.create_with(model, options),
            Options::Taken | Options::OneSet => self.create(model),
        }
    }

    fn create_thread_safe(&self, model: &ModelFixture) -> Option<Result<Arc<dyn ThreadSafeInference>>> {
        self.thread_safe.map(|works| {
            let engine = if works { self.create(model)? } else { return Err(error()) };
            Ok(Arc::new(ConcurrentInferenceEngine::new(engine)) as Arc<dyn ThreadSafeInference>)
        })
    }
}

/// Runs one check of the suite in this process.
fn outcome(factory: &dyn BackendFactory, check: &str, model: &str) -> Outcome {
    let folder = tempfile::tempdir().expect("a folder");
    let model = ModelFixture::built_in(model, folder.path()).expect("a model");
    let scratch = folder.path().join("scratch");
    std::fs::create_dir(&scratch).expect("a folder");
    let checks = conformance::checks::all();
    let check = checks.iter().find(|c| c.name == check).expect("a check of the suite");
    run_check(check, factory, &model, &scratch, false)
}

fn least() -> Capabilities {
    Capabilities::new(Semantics::Fp32)
}

const SMALL: &str = "context-32";

#[rstest]
#[case::honest(Lie::RefusesBatch, Verdict::Unsupported)]
#[case::another_error(Lie::RefusesBatchOddly, Verdict::Fail)]
#[case::right_answer(Lie::None, Verdict::UnexpectedPass)]
#[case::wrong_answer(Lie::FirstRowForAll, Verdict::Fail)]
fn a_batch_declared_absent_is_asked_for(#[case] lie: Lie, #[case] verdict: Verdict) {
    let seen = outcome(&Factory::new(least(), lie), "batch/row_is_alone", SMALL);
    assert_eq!(seen.verdict, verdict, "{seen:?}");
    assert!(seen.assertions > 0, "a refusal is asserted, not assumed: {seen:?}");
    let reason = seen.reason.unwrap_or_default();
    assert_eq!(reason.contains("stale claim"), verdict == Verdict::UnexpectedPass, "{reason}");
    assert!(seen.notes.iter().any(|note| note.contains("CAP-1")), "{:?}", seen.notes);
}

#[rstest]
#[case::refused(Lie::None, Options::Refused, Verdict::Unsupported)]
#[case::another_error(Lie::None, Options::RefusedOddly, Verdict::Fail)]
#[case::without_effect(Lie::None, Options::Taken, Verdict::Unsupported)]
#[case::wrong(Lie::Attention, Options::Taken, Verdict::Fail)]
#[case::wrong_states(Lie::HiddenStates, Options::Taken, Verdict::Fail)]
fn outputs_declared_absent_are_asked_for(#[case] lie: Lie, #[case] options: Options, #[case] verdict: Verdict) {
    let factory = Factory { options, ..Factory::new(least(), lie) };
    let check = if lie == Lie::HiddenStates { "shape/hidden_states" } else { "shape/attention_weights" };
    let seen = outcome(&factory, check, SMALL);
    assert_eq!((seen.verdict, seen.assertions > 0), (verdict, true), "{seen:?}");
}

#[rstest]
#[case::refused(Options::Refused, Verdict::Unsupported)]
#[case::another_error(Options::RefusedOddly, Verdict::Fail)]
#[case::taken(Options::Taken, Verdict::UnexpectedPass)]
fn threads_declared_absent_are_asked_for(#[case] options: Options, #[case] verdict: Verdict) {
    let factory = Factory { options, ..Factory::new(least(), Lie::None) };
    let seen = outcome(&factory, "determinism/threads", SMALL);
    assert_eq!((seen.verdict, seen.assertions > 0), (verdict, true), "{seen:?}");
}

#[rstest]
#[case::refused(Options::Refused, Verdict::Unsupported)]
#[case::another_error(Options::RefusedOddly, Verdict::Fail)]
#[case::any_name_taken(Options::Taken, Verdict::Fail)]
#[case::one_taken(Options::OneSet, Verdict::UnexpectedPass)]
fn instruction_sets_declared_absent_are_asked_for(#[case] options: Options, #[case] verdict: Verdict) {
    let factory = Factory { options, ..Factory::new(least(), Lie::None) };
    let seen = outcome(&factory, "determinism/instruction_sets", SMALL);
    assert_eq!((seen.verdict, seen.assertions > 0), (verdict, true), "{seen:?}");
}

#[rstest]
#[case::none(None, Verdict::Unsupported)]
#[case::an_error(Some(false), Verdict::Fail)]
#[case::an_engine(Some(true), Verdict::UnexpectedPass)]
fn a_thread_safe_engine_declared_absent_is_asked_for(#[case] thread_safe: Option<bool>, #[case] verdict: Verdict) {
    let factory = Factory { thread_safe, ..Factory::new(least(), Lie::None) };
    let seen = outcome(&factory, "concurrency/callers_are_alone", SMALL);
    assert_eq!((seen.verdict, seen.assertions > 0), (verdict, true), "{seen:?}");
}

#[rstest]
#[case::refused(Lie::None, Verdict::Unsupported)]
#[case::passed_over(Lie::IgnoresStopSequences, Verdict::Fail)]
#[case::text(Lie::Babbles, Verdict::Fail)]
fn a_tokenizer_declared_absent_is_asked_for(#[case] lie: Lie, #[case] verdict: Verdict) {
    let seen = outcome(&Factory::new(least(), lie), "generation/stop_sequence", "tiny");
    assert_eq!((seen.verdict, seen.assertions > 0), (verdict, true), "{seen:?}");
}

fn batch_claim(level: Option<Level>) -> Capabilities {
    least().with_batch().with_invariance(Invariance { batch: level, ..Invariance::default() })
}

#[rstest]
#[case::bitwise_holds(Lie::None, Noise::F32, Some(Level::Bitwise), Verdict::Pass)]
#[case::bitwise_broken(Lie::Rounds(2e-6), Noise::F32, Some(Level::Bitwise), Verdict::Fail)]
#[case::rounding_is_stable(Lie::Rounds(2e-6), Noise::F32, Some(Level::ArgmaxStable), Verdict::Pass)]
#[case::rounding_is_statistical(Lie::Rounds(2e-6), Noise::F32, Some(Level::Statistical), Verdict::Pass)]
#[case::unclaimed_is_statistical(Lie::Rounds(2e-6), Noise::F32, None, Verdict::Pass)]
#[case::too_far_for_any(Lie::Rounds(2e-2), Noise::F32, Some(Level::Statistical), Verdict::Fail)]
#[case::too_far_unclaimed(Lie::Rounds(2e-2), Noise::F32, None, Verdict::Fail)]
#[case::another_top_token(Lie::SwapsTop, Noise::Coarse, Some(Level::ArgmaxStable), Verdict::Fail)]
#[case::another_top_token_correlates(Lie::SwapsTop, Noise::Coarse, Some(Level::Statistical), Verdict::Pass)]
fn a_claim_is_tested_at_its_level(
    #[case] lie: Lie,
    #[case] noise: Noise,
    #[case] level: Option<Level>,
    #[case] verdict: Verdict,
) {
    // The trained model is sure of some tokens, and its vocabulary is large: one swap hardly moves the correlation.
    let model = if lie == Lie::SwapsTop { "tiny" } else { SMALL };
    let factory = Factory::new(batch_claim(level).with_noise(noise), lie);
    let seen = outcome(&factory, "batch/row_is_alone", model);
    assert_eq!(seen.verdict, verdict, "{seen:?}");
}

#[rstest]
#[case::taken(Options::OneSet, Verdict::Pass)]
#[case::any_name_taken(Options::Taken, Verdict::Fail)]
fn declared_instruction_sets_are_forced_and_others_refused(#[case] options: Options, #[case] verdict: Verdict) {
    let capabilities = least().with_bitwise().with_instruction_sets(["portable"]);
    let factory = Factory { options, ..Factory::new(capabilities, Lie::None) };
    assert_eq!(outcome(&factory, "determinism/instruction_sets", SMALL).verdict, verdict);
}

#[test]
fn one_process_proves_nothing_about_processes() {
    let seen = outcome(&Factory::new(least(), Lie::None), "determinism/process", SMALL);
    assert_eq!(seen.verdict, Verdict::Inconclusive, "{seen:?}");
}

#[test]
fn a_claim_needs_what_it_is_about() {
    let claims = |capabilities: Capabilities| Axis::ALL.map(|axis| capabilities.claim(axis));
    let bitwise = Some(Level::Bitwise);
    assert_eq!(claims(least().with_bitwise()), [bitwise, None, None, bitwise, None, bitwise, None]);
    let all = least().with_bitwise().with_threads().with_batch().with_instruction_sets(["a"]);
    assert_eq!(claims(all), [bitwise, bitwise, bitwise, bitwise, bitwise, bitwise, None]);
}

/// A case of every check that tests an axis, all passed.
fn passed() -> Vec<CaseResult> {
    let case = |check: conformance::Check| CaseResult {
        id: check.case_id("changed", SMALL),
        backend: "changed".to_string(),
        model: SMALL.to_string(),
        model_argument: SMALL.to_string(),
        check: check.name.to_string(),
        requirement: check.id.to_string(),
        clause: check.clause.to_string(),
        category: check.category,
        exclusive: false,
        outcome: Outcome { assertions: 1, reason: None, ..Outcome::bare(Verdict::Pass, "") },
    };
    conformance::checks::all().into_iter().filter(|check| check.axis.is_some()).map(case).collect()
}

fn summary(capabilities: &Capabilities, cases: &[CaseResult]) -> Summary {
    Summary::of(capabilities, &conformance::checks::all(), &cases.iter().collect::<Vec<_>>())
}

fn standing(summary: &Summary, axis: Axis) -> Standing {
    summary.claims.iter().find(|c| c.axis == axis).expect("every axis").standing
}

#[test]
fn claims_add_up_to_a_level() {
    let capabilities = least().with_bitwise().with_batch().with_threads().with_instruction_sets(["a"]);
    let all = summary(&capabilities, &passed());
    assert_eq!(all.level, Some(Level::Bitwise));
    assert_eq!(all.covers, Axis::ALL[..6]);
    assert_eq!(standing(&all, Axis::Device), Standing::Unclaimed);

    // The weakest claim that holds is the level.
    let weaker = Invariance { chunking: Some(Level::ArgmaxStable), ..Invariance::bitwise() };
    assert_eq!(summary(&capabilities.clone().with_invariance(weaker), &passed()).level, Some(Level::ArgmaxStable));

    // What a backend lacks is neither claimed nor missed.
    let mut cases = passed();
    let of_batches =
        |c: &&mut CaseResult| c.check.starts_with("batch/") || c.check == "kv_cache/chunked_batch_is_whole";
    cases.iter_mut().filter(of_batches).for_each(|c| c.outcome.verdict = Verdict::Unsupported);
    let alone = summary(&least().with_bitwise(), &cases);
    assert_eq!((alone.level, alone.covers), (Some(Level::Bitwise), vec![Axis::Runs, Axis::Chunking, Axis::Process]));
}

#[rstest]
#[case(Verdict::Fail, Standing::Broken)]
#[case(Verdict::Crash, Standing::Broken)]
#[case(Verdict::Timeout, Standing::Broken)]
#[case(Verdict::Waived, Standing::Broken)]
#[case(Verdict::Inconclusive, Standing::Untested)]
#[case(Verdict::UnexpectedPass, Standing::Held)]
fn one_check_decides_a_claim(#[case] verdict: Verdict, #[case] expected: Standing) {
    let capabilities = least().with_bitwise().with_batch();
    let mut cases = passed();
    let one = cases.iter_mut().find(|c| c.check == "batch/order_of_rows").expect("that check");
    one.outcome.verdict = verdict;
    let seen = summary(&capabilities, &cases);
    assert_eq!(standing(&seen, Axis::Batch), expected);
    assert_eq!(standing(&seen, Axis::Chunking), Standing::Held);
    assert_eq!(seen.level.is_none(), expected == Standing::Broken, "{seen:?}");
    assert_eq!(seen.covers.contains(&Axis::Batch), expected == Standing::Held);
}

#[test]
fn a_claim_whose_checks_did_not_all_run_is_untested() {
    let capabilities = least().with_bitwise().with_batch();
    let mut cases = passed();
    cases.retain(|c| c.check != "batch/order_of_rows");
    let seen = summary(&capabilities, &cases);
    assert_eq!(standing(&seen, Axis::Batch), Standing::Untested);
    let nothing = summary(&capabilities, &[]);
    assert_eq!((nothing.level, nothing.covers.len()), (None, 0));
    assert!(nothing.claims.iter().all(|c| c.standing != Standing::Held));
}

/// The report of a run of the oracle whose cases made this many statistical assertions each.
fn report(statistical: u64) -> Report {
    let suite = Suite::new(Registry::new().with(OracleFactory)).expect("a suite");
    let selection =
        Selection { models: vec![SMALL.to_string()], filter: Some("/batch/".to_string()), ..Selection::default() };
    let cases = suite.select(&selection).expect("cases");
    let mut results: Vec<CaseResult> = passed().into_iter().filter(|c| c.category == Category::Batch).collect();
    for result in &mut results {
        result.backend = "oracle".to_string();
        result.outcome.statistical = statistical;
    }
    Report::new(&cases, results, UNIX_EPOCH, Duration::from_secs(1))
}

#[test]
fn a_run_that_spends_more_than_its_budget_fails() {
    let good = report(STATISTICAL_ASSERTIONS / 3);
    assert!(good.is_green() && good.findings.is_empty(), "{:?}", good.findings);
    let spent = report(STATISTICAL_ASSERTIONS / 3 + 1);
    assert!(!spent.is_green(), "three cases make more than the budget");
    assert!(spent.findings[0].contains("oracle") && spent.findings[0].contains("statistical"), "{:?}", spent.findings);
    assert_eq!(spent.invariance["oracle"].level, Some(Level::Bitwise));
}

/// Every statistical assertion of a default run, counted. The engine takes part for its speed: the count depends on the
/// models alone.
#[cfg(feature = "own-backends")]
#[test]
fn the_budget_for_false_alarms_is_enough_for_all_statistical_assertions() {
    assert!(FALSE_ALARM * STATISTICAL_ASSERTIONS as f64 <= RUN_FALSE_ALARM);
    let registry = own_backends::registry();
    let engine = registry.get("cpu").expect("the engine");
    let cases = Suite::new(registry.clone())
        .and_then(|suite| suite.select(&Selection { backends: vec!["cpu".to_string()], ..Selection::default() }));
    let statistical = |case: &&conformance::Case| {
        matches!(case.check.category, Category::Sampling) || case.check.name == "determinism/seeds_differ"
    };
    let count = |case: &conformance::Case| outcome(engine.as_ref(), case.check.name, case.model.name()).statistical;
    let sum: u64 = cases.expect("cases").iter().filter(statistical).map(count).sum();
    assert!(sum <= STATISTICAL_ASSERTIONS, "{sum} of {STATISTICAL_ASSERTIONS}");
    // A budget shared by many more than there are makes every assertion weaker for nothing.
    assert!(sum > STATISTICAL_ASSERTIONS / 2, "{sum} of {STATISTICAL_ASSERTIONS}");
}
