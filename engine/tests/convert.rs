//! `bitnet convert`, `quantize` and `diff` as commands.

use std::path::Path;
use std::process::{Command, Output};

fn bitnet(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_bitnet")).args(arguments).output().expect("the command starts")
}

fn succeed(arguments: &[&str]) -> String {
    let output = bitnet(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn fail(arguments: &[&str]) -> String {
    let output = bitnet(arguments);
    assert_eq!(output.status.code(), Some(1), "{arguments:?}");
    String::from_utf8(output.stderr).unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn converted_models_have_the_same_logits_and_no_difference() {
    let (source, folder) = (fixtures::tiny().folder().unwrap(), tempfile::tempdir().unwrap());
    let logits = |model: &Path| {
        let out = folder.path().join("logits.safetensors");
        succeed(&["logits", "--model", text(model), "--tokens", "4094,5,6;7,8,9", "--out", text(&out)]);
        std::fs::read(out).unwrap()
    };
    let expected = logits(source.path());
    let ggufs = ["i2_s", "tq1_0", "tq2_0", "tl1", "tl2", "iq1_bn", "iq2_bn", "f16"].map(|name| format!("gguf-{name}"));
    for target in ggufs.iter().map(String::as_str).chain(["hf-packed"]) {
        let out = folder.path().join(target).with_extension(if target == "hf-packed" { "d" } else { "gguf" });
        succeed(&["convert", text(source.path()), text(&out), "--to", target]);
        assert!(logits(&out) == expected, "{target}");
        assert!(succeed(&["diff", text(source.path()), text(&out)]).contains("0 of 46 tensors differ"), "{target}");
        let shown = succeed(&["inspect", text(&out)]);
        assert!(
            shown.contains("4096 tokens") && (target == "hf-packed" || shown.contains("general.architecture")),
            "{shown}"
        );
        let json: serde_json::Value = serde_json::from_str(&succeed(&["inspect", text(&out), "--json"])).unwrap();
        assert_eq!(json["activation"], "relu2");
    }
    let arm = folder.path().join("arm.gguf");
    succeed(&["convert", text(source.path()), text(&arm), "--to", "gguf-i2_s", "--to-i2s-layout", "arm"]);
    assert!(logits(&arm) == expected);
    assert!(fail(&["inspect", text(&arm), "--i2s-layout", "x86"]).contains("arm"));
    let q8 = folder.path().join("q8.gguf");
    succeed(&["convert", text(source.path()), text(&q8), "--to", "gguf-tq2_0", "--head", "q8_0"]);
    let report = bitnet(&["diff", "--json", text(source.path()), text(&q8)]);
    assert_eq!(report.status.code(), Some(1));
    let json: serde_json::Value = serde_json::from_slice(&report.stdout).unwrap();
    assert_eq!(json["tensors"].as_array().unwrap().len(), 1);
    assert_eq!(json["tensors"][0]["name"], "model.embed_tokens.weight");
}

#[test]
fn masters_are_quantised_and_nothing_else_is() {
    let (master, folder) =
        (fixtures::preset("master-bf16", 1).unwrap().folder().unwrap(), tempfile::tempdir().unwrap());
    let out = folder.path().join("packed");
    assert!(fail(&["convert", text(master.path()), text(&out), "--to", "hf-packed"]).contains("bitnet quantize"));
    assert!(!out.exists());
    succeed(&["quantize", text(master.path()), text(&out), "--to", "hf-packed"]);
    assert!(succeed(&["diff", text(master.path()), text(&out)]).contains("0 of"));
    let again = folder.path().join("again");
    assert!(fail(&["quantize", text(&out), text(&again), "--to", "hf-packed"]).contains("no master weights"));
    // What is there already, and shapes that do not fit, leave nothing new behind.
    assert!(fail(&["convert", text(&out), text(&out), "--to", "hf-packed"]).contains("there already"));
    let before = std::fs::read_dir(folder.path()).unwrap().count();
    fail(&["convert", text(&out), text(&folder.path().join("x.gguf")), "--to", "gguf-tq1_0"]);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), before);
}
