//! The head of the page, the grid of backends and categories, and the environment.

use super::slug;
use crate::case::Category;
use crate::report::json::ReportError;
use crate::report::terminal::grouped;
use crate::report::{Report, Totals, badge};
use crate::verdict::Verdict;
use crate::zoo::proof::Proof;
use serde::Serialize;

/// The head: what came of the run, in one look.
#[derive(Serialize)]
pub(super) struct Header<'a> {
    title: String,
    green: bool,
    badge: String,
    icon: &'static str,
    started: String,
    duration: String,
    suite_version: &'a str,
    content_sha256: &'a str,
    backends: Vec<BackendHead<'a>>,
    tiles: Vec<Tile>,
    shares: Vec<Share>,
}

/// A backend in the head.
#[derive(Serialize)]
struct BackendHead<'a> {
    name: &'a str,
    description: &'a str,
    semantics: &'static str,
    green: bool,
    words: String,
}

/// A number that matters.
#[derive(Serialize)]
struct Tile {
    value: String,
    what: &'static str,
    class: &'static str,
}

/// The share of one verdict in the cases.
#[derive(Serialize)]
pub(super) struct Share {
    words: &'static str,
    class: &'static str,
    count: u64,
    percent: f64,
}

pub(super) fn header<'a>(report: &'a Report, proof: Option<&Proof>) -> Header<'a> {
    let totals = &report.totals;
    let names = report.backend_names();
    let backends: Vec<BackendHead<'_>> = names
        .iter()
        .map(|name| {
            let totals = Totals::of(report.cases.iter().filter(|c| c.backend == *name));
            BackendHead {
                name,
                description: report.descriptions.get(*name).map_or("", String::as_str),
                semantics: report.backends.get(*name).map_or("", |c| c.semantics.name()),
                green: totals.is_green(),
                words: words(&totals),
            }
        })
        .collect();
    let good = backends.iter().filter(|b| b.green).count();
    let title = match (good, backends.len()) {
        (_, 0) => "Nothing was run".to_string(),
        (1, 1) => format!("{} conforms", backends[0].name),
        (0, 1) => format!("{} does not conform", backends[0].name),
        (2, 2) => "Both backends conform".to_string(),
        (0, _) => "No backend conforms".to_string(),
        (good, all) if good == all => format!("All {all} backends conform"),
        (good, all) => format!("{good} of {all} backends conform"),
    };
    let bad: u64 = Verdict::ALL.iter().filter(|v| !v.is_good()).map(|v| totals.count(*v)).sum();
    let absent = totals.count(Verdict::Unsupported) + totals.count(Verdict::Waived);
    let tile = |value: u64, what, class| Tile { value: grouped(value), what, class };
    let mut tiles = vec![
        tile(totals.cases, "cases", ""),
        tile(totals.count(Verdict::Pass), "passed", "pass"),
        tile(bad, "not good", if bad == 0 { "" } else { "fail" }),
        tile(absent, "unsupported or waived", ""),
        tile(totals.assertions, "assertions", ""),
        tile(totals.values, "values compared", ""),
    ];
    if let Some(proof) = proof {
        let killed = proof.faults.len() - proof.survivors().len();
        let value = format!("{killed} / {}", proof.faults.len());
        tiles.push(Tile { value, what: "faults caught", class: if proof.is_good() { "pass" } else { "fail" } });
    }
    Header {
        title,
        green: totals.is_green(),
        badge: badge::render(report),
        icon: if totals.is_green() { "1a7f4b" } else { "c0322f" },
        started: utc(report.started_unix_s),
        duration: format!("{:.1} s", report.duration_s),
        suite_version: &report.suite_version,
        content_sha256: &report.content_sha256,
        backends,
        tiles,
        shares: shares(totals),
    }
}

/// The verdicts that occurred, with their share of the cases.
fn shares(totals: &Totals) -> Vec<Share> {
    let all = totals.cases.max(1) as f64;
    Verdict::ALL
        .iter()
        .filter(|v| totals.count(**v) > 0)
        .map(|v| {
            let count = totals.count(*v);
            Share { words: v.words(), class: v.name(), count, percent: 100.0 * count as f64 / all }
        })
        .collect()
}

fn words(totals: &Totals) -> String {
    shares(totals).iter().map(|s| format!("{} {}", s.count, s.words)).collect::<Vec<_>>().join(", ")
}

/// Backend × category.
#[derive(Serialize)]
pub(super) struct Grid<'a> {
    backends: Vec<&'a str>,
    rows: Vec<GridRow>,
}

/// One category, or all of them.
#[derive(Serialize)]
struct GridRow {
    category: &'static str,
    cells: Vec<GridCell>,
}

/// The cases of one backend in one category.
#[derive(Serialize)]
struct GridCell {
    target: String,
    cases: u64,
    pass: u64,
    state: &'static str,
    others: Vec<Share>,
    label: String,
}

