//! What is made of a report: the hash of its content, the schema, the page, the badge, the comparison of two.
#![forbid(unsafe_code)]

mod sample;

use conformance::case::Category;
use conformance::measure;
use conformance::report::diff::{self, Kind};
use conformance::report::{GitState, Report, badge, html, json, schema};
use conformance::verdict::{CaseResult, Failure, Verdict};
use conformance::zoo::proof::{Depth, FaultRow, HonestRow, Proof};
use sample::{case, good_cases, report};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

type Change = fn(&mut CaseResult);

#[test]
fn what_a_case_found_is_in_the_hash() {
    let changes: [(&str, Change); 10] = [
        ("verdict", |c| c.outcome.verdict = Verdict::Waived),
        ("assertions", |c| c.outcome.assertions += 1),
        ("values", |c| c.outcome.values += 1),
        ("measurement", |c| *c.outcome.measurements.entry("gap".to_string()).or_default() += f64::EPSILON),
        ("error", |c| c.outcome.errors.extend([("FP32_ABS".to_string(), 1e-5)])),
        ("series", |c| c.outcome.series.extend([("gap".to_string(), vec![1e-5])])),
        ("failed assertions", |c| c.outcome.failed_assertions = 1),
        ("reason", |c| c.outcome.reason = Some("why".to_string())),
        ("clause", |c| c.clause = "another clause".to_string()),
        ("exclusive", |c| c.exclusive = true),
    ];
    let mut cases = good_cases();
    cases[0].outcome.measurements.insert("gap".to_string(), 0.1);
    for (what, change) in changes {
        let mut changed = cases.clone();
        change(&mut changed[0]);
        assert_ne!(report(changed).content_sha256, report(cases.clone()).content_sha256, "{what}");
    }
}

#[test]
fn what_no_two_runs_repeat_is_not() {
    let changes: [(&str, Change); 6] = [
        ("timing", |c| c.outcome.timings.extend([("ms".to_string(), 1.0)])),
        ("samples", |c| c.outcome.samples.extend([("ms".to_string(), vec![1.0])])),
        ("duration", |c| c.outcome.duration_s = 9.0),
        ("note", |c| c.outcome.notes.push("took 3 ms".to_string())),
        ("tail", |c| c.outcome.output_tail = Some("pid 7".to_string())),
        ("reproducer", |c| c.outcome.reproducer = Some("{}".to_string())),
    ];
    for (what, change) in changes {
        let mut changed = good_cases();
        change(&mut changed[0]);
        assert_eq!(report(changed).content_sha256, report(good_cases()).content_sha256, "{what}");
    }
}

#[test]
fn a_case_that_measures_time_is_hashed_by_its_verdict_and_measurements() {
    let hash = |change: Change| {
        let mut cases = good_cases();
        cases[2].exclusive = true;
        change(&mut cases[2]);
        report(cases).content_sha256
    };
    let before = hash(|_| {});
    assert_eq!(hash(|c| c.outcome.assertions += 7), before);
    assert_eq!(hash(|c| c.outcome.reason = Some("3.2 ms".to_string())), before);
    assert_ne!(hash(|c| c.outcome.verdict = Verdict::Fail), before);
    assert_ne!(hash(|c| c.outcome.measurements.extend([("flops_ratio".to_string(), 1.0)])), before);
}

#[test]
fn where_and_when_a_run_was_is_not_in_the_hash_and_the_suites_version_is() {
    let mut changed = report(good_cases());
    let before = changed.content_sha256.clone();
    changed.started_unix_s += 60;
    changed.duration_s += 1.0;
    changed.environment.cpu = "another".to_string();
    changed.descriptions.insert("alpha".to_string(), "avx2".to_string());
    let mut changed = changed.sealed();
    assert_eq!(changed.content_sha256, before);
    changed.suite_version = "99.0.0".to_string();
    assert_ne!(changed.sealed().content_sha256, before);
}

