//! Service levels: limits, records and statistics.

use std::time::Duration;

use bitnet_contracts::*;
use rstest::rstest;

const HOUR: Duration = Duration::from_secs(3600);

fn metrics(total_time: Duration, peak_memory_usage: usize) -> ForwardPassMetrics {
    ForwardPassMetrics { total_time, peak_memory_usage, ..Default::default() }
}

fn good() -> ForwardPassMetrics {
    metrics(Duration::from_millis(10), 1000)
}

fn monitor() -> PerformanceMonitor {
    PerformanceMonitor::new(PerformanceContract::default())
}

fn kinds(monitor: &PerformanceMonitor) -> Vec<ViolationType> {
    monitor.violations().map(|violation| violation.violation_type).collect()
}

#[test]
fn gate_and_targets() {
    let gate = PerformanceContract::default();
    assert_eq!(gate.max_token_latency_ms, 100);
    assert_eq!(gate.min_throughput_tps, 5.0);
    assert_eq!(gate.max_memory_usage, 8 * 1024 * 1024 * 1024);
    assert_eq!(gate.min_accuracy_correlation, 0.99);
    assert!(gate.monitoring_enabled && gate.alert_on_violation);

    let cpu = PerformanceContract::cpu_target();
    assert_eq!(cpu, PerformanceContract { max_token_latency_ms: 10, min_throughput_tps: 5.0, ..gate.clone() });
    let gpu = PerformanceContract::gpu_target();
    assert_eq!(gpu, PerformanceContract { max_token_latency_ms: 2, min_throughput_tps: 15.0, ..gate });
}

#[test]
fn a_conforming_pass_is_recorded_without_complaint() {
    let mut monitor = monitor();
    monitor.validate_performance(&good(), 1).unwrap();
    let stats = monitor.get_performance_stats(HOUR);
    assert_eq!(stats.avg_latency_ms, 10.0);
    assert!((stats.avg_throughput_tps - 100.0).abs() < 1e-3);
    assert_eq!((stats.violation_count, stats.sla_compliance_rate), (0, 1.0));
}

// Exactly at a limit conforms; the smallest step beyond does not. Whole milliseconds would hide the first of these.
#[rstest]
#[case(metrics(Duration::from_millis(100), 0), 1, &[])]
#[case(metrics(Duration::from_micros(100_001), 0), 1, &[ViolationType::LatencyExceeded])]
#[case(metrics(Duration::from_micros(200_001), 0), 2, &[ViolationType::LatencyExceeded])]
#[case(metrics(Duration::from_millis(10), 8 << 30), 1, &[])]
#[case(metrics(Duration::from_millis(10), (8 << 30) + 1), 1, &[ViolationType::MemoryExceeded])]
#[case(metrics(Duration::from_millis(10), 0), 0, &[ViolationType::ThroughputTooLow])]
#[case(metrics(Duration::from_millis(250), usize::MAX), 1,
    &[ViolationType::LatencyExceeded, ViolationType::ThroughputTooLow, ViolationType::MemoryExceeded])]
#[case(metrics(Duration::MAX, 0), 1, &[ViolationType::LatencyExceeded, ViolationType::ThroughputTooLow])]
fn limits(#[case] metrics: ForwardPassMetrics, #[case] tokens: usize, #[case] expected: &[ViolationType]) {
    let mut monitor = monitor();
    assert_eq!(monitor.validate_performance(&metrics, tokens).is_err(), !expected.is_empty());
    assert_eq!(kinds(&monitor), expected, "all of them, in order");
}

#[test]
fn the_first_violation_is_the_error() {
    let mut monitor = monitor();
    let error = monitor.validate_performance(&metrics(Duration::from_millis(250), usize::MAX), 1).unwrap_err();
    let expected = ForwardPassError::ComputationFailed {
        component: "PerformanceMonitor".to_string(),
        reason: "Latency SLA violated: 250.000ms > 100ms".to_string(),
    };
    assert_eq!(error, expected.into());

    let error = monitor.validate_performance(&metrics(Duration::from_millis(10), 9 << 30), 1).unwrap_err();
    assert_eq!(error, MemoryError::OutOfMemory { requested_mb: 9 * 1024, available_mb: 8 * 1024 }.into());

    let first = monitor.violations().next().unwrap();
    assert_eq!((first.actual_value, first.expected_value), (250.0, 100.0));
}

#[test]
fn throughput_error_names_both_rates() {
    let contract = PerformanceContract { min_throughput_tps: 50.0, ..Default::default() };
    let mut monitor = PerformanceMonitor::new(contract);
    let error = monitor.validate_performance(&metrics(Duration::from_millis(50), 0), 1).unwrap_err();
    assert!(error.to_string().ends_with("Throughput SLA violated: 20.00 tps < 50.00 tps"), "{error}");
}

