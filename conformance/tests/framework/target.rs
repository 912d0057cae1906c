//! The framework as a test target of cargo: what it lists, judges and leaves behind. The target is this executable.

use super::{TestResult, ensure};
use conformance::Verdict;
use conformance::report::json;
use libtest_mimic::Failed;

/// Runs this executable as cargo or a shell would run a test target of the suite.
fn target(backends: &str, args: &[&str]) -> Result<(bool, String), Failed> {
    output(as_target("").env("CONFORMANCE_BACKENDS", backends).args(args))
}

/// This executable as a test target of the suite with the checks that have a word in their names.
fn as_target(word: &str) -> std::process::Command {
    let mut command = std::process::Command::new(std::env::current_exe().unwrap_or_default());
    command.env("FRAMEWORK_AS_TARGET", word).env_remove("CONFORMANCE_JSON").env_remove("NEXTEST");
    command
}

fn output(command: &mut std::process::Command) -> Result<(bool, String), Failed> {
    let output = command.output()?;
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    Ok((output.status.success(), text))
}

pub(super) fn a_test_target_lists_filters_and_judges() -> TestResult {
    let (good, text) = target("oracle", &["--list", "--format", "terse"])?;
    ensure(good && text.contains("oracle/tiny/errors/passes@TST-1: test\n") && !text.contains("broken/"), &text)?;
    let (good, text) = target("", &["--exact", "oracle/tiny/errors/passes@TST-1", "--nocapture"])?;
    ensure(good && text.contains("1 passed"), &text)?;
    let (good, text) = target("", &["needs_attention"])?;
    ensure(good && text.contains("unsupported: attention weights") && text.contains("2 ignored"), &text)?;
    let (good, text) = target("oracle", &["asserts_nothing"])?;
    ensure(!good && text.contains("INCONCLUSIVE") && text.contains("--exact"), &text)?;
    let (good, text) = target("gpu", &["--list"])?;
    ensure(!good && text.contains("registered: oracle, broken"), &text)
}

pub(super) fn only_a_whole_run_of_a_test_target_leaves_a_report() -> TestResult {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("report.json");
    let run = |word: &str, backends: &str, args: &[&str]| {
        std::fs::write(&file, "of an earlier run")?;
        let mut command = as_target(word);
        command.env("CONFORMANCE_JSON", &file).env("CONFORMANCE_BACKENDS", backends).args(args);
        output(&mut command)
    };
    let (good, text) = run("errors/passes", "", &[])?;
    ensure(good && text.contains("2 passed"), &text)?;
    let report = json::read(&file)?;
    let ids: Vec<&str> = report.cases.iter().map(|case| case.id.as_str()).collect();
    let whole = ["oracle/tiny/errors/passes@TST-1", "broken/tiny/errors/passes@TST-1"];
    ensure(ids == whole && report.is_green(), &ids)?;
    let (good, text) = run("errors/fails_", "", &[])?;
    let report = json::read(&file)?;
    ensure(!good && report.totals.count(Verdict::Fail) == report.totals.cases, &text)?;
    for (backends, args) in [("oracle", &[][..]), ("", &["oracle/"]), ("", &["--skip", "broken/"])] {
        let (good, text) = run("errors/passes", backends, args)?;
        ensure(good && text.contains("1 passed") && !file.exists(), &text)?;
    }
    let (good, text) = run("errors/passes", "", &["--list"])?;
    ensure(good && std::fs::read_to_string(&file)? == "of an earlier run", &text)
}
