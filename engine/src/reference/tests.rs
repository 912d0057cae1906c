//! Both dense backends against golden logits, against themselves cut into pieces, and against hostile callers and weights.

use bitnet_contracts::{
    BitNetInference, Device, ForwardPassError, GenerationConfig, InferenceError, InferenceOutput, KVCache,
    QuantizationType, Tensor, ThreadSafeInference, TokenizationError,
};
use fixtures::Fixture;
use golden::{Derivation, Semantics};

use super::candle::CandleModel;
use super::engine::DenseModel;
use super::ndarray::NdarrayModel;
use super::{CandleFp32, DenseEngine};
use crate::EngineOptions;

/// Makes a test of each backend from a generic function.
macro_rules! both {
    ($($name:ident),* $(,)?) => {
        mod candle { $(#[test] fn $name() { super::$name::<super::CandleModel>(); })* }
        mod ndarray { $(#[test] fn $name() { super::$name::<super::NdarrayModel>(); })* }
    };
}

both![
    golden_logits,
    unseen_models,
    pieces_make_the_whole,
    batches_are_their_sequences,
    errors_leave_the_cache_alone,
    foreign_caches_are_refused,
    truncated_caches_go_on,
    greedy_is_the_argmax,
    calls_repeat_bit_for_bit,
    attention_and_hidden_states,
    overflow_of_the_logits_is_an_error,
    memory_is_what_is_held,
    options_are_checked,
];

/// Largest difference from golden fp32 logits over all cases, as measured: 0 from the oracle, and 1.4e-6 where the stored scale
/// divides and its inverse is rounded to f32. The nearest fault known, a wrong epsilon, makes 1.8e-4.
const TOLERANCE: f32 = 2e-6;

/// Largest difference between two evaluations of one sequence, in pieces, in a batch or whole: two orders of an f64 sum may round to
/// neighbouring f32 logits. A position off by one makes more than 0.1.
const SELF_TOLERANCE: f32 = 2e-6;

fn ids(rows: &[Vec<u32>]) -> Tensor {
    Tensor::from_vec(rows.concat(), (rows.len(), rows[0].len()), &Device::Cpu).unwrap()
}

fn one(tokens: &[u32]) -> Tensor {
    ids(&[tokens.to_vec()])
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn bits(output: &InferenceOutput) -> Vec<u32> {
    values(&output.logits).into_iter().map(f32::to_bits).collect()
}

fn prompt(len: usize, seed: usize, vocabulary: usize) -> Vec<u32> {
    (0..len).map(|i| ((i * 7919 + seed * 101 + 5) % vocabulary) as u32).collect()
}

fn difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    // A NaN is no maximum, so it must not be skipped as one.
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, |m, d| if d <= m { m } else { d })
}

fn load<M: DenseModel>(fixture: &Fixture, options: &EngineOptions) -> DenseEngine<M> {
    DenseEngine::load(fixture.folder().unwrap().path(), options).unwrap()
}

fn embedded<M: DenseModel>() -> DenseEngine<M> {
    DenseEngine::embedded(&EngineOptions::default()).unwrap()
}

fn logits<M: DenseModel>(engine: &mut DenseEngine<M>, tokens: &[u32], cache: Option<&mut KVCache>) -> Vec<f32> {
    values(&engine.forward(&one(tokens), cache).unwrap().logits)
}

fn golden_logits<M: DenseModel>() {
    for case in golden::cases() {
        let golden = golden::load(case).unwrap();
        let mut engine = load::<M>(&golden::model(case).unwrap(), &EngineOptions::default());
        for prompt in &golden.prompts {
            let output = engine.forward(&ids(&prompt.input_ids), None).unwrap();
            output.validate(prompt.batch, prompt.seq, prompt.vocab).unwrap();
            let ours = values(&output.logits);
            for derivation in Derivation::ALL {
                let worst = difference(&ours, prompt.logits(Semantics::Fp32, derivation));
                assert!(worst <= TOLERANCE, "{case} {} {derivation:?}: {worst:e}", prompt.name);
            }
        }
    }
}

/// Other seeds than those of the golden data, longer than a block of queries, in calls of uneven lengths.
fn unseen_models<M: DenseModel>() {
    for (name, seed, len) in
        [("gqa2-untied-f32", 90, 60), ("gqa4-tied-f16", 91, 128), ("master-bf16", 92, 40), ("tiny", 0, 150)]
    {
        let fixture = if name == "tiny" { fixtures::tiny() } else { fixtures::preset(name, seed).unwrap() };
        let oracle = golden::oracle::Oracle::from_bytes(fixture.config_json(), fixture.weights()).unwrap();
        let tokens = prompt(len, 3, oracle.vocab());
        let expected: Vec<f32> =
            oracle.forward(&tokens, Semantics::Fp32).unwrap().into_iter().flatten().map(|l| l as f32).collect();
        let mut engine = load::<M>(&fixture, &EngineOptions::default());
        let mut cache = KVCache::new(len);
        let mut cut = logits(&mut engine, &tokens[..1], Some(&mut cache));
        cut.extend(logits(&mut engine, &tokens[1..len - 9], Some(&mut cache)));
        cut.extend(logits(&mut engine, &tokens[len - 9..], Some(&mut cache)));
        for ours in [logits(&mut engine, &tokens, None), cut] {
            let worst = difference(&ours, &expected);
            assert!(worst <= TOLERANCE, "{name}: {worst:e}");
        }
    }
}

fn pieces_make_the_whole<M: DenseModel>() {
    let mut engine = embedded::<M>();
    let tokens = prompt(140, 0, 4096);
    let whole = logits(&mut engine, &tokens, None);
    let mut cache = KVCache::new(140);
    let mut pieces = Vec::new();
    for piece in [&tokens[..3], &tokens[3..4], &tokens[4..134], &tokens[134..]] {
        pieces.extend(logits(&mut engine, piece, Some(&mut cache)));
    }
    assert_eq!(cache.len(), 140);
    let worst = difference(&whole, &pieces);
    assert!(worst < SELF_TOLERANCE, "{worst:e}");
}

fn batches_are_their_sequences<M: DenseModel>() {
    let mut engine = load::<M>(&fixtures::preset("gqa4-untied-f16", 5).unwrap(), &EngineOptions::default());
    let rows: Vec<Vec<u32>> = (0..3).map(|seed| prompt(12, seed, 211)).collect();
    let mut cache = KVCache::new(12);
    let parts = |from: usize, to: usize| -> Vec<Vec<u32>> { rows.iter().map(|r| r[from..to].to_vec()).collect() };
    let first = values(&engine.forward(&ids(&parts(0, 7)), Some(&mut cache)).unwrap().logits);
    let second = values(&engine.forward(&ids(&parts(7, 12)), Some(&mut cache)).unwrap().logits);
    for (b, row) in rows.iter().enumerate() {
        let alone = logits(&mut engine, row, None);
        assert!(difference(&first[b * 7 * 211..(b + 1) * 7 * 211], &alone[..7 * 211]) < SELF_TOLERANCE, "sequence {b}");
        assert!(
            difference(&second[b * 5 * 211..(b + 1) * 5 * 211], &alone[7 * 211..]) < SELF_TOLERANCE,
            "sequence {b}"
        );
    }
    // Both integer types of ids are read.
    let wide = ids(&rows).to_dtype(candle_core::DType::I64).unwrap();
    assert_eq!(bits(&engine.forward(&wide, None).unwrap()), bits(&engine.forward(&ids(&rows), None).unwrap()));
}

fn errors_leave_the_cache_alone<M: DenseModel>() {
    let mut engine = embedded::<M>();
    let tokens = prompt(10, 1, 4096);
    let whole = logits(&mut engine, &tokens, None);
    let mut cache = KVCache::new(10);
    assert!(matches!(
        engine.forward(&one(&[1, 2, 5000]), Some(&mut cache)),
        Err(InferenceError::Tokenization(TokenizationError::InvalidToken { position: 2, token_id: 5000, .. }))
    ));
    assert!(cache.is_empty() && cache.owner().is_none(), "a failed first call attaches nothing");
    logits(&mut engine, &tokens[..6], Some(&mut cache));
    let bytes = cache.memory_bytes();
    let float = Tensor::zeros((1, 2), candle_core::DType::F32, &Device::Cpu).unwrap();
    let flat = Tensor::new(&[1u32, 2], &Device::Cpu).unwrap();
    let two_sequences = ids(&[vec![1], vec![2]]);
    for (what, input) in [
        ("too many", one(&tokens[..5])),
        ("invalid", one(&[4096])),
        ("float", float),
        ("rank", flat),
        ("batch", two_sequences),
    ] {
        let error = engine.forward(&input, Some(&mut cache)).unwrap_err();
        let cache_error = matches!(error, InferenceError::ForwardPass(ForwardPassError::KVCacheError { .. }));
        assert_eq!(cache_error, matches!(what, "too many" | "batch"), "{what}: {error}");
        assert_eq!((cache.len(), cache.memory_bytes()), (6, bytes), "{what}");
    }
    let rest = logits(&mut engine, &tokens[6..], Some(&mut cache));
    assert!(difference(&rest, &whole[6 * 4096..]) < SELF_TOLERANCE);
}

fn foreign_caches_are_refused<M: DenseModel>() {
    let mut engine = embedded::<M>();
    let (mut other, mut twin) = (embedded::<M>(), engine.clone());
    let mut cache = KVCache::new(10);
    logits(&mut engine, &[1, 2, 3], Some(&mut cache));
    let refused = other.forward(&one(&[4]), Some(&mut cache)).unwrap_err();
    let attach = |e: &InferenceError| matches!(e, InferenceError::ForwardPass(ForwardPassError::KVCacheError { operation, .. }) if operation == "attach");
    assert!(attach(&refused), "{refused}");
    // The other backend's, too, in both directions.
    let foreign = match M::NAME {
        "candle-fp32" => embedded::<NdarrayModel>().forward(&one(&[4]), Some(&mut cache)),
        _ => embedded::<CandleModel>().forward(&one(&[4]), Some(&mut cache)),
    };
    assert!(attach(&foreign.unwrap_err()));
    assert_eq!(cache.len(), 3);
    // A clone works on the same model.
    let next = logits(&mut twin, &[4], Some(&mut cache));
    assert!(difference(&next, &logits(&mut engine, &[1, 2, 3, 4], None)[3 * 4096..]) < SELF_TOLERANCE);
    // An empty cache may change hands.
    cache.clear();
    assert_eq!(cache.memory_bytes(), 0);
    logits(&mut other, &[4], Some(&mut cache));
    assert_eq!(cache.len(), 1);
}

fn truncated_caches_go_on<M: DenseModel>() {
    let mut engine = embedded::<M>();
    let tokens = prompt(9, 2, 4096);
    let mut cache = KVCache::new(9);
    logits(&mut engine, &tokens[..5], Some(&mut cache));
    logits(&mut engine, &[7, 7, 7], Some(&mut cache));
    cache.truncate(5);
    let rest = logits(&mut engine, &tokens[5..], Some(&mut cache));
    let whole = logits(&mut engine, &tokens, None);
    assert!(difference(&rest, &whole[5 * 4096..]) < SELF_TOLERANCE);
    assert_eq!(cache.len(), 9);
}

fn greedy_is_the_argmax<M: DenseModel>() {
    let mut engine = embedded::<M>();
    let prompt = prompt(5, 4, 4096);
    let mut sequence = prompt.clone();
    for _ in 0..6 {
        let all = logits(&mut engine, &sequence, None);
        let last = &all[all.len() - 4096..];
        let best = (0..4096).max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap();
        sequence.push(best as u32);
    }
    let greedy = GenerationConfig::greedy();
    for config in [greedy.clone(), GenerationConfig { use_cache: false, ..greedy.clone() }] {
        let result = engine.generate(&prompt, 6, &config).unwrap();
        assert_eq!(result.generated_tokens, sequence[5..]);
        assert!(!result.generated_text.is_empty());
    }
    let concurrent = engine.generate_concurrent(&prompt, 6, &greedy).unwrap();
    assert_eq!(concurrent.generated_tokens, sequence[5..]);
    // The context ends a generation, and is never overrun.
    let mut small = load::<M>(&fixtures::preset("context-32", 1).unwrap(), &EngineOptions::default());
    let result = small.generate(&[5; 30], 10, &GenerationConfig::greedy()).unwrap();
    assert!(result.generated_tokens.len() <= 2);
    assert!(crate::generate::StepModel::feed(&mut small, &[5; 10]).is_err());
}

fn calls_repeat_bit_for_bit<M: DenseModel>() {
    let mut engine = embedded::<M>();
    let tokens = prompt(40, 6, 4096);
    let first = bits(&engine.forward(&one(&tokens), None).unwrap());
    let a = engine.generate_deterministic(&tokens[..4], 8, 42).unwrap().generated_tokens;
    engine.reset().unwrap();
    let b = engine.generate_deterministic(&tokens[..4], 8, 42).unwrap().generated_tokens;
    assert_eq!(a, b);
    assert_eq!(first, bits(&engine.forward(&one(&tokens), None).unwrap()));
    for threads in [1, 3] {
        let mut engine = DenseEngine::<M>::embedded(&EngineOptions::default().with_threads(threads)).unwrap();
        assert_eq!(first, bits(&engine.forward(&one(&tokens), None).unwrap()), "{threads} threads");
    }
}

fn attention_and_hidden_states<M: DenseModel>() {
    let fixture = fixtures::preset("gqa4-tied-f16", 8).unwrap();
    let options = EngineOptions::default().with_attentions().with_hidden_states();
    let mut engine = load::<M>(&fixture, &options);
    let c = engine.config().clone();
    let mut cache = KVCache::new(20);
    engine.forward(&one(&prompt(4, 0, c.vocab_size)), Some(&mut cache)).unwrap();
    let output = engine.forward(&one(&prompt(6, 1, c.vocab_size)), Some(&mut cache)).unwrap();
    let attention = output.attention_weights.unwrap();
    assert_eq!(attention.len(), c.num_layers);
    for layer in &attention {
        check_probabilities(layer, [1, c.num_attention_heads, 6, 10]);
    }
    let hidden = output.hidden_states.unwrap();
    assert_eq!(hidden.dims(), [1, 6, c.hidden_size]);
    // The head is a matrix product with these states.
    let folder = fixture.folder().unwrap();
    let source = crate::model::ModelSource::Folder(folder.path().to_path_buf());
    let head = crate::model::Checkpoint::open(&source)
        .unwrap()
        .matrix("model.embed_tokens.weight", c.vocab_size, c.hidden_size)
        .unwrap();
    let (hidden, mut row) = (values(&hidden), vec![0.0; c.hidden_size]);
    let mut product = vec![0.0; 6 * c.vocab_size];
    for token in 0..c.vocab_size {
        head.row(token, &mut row);
        for (t, state) in hidden.chunks_exact(c.hidden_size).enumerate() {
            let sum: f64 = state.iter().zip(&row).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
            product[t * c.vocab_size + token] = sum as f32;
        }
    }
    assert!(difference(&product, &values(&output.logits)) < 2e-5);

    // More than a block of queries.
    let mut tiny = DenseEngine::<M>::embedded(&options).unwrap();
    let mut other = DenseEngine::<CandleModel>::embedded(&options).unwrap();
    let tokens = one(&prompt(131, 0, 4096));
    let (ours, theirs) = (tiny.forward(&tokens, None).unwrap(), other.forward(&tokens, None).unwrap());
    for (ours, theirs) in ours.attention_weights.unwrap().iter().zip(&theirs.attention_weights.unwrap()) {
        check_probabilities(ours, [1, 4, 131, 131]);
        assert!(difference(&values(ours), &values(theirs)) < 2e-5);
    }
    assert!(embedded::<M>().forward(&one(&[1]), None).unwrap().attention_weights.is_none());
}

/// Rows sum to 1, and no query looks ahead.
fn check_probabilities(layer: &Tensor, shape: [usize; 4]) {
    assert_eq!(layer.dims(), shape);
    let [_, _, queries, total] = shape;
    for (i, row) in values(layer).chunks_exact(total).enumerate() {
        let seen = total - queries + i % queries + 1;
        assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-5);
        assert!(row[..seen].iter().all(|&p| p > 0.0) && row[seen..].iter().all(|&p| p == 0.0));
    }
}

/// A copy of a fixture on disk with every value of some f32 tensors replaced.
fn patched(fixture: &Fixture, changes: &[(&str, f32)]) -> fixtures::Folder {
    let folder = fixture.folder().unwrap();
    let mut bytes = fixture.weights().to_vec();
    let (header, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    for (name, value) in changes {
        let info = metadata.info(name).unwrap();
        assert_eq!(info.dtype, safetensors::Dtype::F32);
        let at = 8 + header;
        for element in bytes[at + info.data_offsets.0..at + info.data_offsets.1].chunks_exact_mut(4) {
            element.copy_from_slice(&value.to_le_bytes());
        }
    }
    std::fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
    folder
}

fn instability(error: &InferenceError) -> &str {
    match error {
        InferenceError::ForwardPass(ForwardPassError::NumericalInstability { details }) => details,
        other => panic!("{other}"),
    }
}

fn overflow_of_the_logits_is_an_error<M: DenseModel>() {
    let folder = patched(&fixtures::preset("gqa2-untied-f32", 1).unwrap(), &[("model.norm.weight", 3e38)]);
    let mut engine = DenseEngine::<M>::load(folder.path(), &EngineOptions::default()).unwrap();
    let mut cache = KVCache::new(4);
    let error = engine.forward(&one(&[1, 2]), Some(&mut cache)).unwrap_err();
    assert!(instability(&error).contains("logits"), "{error}");
    assert!(cache.is_empty() && cache.memory_bytes() == 0);
    assert!(engine.generate(&[1, 2], 2, &GenerationConfig::greedy()).is_err());
}

/// Weights with which f32 overflows inside a layer are in range in f64, and both backends agree on what comes out.
#[rstest::rstest]
#[case("model.layers.1.mlp.gate_proj.weight_scale")]
#[case("model.layers.0.self_attn.v_proj.weight_scale")]
#[case("model.layers.0.self_attn.o_proj.weight_scale")]
#[case("model.layers.2.mlp.down_proj.weight_scale")]
fn what_overflows_in_f32_is_in_range(#[case] scale: &str) {
    let folder = patched(&fixtures::preset("gqa2-untied-f32", 1).unwrap(), &[(scale, 3e38)]);
    let mut candle = CandleFp32::load(folder.path(), &EngineOptions::default()).unwrap();
    let mut other = DenseEngine::<NdarrayModel>::load(folder.path(), &EngineOptions::default()).unwrap();
    let worst = difference(&logits(&mut candle, &[1, 2, 3], None), &logits(&mut other, &[1, 2, 3], None));
    assert!(worst < 2e-6, "{worst:e}");
}

fn memory_is_what_is_held<M: DenseModel>() {
    let mut engine = embedded::<M>();
    let d = engine.description().clone();
    let (h, f, kv) = (d.hidden_size, d.intermediate_size, d.kv_size());
    let weights = d.vocab_size * h + h + d.num_layers * (2 * h * h + 2 * h * kv + 3 * h * f + 3 * h + f);
    let before = engine.memory_usage();
    assert_eq!(before.model_weights, weights * M::NUMBER_BYTES);
    assert_eq!((before.kv_cache, before.current_usage), (0, before.model_weights));
    let mut cache = KVCache::new(100);
    for positions in [7, 8, 50] {
        let output = engine.forward(&one(&prompt(positions - cache.len(), 0, 4096)), Some(&mut cache)).unwrap();
        let expected = d.num_layers * 2 * kv * positions * M::NUMBER_BYTES;
        assert_eq!(cache.memory_bytes(), expected);
        assert_eq!(output.metrics.cache_memory_usage, expected);
        assert_eq!(output.memory_usage.kv_cache, expected);
        assert!(output.metrics.total_time >= output.metrics.attention_time + output.metrics.feedforward_time);
        assert!(
            output.memory_usage.activations > 0 && output.memory_usage.peak_usage >= output.memory_usage.current_usage
        );
    }
    engine.generate(&[1, 2], 3, &GenerationConfig::greedy()).unwrap();
    assert!(engine.memory_usage().kv_cache > 0);
    engine.reset().unwrap();
    assert_eq!(engine.memory_usage().kv_cache, 0);
    assert!(engine.supports_quantization(QuantizationType::I2S));
}

fn options_are_checked<M: DenseModel>() {
    for threads in [0, 100_000] {
        let refused = DenseEngine::<M>::embedded(&EngineOptions::default().with_threads(threads));
        assert!(matches!(refused.err(), Some(InferenceError::Configuration(_))), "{threads}");
    }
    let nowhere = DenseEngine::<M>::load(std::path::Path::new("no such folder"), &EngineOptions::default());
    assert!(matches!(nowhere.err(), Some(InferenceError::Model(_))));
}
