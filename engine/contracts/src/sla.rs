//! Service levels, and the monitor that holds an engine to them.

use std::collections::VecDeque;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::{ForwardPassError, ForwardPassMetrics, InferenceError, MemoryError, OutputValidationError, Result};

/// How many measurements, accuracy checks and violations a monitor remembers, of each.
const HISTORY: usize = 1000;

/// Averages are taken over at most this many of the latest measurements.
const AVERAGED: usize = 100;

/// 8 GiB, or the whole address space where that is smaller.
const EIGHT_GIB: usize = if usize::BITS > 32 { (8_u64 * 1024 * 1024 * 1024) as usize } else { usize::MAX };

/// A service level.
///
/// The default is the gate that an engine must pass. [`cpu_target`](Self::cpu_target) and
/// [`gpu_target`](Self::gpu_target) are what it should reach with the 2B model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PerformanceContract {
    /// Maximum acceptable latency a token, in milliseconds.
    pub max_token_latency_ms: u32,

    /// Minimum acceptable throughput, in tokens a second.
    pub min_throughput_tps: f32,

    /// Maximum memory, in bytes.
    pub max_memory_usage: usize,

    /// Minimum correlation with the reference, 0 to 1.
    pub min_accuracy_correlation: f32,

    /// Whether a monitor checks and records at all.
    pub monitoring_enabled: bool,
    /// Whether a violation is returned as an error, or only recorded.
    pub alert_on_violation: bool,
}

impl Default for PerformanceContract {
    fn default() -> Self {
        Self {
            max_token_latency_ms: 100,
            min_throughput_tps: 5.0,
            max_memory_usage: EIGHT_GIB,
            min_accuracy_correlation: 0.99,
            monitoring_enabled: true,
            alert_on_violation: true,
        }
    }
}

impl PerformanceContract {
    /// The target on a CPU: 10 ms a token, at least 5 tokens a second, 8 GiB, a correlation of 0.99.
    pub fn cpu_target() -> Self {
        Self { max_token_latency_ms: 10, min_throughput_tps: 5.0, ..Self::default() }
    }

    /// The target on a GPU: 2 ms a token, at least 15 tokens a second, 8 GiB, a correlation of 0.99.
    pub fn gpu_target() -> Self {
        Self { max_token_latency_ms: 2, min_throughput_tps: 15.0, ..Self::default() }
    }
}

/// One measured forward pass.
#[derive(Debug, Clone)]
struct Measurement {
    metrics: ForwardPassMetrics,
    tokens: usize,
    timestamp: SystemTime,
    conforms: bool,
}

/// One accuracy check.
#[derive(Debug, Clone)]
struct AccuracyCheck {
    timestamp: SystemTime,
    conforms: bool,
}

/// Holds an engine to a [`PerformanceContract`].
///
/// The last 1,000 measurements, accuracy checks and violations are remembered.
#[derive(Debug, Clone)]
pub struct PerformanceMonitor {
    contract: PerformanceContract,
    measurements: VecDeque<Measurement>,
    accuracy_checks: VecDeque<AccuracyCheck>,
    violations: VecDeque<PerformanceViolation>,
}

impl PerformanceMonitor {
    /// A monitor with an empty history.
    pub fn new(contract: PerformanceContract) -> Self {
        Self {
            contract,
            measurements: VecDeque::with_capacity(HISTORY),
            accuracy_checks: VecDeque::new(),
            violations: VecDeque::new(),
        }
    }

    /// The contract that this monitor enforces.
    pub fn contract(&self) -> &PerformanceContract {
        &self.contract
    }

    /// The remembered violations, oldest first.
    pub fn violations(&self) -> impl ExactSizeIterator<Item = &PerformanceViolation> {
        self.violations.iter()
    }

    /// Records a pass over `num_tokens` tokens and checks its latency, throughput and memory.
    ///
    /// All violations of the pass are recorded. Does nothing when monitoring is off.
    ///
    /// # Errors
    /// The first violation, unless the contract only records them: `ForwardPassError::ComputationFailed` of the
    /// component `PerformanceMonitor` for latency and throughput, `MemoryError::OutOfMemory` for memory.
    pub fn validate_performance(&mut self, metrics: &ForwardPassMetrics, num_tokens: usize) -> Result<()> {
        if !self.contract.monitoring_enabled {
            return Ok(());
        }
        let timestamp = SystemTime::now();
        let found = self.find_violations(metrics, num_tokens, timestamp);
        push_bounded(
            &mut self.measurements,
            Measurement { metrics: metrics.clone(), tokens: num_tokens, timestamp, conforms: found.is_empty() },
        );
        self.record(found)
    }

    /// Records a correlation with the reference and checks it. A NaN is a violation.
    ///
    /// Does nothing when monitoring is off.
    ///
    /// # Errors
    /// `OutputValidationError::InconsistentOutput`, unless the contract only records violations.
    pub fn validate_accuracy(&mut self, correlation: f32) -> Result<()> {
        if !self.contract.monitoring_enabled {
            return Ok(());
        }
        let minimum = self.contract.min_accuracy_correlation;
        let timestamp = SystemTime::now();
        let conforms = correlation >= minimum;
        push_bounded(&mut self.accuracy_checks, AccuracyCheck { timestamp, conforms });
        if conforms {
            return Ok(());
        }
        let violation = PerformanceViolation {
            violation_type: ViolationType::AccuracyTooLow,
            actual_value: f64::from(correlation),
            expected_value: f64::from(minimum),
            timestamp,
        };
        let error = OutputValidationError::InconsistentOutput {
            reason: format!("Accuracy SLA violated: correlation {correlation} < {minimum}"),
        };
        self.record(vec![(violation, error.into())])
    }

