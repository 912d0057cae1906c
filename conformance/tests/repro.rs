//! Reproducers and fuzzing, tested on a sound backend (the example's oracle) and on faulty wrappers around it.
//!
//! Workers are this executable, and so is the command line: `REPRO_AS_CLI` turns it into one.
#![forbid(unsafe_code)]

#[path = "../examples/oracle_backend/mod.rs"]
mod oracle_backend;

use bitnet_contracts::{
    BitNetInference, Device, GenerationConfig, GenerationResult, InferenceOutput, KVCache, MemoryUsage, ModelConfig,
    QuantizationType, Result as EngineResult, Tensor,
};
use conformance::repro::{Call, Fuzzer, ModelChoice, Reproducer, limits, replay, reproduce};
use conformance::run::Runner;
use conformance::{BackendFactory, Capabilities, ModelFixture, Registry, Selection, Suite, Verdict};
use libtest_mimic::{Arguments, Failed, Trial};
use oracle_backend::OracleFactory;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

/// Time to shrink to the end, on a busy machine too.
const AMPLE: Duration = Duration::from_secs(120);

type TestResult = Result<(), Failed>;

/// What is wrong with a backend that is the oracle's otherwise.
#[derive(Clone, Copy)]
enum Fault {
    /// Token 5 is taken for token 6.
    FiveIsSix,
    /// Behind three cached positions or more, the last one is taken for token 0.
    ForgetsTheLast,
    /// Token 9 ends the process.
    AbortsOnTokenNine,
    /// A sequence of more than five tokens never ends.
    HangsOnSix,
}

const FAULTS: [(&str, Fault); 4] = [
    ("five-is-six", Fault::FiveIsSix),
    ("forgets-the-last", Fault::ForgetsTheLast),
    ("aborts-on-nine", Fault::AbortsOnTokenNine),
    ("hangs-on-six", Fault::HangsOnSix),
];

