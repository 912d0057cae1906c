//! Known failures: what an expectations file may say, what it does to verdicts, and what makes it fail a run.
//!
//! The backends are the example's oracle and the same with a false declaration, which one check catches. Runs are those
//! of this executable as the command line and as a test target; workers are this executable too.
#![forbid(unsafe_code)]

#[path = "../examples/oracle_backend/mod.rs"]
mod oracle_backend;

use bitnet_contracts::{BitNetInference, QuantizationType, Result as EngineResult};
use conformance::expectations::{Date, Expectations};
use conformance::report::Report;
use conformance::suite::{Selection, Suite};
use conformance::verdict::{CaseResult, Outcome, Verdict};
use conformance::{BackendFactory, Capabilities, Category, ModelFixture, Registry};
use libtest_mimic::{Arguments, Failed, Trial};
use oracle_backend::OracleFactory;
use std::process::{Command, ExitCode};

type TestResult = Result<(), Failed>;

/// The oracle with a quantisation type declared that it does not support: SHP-9 fails, all else passes.
struct Boastful;

impl BackendFactory for Boastful {
    fn name(&self) -> &str {
        "boastful"
    }

    fn capabilities(&self) -> Capabilities {
        OracleFactory.capabilities().with_quantization(&[QuantizationType::I2S, QuantizationType::TL1])
    }

    fn create(&self, model: &ModelFixture) -> EngineResult<Box<dyn BitNetInference>> {
        OracleFactory.create(model)
    }
}

fn registry() -> Registry {
    Registry::new().with(OracleFactory).with(Boastful)
}

fn ensure(holds: bool, what: impl std::fmt::Debug) -> TestResult {
    if holds { Ok(()) } else { Err(format!("not so: {what:?}").into()) }
}

const ENTRY: &str = r#"
[[expect]]
id = "boastful/tiny/shape/quantization@SHP-9"
kind = "fail"
reason = "TL1 is on its way"
link = "https://example.org/issues/7"
expires = 2999-12-31
"#;

const TODAY: Date = Date { year: 2027, month: 3, day: 10 };

fn file(entries: &str) -> String {
    format!("version = 1\n{entries}")
}

fn parse(entries: &str) -> Result<Expectations, Failed> {
    Ok(Expectations::parse(&file(entries), TODAY)?)
}

fn a_sound_file_is_read() -> TestResult {
    parse("")?;
    parse(ENTRY)?;
    parse(&ENTRY.replace("2999-12-31", "\"2999-12-31\""))?;
    parse(&format!("{ENTRY}bound = {{ max_abs = 0.5, other = 1 }}"))?;
    Ok(())
}

fn a_faulty_file_is_refused() -> TestResult {
    let refused = |text: &str, part: &str| {
        let error = Expectations::parse(text, TODAY).err().map(|e| e.to_string());
        ensure(error.as_ref().is_some_and(|e| e.contains(part)), (text, part, &error))
    };
    refused("", "version")?;
    refused("version = 2", "version 2")?;
    refused("version = 1\nexpected = 1", "expected")?;
    refused(&file("[[except]]"), "except")?;
    for (from, to, part) in [
        ("kind = \"fail\"", "kind = \"fails\"", "fails"),
        ("kind = \"fail\"", "kind = \"pass\"", "pass"),
        ("kind = \"fail\"", "", "kind"),
        ("TL1 is on its way", " ", "reason is empty"),
        ("reason = \"TL1 is on its way\"", "", "reason"),
        ("https://example.org/issues/7", "issue 7", "no http(s) address"),
        ("https://example.org/issues/7", "https://", "no http(s) address"),
        ("link = \"https://example.org/issues/7\"", "", "link"),
        ("expires = 2999-12-31", "", "expires"),
        ("expires = 2999-12-31", "expires = \"next year\"", "no date"),
        ("expires = 2999-12-31", "expires = \"2999-02-29\"", "no date"),
        ("expires = 2999-12-31", "expires = 2999-12-31T10:00:00Z", "no date"),
        ("expires = 2999-12-31", "expires = 2999", "no date"),
        ("id = \"boastful/", "id = \"[boastful/", "no pattern"),
        ("expires = 2999-12-31", "expires = 2999-12-31\nexpiry = 1", "expiry"),
        ("expires = 2999-12-31", "expires = 2999-12-31\nbound = { max_abs = nan }", "max_abs"),
        ("expires = 2999-12-31", "expires = 2999-12-31\nbound = { max_abs = \"1\" }", "max_abs"),
    ] {
        ensure(ENTRY.contains(from), from)?;
        refused(&file(&ENTRY.replace(from, to)), part)?;
    }
    let bounded = format!("{}bound = {{ max_abs = 1 }}", ENTRY.replace("\"fail\"", "\"crash\""));
    refused(&file(&bounded), "leaves no errors")
}

