//! Every model of `fixtures/malformed`, and files that are no files: refused at once, with a typed error that names what is wrong.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bitnet_contracts::{InferenceError, ModelError, Result};
use bitnet_engine::model::{Checkpoint, ModelSource, PackedWeights, Part};
use bitnet_engine::{CpuEngine, EngineOptions};
use fixtures::{RawFolder, small_gguf};
use serde::Deserialize;

/// The longest that a refusal may take.
const LIMIT: Duration = Duration::from_secs(1);

/// A line of cases.json.
#[derive(Deserialize)]
struct Case {
    path: String,
    file: String,
    error: String,
    words: Vec<String>,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/malformed")
}

fn cases() -> Vec<Case> {
    serde_json::from_slice(&std::fs::read(root().join("cases.json")).unwrap()).unwrap()
}

/// Loads a model as the engine does.
fn load(path: &Path) -> Result<()> {
    let options = EngineOptions::default().with_threads(1).with_packed(PackedWeights::Never);
    CpuEngine::load(path, &options).map(|_| ())
}

/// Opens a model and reads every tensor of it, as the tools do.
fn read(path: &Path) -> Result<()> {
    let checkpoint = Checkpoint::open(&ModelSource::from_path(path))?;
    checkpoint.description().parts().iter().try_for_each(|part| match part {
        Part::Vector { name, len } => checkpoint.vector(name, *len).map(|_| ()),
        Part::Floats { name, rows, columns } => checkpoint.matrix(name, *rows, *columns).map(|_| ()),
        Part::Ternary { name, rows, columns } => checkpoint.ternary(name, *rows, *columns)?.trits().map(|_| ()),
    })
}

/// What is not as it should be with what `open` says about a case.
fn complaint(case: &Case, open: fn(&Path) -> Result<()>) -> Option<String> {
    let root = root();
    let mut fastest = Duration::MAX;
    // A machine that is busy, or a process that is stopped, may make one try slow.
    for _ in 0..3 {
        let start = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(|| open(&root.join(&case.path))));
        fastest = fastest.min(start.elapsed());
        let error = match result {
            Err(_) => return Some("panics".to_string()),
            Ok(Ok(())) => return Some("is taken".to_string()),
            Ok(Err(error)) => error,
        };
        // `Model::InvalidFormat` is `Model(InvalidFormat { .. })`.
        let kind = format!("{} {{", case.error.replace("::", "("));
        if !format!("{error:?}").starts_with(&kind) {
            return Some(format!("is no {}: {error:?}", case.error));
        }
        let (message, file) = (error.to_string(), root.join(&case.file).display().to_string());
        for word in case.words.iter().chain([&file]) {
            if !message.contains(word) {
                return Some(format!("{word:?} is not in {message}"));
            }
        }
        if fastest <= LIMIT {
            return None;
        }
    }
    Some(format!("takes {fastest:?}"))
}