#[test]
fn every_float_reads_back_to_the_last_bit() {
    // Decimal texts that a parser which does not round correctly gets wrong.
    let mut cases = good_cases();
    let hard = [31.245270191439438, 121.48791951161945, 0.9073038322028689, 0.48183792520110524, 5e-324];
    for (i, value) in hard.into_iter().enumerate() {
        cases[0].outcome.measurements.insert(format!("m{i}"), value);
    }
    let report = report(cases);
    assert_eq!(json::from_str(&json::to_string(&report).expect("text")).expect("report"), report);
}

fn committed_schema() -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("report.schema.json")).expect("the schema")
}

#[test]
fn the_published_schema_is_that_of_the_types() {
    assert_eq!(
        committed_schema(),
        schema::text().expect("a schema"),
        "run `cargo run -p conformance -- schema > conformance/report.schema.json`"
    );
}

#[test]
fn the_schema_takes_reports_and_refuses_what_is_none() {
    let schema: serde_json::Value = serde_json::from_str(&committed_schema()).expect("JSON");
    let validator = jsonschema::validator_for(&schema).expect("a schema");
    let mut cases = good_cases();
    for verdict in Verdict::ALL {
        cases.push(case("beta", Category::Errors, verdict.name(), verdict));
    }
    let value = serde_json::to_value(report(cases)).expect("a value");
    let errors: Vec<String> = validator.iter_errors(&value).map(|e| format!("{}: {e}", e.instance_path())).collect();
    assert_eq!(errors, Vec::<String>::new());
    let refused = |change: fn(&mut serde_json::Value)| {
        let mut other = value.clone();
        change(&mut other);
        assert!(!validator.is_valid(&other), "{other:#}");
    };
    refused(|v| v["cases"][0]["verdict"] = "passed".into());
    refused(|v| v["cases"][0]["assertions"] = (-1).into());
    refused(|v| v["schema_version"] = "2".into());
    refused(|v| v["totals"] = serde_json::Value::Null);
    refused(|v| v["surprise"] = 1.into());
    refused(|v| drop(v["cases"][0].as_object_mut().expect("a case").remove("id")));
}

#[test]
fn a_long_series_keeps_its_worst_value_and_a_long_sample_its_ends() {
    let long = (0..10_000).map(|i| if i == 7_777 { 0.123456 } else { 1e-5 });
    let kept = measure::series(long);
    assert!(kept.len() <= measure::MAX_SERIES && kept.contains(&0.1235), "{} {kept:?}", kept.len());
    assert_eq!(measure::series([f64::NAN, f64::INFINITY, 0.0]), [f32::MAX, f32::MAX, 0.0]);
    let kept = measure::samples((0..100_000).map(f64::from).rev().chain([f64::NAN]));
    assert_eq!((kept.len(), kept[0], kept[measure::MAX_SAMPLES - 1]), (measure::MAX_SAMPLES, 0.0, 99_999.0));
}

fn proof() -> Proof {
    let fault = |name: &str, killer: &str, kills: &[&str]| FaultRow {
        name: name.to_string(),
        class: "cache".to_string(),
        what: "a <fault>".to_string(),
        source: "an issue".to_string(),
        killer: killer.to_string(),
        kills: kills.iter().map(|check| ((*check).to_string(), Verdict::Fail)).collect(),
        passed: ["kv_cache/two".to_string()].into(),
    };
    Proof {
        depth: Depth::Matrix,
        part: String::new(),
        checks: ["kv_cache/one", "kv_cache/two", "sla/three"].map(str::to_string).to_vec(),
        faults: vec![
            fault("caught_alone", "kv_cache/one", &["kv_cache/one"]),
            fault("caught_twice", "kv_cache/one", &["kv_cache/one", "kv_cache/two"]),
            fault("survivor", "sla/three", &[]),
        ],
        honest: vec![HonestRow {
            name: "slow".to_string(),
            what: "is slow".to_string(),
            passed: 3,
            unsupported: 0,
            alarms: BTreeMap::from([("slow/tiny/sla/three@SLA-1".to_string(), "too slow".to_string())]),
        }],
    }
}

fn page(report: &Report, proof: Option<&Proof>) -> String {
    html::render(report, proof, "conformance").expect("a page")
}

