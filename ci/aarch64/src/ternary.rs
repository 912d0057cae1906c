//! The ternary matrices as the kernels read them, without the formats of files.

#[path = "../../../engine/src/ternary/interleaved.rs"]
pub mod interleaved;
#[path = "../../../engine/src/ternary/lookup_layout.rs"]
pub(crate) mod lookup_layout;

pub use interleaved::InterleavedMatrix;

/// Stands in for the engine's trait of the same name.
pub trait PackedRows: std::fmt::Debug + Send + Sync {
    /// As the engine's.
    fn row(&self, name: &str, row: usize, out: &mut [i8]) -> crate::Result<()>;
}
