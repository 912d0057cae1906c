//! Reading a header forward, never past the end of the file.

use std::fmt::Display;
use std::path::Path;

use bitnet_contracts::{InferenceError, ModelError, Result};

/// A place in a header.
pub(super) struct Cursor<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

/// A file that is no GGUF file, or a broken one.
pub(super) fn broken(path: &Path, what: impl Display) -> InferenceError {
    ModelError::InvalidFormat {
        format: format!("{}: {what}", path.display()),
        expected: "a GGUF file of version 2 or 3".to_string(),
    }
    .into()
}

impl<'a> Cursor<'a> {
    /// A cursor at byte `at` of a file.
    pub(super) fn new(path: &'a Path, bytes: &'a [u8], at: usize) -> Self {
        Self { path, bytes, at }
    }

    /// Bytes before the cursor.
    pub(super) fn at(&self) -> usize {
        self.at
    }

    fn left(&self) -> u64 {
        self.bytes.len().saturating_sub(self.at) as u64
    }

    /// The next `n` bytes; `what` they are is for the error.
    pub(super) fn take(&mut self, n: u64, what: &dyn Display) -> Result<&'a [u8]> {
        let left = self.left();
        if n > left {
            return Err(broken(self.path, format!("truncated in {what}: {n} bytes needed, {left} left")));
        }
        // No more than what is left of a slice, so it fits a usize.
        let slice = &self.bytes[self.at..self.at + n as usize];
        self.at += n as usize;
        Ok(slice)
    }

    fn array<const N: usize>(&mut self, what: &dyn Display) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64, what)?);
        Ok(out)
    }

    pub(super) fn u8(&mut self, what: &dyn Display) -> Result<u8> {
        Ok(u8::from_le_bytes(self.array(what)?))
    }

    pub(super) fn u32(&mut self, what: &dyn Display) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    pub(super) fn u64(&mut self, what: &dyn Display) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A count of things of at least `least` bytes each, held against `limit` and the rest of the file.
    pub(super) fn count(&mut self, limit: u64, least: u64, what: &dyn Display) -> Result<u64> {
        let count = self.u64(what)?;
        self.check_count(count, limit, least, what)?;
        Ok(count)
    }

    pub(super) fn check_count(&self, count: u64, limit: u64, least: u64, what: &dyn Display) -> Result<()> {
        if count > limit {
            return Err(broken(self.path, format!("{what} is {count}, more than {limit}")));
        }
        if count.saturating_mul(least) > self.left() {
            return Err(broken(self.path, format!("truncated: {what} is {count}, and {} bytes are left", self.left())));
        }
        Ok(())
    }

    /// The bytes of a string of at most `limit` bytes.
    pub(super) fn string(&mut self, limit: u64, what: &dyn Display) -> Result<&'a [u8]> {
        let len = self.count(limit, 1, &format_args!("the length of {what}"))?;
        self.take(len, what)
    }

    /// A string that must be UTF-8, copied.
    pub(super) fn text(&mut self, limit: u64, what: &dyn Display) -> Result<String> {
        let bytes = self.string(limit, what)?.to_vec();
        String::from_utf8(bytes).map_err(|_| broken(self.path, format!("{what} is not UTF-8")))
    }
}