/// A report with everything that a page can show, and texts that try to break out of it.
fn full_report() -> Report {
    let mut cases = good_cases();
    for verdict in Verdict::ALL {
        cases.push(case("alpha", Category::Errors, verdict.name(), verdict));
    }
    let hostile = "</pre><script>alert(1)</script><img src=x onerror=alert(1)>";
    let failing = cases.iter_mut().find(|c| c.outcome.verdict == Verdict::Fail).expect("one that fails");
    let failure = Failure { expected: hostile.to_string(), seen: hostile.to_string(), at: "x.rs:7".to_string() };
    failing.outcome.failures = vec![failure; 5];
    failing.outcome.reproducer = Some("{\"layers\":1}".to_string());
    failing.outcome.output_tail = Some(hostile.to_string());
    cases[0].outcome.series.insert(measure::SERIES_CORRELATION.to_string(), vec![0.0, 1e-4, f32::MAX]);
    cases[3].outcome.series.insert("of \"another\" crate".to_string(), vec![0.5]);
    cases[2].outcome.samples.insert(measure::TOKEN_LATENCY_MS.to_string(), vec![0.2, 0.3, 140.0]);
    cases[4].outcome.assertions = 0;
    report(cases)
}

#[test]
fn the_page_is_whole_and_asks_for_nothing() {
    for (report, proof) in [
        (full_report(), Some(proof())),
        (full_report(), Some(Proof::default())),
        (report(good_cases()), None),
        (report(Vec::new()), None),
    ] {
        let page = page(&report, proof.as_ref());
        let after = |mark: &str| -> BTreeSet<String> {
            page.split(mark).skip(1).filter_map(|rest| rest.split('"').next()).map(str::to_string).collect()
        };
        let (links, ids) = (after("href=\"#"), after(" id=\""));
        assert!(links.len() > 3, "{links:?}");
        assert!(links.is_subset(&ids), "{:?}", links.difference(&ids));
        assert_eq!(page.matches(" id=\"").count(), ids.len(), "an id twice");
        for mark in ["<script", "<img", " src=\"", "url(http", "@import", "NaN", "inf\""] {
            assert!(!page.contains(mark), "{mark}");
        }
        let outside = page.matches("http").count() - page.matches("http://www.w3.org/2000/svg").count();
        assert_eq!(outside, page.matches("http-equiv").count());
    }
}

#[test]
fn the_page_shows_what_there_is() {
    let report = full_report();
    let text = page(&report, Some(&proof()));
    for part in [
        "1 of 2 backends conform",
        "conformance run --backend alpha --model tiny --filter alpha/tiny/errors/fail@TST-1",
        "{&quot;layers&quot;:1}",
        "2 more assertions that did not hold",
        "&lt;script&gt;alert(1)",
        "unexpected pass",
        "gate 0.01",
        "worst 3.4e38 at 2, alpha",
        "3 tokens · median 0.3 · p95 140 · p99 140 ms",
        "beta/tiny/kv_cache/one@TST-1",
        "caught_alone × kv_cache/one: fail",
        "survivor × sla/three: not seen",
        "slow/tiny/sla/three@SLA-1",
        &report.content_sha256,
    ] {
        assert!(text.contains(part) || text.contains(&part.replace('/', "&#x2f;")), "{part:?} is not on the page");
    }
    assert!(!page(&report, None).contains("id=\"proof\""));
}

#[test]
fn the_page_says_of_a_proof_whether_it_holds_and_what_part_it_is() {
    let report = report(good_cases());
    let says = |proof: &Proof, words: &[&str], others: &[&str]| {
        let text = page(&report, Some(proof));
        assert!(words.iter().all(|word| text.contains(word)), "{words:?}: {text}");
        assert!(!others.iter().any(|word| text.contains(word)), "{others:?}: {text}");
    };
    let (holds, not, part) = ("The proof holds", "The proof does not hold", "Only a part was run");
    let spare = "checks without a kill of their own";
    let mut proof = proof();
    says(&proof, &[not, spare], &[holds, part]);
    // What is left speaks for it.
    proof.checks.retain(|check| check == "kv_cache/one");
    proof.faults.truncate(1);
    proof.honest[0].alarms.clear();
    says(&proof, &[holds, spare], &[not, part]);
    proof.depth = Depth::Killers;
    says(&proof, &[part, "check that is there for it alone", "Nothing in it speaks against"], &[holds, not, spare]);
    proof.depth = Depth::Matrix;
    proof.part = "backends named honest-".to_string();
    says(&proof, &[part, "backends named honest-"], &[holds, not, spare]);
    proof.faults[0].kills.clear();
    says(&proof, &[part, "It speaks against the suite"], &[holds, not, spare]);
}