#[test]
fn every_case_is_refused_with_its_error() {
    let cases = cases();
    assert!(cases.len() > 100);
    let mut complaints = Vec::new();
    for case in &cases {
        for (how, open) in [("loaded", load as fn(&Path) -> Result<()>), ("read", read)] {
            complaints.extend(complaint(case, open).map(|what| format!("{} ({how}) {what}", case.path)));
        }
    }
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

#[test]
fn every_case_has_files_and_all_files_have_a_case() {
    let listed: BTreeSet<String> = cases().into_iter().map(|case| case.path).collect();
    let mut there = BTreeSet::new();
    for kind in ["gguf", "folder"] {
        for entry in std::fs::read_dir(root().join(kind)).unwrap() {
            there.insert(format!("{kind}/{}", entry.unwrap().file_name().to_str().unwrap()));
        }
    }
    assert_eq!(listed, there);
    let top = std::fs::read_dir(root()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert_eq!(top.collect::<BTreeSet<_>>(), ["README.md", "cases.json", "folder", "gguf"].map(String::from).into());
}

/// A folder on disk, as it is but for a change.
fn folder(change: impl FnOnce(&mut RawFolder)) -> tempfile::TempDir {
    folder_of(RawFolder::small(), change)
}

fn folder_of(mut raw: RawFolder, change: impl FnOnce(&mut RawFolder)) -> tempfile::TempDir {
    change(&mut raw);
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in raw.files() {
        std::fs::write(folder.path().join(name), bytes).unwrap();
    }
    folder
}

fn tokenizer(tokens: &str) -> Vec<u8> {
    format!(r#"{{"version": "1.0", "model": {{"type": "BPE", "vocab": {{{tokens}}}, "merges": []}}}}"#).into_bytes()
}

/// What the cases are made from has nothing wrong; nor has what looks a little like some of them.
#[test]
fn what_is_sound_is_taken() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    std::fs::write(&path, small_gguf().bytes().0).unwrap();
    load(&path).unwrap();
    read(&path).unwrap();
    for folder in [
        folder(|_| ()),
        folder_of(RawFolder::packed(), |_| ()),
        // A tensor that the model does not know, and a vocabulary with fewer tokens than rows.
        folder(|r| {
            r.find("model.norm.weight").cloned().into_iter().for_each(|mut more| {
                more.name = "model.rotary_emb.inv_freq".to_string();
                r.tensors.push(more);
            })
        }),
        folder(|r| r.more.push(("tokenizer.json", tokenizer(r#""a": 0, "b": 3"#)))),
    ] {
        load(folder.path()).unwrap();
        read(folder.path()).unwrap();
    }
}

/// The files of a folder that are read, each with the folder that has it.
fn parts() -> Vec<(&'static str, tempfile::TempDir)> {
    let whole = || folder(|r| r.more.push(("tokenizer.json", tokenizer(r#""a": 0"#))));
    let sharded = || {
        folder(|r| {
            let map: Vec<_> = r.tensors.iter().map(|t| format!(r#""{}": "a.safetensors""#, t.name)).collect();
            let index = format!(r#"{{"weight_map": {{{}}}}}"#, map.join(","));
            let weights = r.files().into_iter().find(|(name, _)| *name == "model.safetensors").unwrap().1;
            r.more.extend([("model.safetensors.index.json", index.into_bytes()), ("a.safetensors", weights)]);
        })
    };
    let mut parts = Vec::new();
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        parts.push((name, whole()));
    }
    for name in ["model.safetensors.index.json", "a.safetensors"] {
        parts.push((name, sharded()));
    }
    for name in ["chat_template.jinja", "tokenizer_config.json"] {
        parts.push((name, folder(|r| r.more.push((name, b"{}".to_vec())))));
    }
    parts
}

#[test]
fn a_file_that_is_too_large_is_not_read() {
    for (name, folder) in parts().into_iter().filter(|(name, _)| !name.ends_with(".safetensors")) {
        load(folder.path()).unwrap();
        let path = folder.path().join(name);
        // A hole: it takes no room.
        std::fs::File::options().write(true).open(&path).unwrap().set_len(1 << 30).unwrap();
        let error = load(folder.path()).unwrap_err();
        assert!(error.to_string().contains(path.to_str().unwrap()) && error.to_string().contains("larger"), "{error}");
    }
}

#[cfg(unix)]
#[test]
fn what_is_no_file_is_refused() {
    use std::os::unix::fs::symlink;
    type Put = fn(&Path);
    let kinds: [(&str, Put, bool); 4] = [
        ("a folder", |path| std::fs::create_dir(path).unwrap(), true),
        ("an endless device", |path| symlink("/dev/zero", path).unwrap(), true),
        ("a link to nowhere", |path| symlink("nowhere", path).unwrap(), false),
        // Opening it would wait for a writer.
        ("a pipe", |path| assert!(std::process::Command::new("mkfifo").arg(path).status().unwrap().success()), true),
    ];
    for (kind, put, there) in kinds {
        for (name, folder) in parts() {
            let path = folder.path().join(name);
            std::fs::remove_file(&path).unwrap();
            put(&path);
            let error = load(folder.path()).unwrap_err();
            let named = match &error {
                InferenceError::Model(ModelError::LoadingFailed { path, .. }) if there => path,
                InferenceError::Model(ModelError::FileNotFound { path }) if !there => path,
                _ => panic!("{name} is {kind}: {error}"),
            };
            assert_eq!(Path::new(named), path);
        }
    }
}

/// As the cache of Hugging Face has it.
#[cfg(unix)]
#[test]
fn links_to_files_are_followed() {
    for (name, folder) in parts() {
        let path = folder.path().join(name);
        std::fs::rename(&path, folder.path().join("blob")).unwrap();
        std::os::unix::fs::symlink("blob", &path).unwrap();
        load(folder.path()).unwrap();
    }
}