#[rstest]
#[case(1.0, true)]
#[case(0.99, true)]
#[case(0.98, false)]
#[case(-1.0, false)]
#[case(f32::NAN, false)]
fn accuracy(#[case] correlation: f32, #[case] conforms: bool) {
    let mut monitor = monitor();
    let result = monitor.validate_accuracy(correlation);
    if conforms {
        result.unwrap();
        assert_eq!(kinds(&monitor), []);
        assert_eq!(monitor.get_performance_stats(HOUR).sla_compliance_rate, 1.0);
    } else {
        assert!(matches!(
            result,
            Err(InferenceError::OutputValidation(OutputValidationError::InconsistentOutput { .. }))
        ));
        assert_eq!(kinds(&monitor), [ViolationType::AccuracyTooLow]);
        assert_eq!(monitor.get_performance_stats(HOUR).sla_compliance_rate, 0.0);
    }
}

#[test]
fn empty_history_is_compliant() {
    let expected =
        PerformanceStats { avg_latency_ms: 0.0, avg_throughput_tps: 0.0, violation_count: 0, sla_compliance_rate: 1.0 };
    assert_eq!(monitor().get_performance_stats(HOUR), expected);
    assert_eq!(monitor().get_performance_stats(Duration::ZERO), expected);
}

#[test]
fn the_window_applies_to_measurements_as_well() {
    let mut monitor = monitor();
    let _ = monitor.validate_performance(&metrics(Duration::from_secs(1), 0), 1);
    std::thread::sleep(Duration::from_millis(20));
    let outside = monitor.get_performance_stats(Duration::from_millis(1));
    assert_eq!((outside.avg_latency_ms, outside.violation_count, outside.sla_compliance_rate), (0.0, 0, 1.0));
    // A window longer than the age of the clock takes everything.
    for window in [HOUR, Duration::MAX] {
        let inside = monitor.get_performance_stats(window);
        assert_eq!((inside.avg_latency_ms, inside.violation_count, inside.sla_compliance_rate), (1000.0, 2, 0.0));
    }
}

#[test]
fn compliance_counts_measurements_not_violations() {
    let mut monitor = monitor();
    for _ in 0..3 {
        monitor.validate_performance(&good(), 1).unwrap();
    }
    // One pass, three violations.
    let _ = monitor.validate_performance(&metrics(Duration::from_secs(1), usize::MAX), 1);
    let stats = monitor.get_performance_stats(HOUR);
    assert_eq!((stats.violation_count, stats.sla_compliance_rate), (3, 0.75));
}

#[test]
fn throughput_statistics_use_each_measurements_tokens() {
    let mut monitor = monitor();
    monitor.validate_performance(&metrics(Duration::from_millis(100), 0), 10).unwrap();
    monitor.validate_performance(&metrics(Duration::from_millis(100), 0), 30).unwrap();
    let stats = monitor.get_performance_stats(HOUR);
    assert!((stats.avg_throughput_tps - 200.0).abs() < 1e-3, "{stats:?}");
}

#[test]
fn a_thousand_are_remembered_and_a_hundred_averaged() {
    let mut monitor = monitor();
    for _ in 0..700 {
        let _ = monitor.validate_performance(&metrics(Duration::from_secs(1), 0), 1);
    }
    for _ in 0..800 {
        monitor.validate_performance(&good(), 1).unwrap();
    }
    let stats = monitor.get_performance_stats(HOUR);
    assert_eq!(stats.avg_latency_ms, 10.0, "only the latest are averaged");
    assert_eq!(stats.sla_compliance_rate, 0.8, "200 of the 700 are still within the last thousand");
    assert_eq!(monitor.violations().len(), 1000, "two violations each, 1400 in all");
}

#[test]
fn a_monitor_that_is_off_records_nothing() {
    let contract = PerformanceContract { monitoring_enabled: false, ..Default::default() };
    let mut monitor = PerformanceMonitor::new(contract);
    monitor.validate_performance(&metrics(Duration::from_secs(9), usize::MAX), 1).unwrap();
    monitor.validate_accuracy(0.0).unwrap();
    assert_eq!(monitor.violations().len(), 0);
    assert_eq!(monitor.get_performance_stats(HOUR).avg_latency_ms, 0.0);
}

#[test]
fn a_monitor_without_alerts_records_only() {
    let contract = PerformanceContract { alert_on_violation: false, ..Default::default() };
    let mut monitor = PerformanceMonitor::new(contract);
    monitor.validate_performance(&metrics(Duration::from_secs(9), usize::MAX), 1).unwrap();
    monitor.validate_accuracy(0.0).unwrap();
    assert_eq!(monitor.violations().len(), 4);
    assert_eq!(monitor.get_performance_stats(HOUR).sla_compliance_rate, 0.0);
}
