//! Plots as plain numbers for the template that draws them: a picture of 360 by 180 units with its ticks and marks.

use serde::Serialize;
use std::fmt::Write;

const WIDTH: f64 = 360.0;
const HEIGHT: f64 = 180.0;
const LEFT: f64 = 46.0;
const RIGHT: f64 = 10.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 24.0;
/// Errors below this, zero among them, are drawn at it.
const FLOOR: f64 = 1e-9;
const BINS: usize = 44;

/// Plots of one kind.
#[derive(Serialize)]
pub(super) struct Group {
    pub key: String,
    pub title: String,
    pub about: String,
    /// The names of the colours, in order.
    pub legend: Vec<String>,
    pub plots: Vec<Plot>,
}

/// One picture.
#[derive(Serialize)]
pub(super) struct Plot {
    title: String,
    note: String,
    width: f64,
    height: f64,
    left: f64,
    right: f64,
    top: f64,
    bottom: f64,
    x_ticks: Vec<Tick>,
    y_ticks: Vec<Tick>,
    /// Lines across the plot.
    limits: Vec<Rule>,
    marks: Vec<Marks>,
}

/// A tick: its place along the axis and its label.
#[derive(Serialize)]
struct Tick {
    at: f64,
    label: String,
}

/// A limit: a line from one point to another, its label at the side.
#[derive(Serialize)]
struct Rule {
    path: String,
    x: f64,
    y: f64,
    anchor: &'static str,
    label: String,
}

/// What one backend draws: dots where its path has subpaths of no length, areas elsewhere.
#[derive(Serialize)]
struct Marks {
    colour: usize,
    kind: &'static str,
    path: String,
}

/// A value that should not be passed.
pub(super) struct Limit {
    pub value: f64,
    pub label: String,
}

/// Errors by position.
pub(super) struct Series<'a> {
    pub backend: &'a str,
    pub colour: usize,
    pub values: &'a [f32],
}

/// Readings of one backend.
pub(super) struct Histogram<'a> {
    pub name: &'a str,
    pub colour: usize,
    pub values: Vec<f64>,
}

