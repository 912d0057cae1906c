//! The decode loop on a scripted model: which limits, which stops, which reason.

use bitnet_contracts::{Device, InferenceError, QuantizationType};

use super::*;

/// After `n` tokens the most likely token is `script[n - 1]`; counts what it was fed.
struct Scripted {
    script: Vec<u32>,
    len: usize,
    fed: Vec<usize>,
    logits: Vec<f32>,
}

impl StepModel for Scripted {
    fn restart(&mut self) -> Result<()> {
        self.len = 0;
        Ok(())
    }

    fn feed(&mut self, tokens: &[u32]) -> Result<&[f32]> {
        self.len += tokens.len();
        self.fed.push(tokens.len());
        self.logits = vec![0.0; 10];
        self.logits[self.script[(self.len - 1) % self.script.len()] as usize] = 5.0;
        // A second choice, for when the first may not come.
        self.logits[9] = 1.0;
        Ok(&self.logits)
    }

    fn memory(&self) -> MemoryUsage {
        MemoryUsage::default()
    }
}

fn model_config(max_positions: usize) -> ModelConfig {
    ModelConfig {
        hidden_size: 8,
        num_layers: 1,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        intermediate_size: 8,
        vocab_size: 10,
        max_position_embeddings: max_positions,
        rope_theta: 10000.0,
        quantization_type: QuantizationType::I2S,
        quantization_accuracy: 0.99,
        model_type: "bitnet".to_string(),
        model_name: None,
        version: "1".to_string(),
    }
}

fn run(max_tokens: usize, config: &GenerationConfig, eos: &[u32]) -> (Result<GenerationResult>, Vec<usize>) {
    let model_config = model_config(12);
    let validator = StandardInputValidator::new(model_config.clone(), Device::Cpu);
    let context = GenerationContext { config: &model_config, validator: &validator, tokenizer: None, eos };
    // The prompt is three tokens long, so generation starts at script[2].
    let mut model =
        Scripted { script: vec![0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 1, 2], len: 0, fed: Vec::new(), logits: Vec::new() };
    let result = generate(&mut model, &context, &[0, 0, 0], max_tokens, config, &mut |_| ());
    (result, model.fed)
}

fn greedy() -> GenerationConfig {
    GenerationConfig::greedy()
}

#[test]
fn the_smaller_limit_counts() {
    for (max_tokens, max_new) in [(4, 100), (100, 4)] {
        let result = run(max_tokens, &GenerationConfig { max_new_tokens: max_new, ..greedy() }, &[]).0.unwrap();
        assert_eq!(result.generated_tokens, [1, 2, 3, 4]);
        assert_eq!(result.finish_reason, FinishReason::MaxTokens);
        assert_eq!(result.timing.per_token.len(), 4);
        assert!(result.timing.time_to_first_token <= result.timing.total);
    }
}

#[test]
fn the_context_is_filled_and_not_passed() {
    let result = run(100, &greedy(), &[]).0.unwrap();
    assert_eq!(result.generated_tokens.len(), 12 - 3);
    assert_eq!(result.finish_reason, FinishReason::ContextFull);
    let result = run(100, &GenerationConfig { max_total_tokens: 5, ..greedy() }, &[]).0.unwrap();
    assert_eq!(result.generated_tokens, [1, 2]);
    assert_eq!(result.finish_reason, FinishReason::ContextFull);
}

#[test]
fn final_tokens_end_the_text_and_are_not_in_it() {
    let result = run(9, &GenerationConfig { stop_tokens: vec![7, 4], ..greedy() }, &[]).0.unwrap();
    assert_eq!((result.generated_tokens, result.finish_reason), (vec![1, 2, 3], FinishReason::StopToken));
    // Any of several end-of-sequence tokens of the model.
    let result = run(9, &greedy(), &[8, 3]).0.unwrap();
    assert_eq!((result.generated_tokens, result.finish_reason), (vec![1, 2], FinishReason::EndOfSequence));
    // The caller's replaces the model's.
    let result = run(9, &GenerationConfig { eos_token_id: Some(5), ..greedy() }, &[3]).0.unwrap();
    assert_eq!((result.generated_tokens, result.finish_reason), (vec![1, 2, 3, 4], FinishReason::EndOfSequence));
}

#[test]
fn no_final_token_comes_before_the_minimum() {
    let config = GenerationConfig { stop_tokens: vec![1, 3], min_new_tokens: 3, ..greedy() };
    let result = run(9, &config, &[]).0.unwrap();
    // 1 and 3 give way to the second choice; the text then runs on.
    assert_eq!(result.generated_tokens[..4], [9, 2, 9, 4]);
}

#[test]
fn the_prompt_is_fed_in_pieces_and_the_cache_is_used() {
    assert_eq!(run(3, &greedy(), &[]).1, [3, 1, 1]);
    assert_eq!(run(2, &GenerationConfig { prefill_chunk_size: Some(2), ..greedy() }, &[]).1, [2, 1, 1]);
    assert_eq!(run(2, &GenerationConfig { prefill_chunk_size: Some(3), ..greedy() }, &[]).1, [3, 1]);
    assert_eq!(run(3, &GenerationConfig { use_cache: false, ..greedy() }, &[]).1, [3, 4, 5]);
}

#[test]
fn everything_wrong_is_found_before_any_token_is_computed() {
    let (result, fed) = run(0, &greedy(), &[]);
    assert!(matches!(result, Err(InferenceError::Configuration(ConfigurationError::InvalidParameter { .. }))));
    assert!(fed.is_empty());
    let (result, fed) = run(3, &GenerationConfig { top_p: Some(f32::NAN), ..greedy() }, &[]);
    assert!(result.is_err() && fed.is_empty());
    let (result, fed) = run(3, &GenerationConfig { stop_sequences: vec!["x".to_string()], ..greedy() }, &[]);
    assert!(matches!(result, Err(InferenceError::Tokenization(TokenizationError::MissingTokenizer { .. }))));
    assert!(fed.is_empty());
}
