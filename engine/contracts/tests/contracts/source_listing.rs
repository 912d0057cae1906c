//! The specification's own contract tests, in its own words: struct literals with just the listed fields, the listed
//! variants and the listed method names. What they need of an engine is the toy's.

use std::time::Duration;

use bitnet_contracts::*;

use crate::toy::Toy;

#[test]
fn test_inference_api_contract() {
    let mut inference = create_test_inference_engine().unwrap();
    let input_ids = create_test_tensor([1, 10], vec![1, 2, 3, 4, 5, 6, 7, 8, 9, 10]).unwrap();

    let output = inference.forward(&input_ids, None).unwrap();
    output.validate(1, 10, inference.config().vocab_size).unwrap();

    assert!(output.metrics.throughput(10) > 1.0);
}

#[test]
fn test_error_context_contract() {
    let error = InferenceError::Configuration(ConfigurationError::InvalidParameter {
        parameter: "test_param".to_string(),
        value: "invalid_value".to_string(),
        valid_range: "valid_range".to_string(),
    });

    let context = error.context();
    assert_eq!(context.component, "Configuration");
    assert!(!error.is_recoverable());
    assert_eq!(error.severity(), ErrorSeverity::High);
}

#[test]
fn test_deterministic_generation_contract() {
    let mut inference = create_test_inference_engine().unwrap();
    let prompt_tokens = vec![1, 2, 3, 4, 5];
    let seed = 12345;

    let result1 = inference.generate_deterministic(&prompt_tokens, 10, seed).unwrap();
    inference.reset().unwrap();
    let result2 = inference.generate_deterministic(&prompt_tokens, 10, seed).unwrap();

    assert_eq!(result1.generated_tokens, result2.generated_tokens);
    assert_eq!(result1.generated_text, result2.generated_text);
}

#[test]
fn test_performance_contract_enforcement() {
    let contract = PerformanceContract { max_token_latency_ms: 10, min_throughput_tps: 100.0, ..Default::default() };

    let mut monitor = PerformanceMonitor::new(contract);
    let slow_metrics = ForwardPassMetrics { total_time: Duration::from_millis(500), ..Default::default() };

    let result = monitor.validate_performance(&slow_metrics, 10);
    assert!(result.is_err());
}

#[test]
fn test_input_validation_contract() {
    let validator = StandardInputValidator { config: create_test_model_config(), device: Device::Cpu };

    let invalid_tokens = vec![999999];
    let result = validator.validate_token_sequence(&invalid_tokens, 1000);
    assert!(result.is_err());

    let wrong_shape_tensor = create_test_tensor([1, 5], vec![1, 2, 3, 4, 5]).unwrap();
    let result = validator.validate_input_tensor(&wrong_shape_tensor, &[1, 10]);
    assert!(result.is_err());
}

#[test]
fn test_memory_contract_compliance() {
    let config = create_test_model_config();
    let max_memory = config.quantized_model_size() * 2;

    let memory_usage = MemoryUsage {
        peak_usage: max_memory / 2,
        model_weights: config.quantized_model_size(),
        kv_cache: max_memory / 8,
        activations: max_memory / 16,
        temporary_buffers: max_memory / 32,
        ..Default::default()
    };

    assert!(memory_usage.within_limits(max_memory));
    assert!(memory_usage.total_footprint() <= max_memory);
}

#[test]
fn test_concurrent_access_contract() {
    let inference = create_test_inference_engine().unwrap();
    let concurrent_engine = ConcurrentInferenceEngine::new(inference);

    let handles: Vec<_> = (0..4)
        .map(|i| {
            let engine = concurrent_engine.clone();
            let tokens = vec![1, 2, 3, i as u32 + 10];

            std::thread::spawn(move || engine.generate_concurrent(&tokens, 5, &GenerationConfig::default()))
        })
        .collect();

    for handle in handles {
        let result = handle.join().unwrap();
        assert!(result.is_ok());
    }
}

fn create_test_inference_engine() -> Result<Box<dyn BitNetInference>> {
    Ok(Box::new(Toy::new()))
}

fn create_test_model_config() -> ModelConfig {
    ModelConfig {
        hidden_size: 512,
        num_layers: 6,
        num_attention_heads: 8,
        num_key_value_heads: 8,
        intermediate_size: 2048,
        vocab_size: 32000,
        max_position_embeddings: 2048,
        rope_theta: 10000.0,
        quantization_type: QuantizationType::I2S,
        quantization_accuracy: 0.99,
        model_type: "bitnet".to_string(),
        model_name: Some("test-model".to_string()),
        version: "1.0".to_string(),
    }
}

fn create_test_tensor(shape: [usize; 2], data: Vec<u32>) -> Result<Tensor> {
    Ok(Tensor::from_vec(data, &shape, &Device::Cpu)?)
}
