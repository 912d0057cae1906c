//! Any bytes as a GGUF file: a model that runs, or a typed error.

use std::path::Path;

use bitnet_contracts::{BitNetInference, Device, Tensor};
use bitnet_engine::model::Checkpoint;
use bitnet_engine::model::gguf::{GgufFile, GgufModel, GgufOptions};
use bitnet_engine::ternary::{I2sLayout, TlKernel};
use bitnet_engine::{CpuEngine, EngineOptions};

use super::{bounded, read_all};

/// One input.
pub fn run(data: &[u8]) {
    let mut options = GgufOptions::default();
    // Whether the caller says what the file does not.
    if data.len() % 2 == 1 {
        options.i2s_layout = Some(I2sLayout::Arm);
        options.kernels.insert((64, 64), TlKernel { bm: 64, bk: 64, bmm: 32 });
    }
    bounded(data, || {
        let Ok(file) = GgufFile::from_bytes(Path::new("m.gguf"), data.to_vec(), &options) else { return };
        file.metadata();
        let Ok(checkpoint) = GgufModel::new(file, &options).and_then(Checkpoint::gguf) else { return };
        if read_all(&checkpoint).is_err() {
            return;
        }
        let Ok(mut engine) = CpuEngine::from_checkpoint(&checkpoint, &EngineOptions::default().with_threads(1)) else {
            return;
        };
        if let Some(tokenizer) = engine.tokenizer() {
            let _ = tokenizer.encode("a bc, d\u{1f642} 12").and_then(|ids| tokenizer.decode(&ids));
        }
        let tokens = Tensor::from_slice(&[0u32, 0], (1, 2), &Device::Cpu).expect("a shape that fits");
        let _ = engine.forward(&tokens, None);
    });
}
