//! Generation settings and results.

use std::time::Duration;

use bitnet_contracts::*;

#[test]
fn defaults_are_the_documented_ones() {
    let expected = GenerationConfig {
        max_new_tokens: 128,
        max_total_tokens: 2048,
        min_new_tokens: 1,
        temperature: 0.8,
        top_k: Some(50),
        top_p: Some(0.95),
        repetition_penalty: 1.1,
        frequency_penalty: 0.0,
        presence_penalty: 0.0,
        stop_tokens: vec![],
        stop_sequences: vec![],
        eos_token_id: None,
        do_sample: true,
        seed: None,
        use_cache: true,
        prefill_chunk_size: None,
    };
    assert_eq!(GenerationConfig::default(), expected);
}

#[test]
fn greedy_changes_nothing_but_the_choice_of_tokens() {
    let greedy = GenerationConfig::greedy();
    assert!(!greedy.do_sample);
    assert_eq!(greedy.temperature, 0.0);
    assert_eq!((greedy.top_k, greedy.top_p, greedy.repetition_penalty), (None, None, 1.0));
    assert_eq!(greedy.max_new_tokens, GenerationConfig::default().max_new_tokens);
    StandardInputValidator::new(crate::toy::config(), Device::Cpu).validate_generation_config(&greedy).unwrap();
}

#[test]
fn a_partial_json_takes_defaults() {
    let config: GenerationConfig =
        serde_json::from_str(r#"{"max_new_tokens": 3, "seed": 18446744073709551615}"#).unwrap();
    let expected = GenerationConfig { max_new_tokens: 3, seed: Some(u64::MAX), ..Default::default() };
    assert_eq!(config, expected);
}

#[test]
fn tokens_per_second_counts_generated_tokens_over_total_time() {
    let mut result = GenerationResult {
        prompt_tokens: vec![1; 100],
        generated_tokens: vec![2; 6],
        generated_text: String::new(),
        finish_reason: FinishReason::ContextFull,
        timing: GenerationTiming { total: Duration::from_millis(1500), ..Default::default() },
        memory_usage: MemoryUsage::default(),
    };
    assert_eq!(result.tokens_per_second(), 4.0);
    result.timing.total = Duration::ZERO;
    assert_eq!(result.tokens_per_second(), 0.0);

    let text = serde_json::to_string(&result).unwrap();
    assert_eq!(serde_json::from_str::<GenerationResult>(&text).unwrap(), result);
}
