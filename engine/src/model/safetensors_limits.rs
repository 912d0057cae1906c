//! What the header of a safetensors file, and an index of several, may hold at most. The crate that is used elsewhere for this format
//! takes headers of 100 MB; a table that large is no model's.

/// Bytes of a header: room for the most tensors below at 256 bytes each.
pub(super) const MAX_HEADER_BYTES: u64 = 16 << 20;
/// Tensors: a layer has eleven, and scales beside.
pub(super) const MAX_TENSORS: usize = 1 << 16;
/// Bytes of a tensor's name.
pub(super) const MAX_NAME_BYTES: usize = 256;
/// Dimensions of a tensor. Models of this kind have one or two.
pub(super) const MAX_RANK: usize = 8;
/// Files of one model: each stays open.
pub(super) const MAX_SHARDS: usize = 512;