fn result(id: &str, verdict: Verdict) -> CaseResult {
    let mut parts = id.split('/');
    let mut part = || parts.next().unwrap_or_default().to_string();
    let (backend, model) = (part(), part());
    CaseResult {
        id: id.to_string(),
        backend,
        model_argument: model.clone(),
        model,
        check: "shape/quantization".to_string(),
        requirement: "SHP-9".to_string(),
        clause: "a clause".to_string(),
        exclusive: false,
        category: Category::Shape,
        outcome: Outcome::bare(verdict, "what happened"),
    }
}

const ID: &str = "boastful/tiny/shape/quantization@SHP-9";

fn judged(entries: &str, verdict: Verdict, error: Option<f64>) -> Result<(Verdict, String), Failed> {
    let mut result = result(ID, verdict);
    result.outcome.errors.extend(error.map(|e| ("max_abs".to_string(), e)));
    parse(entries)?.judge(&mut result);
    Ok((result.outcome.verdict, result.outcome.reason.unwrap_or_default()))
}

fn verdicts_change_as_the_file_says_and_no_others() -> TestResult {
    use Verdict::{Crash, Fail, Inconclusive, Pass, Timeout, UnexpectedPass, Unsupported, Waived};
    for (kind, name) in [(Fail, "fail"), (Crash, "crash"), (Timeout, "timeout"), (Inconclusive, "inconclusive")] {
        let entries = ENTRY.replace("\"fail\"", &format!("{name:?}"));
        for verdict in Verdict::ALL {
            let (seen, reason) = judged(&entries, verdict, None)?;
            let expected = match verdict {
                Pass => UnexpectedPass,
                verdict if verdict == kind => Waived,
                verdict => verdict,
            };
            ensure(seen == expected, (kind, verdict, seen))?;
            let told = reason.contains("TL1 is on its way") && reason.contains("https://example.org/issues/7");
            ensure(told == (seen != verdict), &reason)?;
        }
    }
    ensure(judged(&ENTRY.replace("tiny", "huge"), Fail, None)?.0 == Fail, "another case")?;
    ensure(judged(&ENTRY.replace("tiny/shape", "*"), Fail, None)?.0 == Waived, "a pattern across slashes")?;
    ensure(judged(&format!("{ENTRY}{ENTRY}"), Fail, None)?.0 == Fail, "two entries")?;
    ensure(judged(&ENTRY.replace("2999-12-31", "2027-03-10"), Fail, None)?.0 == Waived, "the last day")?;
    ensure(judged(&ENTRY.replace("2999-12-31", "2027-03-09"), Fail, None)?.0 == Fail, "the day after")?;
    ensure(judged(ENTRY, Unsupported, None)?.0 == Unsupported, "not run")
}

fn an_error_past_its_bound_stays_a_failure_and_says_so() -> TestResult {
    let entries = format!("{ENTRY}bound = {{ max_abs = 0.5 }}");
    ensure(judged(&entries, Verdict::Fail, Some(0.5))?.0 == Verdict::Waived, "at the bound")?;
    let (verdict, reason) = judged(&entries, Verdict::Fail, Some(0.500_1))?;
    ensure(verdict == Verdict::Fail && reason.contains("max_abs is 0.5001, at most 0.5"), &reason)?;
    ensure(reason.contains("what happened"), &reason)?;
    let (verdict, reason) = judged(&entries, Verdict::Fail, None)?;
    ensure(verdict == Verdict::Fail && reason.contains("max_abs was not measured"), &reason)
}

fn findings(entries: &str, results: &[CaseResult]) -> Result<Vec<String>, Failed> {
    let selection = Selection { models: vec!["tiny".to_string()], ..Selection::default() };
    let cases = Suite::new(registry())?.select(&selection)?;
    Ok(parse(entries)?.findings(&cases, results).into_iter().map(|f| f.text).collect())
}

