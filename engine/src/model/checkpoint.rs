//! A model on disk, whatever its format: one front for Hugging Face folders and GGUF files.

use std::ops::Range;
use std::path::{Path, PathBuf};

use bitnet_contracts::Result;

use super::description::ModelDescription;
use super::gguf::{GgufModel, GgufSource, TensorType};
use super::hf_folder::HfCheckpoint;
use super::mapped_file::FilePart;
use super::packed_file::PackedKey;
use super::safetensors_file::SafetensorsFile;
use super::tokenizer::Tokenizer;
use super::weights::{FloatMatrix, TernaryTensor};
use crate::ternary::interleaved::Packing;

/// Where a model comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelSource {
    /// The trained tiny model that is compiled in.
    Embedded,
    /// A folder in the layout of Hugging Face.
    Folder(PathBuf),
    /// A GGUF file.
    Gguf(GgufSource),
}

impl ModelSource {
    /// The source that `path` is by its kind: a GGUF file when it is a file or ends in `.gguf`, else a folder.
    pub fn from_path(path: &Path) -> Self {
        if path.is_file() || (path.extension().is_some_and(|e| e == "gguf") && !path.is_dir()) {
            Self::Gguf(GgufSource { path: path.to_path_buf(), options: Default::default() })
        } else {
            Self::Folder(path.to_path_buf())
        }
    }
}

/// An open checkpoint: description, tokenizer, and tensors by name.
///
/// Tensors are asked for by their Hugging Face names, in whatever format they are.
pub struct Checkpoint {
    format: Format,
    tokenizer: Option<Tokenizer>,
}

enum Format {
    HuggingFace(HfCheckpoint),
    Gguf(GgufModel),
}

/// A line of `bitnet inspect`.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorSummary {
    /// Name in the file.
    pub name: String,
    /// Element type as the file format spells it.
    pub dtype: String,
    /// Dimensions as the file has them, the outermost first.
    pub shape: Vec<usize>,
    /// Bytes in the file.
    pub bytes: usize,
    /// Numbers that the tensor stands for: of packed trits more than the product of the dimensions.
    pub elements: usize,
}

/// Calls a method of either format.
macro_rules! either {
    ($self:expr, $name:ident ( $($argument:expr),* )) => {
        match &$self.format {
            Format::HuggingFace(checkpoint) => checkpoint.$name($($argument),*),
            Format::Gguf(model) => model.$name($($argument),*),
        }
    };
}

impl Checkpoint {
    /// Opens a checkpoint.
    ///
    /// The weight files are memory-mapped while they are read. A file that another process shortens in that time ends this one
    /// with SIGBUS, as with every mapped file; one that changes is read as it is at that moment and checked as usual. What stays in
    /// its file after loading is read with ordinary calls: a file that is shorter by then is an error.
    ///
    /// # Errors
    /// `ModelError` naming the file, `ConfigurationError` naming the key.
    pub fn open(source: &ModelSource) -> Result<Self> {
        match source {
            ModelSource::Folder(folder) => {
                Self::hugging_face(HfCheckpoint::open(folder)?, &folder.join("tokenizer.json"))
            }
            ModelSource::Embedded => Self::hugging_face(HfCheckpoint::embedded()?, Path::new("tiny/tokenizer.json")),
            ModelSource::Gguf(source) => Self::gguf(GgufModel::open(&source.path, &source.options)?),
        }
    }

    fn hugging_face(checkpoint: HfCheckpoint, path: &Path) -> Result<Self> {
        let tokenizer = checkpoint.tokenizer_json().map(|json| Tokenizer::from_json(json, path)).transpose()?;
        if let Some(tokenizer) = &tokenizer {
            tokenizer.expect_below(checkpoint.description().vocab_size, path)?;
        }
        Ok(Self { format: Format::HuggingFace(checkpoint), tokenizer })
    }

    /// A checkpoint of an open GGUF model.
    ///
    /// # Errors
    /// `ModelError::LoadingFailed` when its tokenizer cannot be made.
    pub fn gguf(model: GgufModel) -> Result<Self> {
        let path = model.file().path();
        let tokenizer = model.tokenizer_json().map(|json| Tokenizer::from_json(json, path)).transpose()?;
        Ok(Self { format: Format::Gguf(model), tokenizer })
    }

    /// The model's description.
    pub fn description(&self) -> &ModelDescription {
        either!(self, description())
    }

