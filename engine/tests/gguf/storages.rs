//! One model in every storage.

use std::path::{Path, PathBuf};

use bitnet_contracts::{BitNetInference, Device, InferenceError, ModelError, QuantizationError, Tensor};
use bitnet_engine::model::gguf::{ExportOptions, GgufFormat, GgufOptions, GgufSource, TensorType, export};
use bitnet_engine::model::{Activation, Checkpoint, ModelSource, Part, write_hf_packed};
use bitnet_engine::reference::{CandleFp32, NdarrayFp32};
use bitnet_engine::ternary::I2sLayout;
use bitnet_engine::{CpuEngine, EngineOptions};
use golden::{Derivation, Semantics};

const ALL: [GgufFormat; 9] = [
    GgufFormat::I2S(I2sLayout::X86),
    GgufFormat::I2S(I2sLayout::Arm),
    GgufFormat::Tl1,
    GgufFormat::Tl2,
    GgufFormat::Tq1_0,
    GgufFormat::Tq2_0,
    GgufFormat::Iq1Bn,
    GgufFormat::Iq2Bn,
    GgufFormat::F16,
];

fn tiny() -> Checkpoint {
    Checkpoint::open(&ModelSource::Embedded).unwrap()
}

fn open(path: &Path) -> Checkpoint {
    Checkpoint::open(&ModelSource::from_path(path)).unwrap()
}

fn write(checkpoint: &Checkpoint, folder: &Path, format: GgufFormat) -> PathBuf {
    let path = folder.join(format!("{format:?}.gguf"));
    let (mut last, mut calls) = ((0, 1), 0);
    let mut progress = |done, total| {
        assert!(done >= last.0 && done <= total);
        (last, calls) = ((done, total), calls + 1);
    };
    export(checkpoint, &path, &ExportOptions::new(format), &mut progress).unwrap();
    assert!(calls > 0 && last.0 == last.1, "the last call says that all is done");
    path
}

fn logits(engine: &mut dyn BitNetInference, tokens: &[u32]) -> Vec<u32> {
    let input = Tensor::from_slice(tokens, (1, tokens.len()), &Device::Cpu).unwrap();
    let logits = engine.forward(&input, None).unwrap().logits.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    logits.into_iter().map(f32::to_bits).collect()
}

fn of(checkpoint: &Checkpoint, tokens: &[u32]) -> Vec<u32> {
    logits(&mut CpuEngine::from_checkpoint(checkpoint, &EngineOptions::default()).unwrap(), tokens)
}

#[test]
fn the_embedded_model_gives_the_same_bits_from_every_storage() {
    let folder = tempfile::tempdir().unwrap();
    let tokens: Vec<u32> = (0..24).map(|i| (i * 7919 + 5) % 4096).collect();
    let expected = of(&tiny(), &tokens);
    for format in ALL {
        let path = write(&tiny(), folder.path(), format);
        assert!(of(&open(&path), &tokens) == expected, "{format:?}");
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), ALL.len(), "nothing is left beside the files");
    // The second opinions and the free function by path, too.
    let path = folder.path().join(format!("{:?}.gguf", GgufFormat::Tl2));
    let options = EngineOptions::default();
    let mut ours = CandleFp32::load(&path, &options).unwrap();
    let mut theirs = CandleFp32::embedded(&options).unwrap();
    assert!(logits(&mut ours, &tokens[..5]) == logits(&mut theirs, &tokens[..5]));
    assert!(logits(&mut CpuEngine::load(&path, &options).unwrap(), &tokens) == expected);
}

