//! What a GGUF file may hold at most. Every count of a file is held against one of these and against the bytes that are left before
//! anything is made of it; together they bound what an index of a file can need.

/// Key and value pairs.
pub const MAX_KEYS: u64 = 1 << 16;
/// Tensors: a layer has eleven, and scales beside.
pub const MAX_TENSORS: u64 = 1 << 16;
/// Bytes of a key, as the format has it.
pub const MAX_KEY_BYTES: u64 = (1 << 16) - 1;
/// Bytes of a tensor's name; ggml has 64, forks of it 128.
pub const MAX_NAME_BYTES: u64 = 128;
/// Bytes of a string: a chat template, a token, a description.
pub const MAX_STRING_BYTES: u64 = 16 << 20;
/// Elements of an array: the merges of a large vocabulary are half a million.
pub const MAX_ARRAY_LEN: u64 = 1 << 21;
/// Arrays within arrays.
pub const MAX_ARRAY_DEPTH: usize = 4;
/// Dimensions of a tensor, as ggml has it.
pub const MAX_DIMENSIONS: u32 = 4;
/// The largest `general.alignment`.
pub const MAX_ALIGNMENT: u64 = 1 << 20;
/// Bytes between tensors where the file names no alignment.
pub const DEFAULT_ALIGNMENT: u64 = 32;
