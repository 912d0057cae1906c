//! GGUF files: every storage gives the folder's logits, the tokenizer its ids, and whatever is wrong with a file is a typed error.

mod broken;
mod damage;
mod raw;
mod storages;
mod tokenizer;