/// Any format to any other: the same trits, the same scales, the same description, tokenizer and template.
#[test]
fn every_pair_of_formats_is_lossless() {
    let folder = tempfile::tempdir().unwrap();
    let original = tiny();
    let parts = ["self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj"];
    let shape = |part: &str| match part {
        "self_attn.q_proj" => (256, 256),
        "self_attn.k_proj" => (128, 256),
        "mlp.gate_proj" => (768, 256),
        _ => (256, 768),
    };
    for from in ALL {
        let first = write(&original, folder.path(), from);
        for to in ALL {
            let other = tempfile::tempdir().unwrap();
            let second = open(&write(&open(&first), other.path(), to));
            for part in parts {
                let (rows, columns) = shape(part);
                let name = format!("model.layers.3.{part}");
                let (a, b) =
                    (original.ternary(&name, rows, columns).unwrap(), second.ternary(&name, rows, columns).unwrap());
                assert!(
                    a.trits().unwrap() == b.trits().unwrap() && a.scale() == b.scale(),
                    "{from:?} to {to:?}: {part}"
                );
            }
            let (a, b) = (original.description(), second.description());
            assert_eq!(
                (a.config().hidden_size, a.rms_norm_eps, a.rope_theta),
                (b.config().hidden_size, b.rms_norm_eps, b.rope_theta)
            );
            assert_eq!(
                (a.activation, a.bos_token_id, &a.eos_token_ids),
                (b.activation, b.bos_token_id, &b.eos_token_ids)
            );
            assert_eq!(
                original.tokenizer().unwrap().encode("A day.").unwrap(),
                second.tokenizer().unwrap().encode("A day.").unwrap()
            );
        }
    }
}

/// Exports against the golden logits, not only against ourselves: a case whose shapes every format can hold, and an untied head.
#[test]
fn exported_oracle_cases_meet_the_golden_logits() {
    for (case, formats) in [("c09-h512-gguf", &ALL[..]), ("c02-h256-gqa2-untied", &[GgufFormat::F16][..])] {
        let fixture = fixtures::oracle_case(case).unwrap();
        let source = fixture.folder().unwrap();
        let golden = golden::load(case).unwrap();
        let checkpoint = open(source.path());
        for &format in formats {
            let folder = tempfile::tempdir().unwrap();
            let written = open(&write(&checkpoint, folder.path(), format));
            assert_eq!(written.description().tie_word_embeddings, checkpoint.description().tie_word_embeddings);
            let mut engine = NdarrayFp32::from_checkpoint(&written, &EngineOptions::default()).unwrap();
            let prompt = &golden.prompts[0];
            let tokens: Vec<u32> = prompt.input_ids.concat();
            let input = Tensor::from_vec(tokens, (prompt.batch, prompt.seq), &Device::Cpu).unwrap();
            let ours = engine.forward(&input, None).unwrap().logits.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let theirs = prompt.logits(Semantics::Fp32, Derivation::ALL[0]);
            let worst = ours.iter().zip(theirs).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
            // Scales of f32 lose digits in f16, c02's: 2e-4 relative, and most of it a norm takes away again. The others are exact.
            let tolerance = if case.starts_with("c02") { 5e-3 } else { 2e-6 };
            assert!(worst <= tolerance, "{case} {format:?}: {worst:e}");
        }
    }
}

/// There and back again: the folder that comes of a GGUF file is the folder it came from, byte for byte in its weights.
#[test]
fn a_folder_comes_back_from_every_storage() {
    let folder = tempfile::tempdir().unwrap();
    for format in ALL {
        let gguf = write(&tiny(), folder.path(), format);
        let back = folder.path().join(format!("{format:?}"));
        write_hf_packed(&open(&gguf), &back, &mut |_, _| ()).unwrap();
        let written = open(&back);
        let (before, after) = (tiny(), &written);
        for part in before.description().parts() {
            match part {
                Part::Vector { name, len } => {
                    assert_eq!(before.vector(&name, len).unwrap(), after.vector(&name, len).unwrap())
                }
                Part::Floats { name, rows, columns } => {
                    let (a, b) =
                        (before.matrix(&name, rows, columns).unwrap(), after.matrix(&name, rows, columns).unwrap());
                    assert_eq!(a.memory_bytes(), b.memory_bytes(), "{name} keeps its type");
                }
                Part::Ternary { name, rows, columns } => {
                    let (a, b) =
                        (before.ternary(&name, rows, columns).unwrap(), after.ternary(&name, rows, columns).unwrap());
                    assert!(a.trits().unwrap() == b.trits().unwrap() && a.scale() == b.scale(), "{format:?} {name}");
                }
            }
        }
        assert_eq!(
            std::fs::metadata(back.join("model.safetensors")).unwrap().len(),
            fixtures::tiny().weights().len() as u64
        );
        assert!(of(&written, &[9, 8, 7]) == of(&tiny(), &[9, 8, 7]));
        // What is there already is not touched.
        assert!(write_hf_packed(&open(&gguf), &back, &mut |_, _| ()).is_err());
    }
}

