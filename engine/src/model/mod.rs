//! What a model is and how it gets in: description, checkpoint files, weights in storage form, tokenizer.

mod checkpoint;
mod description;
#[allow(unsafe_code)]
mod safetensors_file;
mod tokenizer;
mod weights;

pub use checkpoint::{Checkpoint, ModelSource, TensorSummary};
pub use description::{ModelDescription, WeightScale};
pub use tokenizer::Tokenizer;
pub use weights::{FloatMatrix, FloatRows, TernaryTensor};
