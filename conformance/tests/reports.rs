//! Reports, gates, ids and layers: everything that needs no worker.
#![forbid(unsafe_code)]

mod sample;

use conformance::case::{Category, Check};
use conformance::gates::Thresholds;
use conformance::invariance::{Axis, Claim, Level, Standing, Summary};
use conformance::measure;
use conformance::report::{Totals, json, junit, terminal};
use conformance::verdict::{CaseResult, Verdict};
use rstest::rstest;
use sample::{case, good_cases, report};
use std::collections::{BTreeSet, HashSet};
use std::path::{Path, PathBuf};

const THRESHOLDS: &str = r#"
version = 1
[suite]
max_failures = 0
max_inconclusive = 0
min_cases = 6
min_assertions = 60
[backends.alpha]
required_categories = ["golden", "kv_cache"]
min_cases = 3
[profiles.default]
max_token_latency_ms = 100.0
min_throughput_tps = 5.0
max_memory_bytes = 8589934592
min_accuracy_correlation = 0.99
max_time_to_first_token_ms = 1000.0
[profiles.cpu-target]
max_token_latency_ms = 10.0
"#;

fn breaches(cases: Vec<CaseResult>, profile: &str) -> Vec<String> {
    let thresholds = Thresholds::parse(THRESHOLDS).expect("thresholds");
    thresholds.breaches(&report(cases), profile).expect("a known profile")
}

#[test]
fn a_good_report_passes_the_gate_and_its_target_is_another_matter() {
    assert_eq!(breaches(good_cases(), "default"), Vec::<String>::new());
    let target = breaches(good_cases(), "cpu-target");
    assert_eq!(target.len(), 2, "{target:?}");
    assert!(target[0].contains("alpha") && target[0].contains("20"), "{target:?}");
}

#[rstest]
#[case::failed(Verdict::Fail, "failed")]
#[case::crashed(Verdict::Crash, "crashed")]
#[case::timed_out(Verdict::Timeout, "timed out")]
#[case::inconclusive(Verdict::Inconclusive, "inconclusive")]
#[case::passed_unexpectedly(Verdict::UnexpectedPass, "unexpectedly")]
fn a_bad_verdict_is_a_breach(#[case] verdict: Verdict, #[case] word: &str) {
    let mut cases = good_cases();
    cases.push(case("beta", Category::Batch, "bad", verdict));
    let found = breaches(cases, "default");
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].contains(word) && found[0].starts_with('1'), "{found:?}");
}

#[rstest]
#[case::latency(measure::TOKEN_LATENCY_MS, 100.1, "latency")]
#[case::throughput(measure::THROUGHPUT_TPS, 4.9, "throughput")]
#[case::memory(measure::PEAK_MEMORY_BYTES, 8589934593.0, "memory")]
#[case::correlation(measure::WORST_CORRELATION, 0.989, "correlation")]
#[case::first_token(measure::TIME_TO_FIRST_TOKEN_MS, 1000.5, "first token")]
fn a_level_is_held_by_the_worst_case_and_must_be_measured(#[case] key: &str, #[case] bad: f64, #[case] word: &str) {
    // One bad value among good ones, first and last, so that neither an average nor an order hides it.
    for at in [0, 1] {
        let mut cases = good_cases();
        cases[at].outcome.measurements.insert(key.to_string(), bad);
        let found = breaches(cases, "default");
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].contains(word) && found[0].contains("alpha"), "{found:?}");
    }
    let mut cases = good_cases();
    cases[5].outcome.measurements.remove(key);
    let found = breaches(cases, "default");
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].contains("beta") && found[0].contains("not measured"), "{found:?}");
}

#[test]
fn a_level_met_exactly_is_met() {
    let mut cases = good_cases();
    cases[2].outcome.measurements.insert(measure::TOKEN_LATENCY_MS.to_string(), 100.0);
    cases[2].outcome.measurements.insert(measure::WORST_CORRELATION.to_string(), 0.99);
    assert!(breaches(cases, "default").is_empty());
}

#[test]
fn missing_cases_assertions_backends_and_categories_are_breaches() {
    let empty = breaches(Vec::new(), "default");
    assert!(empty.iter().any(|b| b == "the report has no cases"), "{empty:?}");
    assert!(empty.iter().any(|b| b.contains("backend alpha is required")), "{empty:?}");

    let without_alpha = good_cases().into_iter().filter(|c| c.backend != "alpha").collect();
    let found = breaches(without_alpha, "default");
    assert!(found.iter().any(|b| b.contains("alpha") && b.contains("not in the report")), "{found:?}");
    assert!(found.iter().any(|b| b.contains("3 cases passed")), "{found:?}");

    // A category whose only case is unsupported has not been passed.
    let mut cases = good_cases();
    cases[1].outcome.verdict = Verdict::Unsupported;
    let found = breaches(cases, "default");
    assert!(found.iter().any(|b| b.contains("category kv_cache")), "{found:?}");

    let mut cases = good_cases();
    cases.iter_mut().for_each(|c| c.outcome.assertions = 1);
    let found = breaches(cases, "default");
    assert_eq!(found, ["7 assertions ran, at least 60 required"]);
}

