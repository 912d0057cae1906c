//! No byte belongs to two tensors.

use bitnet_contracts::Result;

use super::cursor::broken;
use super::file::GgufFile;

/// The codes of TL1 and TL2 do not count their scale: bitnet.cpp's converter writes it as a tensor of its own, and reserves room for it in
/// the weight's size as well, so that the two would overlap if that size were taken at its word.
pub(super) fn check(file: &GgufFile) -> Result<()> {
    let mut places: Vec<_> = file.tensors().iter().map(|(name, t)| (t.start, t.start + t.bytes, name)).collect();
    places.sort_unstable();
    for pair in places.windows(2) {
        let ((_, end, first), (start, _, second)) = (pair[0], pair[1]);
        if start < end {
            return Err(broken(
                file.path(),
                format!("tensors {first:?} and {second:?} overlap by {} bytes", end - start),
            ));
        }
    }
    Ok(())
}
