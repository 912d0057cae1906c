//! One safetensors file and its table of tensors.

use std::borrow::Cow;
use std::path::Path;

use bitnet_contracts::{InferenceError, ModelError, Result};

use super::mapped_file::{FilePart, MappedFile, Stamp};
use super::safetensors_header::{self, TensorEntry};

/// An open file with a checked header.
pub(super) struct SafetensorsFile {
    file: MappedFile,
    data: usize,
    tensors: Vec<TensorEntry>,
}

impl SafetensorsFile {
    /// Maps `path`.
    ///
    /// # Errors
    /// `ModelError::FileNotFound`, `::LoadingFailed`, `::InvalidFormat` naming the file, the tensor and what is wrong with it.
    pub(super) fn open(path: &Path) -> Result<Self> {
        Self::parse(MappedFile::open(path)?)
    }

    /// A file in memory.
    ///
    /// # Errors
    /// `ModelError::InvalidFormat`.
    pub(super) fn embedded(path: &Path, bytes: Cow<'static, [u8]>) -> Result<Self> {
        Self::parse(MappedFile::embedded(path, bytes))
    }

    fn parse(file: MappedFile) -> Result<Self> {
        let (data, tensors) = safetensors_header::read(file.bytes()).map_err(|reason| broken(file.path(), &reason))?;
        Ok(Self { data, tensors, file })
    }

    /// The file's path.
    pub(super) fn path(&self) -> &Path {
        self.file.path()
    }

    /// All tensors.
    pub(super) fn tensors(&self) -> &[TensorEntry] {
        &self.tensors
    }

    /// What tells the file from others; None when it is in memory.
    pub(super) fn stamp(&self) -> Option<Stamp> {
        self.file.stamp()
    }

    /// The bytes at `offsets` of the data section.
    pub(super) fn data(&self, offsets: (usize, usize)) -> Result<&[u8]> {
        let data = self.file.bytes().get(self.data..).and_then(|data| data.get(offsets.0..offsets.1));
        data.ok_or_else(|| broken(self.path(), &format!("a tensor at {offsets:?} lies outside the file")))
    }

    /// The bytes at `offsets` of the data section, to be read later.
    pub(super) fn part(&self, offsets: (usize, usize)) -> Option<FilePart> {
        self.file.part(self.data + offsets.0..self.data + offsets.1.max(offsets.0))
    }

    /// Lets the system drop the pages at `offsets` of the data section.
    pub(super) fn release(&self, offsets: (usize, usize)) {
        self.file.release(self.data + offsets.0..self.data + offsets.1.max(offsets.0));
    }
}

fn broken(path: &Path, what: &str) -> InferenceError {
    ModelError::InvalidFormat {
        format: format!("{}: {what}", path.display()),
        expected: "a safetensors file".to_string(),
    }
    .into()
}