fn what_is_wrong_with_a_file_is_found() -> TestResult {
    let one = |entries: &str, results: &[CaseResult], part: &str| {
        let found = findings(entries, results)?;
        ensure(found.len() == 1 && found[0].contains(part), (part, &found))
    };
    let waived = [result(ID, Verdict::Waived)];
    ensure(findings(ENTRY, &waived)?.is_empty(), "a good entry")?;
    one(&ENTRY.replace("quantization@", "quantisation@"), &waived, "matches no case")?;
    one(&ENTRY.replace("boastful/tiny", "boastful/context-32"), &waived, "matches no case")?;
    one(&ENTRY.replace("2999-12-31", "2027-03-09"), &waived, "expired on 2027-03-09")?;
    one(&ENTRY.replace("shape/quantization@SHP-9", "determinism/threads@DET-4"), &waived, "declared absent")?;
    one(&format!("{ENTRY}{}", ENTRY.replace("tiny/shape", "*")), &waived, "both match boastful/tiny/shape")?;
    let passed = [result(ID, Verdict::UnexpectedPass), result("oracle/tiny/shape/x@SHP-9", Verdict::UnexpectedPass)];
    one(ENTRY, &passed, "1 cases fail which pass")
}

/// Runs this executable as another program, with an expectations file in a folder of its own.
fn run(
    program: &str,
    entries: &str,
    environment: &[(&str, &str)],
    args: &[&str],
) -> Result<(i32, String, String), Failed> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("expectations.toml");
    std::fs::write(&path, file(entries))?;
    let json = folder.path().join("report.json");
    let mut command = Command::new(std::env::current_exe()?);
    command
        .env("EXPECTATIONS_AS", program)
        .env_remove("CONFORMANCE_JSON")
        .env_remove("NEXTEST")
        .envs(environment.iter().copied());
    if program == "cli" {
        command.args(["run", "--model", "tiny", "--expectations"]).arg(&path).arg("--json").arg(&json);
    } else {
        command.env("CONFORMANCE_EXPECTATIONS", &path).env("CONFORMANCE_MODELS", "tiny");
    }
    let output = command.args(args).output()?;
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let report = std::fs::read_to_string(&json).unwrap_or_default();
    if program == "cli" && !report.is_empty() {
        let thresholds = concat!(env!("CARGO_MANIFEST_DIR"), "/../ci/thresholds.toml");
        let gate = Command::new(std::env::current_exe()?)
            .env("EXPECTATIONS_AS", "cli")
            .args(["gate", "--thresholds", thresholds])
            .arg(&json)
            .output()?;
        let gate = String::from_utf8_lossy(&gate.stdout).into_owned();
        return Ok((output.status.code().unwrap_or(-1), format!("{text}{gate}"), report));
    }
    Ok((output.status.code().unwrap_or(-1), text, report))
}

fn the_command_line_waives_and_fails_as_the_file_says() -> TestResult {
    let quantization = ["--filter", "shape/quantization"];
    let (code, text, _) = run("cli", "", &[], &quantization)?;
    ensure(code == 1 && text.contains("1 FAIL"), &text)?;

    let (code, text, json) = run("cli", ENTRY, &[], &quantization)?;
    ensure(code == 0 && text.contains("1 waived") && !text.contains("finding"), (code, &text))?;
    ensure(json.contains("\"verdict\": \"waived\"") && json.contains("\"findings\": []"), &json)?;

    // An entry for a case that the filter leaves out is not judged.
    let (code, text, _) = run("cli", ENTRY, &[], &["--filter", "oracle/tiny/shape/quantization"])?;
    ensure(code == 0, &text)?;

    let stale = ENTRY.replace("quantization@", "quantisation@");
    let (code, text, json) = run("cli", &stale, &[], &["--filter", "oracle/tiny/shape/quantization"])?;
    ensure(code == 1 && text.contains("FINDING") && text.contains("matches no case"), (code, &text))?;
    ensure(text.contains("breach: finding: expectation"), &text)?;
    ensure(json.contains("matches no case"), &json)?;

    let (code, text, json) = run("cli", &ENTRY.replace("boastful/", "oracle/"), &[], &quantization)?;
    ensure(code == 1 && text.contains("1 UNEXPECTED PASS") && text.contains("1 cases fail which pass"), (code, &text))?;
    ensure(json.contains("\"verdict\": \"unexpected_pass\""), &json)?;

    let (code, text, _) = run("cli", "nonsense", &[], &quantization)?;
    ensure(code == 2, (code, &text))
}

