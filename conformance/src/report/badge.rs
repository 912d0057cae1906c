//! The verdict of a run as a badge: a small SVG picture that needs no font and no server.

use super::json::ReportError;
use super::{Report, Totals};
use crate::verdict::Verdict;
use std::path::Path;

const LABEL: &str = "bitnet conformance";
const FONT_SIZE: f64 = 11.0;
/// Space before and after either text.
const MARGIN: f64 = 7.0;

/// Advance widths of Verdana from space to tilde, in thousandths of the font size. It is the widest of the fonts that
/// badges are usually set in, and `textLength` holds any other font to the same width.
#[rustfmt::skip]
const WIDTHS: [u16; 95] = [
    352, 394, 459, 818, 636, 1076, 727, 269, 454, 454, 636, 818, 364, 454, 364, 454,
    636, 636, 636, 636, 636, 636, 636, 636, 636, 636, 454, 454, 818, 818, 818, 545,
    1000, 684, 686, 698, 771, 632, 575, 775, 751, 421, 455, 693, 557, 843, 748, 787,
    603, 787, 695, 684, 616, 732, 684, 989, 685, 615, 685, 454, 454, 454, 818, 636,
    636, 601, 623, 521, 623, 596, 352, 623, 633, 274, 344, 592, 274, 973, 633, 607,
    623, 623, 427, 521, 394, 633, 592, 818, 592, 592, 525, 635, 454, 635, 818,
];

/// The badge of a report: green with the number of passes, or red with what else there was.
pub fn render(report: &Report) -> String {
    let (message, colour) = message(&report.totals);
    svg(LABEL, &message, colour)
}

/// Writes the badge.
///
/// # Errors
/// [`ReportError::Io`].
pub fn write(report: &Report, path: &Path) -> Result<(), ReportError> {
    std::fs::write(path, render(report)).map_err(|source| ReportError::Io { path: path.to_path_buf(), source })
}

fn message(totals: &Totals) -> (String, &'static str) {
    let bad = Verdict::ALL.iter().filter(|v| !v.is_good() && totals.count(**v) > 0);
    let mut words: Vec<String> = bad.map(|v| format!("{} {}", totals.count(*v), v.words())).collect();
    words.push(format!("{} pass", totals.count(Verdict::Pass)));
    (words.join(", "), if totals.is_green() { "#1a7f4b" } else { "#c0322f" })
}

/// The width of a text in the badge's font, in pixels.
fn width(text: &str) -> f64 {
    let advance = |c: char| (c as usize).checked_sub(32).and_then(|i| WIDTHS.get(i)).copied().unwrap_or(1000);
    text.chars().map(|c| f64::from(advance(c))).sum::<f64>() * FONT_SIZE / 1000.0
}

fn svg(label: &str, message: &str, colour: &str) -> String {
    let (left, right) = (width(label).ceil(), width(message).ceil());
    let (split, total) = (left + 2.0 * MARGIN, left + right + 4.0 * MARGIN);
    let text = |x: f64, length: f64, text: &str| {
        format!(r##"<text x="{x}" y="14" textLength="{length}" lengthAdjust="spacingAndGlyphs">{text}</text>"##)
    };
    format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" width="{total}" height="20" viewBox="0 0 {total} 20" role="img" aria-label="{label}: {message}">
<title>{label}: {message}</title>
<clipPath id="badge-corners"><rect width="{total}" height="20" rx="4"/></clipPath>
<g clip-path="url(#badge-corners)"><rect width="{split}" height="20" fill="#3b4148"/><rect x="{split}" width="{rest}" height="20" fill="{colour}"/></g>
<g fill="#fff" font-family="Verdana,'DejaVu Sans',Geneva,sans-serif" font-size="{FONT_SIZE}">
{left_text}
{right_text}
</g>
</svg>
"##,
        rest = total - split,
        left_text = text(MARGIN, left, label),
        right_text = text(split + MARGIN, right, message),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_as_wide_as_verdana_sets_them() {
        assert_eq!(width(""), 0.0);
        // Advances of the glyphs of "il" and "MW" at 11 px.
        assert!((width("il") - 6.028).abs() < 1e-9 && (width("MW") - 20.152).abs() < 1e-9);
    }
}
