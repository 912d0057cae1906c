//! What a forward pass cost in time, and how well it used the machine.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Peak memory bandwidth that [`ForwardPassMetrics::efficiency_metrics`] assumes, in GB/s.
const DEFAULT_PEAK_BANDWIDTH_GB_PER_S: f64 = 1000.0;

/// Measurements of one forward pass.
///
/// Every figure is measured, except `flops_estimate`, which is counted from the shapes.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ForwardPassMetrics {
    /// Time of the whole pass.
    pub total_time: Duration,

    /// Time spent looking up embeddings.
    pub embedding_time: Duration,
    /// Time spent in attention, its projections included.
    pub attention_time: Duration,
    /// Time spent in the feed-forward blocks.
    pub feedforward_time: Duration,
    /// Time spent in norms.
    pub normalization_time: Duration,
    /// Time spent in the output head.
    pub logits_time: Duration,

    /// Time spent quantizing activations.
    pub quantization_time: Duration,
    /// Time spent scaling integer sums back to floats, where that is a step of its own.
    pub dequantization_time: Duration,

    /// Largest memory held during the pass, in bytes.
    pub peak_memory_usage: usize,
    /// Memory held by the KV cache after the pass, in bytes.
    pub cache_memory_usage: usize,

    /// Floating-point operations that the pass stands for, counted from the shapes (a multiply-add is two).
    pub flops_estimate: u64,
    /// Memory traffic, in GB/s.
    pub memory_bandwidth_usage: f64,
}

impl ForwardPassMetrics {
    /// Metrics of a pass that has not run: all zero.
    pub fn new() -> Self {
        Self::default()
    }

    /// Throughput in tokens a second; 0 when no time was measured.
    pub fn throughput(&self, num_tokens: usize) -> f32 {
        let seconds = self.total_time.as_secs_f32();
        if seconds > 0.0 { num_tokens as f32 / seconds } else { 0.0 }
    }

    /// Efficiency against an assumed peak of 1000 GB/s.
    /// [`efficiency_metrics_at`](Self::efficiency_metrics_at) takes the bandwidth that was measured.
    pub fn efficiency_metrics(&self) -> EfficiencyMetrics {
        self.efficiency_metrics_at(DEFAULT_PEAK_BANDWIDTH_GB_PER_S)
    }

    /// Efficiency against the device's own peak memory bandwidth, in GB/s.
    ///
    /// Every ratio is within 0 to 1 and never NaN. A peak that is not a positive finite number gives a memory
    /// efficiency of 0.
    pub fn efficiency_metrics_at(&self, peak_bandwidth_gb_per_s: f64) -> EfficiencyMetrics {
        EfficiencyMetrics {
            compute_utilization: self.share_of_total(self.attention_time, self.feedforward_time),
            memory_efficiency: self.memory_efficiency(peak_bandwidth_gb_per_s),
            quantization_overhead: self.share_of_total(self.quantization_time, self.dequantization_time),
        }
    }

    /// Two parts of the pass as a share of the whole. Parts may overlap in a threaded engine, hence the clamp.
    fn share_of_total(&self, first: Duration, second: Duration) -> f32 {
        let total = self.total_time.as_secs_f32();
        if total > 0.0 { (first.saturating_add(second).as_secs_f32() / total).clamp(0.0, 1.0) } else { 0.0 }
    }

    fn memory_efficiency(&self, peak: f64) -> f32 {
        // A NaN on either side fails the comparison.
        if self.memory_bandwidth_usage > 0.0 && peak > 0.0 && peak.is_finite() {
            (self.memory_bandwidth_usage / peak).min(1.0) as f32
        } else {
            0.0
        }
    }
}

/// How well a pass used the machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EfficiencyMetrics {
    /// Share of the time spent in attention and feed-forward, 0 to 1.
    pub compute_utilization: f32,
    /// Memory traffic as a share of the peak, 0 to 1.
    pub memory_efficiency: f32,
    /// Share of the time spent quantizing and dequantizing, 0 to 1.
    pub quantization_overhead: f32,
}
