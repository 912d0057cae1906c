//! Files with one thing wrong: each a typed error that names the file, the key or tensor, and what is wrong. What can be wrong with a file
//! of any engine is in `fixtures/malformed`; these are the rest: types, keys and combinations that few have.

use bitnet_contracts::{ConfigurationError, InferenceError, ModelError, QuantizationError};
use bitnet_engine::model::gguf::GgufOptions;
use bitnet_engine::ternary::{I2sLayout, TlKernel, iq2_bn};

use super::raw::{HIDDEN, Key, Raw, RawModel, array, read, text};

/// Makes one thing wrong, and gives words that the error must have. Errors about the file as such name it.
type Case = (&'static str, fn(&mut Raw), &'static [&'static str]);

fn u32(n: u32) -> Vec<u8> {
    n.to_le_bytes().to_vec()
}

fn scale(raw: &mut Raw, bytes: [u8; 4]) {
    // The third row's.
    let at = 2 * (4 + HIDDEN / 4);
    raw.tensor("blk.0.attn_q.weight").data[at..at + 4].copy_from_slice(&bytes);
}

const CASES: &[Case] = &[
    ("more keys than bytes", |r| r.key_count = Some(60_000), &["m.gguf", "truncated", "number of keys"]),
    (
        "alignment that is a text",
        |r| r.set("general.alignment", 8, text("32")),
        &["m.gguf", "general.alignment", "string"],
    ),
    ("a type of run time", |r| r.tensors[1].ty = 335, &["m.gguf", "\"output_norm.weight\"", "IQ2_BN_R4"]),
    ("type 39 and nothing to tell what it is", |r| r.tensors[7].ty = 39, &["m.gguf", "TL2", "no general.file_type"]),
    (
        "type 39 of llama.cpp",
        |r| {
            r.tensors[7].ty = 39;
            r.set("general.file_type", 4, u32(38));
        },
        &["m.gguf", "\"blk.0.attn_k.weight\"", "MXFP4"],
    ),
    (
        "type 36 in a file of another type",
        |r| {
            r.tensors[7].ty = 36;
            r.set("general.file_type", 4, u32(7));
        },
        &["m.gguf", "\"blk.0.attn_k.weight\"", "I2_S", "file_type 7"],
    ),
    (
        "columns that do not fit the type",
        |r| r.tensors[7].ty = 34,
        &["m.gguf", "\"blk.0.attn_k.weight\"", "cannot be TQ1_0"],
    ),
    (
        "a tensor under another name",
        |r| r.tensor("blk.0.ffn_up.weight").name = b"blk.0.ffn_above.weight".to_vec(),
        &["m.gguf", "\"blk.0.ffn_up.weight\"", "missing"],
    ),
    (
        "a layer too many",
        |r| {
            let mut more = r.tensors[2].clone();
            more.name = b"blk.1.attn_norm.weight".to_vec();
            r.tensors.push(more);
        },
        &["m.gguf", "\"blk.1.attn_norm.weight\"", "1 layers"],
    ),
    (
        "a scale that nothing reads",
        |r| {
            let mut more = r.tensors[1].clone();
            (more.name, more.dimensions, more.data) =
                (b"blk.0.attn_q.weight_scale".to_vec(), vec![1], vec![0, 0, 128, 63]);
            r.tensors.push(more);
        },
        &["m.gguf", "\"blk.0.attn_q.weight_scale\""],
    ),
    (
        "a norm of trits",
        |r| {
            let data = iq2_bn::pack("", &[0; HIDDEN], 1, HIDDEN, 1.0).unwrap();
            (r.tensors[1].ty, r.tensors[1].data) = (135, data);
        },
        &["m.gguf", "\"output_norm.weight\"", "IQ2_BN"],
    ),
    ("a split file", |r| r.set("split.count", 2, vec![3, 0]), &["m.gguf", "split"]),
    (
        "a negative hidden size",
        |r| r.set("bitnet-b1.58.embedding_length", 5, (-64i32).to_le_bytes().to_vec()),
        &["m.gguf", "bitnet-b1.58.embedding_length", "-64"],
    ),
    (
        "scaled positions",
        |r| r.set("bitnet-b1.58.rope.scaling.type", 8, text("yarn")),
        &["m.gguf", "rope.scaling.type", "yarn"],
    ),
    (
        "another head dimension",
        |r| r.set("bitnet-b1.58.rope.dimension_count", 4, u32(8)),
        &["m.gguf", "rope.dimension_count is 8", "16"],
    ),
    (
        "an unknown activation",
        |r| r.set("bitnet.activation", 8, text("gelu")),
        &["m.gguf", "bitnet.activation", "gelu"],
    ),
    ("no tokens", |r| r.remove("tokenizer.ggml.tokens"), &["m.gguf", "tokenizer.ggml.tokens"]),
    (
        "tokens that are numbers",
        |r| r.set("tokenizer.ggml.tokens", 9, array(4, &[u32(1)])),
        &["m.gguf", "tokenizer.ggml.tokens", "strings"],
    ),
    (
        "a token that is no text",
        |r| r.set("tokenizer.ggml.tokens", 9, array(8, &[[1, 0, 0, 0, 0, 0, 0, 0, 0xff].to_vec()])),
        &["m.gguf", "tokenizer.ggml.tokens[0]", "UTF-8"],
    ),
    (
        "types of fewer tokens",
        |r| r.set("tokenizer.ggml.token_type", 9, array(5, &[u32(1)])),
        &["m.gguf", "token_type has 1", "8 tokens"],
    ),
    ("a merge of one", |r| r.set("tokenizer.ggml.merges", 9, array(8, &[text("ab")])), &["m.gguf", "merge \"ab\""]),
    (
        "a merge of no tokens",
        |r| r.set("tokenizer.ggml.merges", 9, array(8, &[text("b c")])),
        &["m.gguf", "merge \"b c\""],
    ),
    (
        "an unknown pre-tokenizer",
        |r| r.set("tokenizer.ggml.pre", 8, text("smaug")),
        &["m.gguf", "tokenizer.ggml.pre", "smaug"],
    ),
    ("no pre-tokenizer", |r| r.remove("tokenizer.ggml.pre"), &["m.gguf", "tokenizer.ggml.pre is missing"]),
    ("a token beyond the vocabulary", |r| r.set("tokenizer.ggml.bos_token_id", 4, u32(8)), &["bos_token_id"]),
];

#[test]
fn what_is_wrong_is_named() {
    Raw::model().read().expect("the file is fine when nothing is wrong with it");
    for (name, spoil, words) in CASES {
        let mut raw = Raw::model();
        spoil(&mut raw);
        let error = match raw.read() {
            Ok(_) => panic!("{name}: taken"),
            Err(error) => error,
        };
        assert!(
            matches!(
                error,
                InferenceError::Model(_) | InferenceError::Configuration(_) | InferenceError::Quantization(_)
            ),
            "{name}: {error}"
        );
        for word in *words {
            assert!(error.to_string().contains(word), "{name}: {word:?} is not in {error}");
        }
    }
}

#[test]
fn kinds_of_errors_are_those_documented() {
    let spoiled = |spoil: fn(&mut Raw)| {
        let mut raw = Raw::model();
        spoil(&mut raw);
        raw.read().map(|_| ()).unwrap_err()
    };
    assert!(matches!(spoiled(|r| r.version = 9), InferenceError::Model(ModelError::IncompatibleVersion { .. })));
    assert!(matches!(spoiled(|r| r.magic = [0; 4]), InferenceError::Model(ModelError::InvalidFormat { .. })));
    assert!(matches!(
        spoiled(|r| r.remove("blk.0.attn_q.weight")),
        InferenceError::Model(ModelError::ValidationFailed { .. })
    ));
    assert!(matches!(
        spoiled(|r| r.remove("bitnet-b1.58.block_count")),
        InferenceError::Configuration(ConfigurationError::MissingParameter { .. })
    ));
    assert!(matches!(
        spoiled(|r| scale(r, [0; 4])),
        InferenceError::Quantization(QuantizationError::InvalidScale { .. })
    ));
    assert!(matches!(
        spoiled(|r| r.tensors[7].data[4] = 0xff),
        InferenceError::Quantization(QuantizationError::InvalidCode { position: 0, code: 3, .. })
    ));
}

/// Every prefix of the file, and the file with its last byte gone.
#[test]
fn every_truncation_is_an_error() {
    let (bytes, header) = Raw::model().bytes();
    for len in (0..header + 64).chain((header + 64..bytes.len()).step_by(97)).chain([bytes.len() - 1]) {
        let error = read(bytes[..len].to_vec(), &GgufOptions::default()).map(|_| ()).unwrap_err();
        assert!(matches!(error, InferenceError::Model(ModelError::InvalidFormat { .. })), "{len} bytes: {error}");
    }
}

/// Version 2 has the same layout.
#[test]
fn both_versions_and_every_type_of_value_are_read() {
    let mut raw = Raw::model();
    raw.version = 2;
    let values: [(u32, Vec<u8>, &str); 13] = [
        (0, vec![200], "200"),
        (1, vec![200], "-56"),
        (2, vec![0, 128], "32768"),
        (3, vec![0, 128], "-32768"),
        (4, vec![255; 4], "4294967295"),
        (5, vec![255; 4], "-1"),
        (6, 0.1f32.to_le_bytes().to_vec(), "0.1"),
        (7, vec![1], "true"),
        (8, text("hü"), "\"hü\""),
        (9, array(9, &[array(9, &[array(4, &[u32(1)])]), array(8, &[text("x")])]), "2 x array"),
        (10, vec![255; 8], "18446744073709551615"),
        (11, vec![255; 8], "-1"),
        (12, 0.1f64.to_le_bytes().to_vec(), "0.1"),
    ];
    for (ty, value, _) in &values {
        raw.keys.push(Key { name: format!("any.{ty}").into(), ty: *ty, value: value.clone() });
    }
    let checkpoint = raw.read().unwrap();
    let file = checkpoint.as_gguf().unwrap().file();
    let metadata: std::collections::BTreeMap<_, _> = file.metadata().into_iter().collect();
    for (ty, _, shown) in values {
        assert_eq!(metadata[&format!("any.{ty}")], shown);
    }
    assert_eq!((file.version(), file.alignment()), (2, 32));
    assert_eq!(checkpoint.tokenizer().unwrap().encode("abc a").unwrap(), [6, 4, 5, 0]);
    assert_eq!(checkpoint.tokenizer().unwrap().encode("b</s>").unwrap(), [6, 1, 7]);
    assert_eq!(checkpoint.description().eos_token_ids, [7]);
}

/// Architecture `bitnet` has both kinds of models: told apart by what else the file says.
#[test]
fn the_activation_of_the_oldest_architecture() {
    use bitnet_engine::model::Activation;
    let renamed = |tokenizer: Option<&str>, kv_heads: u32| {
        let mut raw = Raw::model();
        raw.set("general.architecture", 8, text("bitnet"));
        for key in &mut raw.keys {
            key.name = String::from_utf8(key.name.clone()).unwrap().replace("bitnet-b1.58.", "bitnet.").into();
        }
        raw.set("bitnet.attention.head_count_kv", 4, u32(kv_heads));
        match tokenizer {
            Some(name) => raw.set("tokenizer.ggml.model", 8, text(name)),
            None => raw.remove("tokenizer.ggml.model"),
        }
        if kv_heads == 2 {
            for name in ["blk.0.attn_k.weight", "blk.0.attn_v.weight"] {
                let tensor = raw.tensor(name);
                tensor.dimensions[1] /= 2;
                tensor.data.truncate(tensor.data.len() / 2);
            }
        }
        raw.read().unwrap().description().activation
    };
    assert_eq!(renamed(Some("gpt2"), 4), Activation::Relu2);
    assert_eq!(renamed(Some("llama"), 2), Activation::Silu);
    assert_eq!(renamed(None, 4), Activation::Silu);
    assert_eq!(renamed(Some("none"), 2), Activation::Relu2);
    assert_eq!(Raw::model().read().unwrap().description().activation, Activation::Relu2);
}

/// The parameters of the kernels beside the file.
#[test]
fn a_kernel_config_beside_the_file_is_read() {
    use bitnet_engine::model::gguf::{ExportOptions, GgufFormat, export};
    use bitnet_engine::model::{Checkpoint, ModelSource};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let tiny = Checkpoint::open(&ModelSource::Embedded).unwrap();
    export(&tiny, &path, &ExportOptions::new(GgufFormat::Tl2), &mut |_, _| ()).unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    let key = b"bitnet.kernel_config";
    let at = bytes.windows(key.len()).position(|w| w == key).unwrap();
    let len = u64::from_le_bytes(bytes[at + 24..at + 32].try_into().unwrap()) as usize;
    let ini = bytes[at + 32..at + 32 + len].to_vec();
    bytes[at] = b'x';
    std::fs::write(&path, bytes).unwrap();
    let q = |checkpoint: &Checkpoint| {
        checkpoint.ternary("model.layers.1.mlp.up_proj", 768, 256).map(|t| t.trits().unwrap())
    };
    let open = || Checkpoint::open(&ModelSource::from_path(&path)).unwrap();
    assert!(q(&open()).unwrap_err().to_string().contains("kernel_config.ini"));
    std::fs::write(folder.path().join("kernel_config.ini"), ini).unwrap();
    assert!(q(&open()).unwrap() == q(&tiny).unwrap());
}

/// llama.cpp multiplies a product by `blk.N.part.scale` where the file has it.
#[test]
fn scale_tensors_multiply() {
    let with = |value: f32| {
        let mut raw = Raw::model();
        let mut scale = raw.tensors[1].clone();
        (scale.name, scale.dimensions, scale.data) =
            (b"blk.0.attn_q.scale".to_vec(), vec![1], value.to_le_bytes().to_vec());
        raw.tensors.push(scale);
        let checkpoint = raw.read()?;
        let q = checkpoint.ternary("model.layers.0.self_attn.q_proj", 64, 64)?;
        Ok::<_, InferenceError>(q.scale())
    };
    assert_eq!(with(3.0).unwrap(), 1.5);
    for bad in [0.0, -1.0, f32::MIN_POSITIVE / 2.0, f32::MAX] {
        // The last is a scale that is fine by itself and whose product with 0.5 is, too.
        assert_eq!(with(bad).is_ok(), bad == f32::MAX, "{bad}");
    }
}

#[test]
fn another_alignment_is_followed() {
    let mut raw = Raw::model();
    raw.alignment = 256;
    raw.set("general.alignment", 4, u32(256));
    raw.read().unwrap();
}

/// TL2 has no parameters in the file of bitnet.cpp; here the converter's own placement of the scale is read, and one that contradicts it
/// is not.
#[test]
fn kernel_parameters_must_be_known() {
    use bitnet_engine::ternary::tl1;
    let kernel = TlKernel { bm: 64, bk: 64, bmm: 32 };
    let mut raw = Raw::model();
    raw.set("general.file_type", 4, u32(38));
    let trits: Vec<i8> = (0..HIDDEN * HIDDEN).map(|i| (i % 3) as i8 - 1).collect();
    let mut tensors = Vec::new();
    for mut tensor in raw.tensors.drain(..) {
        let mut scale = None;
        if tensor.ty == 135 {
            tensor.ty = 38;
            tensor.data = tl1::pack("", &trits, HIDDEN, HIDDEN, kernel).unwrap();
            let mut more = tensor.clone();
            more.name.extend(b"_scale");
            (more.ty, more.dimensions, more.data) = (0, vec![1], 0.75f32.to_le_bytes().to_vec());
            scale = Some(more);
        }
        tensors.push(tensor);
        tensors.extend(scale);
    }
    raw.tensors = tensors;
    let (bytes, _) = raw.bytes();
    let error = read(bytes.clone(), &GgufOptions::default()).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("kernel_config.ini") && error.contains("64 x 64"), "{error}");
    let mut options = GgufOptions::default();
    options.kernels.insert((64, 64), kernel);
    let checkpoint = read(bytes, &options).unwrap();
    let q = checkpoint.ternary("model.layers.0.self_attn.q_proj", 64, 64).unwrap();
    assert_eq!((q.scale(), q.trits().unwrap()), (0.75, trits));
    // With the tensors of the scales gone the f32 is still where the kernels look.
    let mut unnamed = raw.clone();
    for tensor in &mut unnamed.tensors {
        if tensor.ty == 38 {
            tensor.data.extend(0.75f32.to_le_bytes());
        }
    }
    unnamed.tensors.retain(|t| !t.name.ends_with(b"_scale"));
    read(unnamed.bytes().0, &options).unwrap();
    let mut infinite = raw;
    infinite.tensor("blk.0.attn_q.weight_scale").data = f32::INFINITY.to_le_bytes().to_vec();
    assert!(matches!(
        read(infinite.bytes().0, &options).map(|_| ()).unwrap_err(),
        InferenceError::Quantization(QuantizationError::InvalidScale { tensor, .. }) if tensor == "blk.0.attn_q.weight_scale of m.gguf"
    ));
}

/// What the file does not say, the caller may.
#[test]
fn a_named_layout_settles_what_type_36_is() {
    use bitnet_engine::ternary::i2_s;
    let mut raw = Raw::model();
    for tensor in raw.tensors.iter_mut().filter(|t| t.ty == 135) {
        let trits: Vec<i8> = (0..HIDDEN * HIDDEN).map(|i| (i % 3) as i8 - 1).collect();
        (tensor.ty, tensor.data) = (36, i2_s::pack("", &trits, HIDDEN, HIDDEN, 0.5, I2sLayout::Arm).unwrap());
    }
    raw.set("general.file_type", 4, u32(7));
    assert!(raw.read().is_err());
    let options = GgufOptions { i2s_layout: Some(I2sLayout::Arm), ..GgufOptions::default() };
    read(raw.bytes().0, &options).unwrap();
}

#[test]
fn what_is_no_regular_file_is_refused() {
    use bitnet_engine::model::{Checkpoint, ModelSource};
    let folder = tempfile::tempdir().unwrap();
    let open = |path: &std::path::Path| Checkpoint::open(&ModelSource::from_path(path)).map(|_| ()).unwrap_err();
    let missing = folder.path().join("missing.gguf");
    assert!(
        matches!(open(&missing), InferenceError::Model(ModelError::FileNotFound { path }) if path.ends_with("missing.gguf"))
    );
    let empty = folder.path().join("empty.gguf");
    std::fs::write(&empty, []).unwrap();
    assert!(matches!(open(&empty), InferenceError::Model(_)));
    #[cfg(unix)]
    {
        let link = folder.path().join("link.gguf");
        std::os::unix::fs::symlink(&missing, &link).unwrap();
        assert!(matches!(open(&link), InferenceError::Model(ModelError::FileNotFound { .. })));
        let device = folder.path().join("device.gguf");
        std::os::unix::fs::symlink("/dev/zero", &device).unwrap();
        assert!(matches!(open(&device), InferenceError::Model(ModelError::LoadingFailed { .. })));
    }
}