#[test]
fn the_badge_tells_passes_or_what_else_there_was() {
    let green = badge::render(&report(good_cases()));
    assert!(green.contains(">6 pass<") && green.contains("#1a7f4b"), "{green}");
    let mut cases = good_cases();
    cases.push(case("alpha", Category::Errors, "x", Verdict::Crash));
    let red = badge::render(&report(cases));
    assert!(red.contains(">1 crash, 6 pass<") && red.contains("#c0322f"), "{red}");
    let width = |svg: &str| -> f64 {
        let rest = svg.split(" width=\"").nth(1).expect("a width");
        rest.split('"').next().and_then(|w| w.parse().ok()).expect("a number")
    };
    assert!(width(&red) > width(&green), "longer words need a wider badge");
}

fn differences(change: impl FnOnce(&mut Vec<CaseResult>)) -> Vec<(Kind, String)> {
    let mut cases = good_cases();
    cases[0].outcome.errors.insert("FP32_ABS".to_string(), 1e-5);
    cases[0].outcome.measurements.insert("share".to_string(), 0.9);
    let before = report(cases.clone());
    change(&mut cases);
    diff::compare(&before, &report(cases), diff::FACTOR).changes.into_iter().map(|c| (c.kind, c.what)).collect()
}

#[test]
fn a_difference_is_judged() {
    use Kind::{Improvement, Other, Regression};
    let one = |kind: Kind, what: &str| vec![(kind, what.to_string())];
    assert_eq!(differences(|_| {}), []);
    assert_eq!(differences(|c| c[0].outcome.verdict = Verdict::Crash), one(Regression, "pass → crash"));
    assert_eq!(differences(|c| c[0].outcome.verdict = Verdict::Unsupported), one(Regression, "pass → unsupported"));
    assert_eq!(differences(|c| c[6].outcome.verdict = Verdict::Pass), one(Improvement, "unsupported → pass"));
    assert_eq!(differences(|c| c[6].outcome.verdict = Verdict::Waived), one(Other, "unsupported → waived"));
    assert_eq!(differences(|c| drop(c.remove(0))), one(Regression, "vanished, was pass"));
    assert_eq!(differences(|c| drop(c.remove(6))), one(Other, "vanished, was unsupported"));
    let new = |verdict| move |c: &mut Vec<CaseResult>| c.push(case("alpha", Category::Batch, "new", verdict));
    assert_eq!(differences(new(Verdict::Pass)), one(Other, "appeared, is pass"));
    assert_eq!(differences(new(Verdict::UnexpectedPass)), one(Regression, "appeared, is unexpected pass"));
    let error = |value: f64| move |c: &mut Vec<CaseResult>| c[0].outcome.errors.extend([("FP32_ABS".into(), value)]);
    assert_eq!(differences(error(1.9e-5)), []);
    assert_eq!(differences(error(2.1e-5)), one(Regression, "error FP32_ABS: 1.000e-5 → 2.100e-5"));
    assert_eq!(differences(error(1e-7)), one(Improvement, "error FP32_ABS: 1.000e-5 → 1.000e-7"));
    let measured = |key: &'static str, value: f64| {
        move |c: &mut Vec<CaseResult>| {
            c.iter_mut().for_each(|c| {
                c.outcome.measurements.entry(key.to_string()).and_modify(|v| *v = value);
            })
        }
    };
    assert_eq!(differences(measured("share", 0.3)), one(Other, "share: 0.9000 → 0.3000"));
    let worse = differences(measured(measure::WORST_CORRELATION, 0.98));
    let line = (Regression, "worst_correlation_fp32: 0.995000 → 0.980000".to_string());
    assert_eq!(worse, [line.clone(), line]);
    assert_eq!(differences(|c| c[1].outcome.assertions = 4), one(Regression, "assertions: 10 → 4"));
    assert_eq!(differences(|c| c[1].outcome.values = 9000), one(Other, "values compared: 1000 → 9000"));
}