/// Master weights become the trits and scales that loading them makes.
#[test]
fn master_weights_are_written_as_their_trits() {
    let master = fixtures::preset("master-bf16", 3).unwrap().folder().unwrap();
    let (folder, tokens) = (tempfile::tempdir().unwrap(), [1, 2, 3, 4, 5]);
    let source = open(master.path());
    assert!(source.is_master().unwrap());
    let back = folder.path().join("packed");
    write_hf_packed(&source, &back, &mut |_, _| ()).unwrap();
    assert!(!open(&back).is_master().unwrap());
    assert!(of(&open(&back), &tokens) == of(&source, &tokens));
    let floats = write(&tiny(), folder.path(), GgufFormat::F16);
    assert!(!open(&floats).is_master().unwrap(), "floats that are trits are no master weights");
}

#[test]
fn heads_are_written_in_the_type_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    for (ty, tolerance) in [
        (TensorType::F32, 0.0),
        (TensorType::F16, 1e-6),
        (TensorType::Bf16, 0.0),
        (TensorType::Q8_0, 5e-3),
        (TensorType::Q6K, 4e-2),
    ] {
        let path = folder.path().join("m.gguf");
        let options = ExportOptions { head: Some(ty), ..ExportOptions::new(GgufFormat::Tq2_0) };
        export(&tiny(), &path, &options, &mut |_, _| ()).unwrap();
        let written = open(&path);
        let dtype = |name: &str| written.tensors().into_iter().find(|t| t.name == name).unwrap().dtype;
        assert_eq!((dtype("token_embd.weight").as_str(), dtype("blk.0.attn_q.weight").as_str()), (ty.name(), "TQ2_0"));
        // A head that lost nothing gives the same bits, and takes no more memory than before.
        if tolerance == 0.0 {
            assert!(of(&written, &[1, 2, 3]) == of(&tiny(), &[1, 2, 3]), "{ty:?}");
        }
        let (before, after) = (tiny(), written);
        let name = "model.embed_tokens.weight";
        let (before, after) = (before.matrix(name, 4096, 256).unwrap(), after.matrix(name, 4096, 256).unwrap());
        let (mut a, mut b) = ([0f32; 256], [0f32; 256]);
        for row in 0..4096 {
            before.row(row, &mut a);
            after.row(row, &mut b);
            let absmax = a.iter().fold(0f32, |m, x| m.max(x.abs()));
            assert!(a.iter().zip(b).all(|(x, y)| (x - y).abs() <= tolerance * absmax.max(0.1)), "{ty:?} row {row}");
        }
        let quantized = matches!(ty, TensorType::Q8_0 | TensorType::Q6K);
        assert_eq!(before.memory_bytes() == after.memory_bytes(), !quantized, "{ty:?}");
    }
    let options = ExportOptions { head: Some(TensorType::I2S), ..ExportOptions::new(GgufFormat::F16) };
    assert!(export(&tiny(), &folder.path().join("x.gguf"), &options, &mut |_, _| ()).is_err());
    assert!(!folder.path().join("x.gguf").exists());
}