#[rstest]
#[case::unknown_key("max_failures = 0", "max_failures = 0\nmax_failurse = 0")]
#[case::unknown_level("max_token_latency_ms = 10.0", "max_token_latency = 10.0")]
#[case::unknown_category("\"golden\"", "\"goldne\"")]
#[case::unknown_table("[backends.alpha]", "[backend.alpha]")]
#[case::other_version("version = 1", "version = 2")]
#[case::no_default("[profiles.default]", "[profiles.defualt]")]
#[case::missing_rule("min_cases = 6", "")]
#[case::not_a_number("min_throughput_tps = 5.0", "min_throughput_tps = nan")]
fn a_faulty_thresholds_file_is_refused(#[case] from: &str, #[case] to: &str) {
    assert!(THRESHOLDS.contains(from));
    assert!(Thresholds::parse(&THRESHOLDS.replacen(from, to, 1)).is_err());
}

#[test]
fn an_unknown_profile_is_refused() {
    let thresholds = Thresholds::parse(THRESHOLDS).expect("thresholds");
    let error = thresholds.breaches(&report(good_cases()), "gpu").expect_err("no such profile").to_string();
    assert!(error.contains("cpu-target, default"), "{error}");
}

#[test]
fn the_projects_thresholds_are_the_contracts() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../ci/thresholds.toml");
    let thresholds = Thresholds::read(&path).expect("ci/thresholds.toml");
    let contract = bitnet_contracts::PerformanceContract::default();
    let default = &thresholds.profiles["default"];
    assert_eq!(default.max_token_latency_ms, Some(f64::from(contract.max_token_latency_ms)));
    assert_eq!(default.min_throughput_tps, Some(f64::from(contract.min_throughput_tps)));
    assert_eq!(default.max_memory_bytes, Some(contract.max_memory_usage as u64));
    assert_eq!(default.min_accuracy_correlation, Some(0.99));
    for (name, target) in [
        ("cpu-target", bitnet_contracts::PerformanceContract::cpu_target()),
        ("gpu-target", bitnet_contracts::PerformanceContract::gpu_target()),
    ] {
        let profile = &thresholds.profiles[name];
        assert_eq!(profile.max_token_latency_ms, Some(f64::from(target.max_token_latency_ms)), "{name}");
        assert_eq!(profile.min_throughput_tps, Some(f64::from(target.min_throughput_tps)), "{name}");
        assert_eq!(profile.max_memory_bytes, Some(target.max_memory_usage as u64), "{name}");
    }
    assert_eq!(thresholds.suite.max_failures, 0);
    assert_eq!(thresholds.suite.max_inconclusive, 0);
}

#[test]
fn json_reads_back_as_it_was_written() {
    let mut cases = good_cases();
    for verdict in Verdict::ALL {
        cases.push(case("beta", Category::Errors, verdict.name(), verdict));
    }
    let report = report(cases);
    let text = json::to_string(&report).expect("text");
    assert_eq!(json::from_str(&text).expect("report"), report);
}

#[test]
fn json_that_is_not_a_sound_report_is_refused() {
    let text = json::to_string(&report(good_cases())).expect("text");
    let refused = |text: &str| json::from_str(text).expect_err("refused").to_string();
    assert!(refused("").contains("not a conformance report"));
    assert!(refused("{}").contains("schema_version"));
    assert!(refused(&text.replacen("\"schema_version\": 2", "\"schema_version\": 99", 1)).contains("99"));
    assert!(refused(&text.replacen("\"verdict\": \"pass\"", "\"verdict\": \"fail\"", 1)).contains("sums"));
    assert!(refused(&text.replacen("0.995", "0.996", 1)).contains("content_sha256"));
    let mut cases = good_cases();
    cases.push(cases[0].clone());
    let twice = json::to_string(&report(cases)).expect("text");
    assert!(refused(&twice).contains("two cases"));
}

