//! What a model is and how it gets in: description, checkpoint files, weights in storage form, tokenizer.

mod aside;
mod checkpoint;
mod description;
pub mod gguf;
mod hf_folder;
mod hf_write;
mod in_file;
#[allow(unsafe_code)]
mod mapped_file;
mod packed_file;
mod plan;
mod safetensors_file;
mod safetensors_header;
mod safetensors_limits;
mod shard_index;
mod table;
mod tokenizer;
mod weights;

pub use checkpoint::{Checkpoint, ModelSource, TensorSummary};
pub use description::{Activation, ModelDescription, WeightScale};
pub use gguf::{GgufOptions, GgufSource};
pub use hf_write::write_hf_packed;
pub use packed_file::PackedWeights;
pub(crate) use packed_file::{Found, PackedFile, PackedKey};
pub use plan::Part;
pub(crate) use table::FloatTable;
pub use tokenizer::Tokenizer;
pub use weights::{FloatMatrix, FloatRows, TernaryTensor};
