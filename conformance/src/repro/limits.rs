//! What a reproducer may ask for: a file from a stranger must not make a model that fills the machine.

use fixtures::Spec;

/// Bytes of a reproducer.
pub const MAX_BYTES: usize = 2048;
/// Layers.
pub const MAX_LAYERS: usize = 8;
/// Query heads.
pub const MAX_HEADS: usize = 32;
/// Hidden size.
pub const MAX_HIDDEN: usize = 512;
/// Inner size of the feed-forward block.
pub const MAX_FFN: usize = 2048;
/// Tokens of a vocabulary.
pub const MAX_VOCAB: usize = 4096;
/// Positions: of a model's context, of a cache, of one call.
pub const MAX_CONTEXT: usize = 512;
/// Safetensors files.
pub const MAX_SHARDS: usize = 8;
/// Calls of a schedule.
pub const MAX_CALLS: usize = 64;
/// Caches of a schedule.
pub const MAX_CACHES: usize = 8;
/// Sequences of a batch.
pub const MAX_BATCH: usize = 8;

/// A number beyond its limit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}: {seen}, and {least} to {most} are allowed")]
pub struct Excess {
    /// Which number.
    pub what: &'static str,
    /// What it is.
    pub seen: usize,
    /// The least it may be.
    pub least: usize,
    /// The most it may be.
    pub most: usize,
}

pub(super) fn at_most(what: &'static str, seen: usize, most: usize) -> Result<(), Excess> {
    if seen > most { Err(Excess { what, seen, least: 0, most }) } else { Ok(()) }
}

pub(super) fn at_least(what: &'static str, seen: usize, least: usize) -> Result<(), Excess> {
    if seen < least { Err(Excess { what, seen, least, most: usize::MAX }) } else { Ok(()) }
}

/// Checks the sizes of a synthetic model. Whether they make one is [`Spec::check`]'s to say, which divides by nothing
/// that was not checked and multiplies nothing that is not bounded here.
pub(super) fn check_spec(spec: &Spec) -> Result<(), Excess> {
    at_most("layers", spec.layers, MAX_LAYERS)?;
    at_most("heads", spec.heads, MAX_HEADS)?;
    at_most("kv_heads", spec.kv_heads, MAX_HEADS)?;
    at_most("hidden", spec.hidden, MAX_HIDDEN)?;
    at_most("ffn", spec.ffn, MAX_FFN)?;
    at_most("vocab", spec.vocab, MAX_VOCAB)?;
    at_most("context", spec.context, MAX_CONTEXT)?;
    at_most("shards", spec.shards, MAX_SHARDS)
}