fn a_part_of_the_suite_is_not_taken_for_the_whole() -> TestResult {
    let suite = Suite::new(registry())?.select(&Selection::default())?;
    let mut cases: Vec<CaseResult> = suite.iter().map(|case| result(&case.id, Verdict::Pass)).collect();
    let absences = |cases: &[CaseResult]| {
        let report = Report::new(&suite, cases.to_vec(), std::time::UNIX_EPOCH, std::time::Duration::ZERO);
        conformance::gates::absences(&report, &suite)
    };
    ensure(absences(&cases).is_empty(), absences(&cases))?;
    let last = cases.pop().ok_or("no case")?.id;
    let found = absences(&cases);
    ensure(found.len() == 1 && found[0].contains("boastful: 1 cases") && found[0].contains(&last), &found)?;
    cases.retain(|case| !case.id.starts_with("oracle/"));
    let found = absences(&cases);
    ensure(found.len() == 2 && found[1].contains(&format!("oracle: {} cases", suite.len() / 2)), &found)?;

    let folder = tempfile::tempdir()?;
    let json = folder.path().join("report.json");
    let cli = |args: &[&str]| {
        Command::new(std::env::current_exe()?).env("EXPECTATIONS_AS", "cli").args(args).arg(&json).output()
    };
    cli(&["run", "--backend", "oracle", "--model", "tiny", "--filter", "shape/quantization", "--json"])?;
    for (choice, there) in [(&[][..], false), (&["--whole"], true)] {
        let thresholds = concat!(env!("CARGO_MANIFEST_DIR"), "/../ci/thresholds.toml");
        let output = cli(&[&["gate", "--thresholds", thresholds], choice].concat())?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure(text.contains("breach: backend boastful:") == there && text.contains("gate refused"), &text)?;
    }
    Ok(())
}

fn a_test_target_waives_and_fails_as_the_file_says() -> TestResult {
    let quantization = [("CONFORMANCE_FILTER", "shape/quantization")];
    let (code, text, _) = run("target", ENTRY, &quantization, &[])?;
    ensure(code == 0 && text.contains("3 passed") && text.contains("1 ignored"), &text)?;
    ensure(text.contains("TL1 is on its way") && text.contains("boastful/expectations"), &text)?;

    let stale = ENTRY.replace("quantization@", "quantisation@");
    let (code, text, _) = run("target", &stale, &quantization, &["boastful/expectations"])?;
    ensure(code != 0 && text.contains("matches no case") && text.contains("1 failed"), &text)?;
    let (code, text, _) = run("target", &stale, &quantization, &["oracle/expectations"])?;
    ensure(code == 0 && text.contains("1 passed"), &text)?;

    let (code, text, _) = run("target", &ENTRY.replace("boastful/", "oracle/"), &quantization, &["oracle/"])?;
    ensure(code != 0 && text.contains("UNEXPECTED PASS") && text.contains("1 failed"), &text)?;

    let (code, text, _) = run("target", "nonsense", &quantization, &["--list"])?;
    ensure(code != 0 && text.contains("expectations:"), &text)
}

fn main() -> ExitCode {
    match std::env::var("EXPECTATIONS_AS").as_deref() {
        Ok("cli") => return conformance::cli::main(registry()),
        Ok("target") => return conformance::main(registry()),
        _ => {}
    }
    let trials = vec![
        Trial::test("a_sound_file_is_read", a_sound_file_is_read),
        Trial::test("a_faulty_file_is_refused", a_faulty_file_is_refused),
        Trial::test("verdicts_change_as_the_file_says", verdicts_change_as_the_file_says_and_no_others),
        Trial::test("an_error_past_its_bound_stays_a_failure", an_error_past_its_bound_stays_a_failure_and_says_so),
        Trial::test("what_is_wrong_with_a_file_is_found", what_is_wrong_with_a_file_is_found),
        Trial::test("the_command_line_waives_and_fails", the_command_line_waives_and_fails_as_the_file_says),
        Trial::test("a_part_is_not_taken_for_the_whole", a_part_of_the_suite_is_not_taken_for_the_whole),
        Trial::test("a_test_target_waives_and_fails", a_test_target_waives_and_fails_as_the_file_says),
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}
