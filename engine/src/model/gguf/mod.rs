//! GGUF files: the format of llama.cpp and its relatives, read and written.
//!
//! [`GgufFile`] is a file and its tables, checked against [`limits`] and against its own length; [`GgufModel`] a BitNet model in one;
//! [`write::GgufWriter`] makes one. Files of three families of tools are read: llama.cpp, bitnet.cpp and ik_llama.cpp.

mod config;
mod cursor;
mod export;
mod file;
pub mod floats;
mod i2s_layout;
pub mod limits;
mod loader;
pub(super) mod names;
mod overlap;
mod tensor_type;
mod tl_scale;
mod tokenizer;
mod tokenizer_keys;
mod value;
pub mod write;

use std::path::{Path, PathBuf};

use bitnet_contracts::{InferenceError, Result};

pub use export::{ExportOptions, GgufFormat, export};
pub use file::{GgufFile, GgufTensor};
pub use i2s_layout::LAYOUT_KEY;
pub use loader::GgufModel;
pub use tensor_type::TensorType;
pub use value::{Number, ValueType};

use super::description::Activation;
use super::mapped_file::{loading_failed, open_regular};
use crate::ternary::tl_kernel::{MAX_INI_BYTES, TlKernels};
use crate::ternary::{I2sLayout, TlKernel};

/// What a GGUF file does not say about itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GgufOptions {
    /// How I2_S tensors are interleaved. None: as the file's own key says ([`LAYOUT_KEY`], which this engine writes), else what the
    /// weights suggest, else x86 with a warning.
    pub i2s_layout: Option<I2sLayout>,
    /// Kernel parameters of TL1 and TL2 tensors by shape. A shape that is not here is looked up in the file's own key, then in a
    /// `kernel_config.ini` beside the file, then among bitnet.cpp's presets.
    pub kernels: TlKernels,
    /// The activation of the feed-forward blocks. None: squared ReLU for `bitnet-b1.58` and `bitnet-25`; for `bitnet` as the file's own
    /// key says, else SiLU for a model that looks like the first ones (SentencePiece, a key/value head for every query head), squared
    /// ReLU for any other, with a warning.
    pub activation: Option<Activation>,
}

impl GgufOptions {
    /// Adds the kernel parameters of a `kernel_config.ini`.
    ///
    /// # Errors
    /// `ModelError` when the file cannot be read, `ConfigurationError` naming the line that is wrong.
    pub fn with_kernel_config(mut self, path: &Path) -> Result<Self> {
        self.kernels.extend(read_kernel_config(path)?);
        Ok(self)
    }
}

fn read_kernel_config(path: &Path) -> Result<TlKernels> {
    use std::io::Read;
    let mut text = String::new();
    open_regular(path)?.take(MAX_INI_BYTES).read_to_string(&mut text).map_err(|e| loading_failed(path, &e))?;
    TlKernel::parse_ini(&text, &path.display().to_string())
}

/// A file and what is said about it: what to open a GGUF model with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufSource {
    /// The file.
    pub path: PathBuf,
    /// What it does not say itself.
    pub options: GgufOptions,
}

/// A model whose parts contradict each other.
fn contradiction(path: &Path, what: impl std::fmt::Display) -> InferenceError {
    bitnet_contracts::ModelError::ValidationFailed { reason: format!("{}: {what}", path.display()) }.into()
}
