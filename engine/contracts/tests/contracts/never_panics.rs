//! No public function panics, whatever its arguments. (Overflow is a panic in the test profile.)

use std::time::Duration;

use bitnet_contracts::*;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

/// Sizes, with the ends and the neighbourhoods where arithmetic breaks.
fn size() -> impl Strategy<Value = usize> {
    prop_oneof![
        Just(0),
        Just(1),
        Just(usize::MAX),
        Just(usize::MAX - 1),
        Just(usize::MAX / 2 + 1),
        Just(1 << 32),
        0_usize..200_000,
        any::<usize>(),
    ]
}

/// Every float there is: NaN, infinities, subnormals, both zeros.
fn float() -> impl Strategy<Value = f32> {
    prop_oneof![proptest::num::f32::ANY, Just(f32::NAN), Just(0.0), Just(-0.0), Just(f32::MAX), 0.0_f32..=1.0]
}

fn double() -> impl Strategy<Value = f64> {
    prop_oneof![proptest::num::f64::ANY, Just(f64::NAN), Just(f64::INFINITY), Just(0.0), 0.0_f64..1e4]
}

fn duration() -> impl Strategy<Value = Duration> {
    prop_oneof![
        Just(Duration::ZERO),
        Just(Duration::MAX),
        Just(Duration::from_nanos(1)),
        Just(Duration::from_secs(u64::MAX)),
        (any::<u64>(), 0_u32..1_000_000_000).prop_map(|(secs, nanos)| Duration::new(secs, nanos)),
        (0_u64..10_000_000).prop_map(Duration::from_micros),
    ]
}

fn quantization() -> impl Strategy<Value = QuantizationType> {
    prop_oneof![Just(QuantizationType::I2S), Just(QuantizationType::TL1), Just(QuantizationType::TL2)]
}

fn model_config() -> impl Strategy<Value = ModelConfig> {
    (vec(size(), 7), float(), quantization(), float(), any::<String>(), option::of(any::<String>())).prop_map(
        |(sizes, rope_theta, quantization_type, quantization_accuracy, text, model_name)| ModelConfig {
            hidden_size: sizes[0],
            num_layers: sizes[1],
            num_attention_heads: sizes[2],
            num_key_value_heads: sizes[3],
            intermediate_size: sizes[4],
            vocab_size: sizes[5],
            max_position_embeddings: sizes[6],
            rope_theta,
            quantization_type,
            quantization_accuracy,
            model_type: text.clone(),
            model_name,
            version: text,
        },
    )
}

/// Configurations that pass validation, from the smallest to sizes near the overflow.
fn valid_model_config() -> impl Strategy<Value = ModelConfig> {
    let shape = (1_usize..=64, 1_usize..=8, 1_usize..=8, 1_usize..=10_000, 1_usize..=30_000, 1_usize..=1_000_000);
    (shape, quantization()).prop_map(|((half_dim, kv_heads, group, layers, ffn, vocab), quantization_type)| {
        ModelConfig {
            hidden_size: half_dim * 2 * kv_heads * group,
            num_layers: layers,
            num_attention_heads: kv_heads * group,
            num_key_value_heads: kv_heads,
            intermediate_size: ffn,
            vocab_size: vocab,
            max_position_embeddings: 1 + vocab / 2,
            quantization_type,
            ..crate::toy::config()
        }
    })
}

fn generation_config() -> impl Strategy<Value = GenerationConfig> {
    (
        vec(size(), 3),
        vec(float(), 4),
        (option::of(size()), option::of(float()), option::of(size())),
        (vec(any::<u32>(), 0..4), vec(any::<String>(), 0..4), option::of(any::<u32>())),
        (any::<bool>(), option::of(any::<u64>()), any::<bool>()),
    )
        .prop_map(|(sizes, floats, (top_k, top_p, prefill_chunk_size), stops, (do_sample, seed, use_cache))| {
            GenerationConfig {
                max_new_tokens: sizes[0],
                max_total_tokens: sizes[1],
                min_new_tokens: sizes[2],
                temperature: floats[0],
                top_k,
                top_p,
                repetition_penalty: floats[1],
                frequency_penalty: floats[2],
                presence_penalty: floats[3],
                stop_tokens: stops.0,
                stop_sequences: stops.1,
                eos_token_id: stops.2,
                do_sample,
                seed,
                use_cache,
                prefill_chunk_size,
            }
        })
}

fn metrics() -> impl Strategy<Value = ForwardPassMetrics> {
    (vec(duration(), 8), vec(size(), 2), any::<u64>(), double()).prop_map(
        |(times, sizes, flops_estimate, memory_bandwidth_usage)| ForwardPassMetrics {
            total_time: times[0],
            embedding_time: times[1],
            attention_time: times[2],
            feedforward_time: times[3],
            normalization_time: times[4],
            logits_time: times[5],
            quantization_time: times[6],
            dequantization_time: times[7],
            peak_memory_usage: sizes[0],
            cache_memory_usage: sizes[1],
            flops_estimate,
            memory_bandwidth_usage,
        },
    )
}