    /// Statistics of the last `window` of time.
    ///
    /// Averages are taken over at most the latest 100 measurements of the window. Compliance is the share of
    /// conforming measurements (passes and accuracy checks) in the whole window. Without any measurement the averages
    /// are 0 and compliance is 1.
    pub fn get_performance_stats(&self, window: Duration) -> PerformanceStats {
        // A window that reaches back further than time itself takes everything.
        let cutoff = SystemTime::now().checked_sub(window);
        let recent = |timestamp: SystemTime| cutoff.is_none_or(|cutoff| timestamp > cutoff);

        let measured: Vec<&Measurement> = self.measurements.iter().filter(|m| recent(m.timestamp)).collect();
        let latest = &measured[measured.len().saturating_sub(AVERAGED)..];
        let mean = |value: fn(&Measurement) -> f64| -> f64 {
            if latest.is_empty() {
                return 0.0;
            }
            latest.iter().map(|m| value(m)).sum::<f64>() / latest.len() as f64
        };

        let verdicts: Vec<bool> = measured
            .iter()
            .map(|m| m.conforms)
            .chain(self.accuracy_checks.iter().filter(|check| recent(check.timestamp)).map(|check| check.conforms))
            .collect();
        let conforming = verdicts.iter().filter(|&&conforms| conforms).count();

        PerformanceStats {
            avg_latency_ms: mean(|m| milliseconds(m.metrics.total_time)),
            avg_throughput_tps: mean(|m| f64::from(m.metrics.throughput(m.tokens))),
            violation_count: self.violations.iter().filter(|v| recent(v.timestamp)).count(),
            sla_compliance_rate: if verdicts.is_empty() { 1.0 } else { conforming as f64 / verdicts.len() as f64 },
        }
    }

    /// Every way in which one pass breaks the contract, each with the error that says so.
    fn find_violations(
        &self,
        metrics: &ForwardPassMetrics,
        num_tokens: usize,
        timestamp: SystemTime,
    ) -> Vec<(PerformanceViolation, InferenceError)> {
        let contract = &self.contract;
        let mut found = Vec::new();
        let mut add = |violation_type, actual_value, expected_value, error: InferenceError| {
            found.push((PerformanceViolation { violation_type, actual_value, expected_value, timestamp }, error));
        };
        let computation_failed = |reason: String| -> InferenceError {
            ForwardPassError::ComputationFailed { component: "PerformanceMonitor".to_string(), reason }.into()
        };

        let latency = milliseconds(metrics.total_time) / num_tokens.max(1) as f64;
        let max_latency = f64::from(contract.max_token_latency_ms);
        if latency > max_latency {
            let reason = format!("Latency SLA violated: {latency:.3}ms > {max_latency}ms");
            add(ViolationType::LatencyExceeded, latency, max_latency, computation_failed(reason));
        }

        let throughput = metrics.throughput(num_tokens);
        let min_throughput = contract.min_throughput_tps;
        if throughput < min_throughput {
            let reason = format!("Throughput SLA violated: {throughput:.2} tps < {min_throughput:.2} tps");
            let (actual, expected) = (f64::from(throughput), f64::from(min_throughput));
            add(ViolationType::ThroughputTooLow, actual, expected, computation_failed(reason));
        }

        let (memory, max_memory) = (metrics.peak_memory_usage, contract.max_memory_usage);
        if memory > max_memory {
            let error =
                MemoryError::OutOfMemory { requested_mb: memory / 1024 / 1024, available_mb: max_memory / 1024 / 1024 };
            add(ViolationType::MemoryExceeded, memory as f64, max_memory as f64, error.into());
        }
        found
    }

    /// Remembers the violations and returns the first one's error, if the contract asks for errors.
    fn record(&mut self, found: Vec<(PerformanceViolation, InferenceError)>) -> Result<()> {
        let mut first = None;
        for (violation, error) in found {
            log::warn!("{error}");
            push_bounded(&mut self.violations, violation);
            first.get_or_insert(error);
        }
        match first {
            Some(error) if self.contract.alert_on_violation => Err(error),
            _ => Ok(()),
        }
    }
}

/// Appends, and forgets the oldest beyond [`HISTORY`].
fn push_bounded<T>(history: &mut VecDeque<T>, item: T) {
    if history.len() == HISTORY {
        history.pop_front();
    }
    history.push_back(item);
}

/// Exact to a fraction of a millisecond.
fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// One way in which a measurement broke the contract.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PerformanceViolation {
    /// What was broken.
    pub violation_type: ViolationType,
    /// The value measured, in the unit of the contract's field.
    pub actual_value: f64,
    /// The limit in the contract.
    pub expected_value: f64,
    /// When it was measured.
    pub timestamp: SystemTime,
}

/// What a measurement can break.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum ViolationType {
    /// A token took too long.
    LatencyExceeded,
    /// Too few tokens a second.
    ThroughputTooLow,
    /// Too much memory.
    MemoryExceeded,
    /// Too far from the reference.
    AccuracyTooLow,
}

/// Statistics over a window of time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PerformanceStats {
    /// Mean time of a forward pass, in milliseconds.
    pub avg_latency_ms: f64,
    /// Mean throughput, in tokens a second.
    pub avg_throughput_tps: f64,
    /// Violations in the window.
    pub violation_count: usize,
    /// Conforming measurements as a share of all, 0 to 1.
    pub sla_compliance_rate: f64,
}
