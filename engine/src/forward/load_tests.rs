//! Packed weights in a file: the same bits as packed anew, and never those of another model or of a damaged file.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rstest::rstest;

use crate::kernels::{Isa, Kernels, Threads};
use crate::model::{Checkpoint, Found, ModelSource, PackedFile, PackedWeights};
use crate::ternary::Quantization;
use crate::{CpuEngine, EngineOptions};

/// A small model, old enough to have a stamp.
fn model(preset: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fixtures::synthesize(fixtures::find_preset(preset).unwrap(), 3, folder.path(), &mut |_| ()).unwrap();
    settle();
    folder
}

/// Waits until files that were just written are older than a tick of any clock.
fn settle() {
    std::thread::sleep(Duration::from_millis(30));
}

/// Bits of the logits behind a prompt, and the tokens that the screened head chooses.
fn run(path: &Path, packed: PackedWeights) -> (Vec<u32>, Vec<u32>) {
    run_as(path, packed, Quantization::Auto)
}

fn run_as(path: &Path, packed: PackedWeights, quantization: Quantization) -> (Vec<u32>, Vec<u32>) {
    let options = EngineOptions::default().with_threads(2).with_packed(packed).with_quantization(quantization);
    let mut engine = CpuEngine::load(path, &options).unwrap();
    let logits = engine.feed(&[3, 1, 4, 1, 5]).unwrap().iter().map(|l| l.to_bits()).collect();
    let mut tokens = vec![7];
    for _ in 0..4 {
        tokens.push(engine.feed_greedy(&tokens[tokens.len() - 1..]).unwrap());
    }
    (logits, tokens)
}

/// Files of packed weights in a folder; nothing half written may lie there.
fn kept(folder: &Path) -> Vec<PathBuf> {
    let paths: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    let ends = |path: &Path, end: &str| path.to_string_lossy().ends_with(end);
    assert!(!paths.iter().any(|path| ends(path, ".partial")), "{paths:?}");
    paths.into_iter().filter(|path| ends(path, ".packed")).collect()
}

/// A packed file that holds what the one at `path` holds, but for the scale of the first matrix, which is doubled.
fn forge(folder: &Path, path: &Path) {
    forge_as(folder, path, Quantization::Auto)
}

fn forge_as(folder: &Path, path: &Path, quantization: Quantization) {
    let checkpoint = Checkpoint::open(&ModelSource::from_path(folder)).unwrap();
    let threads = Threads::new(Some(1)).unwrap();
    let (_, key) = checkpoint
        .packed_place(quantization.packing(Kernels::of(Isa::from_environment().unwrap()).unwrap().packing()))
        .unwrap();
    let Found::Fresh(file) = PackedFile::find(path, &key) else { panic!("no file") };
    let mut sections: Vec<Vec<u8>> = file.lengths().iter().map(|&len| vec![0; len as usize]).collect();
    for (i, section) in sections.iter_mut().enumerate() {
        file.read(i, section, &threads).unwrap();
    }
    let scale = f32::from_le_bytes(sections[0][..4].try_into().unwrap());
    sections[0][..4].copy_from_slice(&(2.0 * scale).to_le_bytes());
    let sections: Vec<&[u8]> = sections.iter().map(Vec::as_slice).collect();
    PackedFile::write(path, key, &sections, &threads).unwrap();
}

#[rstest]
#[case("gqa1-tied-bf16")]
#[case("sharded-untied-f32")]
#[case("master-bf16")]
fn what_is_kept_gives_the_same_bits_and_is_really_read(#[case] preset: &str) {
    let folder = model(preset);
    let path = folder.path();
    let anew = run(path, PackedWeights::Never);
    assert_eq!(run(path, PackedWeights::Use), anew);
    assert!(kept(path).is_empty(), "a file that nobody asked for");
    assert_eq!(run(path, PackedWeights::Keep), anew);
    let files = kept(path);
    assert_eq!(files.len(), 1);
    let bytes = std::fs::read(&files[0]).unwrap();
    for packed in [PackedWeights::Use, PackedWeights::Keep] {
        assert_eq!(run(path, packed), anew);
    }
    assert_eq!(std::fs::read(&files[0]).unwrap(), bytes);
    forge(path, &files[0]);
    assert_ne!(run(path, PackedWeights::Use).0, anew.0, "the file was not read");
    assert_eq!(run(path, PackedWeights::Never), anew);
}

/// One folder, a file for each packing; none is taken for another's.
#[test]
fn every_quantization_has_a_file_of_its_own() {
    let folder = model("gqa1-tied-bf16");
    let path = folder.path();
    let anew = run(path, PackedWeights::Never);
    for (n, quantization) in [Quantization::I2s, Quantization::Tl1, Quantization::Tl2].into_iter().enumerate() {
        let before = kept(path);
        assert_eq!(run_as(path, PackedWeights::Keep, quantization), anew, "{quantization}");
        let files = kept(path);
        assert_eq!(files.len(), n + 1, "{files:?}");
        assert_eq!(run_as(path, PackedWeights::Use, quantization), anew, "{quantization}");
        let file = files.iter().find(|file| !before.contains(file)).unwrap();
        forge_as(path, file, quantization);
        assert_ne!(run_as(path, PackedWeights::Use, quantization).0, anew.0, "{quantization}: the file was not read");
    }
}