fn contract() -> impl Strategy<Value = PerformanceContract> {
    (any::<u32>(), float(), size(), float(), any::<bool>()).prop_map(
        |(max_token_latency_ms, min_throughput_tps, max_memory_usage, min_accuracy_correlation, alert)| {
            PerformanceContract {
                max_token_latency_ms,
                min_throughput_tps,
                max_memory_usage,
                min_accuracy_correlation,
                monitoring_enabled: true,
                alert_on_violation: alert,
            }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn model_configs(config in model_config()) {
        config.head_dim();
        config.group_size();
        let (packed, budget) = (config.packed_model_size(), config.quantized_model_size());
        config.parameter_count();
        if config.validate().is_ok() {
            prop_assert!(packed <= budget, "{} > {}", packed, budget);
            prop_assert!(config.head_dim() * config.num_attention_heads == config.hidden_size);
        }
    }

    #[test]
    fn packed_weights_stay_within_the_budget(config in valid_model_config()) {
        prop_assert_eq!(config.validate(), Ok(()));
        let (packed, budget) = (config.packed_model_size(), config.quantized_model_size());
        prop_assert!(packed <= budget, "{} > {} for {:?}", packed, budget, config);
    }

    #[test]
    fn generation_configs(config in generation_config(), model in model_config()) {
        let validator = StandardInputValidator::new(model, Device::Cpu);
        if validator.validate_generation_config(&config).is_ok() {
            prop_assert!(config.temperature.is_finite() && config.temperature >= 0.0);
            prop_assert!(config.top_p.is_none_or(|p| p > 0.0 && p <= 1.0));
            prop_assert!(config.repetition_penalty.is_finite() && config.repetition_penalty > 0.0);
            prop_assert!(config.frequency_penalty.is_finite() && config.presence_penalty.is_finite());
            prop_assert!(config.min_new_tokens <= config.max_new_tokens && config.max_new_tokens > 0);
        }
    }

    #[test]
    fn token_sequences(tokens in vec(any::<u32>(), 0..20), vocab in size(), model in model_config()) {
        let positions = model.max_position_embeddings;
        let validator = StandardInputValidator::new(model, Device::Cpu);
        let valid = !tokens.is_empty() && tokens.len() <= positions && tokens.iter().all(|&t| (t as usize) < vocab);
        prop_assert_eq!(validator.validate_token_sequence(&tokens, vocab).is_ok(), valid);
    }

    #[test]
    fn shapes(shape in vec(0_usize..4, 0..5), expected in vec(size(), 0..5), sizes in vec(size(), 3)) {
        let tensor = Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
        let validator = StandardInputValidator::new(crate::toy::config(), Device::Cpu);
        let _ = validator.validate_input_tensor(&tensor, &expected);
        let output = InferenceOutput {
            logits: tensor,
            attention_weights: None,
            hidden_states: None,
            metrics: ForwardPassMetrics::new(),
            memory_usage: MemoryUsage::default(),
        };
        let _ = output.validate(sizes[0], sizes[1], sizes[2]);
        let _ = output.next_token_logits();
        prop_assert_eq!(output.check_numerical_stability(), Ok(()));
    }

    #[test]
    fn metrics_are_ratios(metrics in metrics(), tokens in size(), peak in double()) {
        let throughput = metrics.throughput(tokens);
        prop_assert!(throughput.is_finite() && throughput >= 0.0);
        for efficiency in [metrics.efficiency_metrics(), metrics.efficiency_metrics_at(peak)] {
            prop_assert!((0.0..=1.0).contains(&efficiency.compute_utilization), "{:?}", efficiency);
            prop_assert!((0.0..=1.0).contains(&efficiency.memory_efficiency), "{:?}", efficiency);
            prop_assert!((0.0..=1.0).contains(&efficiency.quantization_overhead), "{:?}", efficiency);
        }
    }

    #[test]
    fn memory_figures(sizes in vec(size(), 8), fragmentation_ratio in float(), limit in size()) {
        let usage = MemoryUsage {
            current_usage: sizes[0],
            peak_usage: sizes[1],
            model_weights: sizes[2],
            kv_cache: sizes[3],
            activations: sizes[4],
            temporary_buffers: sizes[5],
            memory_pool_hits: sizes[6],
            memory_pool_misses: sizes[7],
            fragmentation_ratio,
        };
        prop_assert!(usage.total_footprint() >= sizes[2]);
        prop_assert!((0.0..=1.0).contains(&usage.pool_hit_rate()));
        prop_assert_eq!(usage.within_limits(limit), sizes[1] <= limit);
    }

    #[test]
    fn monitors(
        contract in contract(),
        passes in vec((metrics(), size()), 0..8),
        correlations in vec(float(), 0..4),
        window in duration(),
    ) {
        let mut monitor = PerformanceMonitor::new(contract);
        for (metrics, tokens) in &passes {
            let _ = monitor.validate_performance(metrics, *tokens);
        }
        for correlation in correlations {
            let _ = monitor.validate_accuracy(correlation);
        }
        let stats = monitor.get_performance_stats(window);
        prop_assert!((0.0..=1.0).contains(&stats.sla_compliance_rate), "{:?}", stats);
        prop_assert!(stats.avg_latency_ms.is_finite() && stats.avg_throughput_tps.is_finite(), "{:?}", stats);
    }

    #[test]
    fn generation_results(total in duration(), tokens in vec(any::<u32>(), 0..9)) {
        let result = GenerationResult {
            prompt_tokens: Vec::new(),
            generated_tokens: tokens,
            generated_text: String::new(),
            finish_reason: FinishReason::MaxTokens,
            timing: GenerationTiming { total, ..Default::default() },
            memory_usage: MemoryUsage::default(),
        };
        prop_assert!(result.tokens_per_second().is_finite());
    }

    #[test]
    fn caches(capacity in size(), steps in vec((0_u8..3, size()), 0..12)) {
        let mut cache = KVCache::new(capacity);
        for (kind, n) in steps {
            match kind {
                0 => {
                    let _ = cache.check_room(n);
                    let _ = cache.advance(n);
                }
                1 => cache.truncate(n),
                _ => cache.clear(),
            }
            prop_assert!(cache.len() <= capacity);
            prop_assert_eq!(cache.remaining(), capacity - cache.len());
        }
    }

    #[test]
    fn memory_requirements(required in size(), model in model_config()) {
        let _ = StandardInputValidator::new(model, Device::Cpu).validate_memory_requirements(required);
    }
}