#[test]
fn junit_is_well_formed_and_counts() {
    let mut cases = good_cases();
    cases.push(case("alpha", Category::Errors, "wrong", Verdict::Fail));
    cases.push(case("alpha", Category::Errors, "gone", Verdict::Crash));
    let xml = junit::to_string(&report(cases)).expect("xml");
    assert_well_formed(&xml);
    assert_eq!(xml.matches("<testsuite ").count(), 2);
    assert_eq!(xml.matches("<testcase ").count(), 9);
    assert_eq!(xml.matches("<failure").count(), 1);
    assert_eq!(xml.matches("<error").count(), 1);
    assert_eq!(xml.matches("<skipped").count(), 1);
    assert!(xml.contains("tests=\"9\" skipped=\"1\" failures=\"1\" errors=\"1\""), "{xml}");
    assert!(xml.contains("logit &lt;= 1 &amp;"), "{xml}");
}

#[test]
fn junit_tells_a_waiver_from_a_pass_that_nobody_expected() {
    let mut waived = case("alpha", Category::Errors, "known", Verdict::Waived);
    waived.outcome.reason = Some("issue 7, until 2030-01-01".to_string());
    waived.outcome.failures = case("", Category::Errors, "", Verdict::Fail).outcome.failures;
    let mut stale = case("alpha", Category::Errors, "stale", Verdict::UnexpectedPass);
    stale.outcome.reason = Some("the entry for issue 8 is stale".to_string());
    let xml = junit::to_string(&report(vec![waived, stale])).expect("xml");
    assert_well_formed(&xml);
    assert!(xml.contains("tests=\"2\" skipped=\"1\" failures=\"1\" errors=\"0\""), "{xml}");
    let skipped = xml.split("<skipped").nth(1).expect("a skipped case");
    assert!(skipped.starts_with(" message=\"issue 7, until 2030-01-01\""), "{xml}");
    let failed = xml.split("<failure").nth(1).expect("a failed case");
    assert!(failed.starts_with(" message=\"the entry for issue 8 is stale\" type=\"unexpected_pass\""), "{xml}");
}

/// Tags nest, attributes and text hold no raw `<` or `&`, and no control character is left.
fn assert_well_formed(xml: &str) {
    let mut open: Vec<String> = Vec::new();
    let mut rest = xml;
    while let Some(start) = rest.find('<') {
        let text = &rest[..start];
        assert!(!text.contains('>') || !open.is_empty(), "text outside of elements: {text:?}");
        for (i, _) in text.match_indices('&') {
            let entity = &text[i..];
            assert!(
                ["&lt;", "&gt;", "&amp;", "&quot;", "&apos;", "&#"].iter().any(|e| entity.starts_with(e)),
                "{entity}"
            );
        }
        let end = start + rest[start..].find('>').expect("a tag ends");
        let tag = &rest[start + 1..end];
        assert!(!tag.contains('<'), "{tag}");
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop().as_deref(), Some(name));
        } else if !tag.starts_with('?') && !tag.ends_with('/') {
            open.push(tag.split_whitespace().next().unwrap_or_default().to_string());
        }
        rest = &rest[end + 1..];
    }
    assert!(open.is_empty(), "{open:?} not closed");
    assert!(xml.chars().all(|c| !c.is_control() || c == '\n' || c == '\t'), "a control character");
}

#[test]
fn the_terminal_shows_the_grid_every_failure_and_how_to_repeat_it() {
    let mut cases = good_cases();
    cases.push(case("alpha", Category::Errors, "it's_wrong", Verdict::Fail));
    cases.push(case("beta", Category::Errors, "gone", Verdict::Crash));
    cases.push(case("beta", Category::Errors, "known", Verdict::Waived));
    cases.push(case("beta", Category::Errors, "stale", Verdict::UnexpectedPass));
    let style = terminal::Style { colour: false, program: "conformance".to_string() };
    let text = terminal::render(&report(cases), &style);
    for part in [
        "kv_cache",
        "1 FAIL",
        "1 CRASH",
        "expected  logit <= 1",
        "at        x.rs:7",
        r"conformance run --backend alpha --model tiny --filter 'alpha/tiny/errors/it'\''s_wrong@TST-1'",
        "conformance run --backend beta --model tiny --filter beta/tiny/errors/gone@TST-1",
        "1 UNEXPECTED PASS, 1 waived",
        "UNEXPECTED PASS  beta/tiny/errors/stale@TST-1",
        "waived: beta/tiny/errors/known@TST-1: a reason",
        "11 cases: 6 pass, 1 fail, 1 crash, 1 unexpected pass, 1 waived, 1 unsupported · 110 assertions · 11,000 values",
        "unsupported: beta: a reason (1 cases)",
        "✓ 100.00 ms 0.200×",
        "✗ 10.00 ms 2.000×",
    ] {
        assert!(text.contains(part), "{part:?} not in\n{text}");
    }
}