/// A logarithmic axis over whole decades, or over what its ends are rounded to.
struct LogAxis {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl LogAxis {
    fn at(&self, value: f64) -> f64 {
        let share = (value.max(1e-300).log10() - self.low) / (self.high - self.low);
        round(self.from + share.clamp(0.0, 1.0) * (self.to - self.from))
    }
}

fn round(x: f64) -> f64 {
    (x * 10.0).round() / 10.0
}

fn y_axis(values: impl Iterator<Item = f64>) -> LogAxis {
    let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
    for value in values.map(|v| v.max(FLOOR)) {
        (low, high) = (low.min(value), high.max(value));
    }
    let (low, high) = (low.log10().floor(), high.log10().ceil());
    let high = if high > low { high } else { low + 1.0 };
    LogAxis { low, high, from: HEIGHT - BOTTOM, to: TOP }
}

fn decades(axis: &LogAxis) -> Vec<Tick> {
    let count = (axis.high - axis.low).round() as i32;
    let step = (count / 5).max(1) as usize;
    let low = axis.low.round() as i32;
    let tick = |exponent: i32| {
        let value = 10f64.powi(exponent);
        // What lies below the floor is drawn at it.
        let below = if value <= FLOOR { "≤" } else { "" };
        Tick { at: axis.at(value), label: format!("{below}{}", power_of_ten(exponent)) }
    };
    (low..=low + count).step_by(step).map(tick).collect()
}

/// `10⁻³` and its like.
fn power_of_ten(exponent: i32) -> String {
    let digit = |c: char| match c {
        '-' => '⁻',
        '1' => '¹',
        '2' => '²',
        '3' => '³',
        c => c.to_digit(10).and_then(|d| char::from_u32(0x2070 + d)).unwrap_or(c),
    };
    format!("10{}", exponent.to_string().chars().map(digit).collect::<String>())
}

/// A plot of errors by position for each model, all on one scale of errors.
pub(super) fn positions<'a>(
    models: impl Iterator<Item = (&'a str, Vec<Series<'a>>)>,
    limit: Option<&Limit>,
) -> Vec<Plot> {
    let models: Vec<(&str, Vec<Series<'_>>)> = models.collect();
    let all = models.iter().flat_map(|(_, series)| series.iter()).flat_map(|s| s.values.iter().map(|v| f64::from(*v)));
    let y = y_axis(all.chain(limit.map(|l| l.value)));
    models.iter().map(|(model, series)| position_plot(model, series, limit, &y)).collect()
}

fn position_plot(model: &str, series: &[Series<'_>], limit: Option<&Limit>, y: &LogAxis) -> Plot {
    let longest = series.iter().map(|s| s.values.len()).max().unwrap_or(0);
    let room = WIDTH - RIGHT - LEFT - 8.0;
    let x = |i: usize| round(LEFT + 4.0 + room * i as f64 / (longest.max(2) - 1) as f64);
    let marks = series.iter().map(|s| {
        let mut path = String::new();
        for (i, value) in s.values.iter().enumerate() {
            // Writing to a String cannot fail. A subpath of no length with round ends is a dot.
            let _ = write!(path, "M{} {}h0", x(i), y.at(f64::from(*value).max(FLOOR)));
        }
        Marks { colour: s.colour, kind: "dots", path }
    });
    let worst = series
        .iter()
        .flat_map(|s| s.values.iter().enumerate().map(move |(i, v)| (s.backend, i, *v)))
        .max_by(|a, b| a.2.total_cmp(&b.2));
    let mut ends = vec![0, longest.saturating_sub(1) / 2, longest.saturating_sub(1)];
    ends.dedup();
    Plot {
        title: model.to_string(),
        note: worst.map_or_else(String::new, worst_words),
        x_ticks: ends.into_iter().map(|i| Tick { at: x(i), label: i.to_string() }).collect(),
        y_ticks: decades(y),
        limits: limit.map(|l| horizontal(l, y)).into_iter().collect(),
        marks: marks.collect(),
        ..frame()
    }
}

fn worst_words((backend, position, value): (&str, usize, f32)) -> String {
    if f64::from(value) <= FLOOR {
        return format!("all at most {FLOOR:e}");
    }
    format!("worst {value:.1e} at {position}, {backend}")
}

fn horizontal(limit: &Limit, y: &LogAxis) -> Rule {
    let at = y.at(limit.value);
    let path = format!("M{LEFT} {at}H{}", WIDTH - RIGHT);
    Rule { path, x: WIDTH - RIGHT, y: round(at - 3.0), anchor: "end", label: limit.label.clone() }
}

fn frame() -> Plot {
    Plot {
        title: String::new(),
        note: String::new(),
        width: WIDTH,
        height: HEIGHT,
        left: LEFT,
        right: WIDTH - RIGHT,
        top: TOP,
        bottom: HEIGHT - BOTTOM,
        x_ticks: Vec::new(),
        y_ticks: Vec::new(),
        limits: Vec::new(),
        marks: Vec::new(),
    }
}

/// A histogram for each backend, all on one logarithmic scale that reaches the limits.
pub(super) fn histogram(samples: &[Histogram<'_>], limits: &[Limit]) -> Vec<Plot> {
    let all = samples.iter().flat_map(|h| h.values.iter().copied()).chain(limits.iter().map(|l| l.value));
    let (low, high) = all.fold((f64::INFINITY, 0.0f64), |(low, high), v| (low.min(v), high.max(v)));
    // A little room on either side.
    let x = LogAxis { low: low.log10() - 0.1, high: high.log10() + 0.15, from: LEFT, to: WIDTH - RIGHT };
    samples.iter().map(|h| one_histogram(h, limits, &x)).collect()
}

fn one_histogram(samples: &Histogram<'_>, limits: &[Limit], x: &LogAxis) -> Plot {
    let mut counts = [0usize; BINS];
    for value in &samples.values {
        let share = (value.log10() - x.low) / (x.high - x.low);
        counts[((share * BINS as f64) as usize).min(BINS - 1)] += 1;
    }
    let most = counts.iter().copied().max().unwrap_or(1).max(1);
    let (base, room) = (HEIGHT - BOTTOM, HEIGHT - BOTTOM - TOP);
    let width = (x.to - x.from) / BINS as f64;
    let mut path = String::new();
    for (i, count) in counts.iter().enumerate().filter(|(_, count)| **count > 0) {
        let (left, height) = (x.from + i as f64 * width, room * *count as f64 / most as f64);
        let bar = (round(left + 0.5), round(base - height), round(width - 1.0));
        let _ = write!(path, "M{} {base}V{}h{}V{base}z", bar.0, bar.1, bar.2);
    }
    let mut sorted = samples.values.clone();
    sorted.sort_by(f64::total_cmp);
    let quantile = |q: f64| sorted.get(((sorted.len() - 1) as f64 * q).round() as usize).copied().unwrap_or(f64::NAN);
    let note = format!(
        "{} tokens · median {} · p95 {} · p99 {} ms",
        sorted.len(),
        short(quantile(0.5)),
        short(quantile(0.95)),
        short(quantile(0.99))
    );
    let rule = |limit: &Limit| {
        let at = x.at(limit.value);
        let label = format!("{} {} ms", limit.label, short(limit.value));
        Rule { path: format!("M{at} {TOP}V{base}"), x: round(at - 3.0), y: TOP + 8.0, anchor: "end", label }
    };
    Plot {
        title: samples.name.to_string(),
        note,
        x_ticks: log_ticks(x),
        y_ticks: vec![Tick { at: base, label: "0".to_string() }, Tick { at: TOP, label: most.to_string() }],
        limits: limits.iter().map(rule).collect(),
        marks: vec![Marks { colour: samples.colour, kind: "bars", path }],
        ..frame()
    }
}

/// Ticks at powers of ten within an axis, with 2 and 5 between them where there is room.
fn log_ticks(axis: &LogAxis) -> Vec<Tick> {
    let factors: &[f64] = if axis.high - axis.low < 2.5 { &[1.0, 2.0, 5.0] } else { &[1.0] };
    let mut ticks = Vec::new();
    for exponent in axis.low.floor() as i32..=axis.high.ceil() as i32 {
        for factor in factors {
            let value = factor * 10f64.powi(exponent);
            if (axis.low..=axis.high).contains(&value.log10()) {
                ticks.push(Tick { at: axis.at(value), label: short(value) });
            }
        }
    }
    ticks
}

/// A number in three significant digits, without an exponent where it needs none.
fn short(value: f64) -> String {
    let digits = (2 - value.abs().max(1e-6).log10().floor() as i32).clamp(0, 6) as usize;
    let text = format!("{value:.digits$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_string() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_put_their_ends_at_their_ends_and_keep_what_is_beyond() {
        let y = y_axis([1e-4, 0.02].into_iter());
        assert_eq!((y.at(1e-4), y.at(0.1)), (HEIGHT - BOTTOM, TOP));
        assert_eq!((y.at(0.0), y.at(7.0)), (HEIGHT - BOTTOM, TOP));
        let labels: Vec<String> = decades(&y).into_iter().map(|tick| tick.label).collect();
        assert_eq!(labels, ["10⁻⁴", "10⁻³", "10⁻²", "10⁻¹"]);
    }

    #[test]
    fn every_reading_is_in_a_bar_and_numbers_are_short() {
        let samples = [Histogram { name: "a", colour: 0, values: vec![0.5, 0.5, 20.0] }];
        let plot = &histogram(&samples, &[Limit { value: 100.0, label: "gate".to_string() }])[0];
        assert_eq!(plot.marks[0].path.matches('M').count(), 2, "{}", plot.marks[0].path);
        assert!(plot.note.starts_with("3 tokens · median 0.5 ·"), "{}", plot.note);
        assert_eq!((short(0.2714), short(100.0), short(1234.0)), ("0.271".into(), "100".into(), "1234".into()));
    }
}