#[test]
fn a_gguf_file_has_its_packed_weights_beside_it() {
    let folder = model("gqa1-tied-bf16");
    let path = folder.path().join("model.gguf");
    let checkpoint = Checkpoint::open(&ModelSource::from_path(folder.path())).unwrap();
    let options = crate::model::gguf::ExportOptions::new(crate::model::gguf::GgufFormat::F16);
    crate::model::gguf::export(&checkpoint, &path, &options, &mut |_, _| ()).unwrap();
    settle();
    let anew = run(&path, PackedWeights::Never);
    assert_eq!(run(&path, PackedWeights::Keep), anew);
    assert!(kept(folder.path())[0].file_name().unwrap().to_string_lossy().starts_with("model.gguf."));
    assert_eq!(run(&path, PackedWeights::Use), anew);
}

/// Other weights of the same length, at the same path: in place, and in a new file with the old one's times.
#[rstest]
fn other_weights_make_it_stale(#[values(false, true)] replaced: bool) {
    let (folder, other) = (model("gqa1-tied-bf16"), tempfile::tempdir().unwrap());
    let preset = fixtures::find_preset("gqa1-tied-bf16").unwrap();
    fixtures::synthesize(preset, 4, other.path(), &mut |_| ()).unwrap();
    let expected = run(other.path(), PackedWeights::Never);
    let path = folder.path();
    assert_ne!(run(path, PackedWeights::Keep), expected);
    let weights = path.join("model.safetensors");
    let bytes = std::fs::read(other.path().join("model.safetensors")).unwrap();
    if replaced {
        let modified = std::fs::metadata(&weights).unwrap().modified().unwrap();
        let aside = path.join("aside");
        std::fs::write(&aside, &bytes).unwrap();
        std::fs::File::options().write(true).open(&aside).unwrap().set_modified(modified).unwrap();
        std::fs::rename(&aside, &weights).unwrap();
    } else {
        std::fs::File::options().write(true).open(&weights).unwrap().write_all_at(&bytes, 0).unwrap();
    }
    assert_eq!(run(path, PackedWeights::Use), expected, "at once");
    settle();
    for _ in 0..2 {
        assert_eq!(run(path, PackedWeights::Use), expected, "written anew");
    }
    forge(path, &kept(path)[0]);
}

#[test]
fn another_description_makes_it_stale() {
    let folder = model("gqa1-tied-bf16");
    let path = folder.path();
    run(path, PackedWeights::Keep);
    let config = path.join("config.json");
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
    json["rms_norm_eps"] = 0.01.into();
    std::fs::write(&config, serde_json::to_vec(&json).unwrap()).unwrap();
    assert_eq!(run(path, PackedWeights::Use), run(path, PackedWeights::Never));
}

/// Every eighth of the file's bytes flipped one at a time, every length cut: the weights are packed anew, and so is the file.
#[test]
fn a_damaged_file_is_written_anew() {
    let folder = model("gqa1-tied-bf16");
    let path = folder.path();
    let anew = run(path, PackedWeights::Keep);
    let file = kept(path).remove(0);
    let good = std::fs::read(&file).unwrap();
    let step = good.len() / 24;
    let flipped = (0..64).chain((64..good.len()).step_by(step)).map(|at| {
        let mut bytes = good.clone();
        bytes[at] ^= 0x10;
        bytes
    });
    let cut = [0, 7, 19, 20, 21, good.len() / 2, good.len() - 1].map(|len| good[..len].to_vec());
    let mut endless = good.clone();
    endless[8..16].fill(0xff);
    for bytes in flipped.chain(cut).chain([endless, [&good[..], b"x"].concat()]) {
        std::fs::write(&file, &bytes).unwrap();
        assert!(run(path, PackedWeights::Use) == anew);
        assert!(std::fs::read(&file).unwrap() == good, "not written anew");
    }
}

#[test]
fn a_place_that_cannot_be_written_is_no_reason_not_to_run() {
    let folder = model("gqa1-tied-bf16");
    let path = folder.path();
    let anew = run(path, PackedWeights::Keep);
    let file = kept(path).remove(0);
    std::fs::remove_file(&file).unwrap();
    std::fs::create_dir(&file).unwrap();
    std::fs::write(file.join("x"), b"x").unwrap();
    assert_eq!(run(path, PackedWeights::Keep), anew);
    assert!(kept(path)[0].is_dir());
}

#[test]
fn processes_that_keep_at_once_do_not_disturb_each_other() {
    let folder = model("gqa1-tied-bf16");
    let path = folder.path();
    let anew = run(path, PackedWeights::Never);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..4).for_each(|_| assert_eq!(run(path, PackedWeights::Keep), anew)));
        }
    });
    assert_eq!(kept(path).len(), 1);
    forge(path, &kept(path)[0]);
}
