//! One safetensors file and its table of tensors.

use std::borrow::Cow;
use std::path::Path;

use bitnet_contracts::{ModelError, Result};
use safetensors::SafeTensors;
use safetensors::tensor::Metadata;

use super::mapped_file::{FilePart, MappedFile, Stamp};

/// An open file. The `safetensors` crate has checked the header: its length, the offsets, that they tile the rest of the file.
pub(super) struct SafetensorsFile {
    file: MappedFile,
    data: usize,
    pub(super) metadata: Metadata,
}

impl SafetensorsFile {
    /// Maps `path`.
    ///
    /// # Errors
    /// `ModelError::FileNotFound`, `::LoadingFailed`, `::InvalidFormat`.
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
        let (header, metadata) = SafeTensors::read_metadata(file.bytes()).map_err(|e| ModelError::InvalidFormat {
            format: format!("{}: {e}", file.path().display()),
            expected: "a safetensors file".to_string(),
        })?;
        // `read_metadata` counts the header's JSON without the eight bytes of its length.
        Ok(Self { data: header + 8, file, metadata })
    }

    /// The file's path.
    pub(super) fn path(&self) -> &Path {
        self.file.path()
    }

    /// What tells the file from others; None when it is in memory.
    pub(super) fn stamp(&self) -> Option<Stamp> {
        self.file.stamp()
    }

    /// The bytes at `offsets` of the data section.
    pub(super) fn data(&self, offsets: (usize, usize)) -> Result<&[u8]> {
        self.file.bytes().get(self.data..).and_then(|data| data.get(offsets.0..offsets.1)).ok_or_else(|| {
            ModelError::InvalidFormat {
                format: format!("{}: a tensor at {offsets:?} lies outside the file", self.path().display()),
                expected: "a safetensors file".to_string(),
            }
            .into()
        })
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
