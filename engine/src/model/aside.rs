//! Files that are written aside and renamed when whole: no other process ever sees a part of one under its name.

use std::path::Path;

use bitnet_contracts::Result;
use tempfile::NamedTempFile;

use super::mapped_file::loading_failed;

/// A new file in the folder of `path`, with the permissions that any new file gets. Dropped, it leaves nothing behind.
///
/// # Errors
/// `ModelError::LoadingFailed` naming the path.
pub(super) fn create(path: &Path) -> Result<NamedTempFile> {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut builder = tempfile::Builder::new();
    builder.prefix(".bitnet-").suffix(".partial");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // Less the umask; without this only the owner could read it.
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    builder.tempfile_in(parent).map_err(|e| loading_failed(path, &e))
}

/// Writes `file` through to the disk and gives it the name `path`. A file of that name is replaced.
///
/// # Errors
/// `ModelError::LoadingFailed` naming the path.
pub(super) fn publish(file: NamedTempFile, path: &Path) -> Result<()> {
    file.as_file().sync_all().map_err(|e| loading_failed(path, &e))?;
    file.persist(path).map_err(|e| loading_failed(path, &e.error))?;
    Ok(())
}
