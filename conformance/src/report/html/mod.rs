//! The report as one HTML page that needs nothing else: no script, no font, no picture from anywhere.

mod cases;
mod figures;
mod matrix;
mod overview;
mod plots;

use super::Report;
use super::json::ReportError;
use crate::zoo::proof::Proof;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, UndefinedBehavior};
use serde::Serialize;
use std::path::Path;

/// The templates by name. `page.html` is the page; the others are its parts.
const TEMPLATES: [(&str, &str); 13] = [
    ("page.html", include_str!("../../../templates/page.html")),
    ("style.css", include_str!("../../../templates/style.css")),
    ("header.html", include_str!("../../../templates/header.html")),
    ("failures.html", include_str!("../../../templates/failures.html")),
    ("grid.html", include_str!("../../../templates/grid.html")),
    ("figures.html", include_str!("../../../templates/figures.html")),
    ("plot.html", include_str!("../../../templates/plot.html")),
    ("proof.html", include_str!("../../../templates/proof.html")),
    ("claims.html", include_str!("../../../templates/claims.html")),
    ("vacuity.html", include_str!("../../../templates/vacuity.html")),
    ("absent.html", include_str!("../../../templates/absent.html")),
    ("cases.html", include_str!("../../../templates/cases.html")),
    ("environment.html", include_str!("../../../templates/environment.html")),
];

/// All that the page shows, in the order in which it does.
#[derive(Serialize)]
struct Page<'a> {
    header: overview::Header<'a>,
    failures: Vec<cases::FailureView<'a>>,
    grid: overview::Grid<'a>,
    accuracy: Vec<plots::Group>,
    levels: Vec<figures::LevelRow>,
    latency: Option<plots::Group>,
    proof: Option<matrix::Matrix<'a>>,
    vacuity: cases::Vacuity<'a>,
    absent: Vec<cases::Absent<'a>>,
    sections: Vec<cases::Section<'a>>,
    environment: overview::EnvironmentView<'a>,
}

/// The page of a report, with the kill matrix where a proof is given. `program` begins the commands that repeat a case.
///
/// # Errors
/// [`ReportError::Form`] where a value has no place in the page.
pub fn render(report: &Report, proof: Option<&Proof>, program: &str) -> Result<String, ReportError> {
    let page = Page {
        header: overview::header(report, proof),
        failures: cases::failures(report, program),
        grid: overview::grid(report),
        accuracy: figures::accuracy(report),
        levels: figures::levels(report),
        latency: figures::latency(report),
        proof: proof.map(matrix::matrix),
        vacuity: cases::vacuity(report),
        absent: cases::absent(report),
        sections: cases::sections(report),
        environment: overview::environment(report)?,
    };
    let form = |e: minijinja::Error| ReportError::Form { reason: format!("page: {e:#}") };
    let mut templates = Environment::new();
    templates.set_undefined_behavior(UndefinedBehavior::Strict);
    templates.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(form)?);
    for (name, text) in TEMPLATES {
        templates.add_template(name, text).map_err(form)?;
    }
    templates.get_template("page.html").and_then(|template| template.render(Serde(page))).map_err(form)
}

/// Writes the page.
///
/// # Errors
/// [`ReportError`].
pub fn write(report: &Report, proof: Option<&Proof>, program: &str, path: &Path) -> Result<(), ReportError> {
    let text = render(report, proof, program)?;
    std::fs::write(path, text).map_err(|source| ReportError::Io { path: path.to_path_buf(), source })
}

/// A text as part of an element's id: what a link could misread becomes an underscore.
fn slug(text: &str) -> String {
    text.chars().map(|c| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '_' }).collect()
}
