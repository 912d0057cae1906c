//! Metrics and memory figures.

use std::time::Duration;

use bitnet_contracts::*;

fn millis(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

#[test]
fn throughput_is_tokens_over_seconds() {
    let metrics = ForwardPassMetrics { total_time: millis(250), ..Default::default() };
    assert_eq!(metrics.throughput(10), 40.0);
    assert_eq!(metrics.throughput(0), 0.0);
    assert_eq!(ForwardPassMetrics::new().throughput(10), 0.0);
}

#[test]
fn efficiency_by_hand() {
    let metrics = ForwardPassMetrics {
        total_time: millis(1000),
        attention_time: millis(250),
        feedforward_time: millis(500),
        quantization_time: millis(100),
        dequantization_time: millis(25),
        memory_bandwidth_usage: 20.0,
        ..Default::default()
    };
    let at_default = metrics.efficiency_metrics();
    assert_eq!(at_default.compute_utilization, 0.75);
    assert_eq!(at_default.memory_efficiency, 0.02);
    assert_eq!(at_default.quantization_overhead, 0.125);

    assert_eq!(metrics.efficiency_metrics_at(40.0).memory_efficiency, 0.5);
    assert_eq!(metrics.efficiency_metrics_at(10.0).memory_efficiency, 1.0, "a peak below the reading is clamped");
    for peak in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        assert_eq!(metrics.efficiency_metrics_at(peak).memory_efficiency, 0.0, "peak {peak}");
    }
}

#[test]
fn overlapping_parts_do_not_exceed_the_whole() {
    let metrics = ForwardPassMetrics {
        total_time: millis(10),
        attention_time: millis(8),
        feedforward_time: Duration::MAX,
        quantization_time: Duration::MAX,
        dequantization_time: Duration::MAX,
        ..Default::default()
    };
    let efficiency = metrics.efficiency_metrics();
    assert_eq!(efficiency.compute_utilization, 1.0);
    assert_eq!(efficiency.quantization_overhead, 1.0);
}

#[test]
fn memory_sums_and_rates() {
    let usage = MemoryUsage {
        peak_usage: 100,
        model_weights: 1,
        kv_cache: 20,
        activations: 300,
        temporary_buffers: 4000,
        memory_pool_hits: 3,
        memory_pool_misses: 1,
        ..Default::default()
    };
    assert_eq!(usage.total_footprint(), 4321);
    assert_eq!(usage.pool_hit_rate(), 0.75);
    assert!(usage.within_limits(100));
    assert!(!usage.within_limits(99));

    assert_eq!(MemoryUsage::default().pool_hit_rate(), 0.0);
    let huge = MemoryUsage {
        model_weights: usize::MAX,
        kv_cache: usize::MAX,
        memory_pool_hits: usize::MAX,
        memory_pool_misses: usize::MAX,
        ..Default::default()
    };
    assert_eq!(huge.total_footprint(), usize::MAX);
    assert_eq!(huge.pool_hit_rate(), 0.5);
}