struct FaultyFactory(&'static str, Fault);

impl BackendFactory for FaultyFactory {
    fn name(&self) -> &str {
        self.0
    }

    fn capabilities(&self) -> Capabilities {
        OracleFactory.capabilities()
    }

    fn create(&self, model: &ModelFixture) -> EngineResult<Box<dyn BitNetInference>> {
        Ok(Box::new(Faulty { inner: OracleFactory.create(model)?, fault: self.1 }))
    }
}

struct Faulty {
    inner: Box<dyn BitNetInference>,
    fault: Fault,
}

impl BitNetInference for Faulty {
    fn forward(&mut self, input_ids: &Tensor, cache: Option<&mut KVCache>) -> EngineResult<InferenceOutput> {
        let Ok(rows) = input_ids.to_vec2::<u32>() else { return self.inner.forward(input_ids, cache) };
        match self.fault {
            Fault::FiveIsSix => {
                let six: Vec<Vec<u32>> =
                    rows.iter().map(|row| row.iter().map(|&t| if t == 5 { 6 } else { t }).collect()).collect();
                self.inner.forward(&Tensor::new(six, &Device::Cpu)?, cache)
            }
            Fault::ForgetsTheLast => {
                let Some(cache) = cache else { return self.inner.forward(input_ids, None) };
                let (before, seq) = (cache.len(), rows[0].len());
                let bad = rows.iter().flatten().any(|&t| t as usize >= self.config().vocab_size);
                if before < 3 || bad || before + seq > cache.capacity().min(self.config().max_position_embeddings) {
                    return self.inner.forward(input_ids, Some(cache));
                }
                let longer: Vec<Vec<u32>> = rows.iter().map(|row| [&[0], row.as_slice()].concat()).collect();
                cache.truncate(before - 1);
                let mut output = self.inner.forward(&Tensor::new(longer, &Device::Cpu)?, Some(cache))?;
                output.logits = output.logits.narrow(1, 1, seq)?;
                Ok(output)
            }
            Fault::AbortsOnTokenNine if rows.iter().flatten().any(|&t| t == 9) => std::process::abort(),
            Fault::HangsOnSix if rows[0].len() > 5 => loop {
                std::thread::sleep(Duration::from_secs(60));
            },
            Fault::AbortsOnTokenNine | Fault::HangsOnSix => self.inner.forward(input_ids, cache),
        }
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

fn registry() -> Registry {
    FAULTS.iter().fold(Registry::new().with(OracleFactory), |all, &(name, fault)| all.with(FaultyFactory(name, fault)))
}

fn suite() -> Result<Suite, Failed> {
    Ok(Suite::new(registry())?)
}

fn ensure(holds: bool, what: impl std::fmt::Debug) -> TestResult {
    if holds { Ok(()) } else { Err(format!("not so: {what:?}").into()) }
}

/// Fuzzes a faulty backend until it is found out; gives the reproducer's text.
fn found(suite: &Suite, runner: &Runner, backend: &str) -> Result<(String, Reproducer), Failed> {
    let mut fuzzer = Fuzzer::new(suite, runner, vec![backend.to_string(), "oracle".to_string()], 1);
    fuzzer.shrink_budget = AMPLE;
    for number in 0..60 {
        let iteration = fuzzer.iteration(number)?;
        if let Some(finding) = fuzzer.findings(&iteration).into_iter().next() {
            ensure(finding.backend == backend, &finding.backend)?;
            if finding.outcome.verdict == Verdict::Fail {
                let ranking = finding.ranking();
                let (sound, faulty) = (ranking.find(": oracle "), ranking.find(&format!(" < {backend} ")));
                ensure(sound.is_some() && faulty.is_some(), &ranking)?;
            }
            return Ok((finding.reproducer.to_json()?, finding.reproducer));
        }
    }
    Err(format!("{backend} was not found out").into())
}

/// A file that fits, fails on the faulty backend and passes on the sound one.
fn shows(suite: &Suite, runner: &Runner, text: &str, backend: &str, verdict: Verdict) -> TestResult {
    ensure(text.len() <= limits::MAX_BYTES, text)?;
    let read = Reproducer::from_json(text)?;
    let faulty = replay(suite, runner, &read, backend)?;
    ensure(faulty.verdict == verdict, &faulty)?;
    let sound = replay(suite, runner, &read, "oracle")?;
    ensure(sound.verdict == Verdict::Pass && sound.assertions > 0, &sound)
}

fn fuzzing_finds_nothing_on_a_sound_backend() -> TestResult {
    let (suite, runner) = (suite()?, Runner::new()?);
    let mut fuzzer = Fuzzer::new(&suite, &runner, vec!["oracle".to_string()], 7);
    for number in 0..60 {
        let iteration = fuzzer.iteration(number)?;
        ensure(iteration.outcomes[0].1.verdict == Verdict::Pass, &iteration.outcomes)?;
    }
    let tally = &fuzzer.tally;
    ensure(tally.iterations == 60 && tally.rows > 500 && tally.refusals > 60, tally)?;
    ensure(tally.firm_rows == tally.rows && tally.distances[0].1 < 1.0, tally)
}

fn one_seed_means_one_run() -> TestResult {
    let (suite, runner) = (suite()?, Runner::new()?);
    let tally = |seed| -> Result<_, Failed> {
        let mut fuzzer = Fuzzer::new(&suite, &runner, vec!["oracle".to_string()], seed);
        (0..5).try_for_each(|number| fuzzer.iteration(number).map(drop))?;
        Ok(fuzzer.tally)
    };
    ensure(tally(3)? == tally(3)?, "the same seed")?;
    ensure(tally(3)? != tally(4)?, "another seed")
}

fn a_wrong_token_is_found_and_shrunk() -> TestResult {
    let (suite, runner) = (suite()?, Runner::new()?);
    let (text, reproducer) = found(&suite, &runner, "five-is-six")?;
    shows(&suite, &runner, &text, "five-is-six", Verdict::Fail)?;
    let Reproducer::Schedule(case) = reproducer else { return Err("not a schedule".into()) };
    let [Call::Forward(call)] = case.schedule.calls.as_slice() else { return Err(text.into()) };
    ensure(call.ids == [[5]] && case.model.spec.layers == 1 && case.model.spec.vocab == 8, &text)
}

fn a_wrong_cache_is_found_and_shrunk() -> TestResult {
    let (suite, runner) = (suite()?, Runner::new()?);
    let (text, reproducer) = found(&suite, &runner, "forgets-the-last")?;
    shows(&suite, &runner, &text, "forgets-the-last", Verdict::Fail)?;
    let Reproducer::Schedule(case) = reproducer else { return Err("not a schedule".into()) };
    // Three positions and one more: two calls.
    let tokens = |call: &Call| if let Call::Forward(call) = call { call.ids.concat().len() } else { 0 };
    let counts: Vec<usize> = case.schedule.calls.iter().map(tokens).collect();
    ensure(counts == [3, 1] && case.schedule.caches.len() == 1, &text)
}

fn a_crash_is_found_and_shrunk() -> TestResult {
    let (suite, runner) = (suite()?, Runner::new()?);
    let (text, reproducer) = found(&suite, &runner, "aborts-on-nine")?;
    shows(&suite, &runner, &text, "aborts-on-nine", Verdict::Crash)?;
    let Reproducer::Schedule(case) = reproducer else { return Err("not a schedule".into()) };
    ensure(case.schedule.calls.len() == 1 && case.outcome.seen.contains("SIGABRT"), &text)
}

/// The first failing case of a faulty backend by a check, made smaller.
fn shrunk(suite: &Suite, runner: &Runner, backend: &str, model: &str, check: &str) -> Result<String, Failed> {
    shrunk_within(AMPLE, suite, runner, [backend, model, check])
}

fn shrunk_within(
    budget: Duration,
    suite: &Suite,
    runner: &Runner,
    [backend, model, check]: [&str; 3],
) -> Result<String, Failed> {
    let selection = Selection {
        backends: vec![backend.to_string()],
        models: vec![model.to_string()],
        filter: Some(check.to_string()),
    };
    let case = suite.select(&selection)?.remove(0);
    let outcome = runner.run(&case).outcome;
    let text = reproduce(suite, runner, &case, &outcome, Some(budget));
    Ok(text.ok_or_else(|| format!("no reproducer: {outcome:?}"))?)
}

fn a_failing_check_is_shrunk() -> TestResult {
    let (suite, runner) = (suite()?, Runner::new()?);
    let text = shrunk(&suite, &runner, "forgets-the-last", "gqa4-tied-f16", "kv_cache/chunked_is_whole")?;
    shows(&suite, &runner, &text, "forgets-the-last", Verdict::Fail)?;
    let Reproducer::Check(case) = Reproducer::from_json(&text)? else { return Err("not a check".into()) };
    let ModelChoice::Synthetic(model) = &case.model else { return Err(text.into()) };
    let spec = &model.spec;
    ensure((spec.layers, spec.heads, spec.kv_heads) == (1, 1, 1) && spec.hidden <= 16 && spec.vocab <= 16, &text)
}

fn prompts_are_shrunk_where_the_check_allows_it() -> TestResult {
    let (suite, runner) = (suite()?, Runner::new()?);
    let text = shrunk(&suite, &runner, "forgets-the-last", "context-32", "kv_cache/long_decode_is_whole")?;
    shows(&suite, &runner, &text, "forgets-the-last", Verdict::Fail)?;
    let Reproducer::Check(case) = Reproducer::from_json(&text)? else { return Err("not a check".into()) };
    let ModelChoice::Synthetic(model) = &case.model else { return Err(text.into()) };
    let context = model.spec.context;
    // With one token alone the fault does not show: it takes the last one for token 0.
    ensure(case.prompt.longest.unwrap_or(context) == 4 && case.prompt.alphabet == Some(2), &text)
}

fn a_hanging_check_is_shrunk() -> TestResult {
    let suite = suite()?;
    let checks = suite.checks().iter().filter(|c| c.name == "causality/later_tokens_do_not_show").cloned();
    let checks: Vec<_> = checks.map(|check| check.within(3)).collect();
    ensure(checks.len() == 1, "the check is there")?;
    let (suite, runner) = (suite.with_checks(checks), Runner::new()?);
    // Every candidate that hangs takes its deadline.
    let budget = Duration::from_secs(8);
    let text =
        shrunk_within(budget, &suite, &runner, ["hangs-on-six", "context-32", "causality/later_tokens_do_not_show"])?;
    shows(&suite, &runner, &text, "hangs-on-six", Verdict::Timeout)?;
    let Reproducer::Check(case) = Reproducer::from_json(&text)? else { return Err("not a check".into()) };
    ensure(matches!(case.model, ModelChoice::Synthetic(_)), &text)
}

fn what_no_synthetic_model_shows_names_its_model() -> TestResult {
    let (suite, runner) = (suite()?, Runner::new()?);
    let text = shrunk(&suite, &runner, "forgets-the-last", "context-32", "golden/logits")?;
    let Reproducer::Check(case) = Reproducer::from_json(&text)? else { return Err("not a check".into()) };
    ensure(case.model == ModelChoice::BuiltIn("context-32".to_string()), &text)?;
    shows(&suite, &runner, &text, "forgets-the-last", Verdict::Fail)
}

/// A sound reproducer to break, as JSON.
fn sample() -> Result<serde_json::Value, Failed> {
    let preset = fixtures::find_preset("context-32")?;
    Ok(serde_json::json!({
        "kind": "schedule", "version": 1, "backend": "oracle", "semantics": "fp32",
        "model": {"seed": 1, "spec": preset.spec},
        "schedule": {"caches": [4], "calls": [
            {"forward": {"ids": [[1, 2]], "cache": 0}}, {"truncate": {"cache": 0, "to": 1}}, {"reset": {}},
            {"greedy": {"prompt": [3], "tokens": 2}},
            {"sample": {"generate": {"prompt": [3], "tokens": 2}, "seed": 1, "top": 3}},
        ]},
        "outcome": {"verdict": "fail", "seen": "something"},
    }))
}

fn hostile_files_are_typed_errors() -> TestResult {
    let good = sample()?;
    let read = Reproducer::from_json(&good.to_string())?;
    ensure(Reproducer::from_json(&read.to_json()?)? == read, "written and read again")?;
    let broken = |pointer: &str, value: serde_json::Value| -> Result<String, Failed> {
        let mut file = good.clone();
        *file.pointer_mut(pointer).ok_or("no such place")? = value;
        match Reproducer::from_json(&file.to_string()) {
            Ok(read) => Err(format!("{pointer} was accepted: {read:?}").into()),
            Err(error) => Ok(error.to_string()),
        }
    };
    use serde_json::json;
    for (pointer, value, says) in [
        ("/version", json!(2), "version 2"),
        ("/model/spec/hidden", json!(usize::MAX), "hidden"),
        ("/model/spec/hidden", json!(0), "size is 0"),
        ("/model/spec/heads", json!(0), "heads"),
        ("/model/spec/layers", json!(1_000_000_000), "layers"),
        ("/model/spec/vocab", json!(1e9 as u64), "vocab"),
        ("/model/spec/shards", json!(1u64 << 40), "shards"),
        ("/model/spec/eps", json!("small"), "small"),
        ("/schedule/caches/0", json!(1u64 << 40), "capacity"),
        ("/schedule/calls/0/forward/cache", json!(1), "cache"),
        ("/schedule/calls/0/forward/ids", json!([]), "sequences"),
        ("/schedule/calls/0/forward/ids", json!([[1], [1, 2]]), "row"),
        ("/schedule/calls/1/truncate/cache", json!(7), "cache"),
        ("/schedule/calls/3/greedy/tokens", json!(1u64 << 40), "generate"),
        ("/schedule/calls/2", json!({"explode": {}}), "explode"),
        ("/outcome/verdict", json!("great"), "great"),
    ] {
        let error = broken(pointer, value)?;
        ensure(error.contains(says), &error)?;
    }
    for pointer in ["", "/model", "/model/spec", "/schedule", "/schedule/calls/0/forward", "/outcome"] {
        let mut file = good.clone();
        file.pointer_mut(pointer).and_then(|v| v.as_object_mut()).ok_or("no object")?.insert("more".into(), json!(1));
        let error = Reproducer::from_json(&file.to_string()).err().map(|e| e.to_string()).unwrap_or_default();
        ensure(error.contains("more"), (pointer, &error))?;
    }
    let mut file = good.clone();
    file["outcome"]["seen"] = json!("x".repeat(limits::MAX_BYTES));
    let error = Reproducer::from_json(&file.to_string()).err().map(|e| e.to_string()).unwrap_or_default();
    ensure(error.contains("at most 2048"), &error)?;
    for text in ["", "{}", "[]", "null", "{\"kind\":\"check\"}", "\u{0}"] {
        ensure(Reproducer::from_json(text).is_err(), text)?;
    }
    let text = json!({"kind": "check", "version": 1, "backend": "oracle", "check": "causality/later_tokens_do_not_show",
        "requirement": "CAU-1", "model": {"built_in": "tiny"}, "prompt": {"alphabet": 1u64 << 60},
        "outcome": {"verdict": "fail", "seen": ""}});
    let error = Reproducer::from_json(&text.to_string()).err().map(|e| e.to_string()).unwrap_or_default();
    ensure(error.contains("alphabet"), &error)
}

fn long_texts_are_cut_to_fit() -> TestResult {
    let mut case = Reproducer::from_json(&sample()?.to_string())?;
    let Reproducer::Schedule(schedule) = &mut case else { return Err("not a schedule".into()) };
    schedule.outcome.seen = "\u{1}ü\"".repeat(2000);
    schedule.outcome.expected = "x".repeat(5000);
    let text = case.to_json()?;
    ensure(text.len() <= limits::MAX_BYTES && Reproducer::from_json(&text).is_ok(), &text)?;
    let Reproducer::Schedule(schedule) = &mut case else { return Err("not a schedule".into()) };
    schedule.schedule.calls = vec![schedule.schedule.calls[0].clone(); 60];
    ensure(case.to_json().is_err(), "a case that does not fit is an error")
}

/// Runs this executable as the command line.
fn cli(args: &[&str]) -> Result<(i32, String), Failed> {
    output(std::process::Command::new(std::env::current_exe()?).env("REPRO_AS_CLI", "1").args(args))
}

fn output(command: &mut std::process::Command) -> Result<(i32, String), Failed> {
    let output = command.output()?;
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    Ok((output.status.code().unwrap_or(-1), text))
}

fn only_file(dir: &Path) -> Result<String, Failed> {
    let mut files: Vec<_> = std::fs::read_dir(dir)?.map(|e| e.map(|e| e.path())).collect::<Result<_, _>>()?;
    ensure(files.len() == 1 && std::fs::metadata(&files[0])?.len() <= limits::MAX_BYTES as u64, &files)?;
    Ok(files.remove(0).display().to_string())
}

fn the_command_line_fuzzes_and_replays() -> TestResult {
    let dir = tempfile::tempdir()?;
    let out = dir.path().join("found").display().to_string();
    let (code, text) = cli(&["fuzz", "--iterations", "2", "--backend", "oracle"])?;
    ensure(code == 0 && text.contains("2 iterations") && text.contains("0 findings"), &text)?;
    let (code, text) =
        cli(&["fuzz", "--iterations", "12", "--backend", "five-is-six", "--against", "oracle", "--out", &out])?;
    ensure(code == 1 && text.contains(": oracle ") && text.contains("1 findings"), &text)?;
    let file = only_file(Path::new(&out))?;
    ensure(text.contains(&format!("replay {file} --backend five-is-six")), &text)?;
    let (code, text) = cli(&["replay", &file])?;
    ensure(code == 1 && text.contains("FAIL") && text.contains("expected") && text.contains("seen"), &text)?;
    let (code, text) = cli(&["replay", &file, "--backend", "oracle"])?;
    ensure(code == 0 && text.contains("PASS"), &text)?;
    let (code, text) = cli(&["replay", &file, "--backend", "gpu"])?;
    ensure(code == 2 && text.contains("no backend \"gpu\""), &text)?;
    std::fs::write(&file, "{}")?;
    let (code, text) = cli(&["replay", &file])?;
    ensure(code == 2 && text.contains("not a reproducer"), &text)?;
    let (code, text) = cli(&["fuzz", "--iterations", "0", "--backend", "oracle"])?;
    ensure(code == 2, &text)
}

fn a_run_writes_reproducers_of_its_failures() -> TestResult {
    let dir = tempfile::tempdir()?;
    let out = dir.path().join("out").display().to_string();
    let run = ["run", "--backend", "forgets-the-last", "--model", "context-32", "--filter", "kv_cache/long_decode"];
    let (code, text) = cli(&[&run[..], &["--reproducers", &out]].concat())?;
    let file = only_file(Path::new(&out))?;
    ensure(code == 1 && text.contains(&format!("replay {file} --backend forgets-the-last")), &text)?;
    ensure(std::fs::read_to_string(&file)?.contains("synthetic"), &file)?;
    let (code, text) = cli(&["replay", &file])?;
    ensure(code == 1, &text)?;
    let (code, text) = cli(&["replay", &file, "--backend", "oracle"])?;
    ensure(code == 0, &text)?;
    let json = dir.path().join("report.json").display().to_string();
    let (code, text) = cli(&[&run[..], &["--shrink=false", "--json", &json]].concat())?;
    let report = std::fs::read_to_string(&json)?;
    ensure(code == 1 && report.contains("built_in") && report.contains("\\\"kind\\\":\\\"check\\\""), &text)
}

fn a_test_target_shrinks_when_asked() -> TestResult {
    let target = |shrink: &str| -> Result<(i32, String), Failed> {
        let mut command = std::process::Command::new(std::env::current_exe()?);
        command.env("REPRO_AS_TARGET", "1").env("CONFORMANCE_SHRINK", shrink);
        command.env_remove("CONFORMANCE_JSON").env_remove("NEXTEST");
        output(command.args(["--exact", "forgets-the-last/tiny/kv_cache/truncate_and_replay@KV-3"]))
    };
    let (code, text) = target("0")?;
    ensure(code != 0 && !text.contains("synthetic"), &text)?;
    let (code, text) = target("1")?;
    ensure(code != 0 && text.contains("smaller   {\"kind\":\"check\"") && text.contains("synthetic"), &text)
}

fn main() -> ExitCode {
    if std::env::var_os("REPRO_AS_CLI").is_some() {
        return conformance::cli::main(registry());
    }
    // An error here is told by the trials.
    if let Ok(suite) = suite()
        && let Some(code) = conformance::worker::serve_if_asked(suite.registry(), suite.checks())
    {
        return code;
    }
    if std::env::var_os("REPRO_AS_TARGET").is_some() {
        return conformance::main(registry());
    }
    let trials = vec![
        Trial::test("fuzzing_finds_nothing_on_a_sound_backend", fuzzing_finds_nothing_on_a_sound_backend),
        Trial::test("one_seed_means_one_run", one_seed_means_one_run),
        Trial::test("a_wrong_token_is_found_and_shrunk", a_wrong_token_is_found_and_shrunk),
        Trial::test("a_wrong_cache_is_found_and_shrunk", a_wrong_cache_is_found_and_shrunk),
        Trial::test("a_crash_is_found_and_shrunk", a_crash_is_found_and_shrunk),
        Trial::test("a_failing_check_is_shrunk", a_failing_check_is_shrunk),
        Trial::test("prompts_are_shrunk", prompts_are_shrunk_where_the_check_allows_it),
        Trial::test("a_hanging_check_is_shrunk", a_hanging_check_is_shrunk),
        Trial::test("a_built_in_model_is_named", what_no_synthetic_model_shows_names_its_model),
        Trial::test("hostile_files_are_typed_errors", hostile_files_are_typed_errors),
        Trial::test("long_texts_are_cut_to_fit", long_texts_are_cut_to_fit),
        Trial::test("the_command_line_fuzzes_and_replays", the_command_line_fuzzes_and_replays),
        Trial::test("a_test_target_shrinks_when_asked", a_test_target_shrinks_when_asked),
        Trial::test("a_run_writes_reproducers_of_its_failures", a_run_writes_reproducers_of_its_failures),
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}