pub(super) fn grid(report: &Report) -> Grid<'_> {
    let backends = report.backend_names();
    let cell = |backend: &str, category: Option<Category>| {
        let chosen = |c: &&crate::CaseResult| c.backend == backend && category.is_none_or(|of| c.category == of);
        let totals = Totals::of(report.cases.iter().filter(chosen));
        let state = match (Verdict::ALL.iter().any(|v| !v.is_good() && totals.count(*v) > 0), totals.cases) {
            (_, 0) => "empty",
            (true, _) => "bad",
            (false, _) if totals.count(Verdict::Pass) == 0 => "absent",
            _ => "good",
        };
        GridCell {
            target: section_id(backend, category),
            cases: totals.cases,
            pass: totals.count(Verdict::Pass),
            state,
            others: shares(&totals).into_iter().filter(|share| share.words != Verdict::Pass.words()).collect(),
            label: format!("{backend}, {}: {}", category.map_or("all", Category::name), words(&totals)),
        }
    };
    let row = |name, category| GridRow {
        category: name,
        cells: backends.iter().map(|backend| cell(backend, category)).collect(),
    };
    let mut rows: Vec<GridRow> = present(report).map(|category| row(category.name(), Some(category))).collect();
    rows.push(row("all", None));
    Grid { backends, rows }
}

/// The categories that occur, in order.
pub(super) fn present(report: &Report) -> impl Iterator<Item = Category> + '_ {
    Category::ALL.into_iter().filter(|category| report.cases.iter().any(|case| case.category == *category))
}

/// The id of the list of a backend's cases, in one category or in all.
pub(super) fn section_id(backend: &str, category: Option<Category>) -> String {
    match category {
        Some(category) => format!("cases-{}-{category}", slug(backend)),
        None => format!("backend-{}", slug(backend)),
    }
}

/// Where the run was, and what the backends declare.
#[derive(Serialize)]
pub(super) struct EnvironmentView<'a> {
    facts: Vec<(&'static str, String)>,
    backends: Vec<&'a str>,
    declared: Vec<(String, Vec<String>)>,
}

pub(super) fn environment(report: &Report) -> Result<EnvironmentView<'_>, ReportError> {
    let environment = &report.environment;
    let mut facts = vec![
        ("Processor", environment.cpu.clone()),
        ("Architecture", environment.arch.clone()),
        ("Instruction sets", environment.instruction_sets.join(" ")),
        ("Threads", environment.threads.to_string()),
        ("System", environment.os.clone()),
        ("Compiler", environment.rustc.clone()),
        ("Build", if environment.optimised { "optimised" } else { "not optimised" }.to_string()),
        ("Suite", report.suite_version.clone()),
    ];
    if let Some(git) = &environment.git {
        facts.push(("Working tree", format!("{}{}", git.commit, if git.dirty { ", with changes" } else { "" })));
    }
    facts.extend(environment.variables.iter().map(|(name, value)| ("Variable", format!("{name}={value}"))));
    let backends = report.backend_names();
    let mut declared: Vec<(String, Vec<String>)> = Vec::new();
    for (column, backend) in backends.iter().enumerate() {
        let form = |e: serde_json::Error| ReportError::Form { reason: e.to_string() };
        let capabilities = serde_json::to_value(report.backends.get(*backend)).map_err(form)?;
        for (name, value) in capabilities.as_object().into_iter().flatten() {
            let name = name.replace('_', " ");
            let at = declared.iter().position(|(known, _)| *known == name).unwrap_or_else(|| {
                declared.push((name, vec![String::new(); backends.len()]));
                declared.len() - 1
            });
            declared[at].1[column] = declared_text(value);
        }
    }
    Ok(EnvironmentView { facts, backends, declared })
}

fn declared_text(value: &serde_json::Value) -> String {
    match value {
        serde_json::Value::Bool(yes) => if *yes { "yes" } else { "no" }.to_string(),
        serde_json::Value::String(text) => text.clone(),
        serde_json::Value::Array(items) => items.iter().map(declared_text).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}

/// Seconds since 1970 as a date and time, UTC.
fn utc(seconds: u64) -> String {
    let (mut days, of_day) = (seconds / 86400, seconds % 86400);
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let mut year = 1970;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while days >= lengths[month] {
        days -= lengths[month];
        month += 1;
    }
    let (day, month) = (days + 1, month + 1);
    format!("{year}-{month:02}-{day:02} {:02}:{:02}:{:02} UTC", of_day / 3600, of_day / 60 % 60, of_day % 60)
}

#[cfg(test)]
mod tests {
    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(super::utc(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(super::utc(951_827_696), "2000-02-29 12:34:56 UTC");
        assert_eq!(super::utc(4_102_444_799), "2099-12-31 23:59:59 UTC");
    }
}