#[test]
fn a_difference_is_told_with_regressions_first() {
    let mut cases = good_cases();
    let before = report(cases.clone());
    cases[4].outcome.verdict = Verdict::Fail;
    cases.push(case("alpha", Category::Batch, "new", Verdict::Pass));
    let after = report(cases);
    let diff = diff::compare(&before, &after, diff::FACTOR);
    assert!(diff.is_regression() && !diff.same_content);
    let text = diff.to_string();
    assert!(text.starts_with("worse (1):\n  beta/tiny/kv_cache/one@TST-1  pass → fail\n"), "{text}");
    assert!(text.contains("cases 7 → 8 · pass 6 → 6 · fail 0 → 1 · unsupported 1 → 1"), "{text}");
    let same = diff::compare(&before, &before, diff::FACTOR);
    assert!(!same.is_regression() && same.same_content && same.changes.is_empty());
}

#[test]
fn the_state_of_a_working_tree_is_told_and_none_where_there_is_none() {
    let git = |dir: &Path, args: &[&str]| {
        let mut git = std::process::Command::new("git");
        git.arg("-C").arg(dir).args(["-c", "user.name=t", "-c", "user.email=t@example.org"]).args(args);
        git.output().is_ok_and(|output| output.status.success())
    };
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    if !git(dir.path(), &["init", "-q"]) {
        // No git on this machine: then no state is told either.
        assert_eq!(GitState::of(dir.path()), None);
        return;
    }
    assert_eq!(GitState::of(dir.path()), None, "no commit yet");
    let file = dir.path().join("file");
    std::fs::write(&file, "1").expect("a file");
    assert!(git(dir.path(), &["add", "."]) && git(dir.path(), &["commit", "-q", "-m", "one"]));
    let clean = GitState::of(dir.path()).expect("a state");
    assert!(clean.commit.len() >= 40 && !clean.dirty, "{clean:?}");
    std::fs::write(&file, "2").expect("a file");
    assert_eq!(GitState::of(dir.path()), Some(GitState { dirty: true, ..clean }));
    assert_eq!(GitState::of(Path::new("/")), None);
}

#[test]
#[cfg(feature = "own-backends")]
fn the_command_line_compares_and_converts() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let path = |name: &str| dir.path().join(name).display().to_string();
    let mut cases = good_cases();
    json::write(&report(cases.clone()), Path::new(&path("before.json"))).expect("a file");
    cases[0].outcome.verdict = Verdict::Fail;
    json::write(&report(cases), Path::new(&path("after.json"))).expect("a file");
    std::fs::write(path("proof.json"), serde_json::to_string(&proof()).expect("JSON")).expect("a file");
    let run = |args: &[&str]| {
        let output =
            std::process::Command::new(env!("CARGO_BIN_EXE_conformance")).args(args).output().expect("it runs");
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let (before, after) = (path("before.json"), path("after.json"));
    assert_eq!(run(&["diff", &before, &before]).0, Some(0));
    assert_eq!(run(&["diff", &after, &before]).0, Some(0), "better is no regression");
    let (code, text) = run(&["diff", &before, &after]);
    assert!(code == Some(1) && text.contains("pass → fail"), "{text}");
    for unusable in [&["diff", &before, &path("none.json")][..], &["diff", "--factor", "1", &before, &after]] {
        assert_eq!(run(unusable).0, Some(2), "{unusable:?}");
    }
    let (html, badge, proof) = (path("page.html"), path("badge.svg"), path("proof.json"));
    assert_eq!(run(&["report", &after, "--html", &html, "--badge", &badge, "--proof", &proof]).0, Some(0));
    assert!(std::fs::read_to_string(&html).is_ok_and(|page| page.contains("id=\"proof\"")));
    assert!(std::fs::read_to_string(&badge).is_ok_and(|svg| svg.contains("1 fail, 5 pass")));
    let (code, text) = run(&["report", &after]);
    assert!(code == Some(0) && text.contains("1 FAIL"), "{text}");
    assert_eq!(run(&["schema"]).1, committed_schema());
}
