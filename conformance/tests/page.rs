//! Reports of real runs: that two runs have one hash, that the schema takes them, and that their page works in a browser.
//!
//! The backend is the example's oracle, beside one that cannot be built. Workers are this executable. Without Chromium
//! and chromedriver the browser's part is ignored, unless `CONFORMANCE_PAGE=required` says that they must be there.
#![forbid(unsafe_code)]

#[path = "../examples/oracle_backend/mod.rs"]
mod oracle_backend;
#[path = "page/webdriver.rs"]
mod webdriver;

use bitnet_contracts::{BitNetInference, ForwardPassError, InferenceError, KVCache, Tensor};
use conformance::case::{Category, Check, CheckResult, Context};
use conformance::report::{Report, Totals, html, json, schema};
use conformance::run::Runner;
use conformance::suite::{Selection, Suite};
use conformance::zoo::proof::{FaultRow, HonestRow, Proof};
use conformance::{BackendFactory, Capabilities, ModelFixture, Registry, Semantics, Verdict, measure};
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use oracle_backend::OracleFactory;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Instant, SystemTime};
use webdriver::{Browser, Lack};

/// Set to `required` where the browser must be there.
const REQUIRED_ENV: &str = "CONFORMANCE_PAGE";

/// A backend that loads no model.
struct Broken;

impl BackendFactory for Broken {
    fn name(&self) -> &str {
        "broken"
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::new(Semantics::W158A8)
    }

    fn description(&self) -> Option<String> {
        Some("loads no model".to_string())
    }

    fn create(&self, model: &ModelFixture) -> bitnet_contracts::Result<Box<dyn BitNetInference>> {
        let details = format!("{} cannot be loaded", model.dir().display());
        Err(InferenceError::ForwardPass(ForwardPassError::NumericalInstability { details }))
    }
}

/// The suite's own checks that say most about a report in the shortest time.
const CHOSEN: [&str; 6] = [
    "golden/logits",
    "golden/reproduced_rows",
    "kv_cache/chunked_is_whole",
    "causality/later_tokens_do_not_show",
    "errors/token_out_of_range",
    "hostile/missing_files",
];

fn token_times(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let mut cache = KVCache::new(30);
    for _ in 0..30 {
        let ids = Tensor::new(&[[7u32]], engine.device())?;
        let clock = Instant::now();
        let output = engine.forward(&ids, Some(&mut cache))?;
        let time = clock.elapsed().as_secs_f64() * 1e3;
        ctx.check_eq("rows", output.logits.dims()[1], 1);
        ctx.samples(measure::TOKEN_LATENCY_MS, [time]);
        ctx.timing(measure::TOKEN_LATENCY_MS, time);
    }
    Ok(())
}

fn checks() -> Vec<Check> {
    let mut checks: Vec<Check> =
        conformance::checks::all().into_iter().filter(|check| CHOSEN.contains(&check.name)).collect();
    assert_eq!(checks.len(), CHOSEN.len(), "the chosen checks are in the suite");
    let own = |name, category, run| Check::new("TST-1", name, category, "a check of this test's own", run);
    checks.push(own("sla/token_times", Category::Sla, token_times).exclusive());
    checks.push(own("errors/panics", Category::Errors, |_| panic!("a check that panics")));
    checks.push(own("errors/asserts_nothing", Category::Errors, |_| Ok(())));
    checks
}

fn suite() -> Suite {
    Suite::new(Registry::new().with(OracleFactory).with(Broken)).expect("a sound registry").with_checks(checks())
}

/// Runs what a filter chooses, on two models.
fn run(filter: Option<&str>) -> Result<Report, Failed> {
    let models = ["context-32", "c02-h256-gqa2-untied", "c07-h256-bitlinear"].map(str::to_string).to_vec();
    let selection = Selection { models, filter: filter.map(str::to_string), ..Selection::default() };
    let cases = suite().select(&selection)?;
    let (started, clock) = (SystemTime::now(), Instant::now());
    let results = Runner::new()?.run_all(&cases, 2, &|_| {});
    Ok(Report::new(&cases, results, started, clock.elapsed()))
}

fn two_runs_have_one_hash() -> Result<(), Failed> {
    // Failures that quote a temporary folder, and times, are among what runs.
    let (first, second) = (run(Some("context-32"))?, run(Some("context-32"))?);
    let failed = first.totals.count(Verdict::Fail) > 0 && first.totals.count(Verdict::Pass) > 0;
    let timed = first.cases.iter().any(|case| !case.outcome.samples.is_empty());
    if !failed || !timed {
        return Err(format!("the run has too little in it: {:?}", first.totals).into());
    }
    if first.cases == second.cases || first.content_sha256 != second.content_sha256 {
        let differ = first.cases.iter().zip(&second.cases).filter(|(a, b)| a.outcome.failures != b.outcome.failures);
        return Err(format!("two runs, two hashes: {:#?}", differ.collect::<Vec<_>>()).into());
    }
    Ok(())
}

