//! The tokenizer of a GGUF file against the tokenizer.json it was written from.

use bitnet_engine::model::gguf::{ExportOptions, GgufFormat, export};
use bitnet_engine::model::{Checkpoint, ModelSource};
use proptest::prelude::*;

fn both() -> (tempfile::TempDir, Checkpoint, Checkpoint) {
    let folder = tempfile::tempdir().unwrap();
    let json = Checkpoint::open(&ModelSource::Embedded).unwrap();
    let path = folder.path().join("m.gguf");
    export(&json, &path, &ExportOptions::new(GgufFormat::Tq2_0), &mut |_, _| ()).unwrap();
    let gguf = Checkpoint::open(&ModelSource::from_path(&path)).unwrap();
    (folder, json, gguf)
}

/// What has gone wrong in tokenizers before.
const AWKWARD: &[&str] = &[
    "",
    " ",
    "  ",
    "\n",
    "\r\n\r\n",
    "\t\t x",
    "a",
    "Hello, world!",
    " Hello",
    "Hello ",
    "it's I'LL we'Ve 'tis don’t",
    "1 12 123 1234 12345 1.5e-10",
    "٣٤٥ ½ ²",
    "CamelCase snake_case kebab-case",
    "https://example.org/a?b=c&d=%20#e",
    "日本語のテキスト。",
    "Привет, мир!",
    "שלום עולם",
    "مرحبا بالعالم",
    "e\u{301} é \u{1e9b}\u{323}",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽",
    "\u{200b}\u{feff}\u{a0}\u{2028}",
    "\u{0}\u{1}\u{7f}",
    "\u{10ffff}\u{fffd}",
    "<|begin_of_text|>",
    "x<|end_of_text|>y",
    "<|begin_of_text|><|begin_of_text|> z",
    "<|begin_of",
    "fn main() {\n    println!(\"{}\", 1);\n}\n",
    "!!!???...---===",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "    indented\n\tmixed  \n trailing   ",
    "ĠĠ Ċ â",
    "ſ K Å",
];

#[test]
fn ids_are_those_of_the_json_file_on_awkward_text() {
    let (_folder, json, gguf) = both();
    let (json, gguf) = (json.tokenizer().unwrap(), gguf.tokenizer().unwrap());
    assert_eq!(json.vocab_size(), gguf.vocab_size());
    let long = AWKWARD.concat();
    for text in AWKWARD.iter().copied().chain([long.as_str()]) {
        let ids = json.encode(text).unwrap();
        assert_eq!(gguf.encode(text).unwrap(), ids, "{text:?}");
        assert_eq!(gguf.decode(&ids).unwrap(), json.decode(&ids).unwrap(), "{text:?}");
    }
    for id in 0..json.vocab_size() as u32 {
        assert_eq!(gguf.decode(&[id]).unwrap(), json.decode(&[id]).unwrap(), "{id}");
    }
}

#[test]
fn ids_are_those_of_the_json_file_on_any_text() {
    let (_folder, json, gguf) = both();
    let (json, gguf) = (json.tokenizer().unwrap(), gguf.tokenizer().unwrap());
    proptest!(|(text in any::<String>())| {
        prop_assert_eq!(gguf.encode(&text).unwrap(), json.encode(&text).unwrap());
    });
}
