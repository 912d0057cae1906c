//! A schedule: the calls that a fuzzing iteration makes on one engine, in order.

use super::limits::{self, Excess};
use serde::{Deserialize, Serialize};

/// Calls on one engine and on caches of given capacities. Any schedule is playable: what a call must bring follows from
/// the calls before it, refusals included.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    /// The capacity of each cache.
    pub caches: Vec<usize>,
    /// The calls.
    pub calls: Vec<Call>,
}

/// One call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Call {
    /// `forward`.
    Forward(Forward),
    /// `KVCache::truncate`.
    Truncate {
        /// Which cache.
        cache: usize,
        /// Positions kept.
        to: usize,
    },
    /// `KVCache::clear`.
    Clear {
        /// Which cache.
        cache: usize,
    },
    /// `reset`, after which all caches are new ones.
    Reset {},
    /// Greedy `generate`.
    Greedy(Generate),
    /// `generate` from the `top` most likely tokens at temperature 1, twice with one seed.
    Sample {
        /// Prompt and length.
        generate: Generate,
        /// The seed.
        seed: u64,
        /// `top_k`.
        top: usize,
    },
}

/// A forward pass.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Forward {
    /// Token ids, a list for each sequence. Ids outside the vocabulary must be refused.
    pub ids: Vec<Vec<u32>>,
    /// Which cache; none for a call without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<usize>,
    /// The tensor that the ids are put into.
    #[serde(default, skip_serializing_if = "is_default")]
    pub form: Form,
    /// On a thread-local copy of a thread-safe engine, where the backend declares one; only without a cache.
    #[serde(default, skip_serializing_if = "is_default")]
    pub copy: bool,
}

/// What a generation is asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Generate {
    /// The prompt.
    pub prompt: Vec<u32>,
    /// The most tokens.
    pub tokens: usize,
    /// By `generate_concurrent` of a thread-safe engine, where the backend declares one.
    #[serde(default, skip_serializing_if = "is_default")]
    pub copy: bool,
}

/// How ids are handed over.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// `[batch, seq]` of u32.
    #[default]
    U32,
    /// `[batch, seq]` of i64.
    I64,
    /// `[batch, seq]` of f32, which must be refused.
    F32,
    /// Rank 1, which must be refused.
    Flat,
    /// Rank 3, which must be refused.
    Deep,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl Schedule {
    /// Checks what a file may not ask for: sizes beyond the limits, caches that are not there, ragged batches.
    ///
    /// # Errors
    /// [`Excess`], which names the field.
    pub fn check(&self) -> Result<(), Excess> {
        limits::at_most("calls", self.calls.len(), limits::MAX_CALLS)?;
        limits::at_most("caches", self.caches.len(), limits::MAX_CACHES)?;
        self.caches.iter().try_for_each(|&c| limits::at_most("capacity of a cache", c, limits::MAX_CONTEXT))?;
        self.calls.iter().try_for_each(|call| call.check(self.caches.len()))
    }

    /// The token ids of all calls.
    pub(super) fn tokens_mut(&mut self) -> impl Iterator<Item = &mut u32> {
        self.calls.iter_mut().flat_map(|call| match call {
            Call::Forward(forward) => forward.ids.iter_mut().flatten().collect::<Vec<_>>(),
            Call::Greedy(generate) | Call::Sample { generate, .. } => generate.prompt.iter_mut().collect(),
            Call::Truncate { .. } | Call::Clear { .. } | Call::Reset {} => Vec::new(),
        })
    }
}

impl Call {
    fn check(&self, caches: usize) -> Result<(), Excess> {
        let cache = |index: usize| limits::at_most("index of a cache", index + 1, caches);
        match self {
            Self::Forward(forward) => {
                limits::at_most("sequences of a batch", forward.ids.len(), limits::MAX_BATCH)?;
                limits::at_least("sequences of a batch", forward.ids.len(), 1)?;
                let seq = forward.ids.first().map_or(0, Vec::len);
                for row in &forward.ids {
                    limits::at_most("tokens of a call", row.len(), limits::MAX_CONTEXT)?;
                    limits::at_most("tokens of a row beyond those of the first", row.len().abs_diff(seq), 0)?;
                }
                limits::at_most("caches of a copy", usize::from(forward.copy && forward.cache.is_some()), 0)?;
                forward.cache.map_or(Ok(()), cache)
            }
            Self::Truncate { cache: index, .. } | Self::Clear { cache: index } => cache(*index),
            Self::Reset {} => Ok(()),
            Self::Greedy(generate) | Self::Sample { generate, .. } => {
                limits::at_most("tokens of a call", generate.prompt.len(), limits::MAX_CONTEXT)?;
                limits::at_most("tokens to generate", generate.tokens, limits::MAX_CONTEXT)
            }
        }
    }

    /// What it is called in messages: short enough to be read.
    pub(super) fn name(&self) -> String {
        match self {
            Self::Forward(Forward { ids, cache, form, copy }) => {
                let place = cache.map_or("without a cache".to_string(), |c| format!("into cache {c}"));
                let form = if is_default(form) { String::new() } else { format!(" as {form:?}") };
                let on = if *copy { " on a copy" } else { "" };
                format!("forward {ids:?}{form} {place}{on}")
            }
            Self::Truncate { cache, to } => format!("truncate cache {cache} to {to}"),
            Self::Clear { cache } => format!("clear cache {cache}"),
            Self::Reset {} => "reset".to_string(),
            Self::Greedy(g) => format!("{} greedy tokens after {:?}", g.tokens, g.prompt),
            Self::Sample { generate: g, seed, top } => {
                format!("{} tokens of the top {top} with seed {seed} after {:?}", g.tokens, g.prompt)
            }
        }
    }
}