fn a_real_report_follows_the_schema() -> Result<(), Failed> {
    let text = json::to_string(&run(Some("context-32"))?)?;
    let validator = jsonschema::validator_for(&serde_json::from_str(&schema::text()?)?)?;
    let value: Value = serde_json::from_str(&text)?;
    let errors: Vec<String> = validator.iter_errors(&value).map(|e| format!("{}: {e}", e.instance_path())).collect();
    if !errors.is_empty() {
        return Err(errors.join("\n").into());
    }
    json::from_str(&text)?;
    Ok(())
}

/// A proof with something of everything: one survivor, one fault that the wrong check caught, one false alarm.
fn proof() -> Proof {
    let checks: Vec<String> = conformance::checks::all().iter().map(|check| check.name.to_string()).collect();
    let fault = |i: usize| FaultRow {
        name: format!("fault_number_{i}"),
        class: ["weights", "architecture", "cache", "sampling", "errors"][i * 5 / 60].to_string(),
        what: "one thing is wrong".to_string(),
        source: "an engine's issue".to_string(),
        killer: checks[i % checks.len()].clone(),
        kills: [i, i + 1 + i % 3, (i * 7) % 50]
            .iter()
            .take(if i == 13 { 0 } else { 1 + i % 3 })
            .map(|k| (checks[(k + usize::from(i == 20)) % checks.len()].clone(), Verdict::Fail))
            .collect(),

        passed: checks.iter().take(100).cloned().collect(),
    };
    let honest = |name: &str, alarms: &[(&str, &str)]| HonestRow {
        name: name.to_string(),
        what: "correct, and different".to_string(),
        passed: 400,
        unsupported: 2,
        alarms: alarms.iter().map(|(id, why)| ((*id).to_string(), (*why).to_string())).collect(),
    };
    let alarm = ("slow/tiny/sla/gate@SLA-1", "too slow");
    let honest = vec![honest("f16", &[]), honest("slow", &[alarm])];
    Proof { faults: (0..60).map(fault).collect(), honest, checks, ..Proof::default() }
}

fn the_page_works_in_a_browser() -> Result<Completion, Failed> {
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let browser = match Browser::start(scratch.path()) {
        Ok(browser) => browser,
        Err(Lack::Broken(error)) => return Err(format!("the browser does not work: {error}").into()),
        Err(Lack::NotInstalled(what)) if std::env::var(REQUIRED_ENV).is_ok_and(|v| v == "required") => {
            return Err(format!("{what}, and {REQUIRED_ENV} says that it must be").into());
        }
        Err(Lack::NotInstalled(what)) => return Ok(Completion::ignored_with(what)),
    };
    let report = run(None)?;
    let pictures = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("conformance").join("page");
    std::fs::create_dir_all(&pictures)?;
    let page = pictures.join("report.html");
    html::write(&report, Some(&proof()), "conformance", &page)?;
    let faults = inspect(&browser, &report, &page, &pictures).map_err(|e| e.to_string())?;
    if faults.is_empty() { Ok(Completion::Completed) } else { Err(faults.join("\n").into()) }
}

type Inspection = Result<Vec<String>, Box<dyn std::error::Error + Send + Sync>>;

