//! The bytes that other programs' converters and quantisers make of the embedded model, and those that ours makes.
//!
//! `written_by_others.json` has a CRC-32 of every ternary tensor, padded to the alignment of the file; TL1 and TL2 by the converter of
//! bitnet.cpp, I2_S by its llama-quantize (c82b5e6); TQ1_0 and TQ2_0 by llama.cpp's quantiser (PyPI's llama-cpp-python 0.3.36); IQ1_BN and
//! IQ2_BN by ik_llama.cpp's llama-quantize (8337e4c). `ci/interop/digests.py` says how.

use std::collections::BTreeMap;

use bitnet_engine::model::gguf::{ExportOptions, GgufFile, GgufFormat, export};
use bitnet_engine::model::{Checkpoint, GgufOptions, ModelSource};
use bitnet_engine::ternary::I2sLayout;

type Digests = BTreeMap<String, BTreeMap<String, u32>>;

#[test]
fn ternary_tensors_are_the_bytes_that_others_write() {
    let theirs: Digests = serde_json::from_str(include_str!("data/gguf/written_by_others.json")).unwrap();
    let source = fixtures::tiny().folder().unwrap();
    let checkpoint = Checkpoint::open(&ModelSource::from_path(source.path())).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let formats = [
        ("I2_S", GgufFormat::I2S(I2sLayout::X86)),
        ("TL1", GgufFormat::Tl1),
        ("TL2", GgufFormat::Tl2),
        ("TQ1_0", GgufFormat::Tq1_0),
        ("TQ2_0", GgufFormat::Tq2_0),
        ("IQ1_BN", GgufFormat::Iq1Bn),
        ("IQ2_BN", GgufFormat::Iq2Bn),
    ];
    assert_eq!(theirs.len(), formats.len());
    for (name, format) in formats {
        let path = folder.path().join(name);
        export(&checkpoint, &path, &ExportOptions::new(format), &mut |_, _| {}).unwrap();
        let file = GgufFile::open(&path, &GgufOptions::default()).unwrap();
        assert_eq!(theirs[name].len(), 28, "{name}");
        for (tensor, crc) in &theirs[name] {
            let mut bytes = file.data(&file.tensors()[tensor]).unwrap().to_vec();
            let (rows, columns) = file.tensors()[tensor].matrix();
            // Behind the codes and the scale of I2_S its quantiser leaves what happens to be there.
            let end =
                if name == "I2_S" { rows * columns / 4 + 4 } else { bytes.len().next_multiple_of(file.alignment()) };
            bytes.resize(end, 0);
            assert_eq!(crc32fast::hash(&bytes), *crc, "{name}: {tensor}");
        }
    }
}
