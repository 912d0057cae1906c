//! What the plots show: errors by position, token latencies beside the service levels.

use super::plots::{Group, Histogram, Limit, Series, histogram, positions};
use crate::measure;
use crate::report::Report;
use crate::report::levels::readings;
use bitnet_contracts::PerformanceContract;
use serde::Serialize;

/// The errors by position that the cases recorded: a group for every series, in it a plot for every model, in that the
/// backends.
pub(super) fn accuracy(report: &Report) -> Vec<Group> {
    let mut keys: Vec<&str> = report.cases.iter().flat_map(|c| c.outcome.series.keys().map(String::as_str)).collect();
    keys.sort_by_key(|key| (KNOWN.iter().position(|(known, ..)| known == key).unwrap_or(KNOWN.len()), *key));
    keys.dedup();
    let backends = report.backend_names();
    let group = |key: &&str| {
        let known = KNOWN.iter().find(|(known, ..)| known == key);
        let mut models: Vec<&str> = Vec::new();
        for case in report.cases.iter().filter(|c| c.outcome.series.contains_key(*key)) {
            if !models.contains(&case.model.as_str()) {
                models.push(&case.model);
            }
        }
        let series = |model: &str| -> Vec<Series<'_>> {
            let of_model = report.cases.iter().filter(|c| c.model == model);
            of_model
                .filter_map(|case| {
                    let values = case.outcome.series.get(*key)?;
                    let colour = backends.iter().position(|b| *b == case.backend)?;
                    Some(Series { backend: &case.backend, colour, values })
                })
                .collect()
        };
        let limit = (*key == measure::SERIES_CORRELATION).then(|| {
            let gate = 1.0 - f64::from(PerformanceContract::default().min_accuracy_correlation);
            Limit { value: gate, label: format!("gate {gate:.2}") }
        });
        Group {
            key: (*key).to_string(),
            title: known.map_or(*key, |(_, title, _)| title).to_string(),
            about: known.map_or("", |(.., about)| about).to_string(),
            legend: backends.iter().map(|b| (*b).to_string()).collect(),
            plots: positions(models.into_iter().map(|model| (model, series(model))), limit.as_ref()),
        }
    };
    keys.iter().map(group).collect()
}

/// The series that the suite's checks record: key, title, and what one point is.
const KNOWN: [(&str, &str, &str); 3] = [
    (
        measure::SERIES_CORRELATION,
        "Distance from the fp32 golden logits",
        "Each point is one position of the golden prompts: 1 minus the Pearson correlation of its logits with the fp32 \
         golden. The contract's gate is on the worst point.",
    ),
    (
        measure::SERIES_MAX_ABS,
        "Largest difference from the golden of the backend's own semantics",
        "Each point is one position: the largest absolute difference of a logit from the golden of the arithmetic that \
         the backend declares, for the whole prompt at once.",
    ),
    (
        measure::SERIES_DECODING,
        "The same in decoding",
        "The longest golden prompt, its second half and then all of it decoded token by token with a cache.",
    ),
];

/// A row of the table of service levels.
#[derive(Serialize)]
pub(super) struct LevelRow {
    backend: String,
    name: &'static str,
    seen: String,
    gate: Held,
    target: Held,
}

/// A value held against a limit.
#[derive(Serialize)]
struct Held {
    meets: bool,
    limit: String,
    distance: String,
}

pub(super) fn levels(report: &Report) -> Vec<LevelRow> {
    let row = |reading: &crate::report::levels::Reading<'_>| {
        let show = reading.level.show;
        let held =
            |limit: f64| Held { meets: reading.meets(limit), limit: show(limit), distance: reading.distance(limit) };
        LevelRow {
            backend: reading.backend.to_string(),
            name: reading.level.name,
            seen: show(reading.seen),
            gate: held(reading.level.gate),
            target: held(reading.level.target),
        }
    };
    readings(report).iter().map(row).collect()
}

/// Histograms of the time of single tokens, one a backend, on one scale with the gate and the target.
pub(super) fn latency(report: &Report) -> Option<Group> {
    let (gate, target) = (PerformanceContract::default(), PerformanceContract::cpu_target());
    let limits = [
        Limit { value: f64::from(gate.max_token_latency_ms), label: "gate".to_string() },
        Limit { value: f64::from(target.max_token_latency_ms), label: "target".to_string() },
    ];
    let backends = report.backend_names();
    let samples: Vec<Histogram<'_>> = backends
        .iter()
        .enumerate()
        .map(|(colour, backend)| {
            let cases = report.cases.iter().filter(|c| c.backend == *backend);
            let values = cases.filter_map(|c| c.outcome.samples.get(measure::TOKEN_LATENCY_MS)).flatten().copied();
            Histogram { name: backend, colour, values: values.filter(|v| *v > 0.0).collect() }
        })
        .filter(|histogram| !histogram.values.is_empty())
        .collect();
    (!samples.is_empty()).then(|| Group {
        key: measure::TOKEN_LATENCY_MS.to_string(),
        title: "Time of a decoded token".to_string(),
        about:
            "Milliseconds on the caller's clock, on a logarithmic scale, of steps whose output was verified. The gate \
                is the contract's; the target is meant for the 2B model."
                .to_string(),
        legend: Vec::new(),
        plots: histogram(&samples, &limits),
    })
}