#[test]
fn findings_fail_a_run_and_are_shown_and_breach_the_gate() {
    let mut found = report(good_cases());
    assert!(found.is_green());
    found.findings = vec!["expectation \"x\" matches no case".to_string()];
    assert!(!found.is_green());
    let style = terminal::Style { colour: false, program: "conformance".to_string() };
    assert!(terminal::render(&found, &style).contains("FINDING  expectation \"x\" matches no case"));
    let thresholds = Thresholds::parse(THRESHOLDS).expect("thresholds");
    let breaches = thresholds.breaches(&found, "default").expect("a known profile");
    assert_eq!(breaches, ["finding: expectation \"x\" matches no case"]);
    let text = json::to_string(&found).expect("text");
    assert_eq!(json::from_str(&text).expect("report"), found);
}

#[test]
fn the_terminal_shows_every_claim_of_invariance_and_what_became_of_it() {
    let claim = |axis, claimed, standing| Claim { axis, claimed, standing, passed: 1, checks: 3 };
    let summary = |level, standing| Summary {
        level,
        covers: vec![Axis::Runs],
        claims: vec![
            claim(Axis::Runs, Some(Level::Bitwise), Standing::Held),
            claim(Axis::Batch, Some(Level::ArgmaxStable), standing),
            claim(Axis::Device, None, Standing::Unclaimed),
        ],
    };
    let mut shown = report(good_cases());
    let style = terminal::Style { colour: false, program: "conformance".to_string() };
    assert!(!terminal::render(&shown, &style).contains("invariance"), "nothing was tested");
    shown.invariance.insert("alpha".to_string(), summary(Some(Level::Bitwise), Standing::Untested));
    shown.invariance.insert("beta".to_string(), summary(None, Standing::Broken));
    let text = terminal::render(&shown, &style);
    for part in [
        "invariance",
        "✓ bitwise",
        "? argmax-stable: untested (1 of 3 checks)",
        "✗ argmax-stable: BROKEN",
        "bitwise on 1 axes",
        "none: 1 claims broken",
    ] {
        assert!(text.contains(part), "{part:?} not in\n{text}");
    }
    let text = json::to_string(&shown).expect("text");
    assert!(text.contains("\"claimed\": \"argmax-stable\"") && text.contains("\"standing\": \"untested\""), "{text}");
    assert_eq!(json::from_str(&text).expect("report"), shown);
}

#[test]
fn green_needs_a_pass_and_nothing_bad() {
    let green = |verdicts: &[Verdict]| {
        let cases: Vec<CaseResult> = verdicts.iter().map(|v| case("a", Category::Errors, "x", *v)).collect();
        Totals::of(&cases).is_green()
    };
    assert!(green(&[Verdict::Pass, Verdict::Unsupported]));
    assert!(!green(&[]));
    assert!(!green(&[Verdict::Unsupported]));
    for bad in [Verdict::Fail, Verdict::Crash, Verdict::Timeout, Verdict::Inconclusive, Verdict::UnexpectedPass] {
        assert!(!green(&[Verdict::Pass, bad]), "{bad}");
    }
}

#[test]
fn check_names_are_unique_and_carry_their_category_and_requirement() {
    let checks: Vec<Check> = conformance::checks::all();
    let mut names = HashSet::new();
    for check in &checks {
        assert!(names.insert(check.name), "two checks are named {}", check.name);
        let rest = check.name.strip_prefix(check.category.name()).and_then(|rest| rest.strip_prefix('/'));
        let what = rest.unwrap_or_else(|| panic!("{} is not named after its category", check.name));
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        assert!(!what.is_empty() && what.chars().all(plain), "{}", check.name);
        let (group, number) = check.id.split_once('-').unwrap_or_else(|| panic!("{}: no number", check.id));
        assert!(group.chars().all(|c| c.is_ascii_uppercase()), "{}", check.id);
        assert!(number.parse::<u32>().is_ok_and(|n| n > 0), "{}", check.id);
        assert!(!check.clause.is_empty(), "{}", check.name);
    }
    let categories: BTreeSet<Category> = checks.iter().map(|c| c.category).collect();
    assert_eq!(categories, Category::ALL.into_iter().collect(), "every category has a check");
}

#[test]
fn the_library_knows_no_engine() {
    fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(dir).expect("a source folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                if path.file_name().is_none_or(|name| name != "bin") {
                    sources(&path, found);
                }
            } else if path.extension().is_some_and(|e| e == "rs") {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut found);
    assert!(found.len() > 10, "the sources were found");
    for path in found {
        let text = std::fs::read_to_string(&path).expect("a source file");
        for name in ["bitnet_engine", "CpuEngine"] {
            assert!(!text.contains(name), "{} mentions {name}", path.display());
        }
    }
}
