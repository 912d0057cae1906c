//! One safetensors file: mapped or embedded bytes and their table of tensors.

use std::borrow::Cow;
use std::fs::File;
use std::path::{Path, PathBuf};

use bitnet_contracts::{ModelError, Result};
use memmap2::Mmap;
use safetensors::SafeTensors;
use safetensors::tensor::Metadata;

/// Bytes of a file: mapped, or compiled in.
enum Bytes {
    Mapped(Mmap),
    Owned(Cow<'static, [u8]>),
}

/// An open file. The `safetensors` crate has checked the header: its length, the offsets, that they tile the rest of the file.
pub(super) struct SafetensorsFile {
    path: PathBuf,
    bytes: Bytes,
    data: usize,
    pub(super) metadata: Metadata,
}

impl SafetensorsFile {
    /// Maps `path`.
    ///
    /// # Errors
    /// `ModelError::FileNotFound`, `::LoadingFailed`, `::InvalidFormat`.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let file = open_regular(path)?;
        // SAFETY: the map is read-only and private to this value. A file that another process shortens while it is mapped makes
        // the system raise SIGBUS on access; the documentation of `Checkpoint::open` says so. Values are copied out at load and
        // checked as they are copied, so a file that merely changes cannot break an invariant.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| loading_failed(path, &e))?;
        Self::parse(path, Bytes::Mapped(map))
    }

    /// A file in memory.
    ///
    /// # Errors
    /// `ModelError::InvalidFormat`.
    pub(super) fn embedded(path: &Path, bytes: Cow<'static, [u8]>) -> Result<Self> {
        Self::parse(path, Bytes::Owned(bytes))
    }

    fn parse(path: &Path, bytes: Bytes) -> Result<Self> {
        let all: &[u8] = match &bytes {
            Bytes::Mapped(map) => map,
            Bytes::Owned(bytes) => bytes,
        };
        let (header, metadata) = SafeTensors::read_metadata(all).map_err(|e| ModelError::InvalidFormat {
            format: format!("{}: {e}", path.display()),
            expected: "a safetensors file".to_string(),
        })?;
        // `read_metadata` counts the header's JSON without the eight bytes of its length.
        Ok(Self { path: path.to_path_buf(), data: header + 8, bytes, metadata })
    }

    /// The file's path.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The bytes at `offsets` of the data section.
    pub(super) fn data(&self, offsets: (usize, usize)) -> Result<&[u8]> {
        let all: &[u8] = match &self.bytes {
            Bytes::Mapped(map) => map,
            Bytes::Owned(bytes) => bytes,
        };
        all.get(self.data..).and_then(|data| data.get(offsets.0..offsets.1)).ok_or_else(|| {
            ModelError::InvalidFormat {
                format: format!("{}: a tensor at {offsets:?} lies outside the file", self.path.display()),
                expected: "a safetensors file".to_string(),
            }
            .into()
        })
    }

    /// Tells the system that the pages at `offsets` are not needed any more, so that loading does not hold a model twice.
    pub(super) fn release(&self, offsets: (usize, usize)) {
        #[cfg(unix)]
        if let Bytes::Mapped(map) = &self.bytes {
            // SAFETY: the map is file-backed and read-only: dropped pages are read again from the file when touched. A failure
            // only means that the pages stay.
            let _ = unsafe {
                map.unchecked_advise_range(
                    memmap2::UncheckedAdvice::DontNeed,
                    self.data + offsets.0,
                    offsets.1.saturating_sub(offsets.0),
                )
            };
        }
        #[cfg(not(unix))]
        let _ = offsets;
    }
}

/// Opens `path` if it is a regular file (a pipe would block, a device has no length).
pub(super) fn open_regular(path: &Path) -> Result<File> {
    let not_found = |e: &std::io::Error| e.kind() == std::io::ErrorKind::NotFound;
    let metadata = std::fs::metadata(path).map_err(|e| -> bitnet_contracts::InferenceError {
        if not_found(&e) {
            ModelError::FileNotFound { path: path.display().to_string() }.into()
        } else {
            loading_failed(path, &e)
        }
    })?;
    if !metadata.is_file() {
        return Err(loading_failed(path, &"not a regular file"));
    }
    File::open(path).map_err(|e| loading_failed(path, &e))
}

pub(super) fn loading_failed(path: &Path, reason: &dyn std::fmt::Display) -> bitnet_contracts::InferenceError {
    ModelError::LoadingFailed { path: path.display().to_string(), reason: reason.to_string() }.into()
}