    /// The tokenizer, if the checkpoint has one.
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.tokenizer.as_ref()
    }

    /// The tokenizer as a tokenizer.json, if the checkpoint has one.
    pub fn tokenizer_json(&self) -> Option<&[u8]> {
        either!(self, tokenizer_json())
    }

    /// The template (Jinja) that turns a conversation into a prompt, if the checkpoint has one.
    pub fn chat_template(&self) -> Option<&str> {
        either!(self, chat_template())
    }

    /// The GGUF model, if it is one.
    pub fn as_gguf(&self) -> Option<&GgufModel> {
        match &self.format {
            Format::Gguf(model) => Some(model),
            Format::HuggingFace(_) => None,
        }
    }

    /// All tensors, by the names of the file.
    pub fn tensors(&self) -> Vec<TensorSummary> {
        either!(self, summaries())
    }

    /// Bytes of all tensors in the files.
    pub fn tensor_bytes(&self) -> usize {
        self.tensors().iter().map(|tensor| tensor.bytes).fold(0, usize::saturating_add)
    }

    /// Whether the layers are stored as packed trits (else they are floats).
    pub fn is_packed(&self) -> bool {
        either!(self, is_packed())
    }

    /// A vector of floats, all finite.
    ///
    /// # Errors
    /// `ModelError::ValidationFailed` naming the tensor: missing, of another type or shape, not finite.
    pub fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        // The shape is checked against the file before anything of that length is made.
        let matrix = either!(self, floats(name, &[len]))?;
        let mut out = vec![0f32; len];
        matrix.row(0, &mut out);
        Ok(out)
    }

    /// A `[rows, columns]` float matrix, all finite, copied out of the file.
    ///
    /// # Errors
    /// As [`Self::vector`], and `MemoryError::AllocationFailed`.
    pub fn matrix(&self, name: &str, rows: usize, columns: usize) -> Result<FloatMatrix> {
        let matrix = either!(self, floats(name, &[rows, columns]))?;
        self.release(name);
        Ok(matrix)
    }

    /// The ternary matrix `name`.weight, `[rows, columns]`, packed or from floats.
    ///
    /// # Errors
    /// As [`Self::vector`], and `QuantizationError::InvalidScale`, `::LayoutMismatch`.
    pub fn ternary(&self, name: &str, rows: usize, columns: usize) -> Result<TernaryTensor<'_>> {
        either!(self, ternary(name, rows, columns))
    }

    /// Where weights of this checkpoint that are packed as `packing` may be kept, and what they are made of. None when the weights are
    /// compiled in, and where the system does not tell whether a file has changed.
    pub(crate) fn packed_place(&self, packing: Packing) -> Option<(PathBuf, PackedKey)> {
        let (path, stamps, reading) = match &self.format {
            Format::HuggingFace(checkpoint) => {
                let files = checkpoint.files();
                let stamps = files.iter().map(SafetensorsFile::stamp).collect::<Option<Vec<_>>>()?;
                (files.first()?.path(), stamps, String::new())
            }
            Format::Gguf(model) => (model.file().path(), vec![model.file().stamp()?], model.reading()),
        };
        let mut name = path.file_name()?.to_os_string();
        name.push(format!(".{}.packed", packing.name()));
        let reading = format!("{reading} {:?}", self.description());
        Some((path.with_file_name(name), PackedKey::new(stamps, reading, packing.name())))
    }

    /// The type of a float tensor in the file.
    pub(super) fn stored_type(&self, name: &str) -> Result<TensorType> {
        either!(self, stored_type(name))
    }

    /// The bytes of a tensor as the file has them.
    pub(super) fn stored_bytes(&self, name: &str, shape: &[usize]) -> Result<&[u8]> {
        either!(self, stored_bytes(name, shape))
    }

    /// The bytes of a tensor, to be read later; None when they are in memory.
    pub(super) fn stored_part(&self, name: &str) -> Result<Option<FilePart>> {
        either!(self, stored_part(name))
    }

    /// Lets the system drop the pages of a tensor that has been read.
    pub fn release(&self, name: &str) {
        self.release_part(name, 0..usize::MAX);
    }

    /// Lets the system drop the pages of some bytes of a tensor.
    pub(super) fn release_part(&self, name: &str, bytes: Range<usize>) {
        either!(self, release_part(name, bytes))
    }
}
