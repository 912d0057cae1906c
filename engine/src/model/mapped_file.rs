//! The bytes of a weight file: mapped, or compiled in. The only unsafe code of `model`.

use std::borrow::Cow;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bitnet_contracts::{ModelError, Result};
use memmap2::Mmap;
use serde::{Deserialize, Serialize};

enum Bytes {
    Mapped(Mmap, Arc<File>),
    Owned(Cow<'static, [u8]>),
}

/// An open file.
pub(super) struct MappedFile {
    path: PathBuf,
    bytes: Bytes,
}

impl MappedFile {
    /// Maps `path`.
    ///
    /// # Errors
    /// `ModelError::FileNotFound`, `::LoadingFailed`.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let file = open_regular(path)?;
        // SAFETY: the map is read-only and private to this value. A file that another process shortens while it is mapped makes
        // the system raise SIGBUS on access; the documentation of `Checkpoint::open` says so. Values are copied out at load and
        // checked as they are copied, so a file that merely changes cannot break an invariant.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| loading_failed(path, &e))?;
        Ok(Self { path: path.to_path_buf(), bytes: Bytes::Mapped(map, Arc::new(file)) })
    }

    /// Bytes in memory; `path` is for error messages.
    pub(super) fn embedded(path: &Path, bytes: Cow<'static, [u8]>) -> Self {
        Self { path: path.to_path_buf(), bytes: Bytes::Owned(bytes) }
    }

    /// The file's path.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The stamp of the file as it is now.
    pub(super) fn stamp(&self) -> Option<Stamp> {
        match &self.bytes {
            Bytes::Mapped(_, file) => Stamp::of(&self.path, file),
            Bytes::Owned(_) => None,
        }
    }

    /// All bytes.
    pub(super) fn bytes(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Mapped(map, _) => map,
            Bytes::Owned(bytes) => bytes,
        }
    }

    /// The bytes of `range`, to be read from the file later; None for a file in memory and where the system cannot read at a place.
    pub(super) fn part(&self, range: Range<usize>) -> Option<FilePart> {
        match &self.bytes {
            Bytes::Mapped(map, file) if cfg!(unix) && range.end <= map.len() => {
                Some(FilePart { file: file.clone(), path: self.path.clone(), range })
            }
            _ => None,
        }
    }

    /// Tells the system that the pages of `range` are not needed any more, so that loading does not hold a model twice. What of the
    /// range is beyond the file is left out.
    pub(super) fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        if let Bytes::Mapped(map, _) = &self.bytes {
            let end = range.end.min(map.len());
            let start = range.start.min(end);
            // SAFETY: `start..end` is within the map, so that no other memory is advised on. The map is file-backed and read-only:
            // dropped pages are read again from the file when touched. A failure only means that the pages stay.
            let _ = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, end - start) };
        }
        #[cfg(not(unix))]
        let _ = range;
    }
}

/// Some bytes of an open file, read when they are asked for. The file may be renamed or deleted meanwhile.
#[derive(Debug)]
pub(super) struct FilePart {
    file: Arc<File>,
    path: PathBuf,
    range: Range<usize>,
}

impl FilePart {
    /// Fills `out` with the bytes from `at` on.
    ///
    /// # Errors
    /// `ModelError::LoadingFailed`, also when the file has become shorter.
    pub(super) fn read(&self, at: usize, out: &mut [u8]) -> Result<()> {
        let start = self.range.start.saturating_add(at);
        if start.saturating_add(out.len()) > self.range.end {
            return Err(loading_failed(&self.path, &"a row outside its tensor"));
        }
        read_at(&self.file, start as u64, out).map_err(|e| loading_failed(&self.path, &e))
    }
}

/// Fills `out` with the bytes of `file` from `at` on, whatever others read of it meanwhile.
pub(super) fn read_at(file: &File, at: u64, out: &mut [u8]) -> std::io::Result<()> {
    #[cfg(unix)]
    return std::os::unix::fs::FileExt::read_exact_at(file, out, at);
    #[cfg(not(unix))]
    {
        let _ = (file, at, out);
        Err(std::io::ErrorKind::Unsupported.into())
    }
}

/// What tells a file from another one, and from itself after a change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stamp {
    name: String,
    len: u64,
    inode: u64,
    /// Seconds and nanoseconds of the last change of the content, and of anything.
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    /// The stamp of an open file; None where the system does not tell, and for a file that was changed so lately that the next change
    /// might bear the same time.
    #[cfg(unix)]
    fn of(path: &Path, file: &File) -> Option<Self> {
        use std::os::unix::fs::MetadataExt;
        /// No clock of a file system ticks more slowly, of those that keep nanoseconds.
        const TICK: std::time::Duration = std::time::Duration::from_millis(20);
        let metadata = file.metadata().ok()?;
        let stamp = Self {
            name: path.file_name()?.to_string_lossy().into_owned(),
            len: metadata.len(),
            inode: metadata.ino(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        };
        let changed = std::time::Duration::new(u64::try_from(stamp.changed.0).ok()?, stamp.changed.1 as u32);
        let age = std::time::SystemTime::UNIX_EPOCH.elapsed().ok()?.checked_sub(changed)?;
        (age > TICK).then_some(stamp)
    }

    #[cfg(not(unix))]
    fn of(_: &Path, _: &File) -> Option<Self> {
        None
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