fn inspect(browser: &Browser, report: &Report, page: &Path, pictures: &Path) -> Inspection {
    let mut faults = Vec::new();
    browser.screen(1280, "light")?;
    // A console that hears nothing would make every page a good one.
    browser.open("data:text/html,<script>console.warn('heard')</script>")?;
    if !browser.console()?.iter().any(|line| line.contains("heard")) {
        faults.push("the console is not heard".to_string());
    }
    browser.open(&address(page))?;
    faults.extend(browser.console()?.into_iter().map(|line| format!("console: {line}")));
    let loaded = browser.run("return performance.getEntriesByType('resource').map(e => e.name)")?;
    if loaded
        .as_array()
        .is_none_or(|list| list.iter().any(|name| !name.as_str().is_some_and(|n| n.starts_with("data:"))))
    {
        faults.push(format!("the page loads something: {loaded}"));
    }
    let dangling = browser.run(
        "const links = [...document.querySelectorAll('a')].map(a => a.getAttribute('href'));
         if (links.length < 20) return ['only ' + links.length + ' links'];
         return links.filter(h => !h.startsWith('#') || !document.getElementById(decodeURIComponent(h.slice(1))))",
    )?;
    if dangling != serde_json::json!([]) {
        faults.push(format!("links to nowhere: {dangling}"));
    }
    faults.extend(grid_faults(browser, report)?);
    let opened = browser.run(
        "const link = document.querySelector('#grid td a'); link.click();
         const target = document.getElementById(link.getAttribute('href').slice(1));
         return new Promise(done => setTimeout(() => done(target.closest('details').open), 300))",
    )?;
    if opened != true {
        faults.push(format!("a cell of the grid does not open its list: {opened}"));
    }
    let badge = browser.run(
        "return [...document.querySelectorAll('.badge text')].filter(t => {
            const boxes = [...t.closest('svg').querySelectorAll('g rect')].map(r => r.getBBox()), own = t.getBBox();
            return !boxes.some(b => b.x <= own.x && own.x + own.width <= b.x + b.width);
         }).length",
    )?;
    if badge != 0 {
        faults.push(format!("{badge} texts do not fit into the badge"));
    }
    browser.open(&address(page))?;
    let mut grounds = Vec::new();
    for (width, scheme) in [(1280, "light"), (400, "light"), (1280, "dark"), (400, "dark")] {
        browser.screen(width, scheme)?;
        grounds.push(browser.run("return getComputedStyle(document.body).backgroundColor")?);
        browser.picture(&pictures.join(format!("{width}-{scheme}.png")))?;
        browser.run("document.querySelectorAll('details').forEach(d => d.dataset.was = d.open ? 1 : ''); document.querySelectorAll('details').forEach(d => d.open = true)")?;
        let wide = browser.run(WIDER)?;
        if wide != serde_json::json!([]) {
            faults.push(format!("wider than {width} pixels: {wide}"));
        }
        browser.run("document.querySelectorAll('details').forEach(d => d.open = d.dataset.was == 1)")?;
    }
    if grounds[0] == grounds[2] {
        faults.push(format!("light and dark have one ground: {grounds:?}"));
    }
    faults.extend(browser.console()?.into_iter().map(|line| format!("console: {line}")));
    Ok(faults)
}

/// The elements that make the page scroll sideways: those beyond the right edge that no container of their own scrolls.
const WIDER: &str = "
    const edge = document.documentElement.clientWidth;
    if (document.documentElement.scrollWidth <= edge) return [];
    return [...document.querySelectorAll('body *')]
        .filter(e => e.getBoundingClientRect().right > edge + 0.5 && !e.parentElement.closest('.scroll, pre, svg'))
        .slice(0, 9).map(e => e.tagName + '.' + e.className)";

/// The grid against the JSON form of the report: every cell's passes, and what else it names.
fn grid_faults(browser: &Browser, report: &Report) -> Inspection {
    let report = json::from_str(&json::to_string(report)?)?;
    let script = "return [...document.querySelectorAll('#grid tbody tr')].map(row =>
        [row.querySelector('th').innerText, ...[...row.querySelectorAll('td')].map(td => td.innerText)])";
    let rows: Vec<Vec<String>> = serde_json::from_value(browser.run(script)?)?;
    let backends = report.backend_names();
    let mut expected: Vec<Vec<String>> = Vec::new();
    let names = Category::ALL.iter().map(|category| category.name()).chain(["all"]);
    for name in names.filter(|name| *name == "all" || report.cases.iter().any(|c| c.category.name() == *name)) {
        let cell = |backend: &&str| {
            let of =
                |c: &&conformance::CaseResult| c.backend == *backend && (name == "all" || c.category.name() == name);
            let totals = Totals::of(report.cases.iter().filter(of));
            let others = Verdict::ALL.iter().filter(|v| **v != Verdict::Pass && totals.count(**v) > 0);
            let others: Vec<String> = others.map(|v| format!("{} {}", totals.count(*v), v.words())).collect();
            match totals.cases {
                0 => "none".to_string(),
                _ => format!("{} pass {}", totals.count(Verdict::Pass), others.join(" ")).trim().to_string(),
            }
        };
        expected.push(std::iter::once(name.to_string()).chain(backends.iter().map(cell)).collect());
    }
    let one_line = |text: &String| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let seen: Vec<Vec<String>> = rows.iter().map(|row| row.iter().map(one_line).collect()).collect();
    Ok(if seen == expected { Vec::new() } else { vec![format!("the grid shows\n{seen:#?}\nfor\n{expected:#?}")] })
}

fn address(page: &Path) -> String {
    let absolute: PathBuf = page.canonicalize().unwrap_or_else(|_| page.to_path_buf());
    format!("file://{}", absolute.display())
}

fn main() -> ExitCode {
    let suite = suite();
    if let Some(code) = conformance::worker::serve_if_asked(suite.registry(), suite.checks()) {
        return code;
    }
    let trials = vec![
        Trial::test("two_runs_have_one_hash", two_runs_have_one_hash),
        Trial::test("a_real_report_follows_the_schema", a_real_report_follows_the_schema),
        Trial::ignorable_test("the_page_works_in_a_browser", the_page_works_in_a_browser),
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}
