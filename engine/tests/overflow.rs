//! Weights with which f32 overflows on the way: the CPU engine names the place, and nothing finite comes out, not through relu, not
//! through softmax, not through a norm or a quantiser.

use bitnet_contracts::*;
use bitnet_engine::kernels::KvFormat;
use bitnet_engine::{CpuEngine, EngineOptions};

/// A preset on disk with all elements of some f32 tensors replaced, or only those from an offset on.
fn patched(changes: &[(&str, usize, usize, f32)]) -> fixtures::Folder {
    let fixture = fixtures::preset("gqa2-untied-f32", 1).unwrap();
    let folder = fixture.folder().unwrap();
    let mut bytes = fixture.weights().to_vec();
    let (header, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    for &(name, first, count, value) in changes {
        let at = 8 + header + metadata.info(name).unwrap().data_offsets.0 + 4 * first;
        for element in bytes[at..at + 4 * count].chunks_exact_mut(4) {
            element.copy_from_slice(&value.to_le_bytes());
        }
    }
    std::fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
    folder
}

fn ids(tokens: &[u32]) -> Tensor {
    Tensor::from_slice(tokens, (1, tokens.len()), &Device::Cpu).unwrap()
}

fn details(error: InferenceError) -> String {
    match error {
        InferenceError::ForwardPass(ForwardPassError::NumericalInstability { details }) => details,
        other => panic!("{other}"),
    }
}

#[rstest::rstest]
#[case(&["model.layers.1.mlp.gate_proj"], 3e38, "the input of the FFN sub-norm of layer 1")]
#[case(&["model.layers.1.mlp.gate_proj"], 1e25, "the input of the FFN sub-norm of layer 1")]
#[case(&["model.layers.0.self_attn.v_proj"], 3e38, "the input of the attention sub-norm of layer 0")]
#[case(&["model.layers.0.self_attn.o_proj"], 3e38, "the input of the post-attention norm of layer 0")]
#[case(&["model.layers.2.mlp.down_proj"], 3e38, "the input of the final norm")]
#[case(&["model.layers.0.mlp.down_proj"], 3e38, "the input of the input norm of layer 1")]
#[case(
    &["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"],
    1e20,
    "the input of the attention sub-norm of layer 1"
)]
fn overflow_is_an_error_with_a_place(#[case] projections: &[&str], #[case] scale: f32, #[case] place: &str) {
    let names: Vec<String> = projections.iter().map(|name| format!("{name}.weight_scale")).collect();
    let changes: Vec<_> = names.iter().map(|name| (name.as_str(), 0, 1, scale)).collect();
    let folder = patched(&changes);
    let mut engine = CpuEngine::load(folder.path(), &EngineOptions::default()).unwrap();
    let error = engine.forward(&ids(&[1, 2, 3, 4]), None).unwrap_err();
    assert_eq!(details(error), format!("NaN or infinity in {place}"));
    assert!(engine.generate(&[1, 2], 2, &GenerationConfig::greedy()).is_err());
}

/// A value of 1e6 or so: f16 has no place for it, int8 takes it by its step.
#[test]
fn a_format_of_keys_and_values_that_is_too_narrow_says_so() {
    let folder = patched(&[("model.layers.1.self_attn.v_proj.weight_scale", 0, 1, 1e6)]);
    let run = |kv| {
        let mut engine = CpuEngine::load(folder.path(), &EngineOptions::default().with_kv(kv)).unwrap();
        let mut cache = KVCache::new(8);
        let outcome = engine.forward(&ids(&[1, 2, 3, 4]), Some(&mut cache)).map(|_| ());
        assert_eq!(cache.len(), if outcome.is_ok() { 4 } else { 0 });
        outcome
    };
    run(KvFormat::F32).unwrap();
    run(KvFormat::Int8).unwrap();
    let told = details(run(KvFormat::F16).unwrap_err());
    assert_eq!(told, "a key or value of layer 1 at position 0 is beyond the cache's f16");
}

/// A token that overflows in a call on a filled cache: the pass fails late, and the cache does not show it.
#[test]
fn overflow_leaves_a_filled_cache_alone() {
    let hidden = 96;
    let folder = patched(&[("model.embed_tokens.weight", 7 * hidden, hidden, 3.3e38)]);
    let mut engine = CpuEngine::load(folder.path(), &EngineOptions::default()).unwrap();
    let logits = |output: InferenceOutput| output.logits.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let mut cache = KVCache::new(8);
    engine.forward(&ids(&[1, 2, 3]), Some(&mut cache)).unwrap();
    let held = cache.memory_bytes();
    details(engine.forward(&ids(&[4, 7]), Some(&mut cache)).unwrap_err());
    assert_eq!((cache.len(), cache.memory_bytes()), (3, held));
    let rest = logits(engine.forward(&ids(&[4, 5]), Some(&mut cache)).unwrap());
    let whole = logits(engine.forward(&ids(&[1, 2, 3, 4, 5]), None).unwrap());
    assert!(whole.ends_with(&rest));
}
