//! The `golden` command as a shell user sees it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use safetensors::tensor::{Dtype, TensorView, serialize_to_file};

fn golden(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_golden")).args(arguments).output().expect("the command starts")
}

fn code(output: &Output) -> Option<i32> {
    output.status.code()
}

/// A file as `bitnet logits` writes it: one tensor `logits` [1, 2, 4].
fn logits_file(dir: &Path, name: &str, values: [f32; 8]) -> PathBuf {
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let view = TensorView::new(Dtype::F32, vec![1, 2, 4], &bytes).expect("tensor");
    let path = dir.join(name);
    serialize_to_file([("logits", view)], None, &path).expect("file");
    path
}

#[test]
fn list_and_verify_report_and_succeed() {
    let list = golden(&["list"]);
    let text = String::from_utf8_lossy(&list.stdout);
    assert_eq!(code(&list), Some(0));
    assert!(golden::cases().iter().all(|case| text.contains(case)), "{text}");
    let verify = golden(&["verify", "--case", "context-32"]);
    assert_eq!(code(&verify), Some(0), "{}", String::from_utf8_lossy(&verify.stderr));
    assert!(String::from_utf8_lossy(&verify.stdout).contains("without a rounding flip"));
    let unknown = golden(&["verify", "--case", "no-such"]);
    assert_eq!(code(&unknown), Some(2));
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("master-bf16"), "the known names are listed");
}

#[test]
fn diff_puts_the_worst_position_first_and_gates() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let a = logits_file(dir.path(), "a", [1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 4.0]);
    let b = logits_file(dir.path(), "b", [1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 4.5, 4.0]);
    let nan = logits_file(dir.path(), "c", [f32::NAN, 2.0, 3.0, 4.0, 1.0, 2.0, 4.5, 4.0]);
    let paths = |x: &Path, y: &Path| (x.display().to_string(), y.display().to_string());
    let (pa, pb) = paths(&a, &b);
    let positions = golden::diff(&a, &b, None, None).expect("diff");
    let seen: Vec<(usize, f64, bool)> = positions.iter().map(|p| (p.position, p.max_abs, p.top1_agrees)).collect();
    assert_eq!(seen, [(1, 1.5, false), (0, 0.0, true)]);
    assert_eq!(code(&golden(&["diff", &pa, &pb])), Some(0));
    assert_eq!(code(&golden(&["diff", &pa, &pb, "--max-abs", "1.4"])), Some(1));
    assert_eq!(code(&golden(&["diff", &pa, &pb, "--max-abs", "1.6"])), Some(0));
    let positions = golden::diff(&nan, &a, None, None).expect("diff");
    assert!(positions[0].position == 0 && positions[0].max_abs.is_nan(), "a NaN is worst of all");
    assert_eq!(code(&golden(&["diff", &nan.display().to_string(), &pa, "--max-abs", "9"])), Some(1));
    assert_eq!(code(&golden(&["diff", &pa, "no-such-file"])), Some(2));
}

#[test]
fn diff_finds_the_golden_tensor_of_a_logits_file() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/context-32");
    let (oracle, transformers) = (data.join("oracle.safetensors"), data.join("transformers.safetensors"));
    let both = golden::diff(&oracle, &transformers, None, None).expect("every tensor of both");
    assert_eq!(both.len(), 2 * 67);
    let p = golden::load("context-32").expect("case");
    let prompt = p.prompt("b1_t7").expect("prompt");
    let logits = prompt.logits(golden::Semantics::Fp32, golden::Derivation::Oracle);
    let bytes: Vec<u8> = logits.iter().flat_map(|v| v.to_le_bytes()).collect();
    let view = TensorView::new(Dtype::F32, vec![1, 7, prompt.vocab], &bytes).expect("tensor");
    let file = dir.path().join("logits.safetensors");
    serialize_to_file([("logits", view)], None, &file).expect("file");
    // Two tensors of the golden file have this shape: one has to be named.
    assert!(golden::diff(&file, &transformers, None, None).is_err());
    let named = golden::diff(&file, &transformers, None, Some("b1_t7.fp32.logits")).expect("named");
    assert_eq!((named.len(), named[0].max_abs <= 1e-6), (7, true));
    assert!(golden::diff(&file, &transformers, None, Some("b2_t13.fp32.logits")).is_err(), "another shape");
}