/// 688 and 600 columns: no multiple of 64.
#[test]
fn shapes_that_a_format_cannot_hold_are_refused_before_a_file_is_there() {
    let fixture = fixtures::oracle_case("c02-h256-gqa2-untied").unwrap().folder().unwrap();
    let folder = tempfile::tempdir().unwrap();
    for format in ALL {
        let path = folder.path().join("m.gguf");
        match export(&open(fixture.path()), &path, &ExportOptions::new(format), &mut |_, _| ()) {
            Ok(()) => assert_eq!(format, GgufFormat::F16),
            Err(error) => {
                assert!(
                    matches!(error, InferenceError::Quantization(QuantizationError::LayoutMismatch { .. })),
                    "{format:?}: {error}"
                );
                assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "{format:?}");
            }
        }
    }
}

/// The file says its layout; without that the trained model's weights do; and a wrong one is not taken silently.
#[test]
fn i2_s_layouts_are_told_apart_in_the_trained_model() {
    let folder = tempfile::tempdir().unwrap();
    let tokens = [1, 2, 3, 4];
    let expected = of(&tiny(), &tokens);
    for layout in [I2sLayout::X86, I2sLayout::Arm] {
        let path = write(&tiny(), folder.path(), GgufFormat::I2S(layout));
        let other = if layout == I2sLayout::X86 { I2sLayout::Arm } else { I2sLayout::X86 };
        let with = |path: &Path, i2s_layout| {
            let options = GgufOptions { i2s_layout, ..GgufOptions::default() };
            Checkpoint::open(&ModelSource::Gguf(GgufSource { path: path.to_path_buf(), options }))
        };
        assert!(of(&with(&path, Some(layout)).unwrap(), &tokens) == expected);
        assert!(matches!(with(&path, Some(other)), Err(InferenceError::Model(ModelError::ValidationFailed { .. }))));
        // The same file with the key made unknown.
        let mut bytes = std::fs::read(&path).unwrap();
        let key = b"bitnet.i2_s.layout";
        let at = bytes.windows(key.len()).position(|w| w == key).unwrap();
        bytes[at] = b'x';
        let silent = folder.path().join("silent.gguf");
        std::fs::write(&silent, bytes).unwrap();
        assert!(of(&with(&silent, Some(layout)).unwrap(), &tokens) == expected);
        match with(&silent, None) {
            Ok(checkpoint) => assert!(layout == I2sLayout::X86 && of(&checkpoint, &tokens) == expected),
            Err(error) => assert!(layout == I2sLayout::Arm && error.to_string().contains("i2s-layout"), "{error}"),
        }
    }
}

/// All three backends agree on either activation.
#[test]
fn the_activation_is_the_files_or_as_said() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let options = ExportOptions { architecture: Some("bitnet".to_string()), ..ExportOptions::new(GgufFormat::Iq2Bn) };
    export(&tiny(), &path, &options, &mut |_, _| ()).unwrap();
    assert_eq!(open(&path).description().activation, Activation::Relu2, "our key says so");
    let with = |activation| {
        let options = GgufOptions { activation, ..GgufOptions::default() };
        Checkpoint::open(&ModelSource::Gguf(GgufSource { path: path.clone(), options })).unwrap()
    };
    let silu = with(Some(Activation::Silu));
    let tokens = [5, 6, 7, 8];
    let options = EngineOptions::default();
    let mut candle = CandleFp32::from_checkpoint(&silu, &options).unwrap();
    let mut ndarray = NdarrayFp32::from_checkpoint(&silu, &options).unwrap();
    let floats = |bits: Vec<u32>| bits.into_iter().map(f32::from_bits).collect::<Vec<_>>();
    let (a, b) = (floats(logits(&mut candle, &tokens)), floats(logits(&mut ndarray, &tokens)));
    assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-4));
    let other = floats(of(&with(Some(Activation::Relu2)), &tokens));
    let ours = floats(of(&silu, &tokens));
    let mean = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| (x - y).abs()).sum::<f32>() / x.len() as f32;
    // Eight bits of activations against none: near; another activation: far.
    assert!(mean(&ours, &a) * 4.0 < mean(&other, &a), "{} {}", mean(&ours, &a), mean(&other, &a));
}
