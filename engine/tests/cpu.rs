//! The CPU engine beyond what the conformance suite asks: bit-identity over instruction sets and threads, loading, memory.

use bitnet_contracts::*;
use bitnet_engine::kernels::{Isa, KvFormat};
use bitnet_engine::model::{Checkpoint, ModelSource};
use bitnet_engine::ternary::Quantization;
use bitnet_engine::{CpuEngine, EngineOptions};

fn ids(tokens: &[u32], batch: usize) -> Tensor {
    Tensor::from_slice(tokens, (batch, tokens.len() / batch), &Device::Cpu).unwrap()
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

fn prompt(len: usize, vocabulary: usize) -> Vec<u32> {
    (0..len).map(|i| ((i * 7919 + 5) % vocabulary) as u32).collect()
}

/// 150 positions: two internal chunks of rows, three cache pages.
#[test]
fn logits_are_the_same_bits_on_every_path() {
    let tokens = prompt(150, 4096);
    let reference = {
        let options = EngineOptions::default().with_isa(Isa::Portable).with_threads(1);
        let mut engine = CpuEngine::embedded(&options).unwrap();
        bits(&engine.forward(&ids(&tokens, 1), None).unwrap().logits)
    };
    for isa in Isa::available() {
        for threads in [1, 2, 3] {
            let mut engine =
                CpuEngine::embedded(&EngineOptions::default().with_isa(isa).with_threads(threads)).unwrap();
            let whole = engine.forward(&ids(&tokens, 1), None).unwrap();
            assert!(bits(&whole.logits) == reference, "{isa}, {threads} threads");
            let mut cache = KVCache::new(150);
            let mut chunked = Vec::new();
            for chunk in [&tokens[..1], &tokens[1..64], &tokens[64..129], &tokens[129..150]] {
                chunked.extend(bits(&engine.forward(&ids(chunk, 1), Some(&mut cache)).unwrap().logits));
            }
            assert!(chunked == reference, "{isa}, {threads} threads, in chunks");
        }
    }
}

/// Behind 256 positions the threads share a row: bits may not show it, nor where the steps are cut, in any format of keys and values. A
/// narrower format is near f32, and takes its share of the memory.
#[rstest::rstest]
#[case(KvFormat::F32, 1.0, 0.0)]
#[case(KvFormat::F16, 0.5, 0.06)]
#[case(KvFormat::Int8, 132.0 / 512.0, 0.1)]
fn keys_and_values_of_every_format_behind_many_positions(#[case] kv: KvFormat, #[case] share: f64, #[case] most: f32) {
    // Heads of 128 numbers, two slices for the threads; one KV head, so that they have nothing else to share.
    let folder = tempfile::tempdir().unwrap();
    let base = fixtures::find_preset("gqa1-tied-bf16").unwrap();
    let spec = fixtures::Spec { hidden: 256, heads: 2, kv_heads: 1, context: 512, ..base.spec.clone() };
    fixtures::synthesize(&fixtures::Preset { spec, ..base.clone() }, 1, folder.path(), &mut |_| ()).unwrap();
    let tokens = prompt(420, base.spec.vocab);
    let (prefix, steps) = tokens.split_at(415);
    let run = |kv, threads, isa, cut: usize| {
        let options = EngineOptions::default().with_isa(isa).with_threads(threads).with_kv(kv);
        let mut engine = CpuEngine::load(folder.path(), &options).unwrap();
        let mut cache = KVCache::new(512);
        engine.forward(&ids(prefix, 1), Some(&mut cache)).unwrap();
        let mut logits = Vec::new();
        for piece in [&steps[..cut], &steps[cut..]] {
            let output = engine.forward(&ids(piece, 1), Some(&mut cache)).unwrap();
            logits.extend(output.logits.flatten_all().unwrap().to_vec1::<f32>().unwrap());
        }
        (logits, cache.memory_bytes())
    };
    let (reference, bytes) = run(kv, 1, Isa::Portable, 1);
    for isa in Isa::available() {
        for (threads, cut) in [(2, 4), (7, 2)] {
            let (logits, _) = run(kv, threads, isa, cut);
            assert!(logits.iter().map(|l| l.to_bits()).eq(reference.iter().map(|l| l.to_bits())), "{isa}, {threads}");
        }
    }
    let (exact, all) = run(KvFormat::F32, 2, Isa::best(), 1);
    let largest = exact.iter().fold(0f32, |m, l| m.max(l.abs()));
    let worst = exact.iter().zip(&reference).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
    println!("{kv}: {} of the bytes, off by {} of the largest", bytes as f64 / all as f64, worst / largest);
    assert!(worst <= most * largest, "{kv} is off by {worst}, the largest logit is {largest}");
    assert!(kv == KvFormat::F32 || worst > 0.0, "{kv} was not used");
    assert!((bytes as f64 - share * all as f64).abs() < 0.01 * all as f64, "{kv}: {bytes} of {all}");
}

/// The kernels of every quantization, prefill and steps: the default's bits, and what the engine says of itself is what was asked for.
#[test]
fn every_quantization_gives_the_same_bits() {
    let tokens = prompt(80, 4096);
    let reference =
        bits(&CpuEngine::embedded(&EngineOptions::default()).unwrap().forward(&ids(&tokens, 1), None).unwrap().logits);
    let kinds = [QuantizationType::I2S, QuantizationType::I2S, QuantizationType::TL1, QuantizationType::TL2];
    for (quantization, kind) in Quantization::ALL.into_iter().zip(kinds) {
        for (isa, threads) in Isa::available().into_iter().zip([1, 2, 3]) {
            let options = EngineOptions::default().with_isa(isa).with_threads(threads).with_quantization(quantization);
            let mut engine = CpuEngine::embedded(&options).unwrap();
            assert_eq!(engine.config().quantization_type, kind);
            assert!(kinds.iter().all(|&kind| engine.supports_quantization(kind)));
            let whole = engine.forward(&ids(&tokens, 1), None).unwrap();
            assert!(bits(&whole.logits) == reference, "{quantization} on {isa}");
            let mut cache = KVCache::new(80);
            let mut pieces = Vec::new();
            let (many, rest) = tokens.split_at(60);
            let (few, steps) = rest.split_at(5);
            for piece in [many, few].into_iter().chain(steps.chunks(1)) {
                pieces.extend(bits(&engine.forward(&ids(piece, 1), Some(&mut cache)).unwrap().logits));
            }
            assert!(pieces == reference, "{quantization} on {isa}, in steps");
        }
    }
}

#[test]
fn a_session_goes_on_from_where_it_is_rewound_to() {
    let mut engine = CpuEngine::embedded(&EngineOptions::default()).unwrap();
    let tokens = prompt(100, 4096);
    let logits = engine.feed(&tokens).unwrap().to_vec();
    for len in [70, 64, 3, 0] {
        engine.feed(&[9, 8, 7]).unwrap();
        engine.rewind(len);
        engine.rewind(len + 5);
        assert_eq!(engine.feed(&tokens[len..]).unwrap(), logits, "rewound to {len}");
    }
}

#[test]
fn every_preset_and_storage_runs_and_agrees_over_instruction_sets() {
    for preset in fixtures::presets() {
        let folder = fixtures::preset(preset.name, 1).unwrap().folder().unwrap();
        let mut seen: Option<Vec<u32>> = None;
        for isa in Isa::available() {
            let mut engine = CpuEngine::load(folder.path(), &EngineOptions::default().with_isa(isa)).unwrap();
            let tokens = prompt(20, engine.config().vocab_size);
            let output = engine.forward(&ids(&tokens, 2), None).unwrap();
            output.validate(2, 10, engine.config().vocab_size).unwrap();
            let bits = bits(&output.logits);
            assert!(seen.get_or_insert(bits.clone()) == &bits, "{} on {isa}", preset.name);
        }
    }
}

#[test]
fn reported_weights_are_what_is_held() {
    for quantization in Quantization::ALL {
        reported_weights_of(quantization);
    }
}

fn reported_weights_of(quantization: Quantization) {
    let engine = CpuEngine::embedded(&EngineOptions::default().with_quantization(quantization)).unwrap();
    let usage = engine.memory_usage();
    // 28 ternary matrices (all dimensions are multiples of 16) at 2 bits, or in base 3 with 20 columns in a block of 64 bytes for 16
    // rows, or in triples with 96 columns in 320 bytes and 64 for the row group; the bf16 embedding; f32 norms; the screen of the head: 4 bits a weight, an f32 a row, a column and 64 rows, and one.
    let d = engine.description();
    let (h, f, kv) = (d.hidden_size, d.intermediate_size, d.kv_size());
    let trits = |rows: usize, columns: usize| match (quantization, engine.isa()) {
        (Quantization::Tl2, _) => rows / 16 * (columns.div_ceil(96) * 320 + 64),
        (Quantization::Auto, Isa::Avx512Vnni) => rows * columns.div_ceil(20) * 4,
        _ => rows * columns / 4,
    };
    let layer = 2 * trits(h, h) + 2 * trits(kv, h) + 2 * trits(f, h) + trits(h, f);
    let screen = 1_048_576 / 2 + 4 * (4096 + 4096 / 64 + 256);
    assert_eq!(usage.model_weights, d.num_layers * layer + 1_048_576 * 2 + 6_400 * 4 + screen);
}

#[test]
fn a_failed_call_leaves_the_cache_as_it_was() {
    let mut engine = CpuEngine::embedded(&EngineOptions::default()).unwrap();
    let mut cache = KVCache::new(10);
    engine.forward(&ids(&[1, 2, 3, 4, 5, 6, 7, 8], 1), Some(&mut cache)).unwrap();
    let before = cache.memory_bytes();
    let error = engine.forward(&ids(&[1, 2, 3], 1), Some(&mut cache)).unwrap_err();
    assert!(matches!(error, InferenceError::ForwardPass(ForwardPassError::KVCacheError { .. })));
    assert!(engine.forward(&ids(&[5000], 1), Some(&mut cache)).is_err());
    assert!(engine.forward(&ids(&[1, 2], 2), Some(&mut cache)).is_err());
    assert_eq!((cache.len(), cache.memory_bytes()), (8, before));
    let after = bits(&engine.forward(&ids(&[9, 10], 1), Some(&mut cache)).unwrap().logits);
    let whole = bits(&engine.forward(&ids(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 1), None).unwrap().logits);
    assert!(whole.ends_with(&after));
}

#[test]
fn attention_weights_are_probabilities_of_the_past() {
    let mut engine = CpuEngine::embedded(&EngineOptions::default().with_attentions().with_hidden_states()).unwrap();
    let mut cache = KVCache::new(16);
    engine.forward(&ids(&[1, 2, 3, 7, 8, 9], 2), Some(&mut cache)).unwrap();
    let output = engine.forward(&ids(&[4, 5, 6, 7], 2), Some(&mut cache)).unwrap();
    assert_eq!(output.hidden_states.unwrap().dims(), [2, 2, 256]);
    let attention = output.attention_weights.unwrap();
    assert_eq!(attention.len(), 4);
    for layer in attention {
        assert_eq!(layer.dims(), [2, 4, 2, 5]);
        for row in layer.reshape((16, 5)).unwrap().to_vec2::<f32>().unwrap().chunks(2) {
            assert!(row.iter().all(|r| (r.iter().sum::<f32>() - 1.0).abs() < 1e-5));
            assert!(row[0][4] == 0.0 && row[0][3] > 0.0 && row[1][4] > 0.0);
        }
    }
}

#[test]
fn the_tokenizer_round_trips_and_text_matches_tokens() {
    let mut engine = CpuEngine::embedded(&EngineOptions::default()).unwrap();
    let prompt = engine.tokenizer().unwrap().encode("Once upon a time").unwrap();
    assert_eq!(prompt[0], 4094, "a begin-of-text token comes first");
    let mut seen = Vec::new();
    let config = GenerationConfig { seed: Some(7), ..GenerationConfig::default() };
    let result = engine.generate_streaming(&prompt, 20, &config, &mut |t| seen.push(t)).unwrap();
    assert_eq!(seen, result.generated_tokens);
    assert_eq!(engine.tokenizer().unwrap().decode(&seen).unwrap(), result.generated_text);
    assert!(!result.generated_text.is_empty());
}

#[test]
fn a_stop_text_ends_the_text_and_is_not_in_it() {
    let mut engine = CpuEngine::embedded(&EngineOptions::default()).unwrap();
    let prompt = engine.tokenizer().unwrap().encode("Once upon a time").unwrap();
    let free = engine.generate(&prompt, 40, &GenerationConfig::greedy()).unwrap();
    // Two characters from the middle of the text, across a token border more often than not.
    let middle = free.generated_text.len() / 2;
    let stop = free.generated_text[middle - 1..middle + 2].to_string();
    let at = free.generated_text.find(&stop).unwrap();
    let config = GenerationConfig { stop_sequences: vec![stop.clone()], ..GenerationConfig::greedy() };
    let stopped = engine.generate(&prompt, 40, &config).unwrap();
    assert_eq!(stopped.finish_reason, FinishReason::StopSequence);
    assert!(!stopped.generated_text.contains(&stop));
    assert!(free.generated_text[..at].starts_with(&stopped.generated_text));
    assert!(free.generated_tokens.starts_with(&stopped.generated_tokens));
}

#[test]
fn broken_folders_are_typed_errors() {
    let folder = fixtures::tiny().folder().unwrap();
    let weights = folder.path().join("model.safetensors");
    let whole = std::fs::read(&weights).unwrap();
    let load = || CpuEngine::load(folder.path(), &EngineOptions::default()).map(|_| ()).unwrap_err();
    for cut in [0, 7, 8, 100, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&weights, &whole[..cut]).unwrap();
        assert!(matches!(load(), InferenceError::Model(_)), "cut to {cut} bytes");
    }
    std::fs::remove_file(&weights).unwrap();
    assert!(
        matches!(load(), InferenceError::Model(ModelError::FileNotFound { path }) if path.ends_with("model.safetensors"))
    );
    assert!(Checkpoint::open(&ModelSource::Folder("no such folder".into())).is_err());
}

#[test]
fn too_many_threads_and_unknown_instruction_sets_are_refused() {
    assert!(CpuEngine::embedded(&EngineOptions::default().with_threads(0)).is_err());
    for isa in Isa::ALL {
        let result = CpuEngine::embedded(&EngineOptions::default().with_isa(isa));
        assert_eq!(result.is_ok(), isa.is_available());
    }
}
