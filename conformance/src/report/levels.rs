//! Service levels: what was measured, beside the gate of the contract and the target of the trait's documentation (CPU
//! column). The target is meant for the 2B model, so on a small fixture model it says little; the correlation is
//! meaningful always.

use super::Report;
use crate::measure;
use bitnet_contracts::PerformanceContract;

/// One service level.
pub struct Level {
    /// What is measured.
    pub name: &'static str,
    /// The measurement.
    pub key: &'static str,
    /// Whether the largest value is the worst one.
    pub high_is_bad: bool,
    /// What the contract asks.
    pub gate: f64,
    /// What the trait's documentation asks.
    pub target: f64,
    /// A value with its unit.
    pub show: fn(f64) -> String,
}

/// A level as one backend meets it.
pub struct Reading<'a> {
    /// The backend.
    pub backend: &'a str,
    /// The level.
    pub level: Level,
    /// The worst value over the backend's cases.
    pub seen: f64,
}

impl Level {
    /// The service levels that reports show.
    pub fn all() -> [Self; 4] {
        let (gate, target) = (PerformanceContract::default(), PerformanceContract::cpu_target());
        [
            Self {
                name: "ms a token, slowest case",
                key: measure::TOKEN_LATENCY_MS,
                high_is_bad: true,
                gate: f64::from(gate.max_token_latency_ms),
                target: f64::from(target.max_token_latency_ms),
                show: |v| format!("{v:.2} ms"),
            },
            Self {
                name: "tokens a second, slowest case",
                key: measure::THROUGHPUT_TPS,
                high_is_bad: false,
                gate: f64::from(gate.min_throughput_tps),
                target: f64::from(target.min_throughput_tps),
                show: |v| format!("{v:.1}/s"),
            },
            Self {
                name: "peak memory",
                key: measure::PEAK_MEMORY_BYTES,
                high_is_bad: true,
                gate: gate.max_memory_usage as f64,
                target: target.max_memory_usage as f64,
                show: |bytes| format!("{:.3} GiB", bytes / f64::from(1 << 30)),
            },
            Self {
                name: "correlation with fp32, worst position",
                key: measure::WORST_CORRELATION,
                high_is_bad: false,
                gate: f64::from(gate.min_accuracy_correlation),
                target: f64::from(target.min_accuracy_correlation),
                show: |v| format!("{v:.6}"),
            },
        ]
    }
}

impl Reading<'_> {
    /// Whether the value keeps a limit of the level.
    pub fn meets(&self, limit: f64) -> bool {
        if self.level.high_is_bad { self.seen <= limit } else { self.seen >= limit }
    }

    /// How far the value is from a limit: a factor, for correlations a difference.
    pub fn distance(&self, limit: f64) -> String {
        match self.level.key {
            measure::WORST_CORRELATION => format!("{:+.4}", self.seen - limit),
            _ if limit > 0.0 => format!("{:.3}×", self.seen / limit),
            _ => String::new(),
        }
    }
}

/// Every level that was measured, by backend.
pub fn readings(report: &Report) -> Vec<Reading<'_>> {
    let mut readings = Vec::new();
    for backend in report.backend_names() {
        for level in Level::all() {
            let worse = if level.high_is_bad { f64::max } else { f64::min };
            let worst = report.measurements(backend, level.key).reduce(worse);
            if let Some(seen) = worst {
                readings.push(Reading { backend, level, seen });
            }
        }
    }
    readings
}
