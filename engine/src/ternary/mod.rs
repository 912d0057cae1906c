//! How trits are stored: one file a format, each with pack, unpack and its layout drawn.

pub mod hf_packed;
pub mod interleaved;

pub use hf_packed::HfPacked;
pub use interleaved::InterleavedMatrix;
