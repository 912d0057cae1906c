//! What a model is and how it gets in: description, checkpoint files, weights in storage form, tokenizer.

mod checkpoint;
mod description;
pub mod gguf;
mod hf_folder;
#[allow(unsafe_code)]
mod mapped_file;
mod safetensors_file;
mod tokenizer;
mod weights;

pub use checkpoint::{Checkpoint, ModelSource, TensorSummary};
pub use description::{Activation, ModelDescription, WeightScale};
pub use gguf::{GgufOptions, GgufSource};
pub use tokenizer::Tokenizer;
pub use weights::{FloatMatrix, FloatRows, TernaryTensor};
