//! Any bytes as the files of a Hugging Face folder: a model that runs, or a typed error.
//!
//! ```text
//! u16 bytes of config.json, u16 bytes of model.safetensors.index.json (0: there is none), the two, the safetensors file
//! ```

use std::path::Path;
use std::sync::OnceLock;

use bitnet_contracts::{BitNetInference, Device, Tensor};
use bitnet_engine::model::{Checkpoint, ModelSource};
use bitnet_engine::{CpuEngine, EngineOptions};

use super::{bounded, read_all};

/// A folder of this process, in memory where the system has such a place.
fn folder() -> &'static Path {
    static FOLDER: OnceLock<tempfile::TempDir> = OnceLock::new();
    FOLDER
        .get_or_init(|| {
            let memory = Path::new("/dev/shm");
            let place = if memory.is_dir() { memory.to_path_buf() } else { std::env::temp_dir() };
            tempfile::tempdir_in(place).expect("a folder for the files")
        })
        .path()
}

/// One input.
pub fn run(data: &[u8]) {
    let Some((lengths, rest)) = data.split_first_chunk::<4>() else { return };
    let length = |at: usize| usize::from(u16::from_le_bytes([lengths[at], lengths[at + 1]]));
    let (config, rest) = rest.split_at(length(0).min(rest.len()));
    let (index, weights) = rest.split_at(length(2).min(rest.len()));
    let folder = folder();
    let put = |name: &str, bytes: &[u8]| std::fs::write(folder.join(name), bytes).expect("a file is written");
    put("config.json", config);
    let (single, sharded) = ("model.safetensors", "a.safetensors");
    let _ = std::fs::remove_file(folder.join(if index.is_empty() { sharded } else { single }));
    if index.is_empty() {
        put(single, weights);
    } else {
        put("model.safetensors.index.json", index);
        put(sharded, weights);
    }
    bounded(data, || {
        let Ok(checkpoint) = Checkpoint::open(&ModelSource::Folder(folder.to_path_buf())) else { return };
        checkpoint.tensors();
        if read_all(&checkpoint).is_err() {
            return;
        }
        let Ok(mut engine) = CpuEngine::from_checkpoint(&checkpoint, &EngineOptions::default().with_threads(1)) else {
            return;
        };
        let tokens = Tensor::from_slice(&[0u32, 0], (1, 2), &Device::Cpu).expect("a shape that fits");
        let _ = engine.forward(&tokens, None);
    });
}
