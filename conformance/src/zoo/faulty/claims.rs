//! Faults of declarations: engines that say they cannot, and answer all the same.

use super::super::Fault;
use super::super::naive::{At, Deviation, Honest, Naive, Site, Ternary};
use crate::backend::{Capabilities, CreateOptions};
use bitnet_contracts::{InferenceOutput, KVCache, Result, Tensor};
use std::sync::Arc;

pub(super) const FAULTS: &[Fault] = &[
    Fault::new(
        "undeclared-batch-repeats",
        "without batches, every row is answered with the first",
        "candle PR #1832, #2073; llama.cpp test-backend-ops: what is not supported is not tried",
        "probe/batch",
        || Arc::new(UndeclaredBatch),
    )
    .declaring(|mut c| {
        c.batch = false;
        c
    }),
    Fault::new(
        "undeclared-attention",
        "attention weights are given and not declared",
        "Bowtie miniatures: implementations that claim another dialect",
        "probe/attention_weights",
        || Arc::new(AnyOutput),
    )
    .declaring(|mut c| {
        c.attention_weights = false;
        c
    }),
    Fault::new(
        "undeclared-hidden-states",
        "hidden states are given and not declared",
        "Bowtie miniatures",
        "probe/hidden_states",
        || Arc::new(AnyOutput),
    )
    .declaring(|mut c| {
        c.hidden_states = false;
        c
    }),
    Fault::new(
        "undeclared-threads",
        "any number of threads is taken, and no choice declared",
        "llama.cpp #163",
        "probe/threads",
        || Arc::new(AnyOutput),
    )
    .declaring(|mut c| {
        c.threads = false;
        c
    }),
    Fault::new(
        "unknown-instruction-set-taken",
        "an instruction set that nobody has is taken without a word",
        "llama-bench #25547: the backend that was asked for is reported, not the one that ran",
        "probe/instruction_sets",
        || Arc::new(AnyInstructionSet),
    )
    .declaring(|c| c.with_instruction_sets(Vec::<String>::new())),
    Fault::new(
        "undeclared-thread-safe",
        "an engine for many threads is given and not declared",
        "tt-metal #11061",
        "probe/thread_safe",
        || Arc::new(ThreadSafeAnyway),
    )
    .declaring(|mut c| {
        c.thread_safe = false;
        c
    }),
    Fault::new(
        "stop-texts-ignored",
        "without a tokenizer stop texts are passed over in silence",
        "vLLM #3574, mlx-knife #68",
        "probe/tokenizer",
        || Arc::new(StopTextsIgnored),
    )
    .declaring(|mut c| {
        c.tokenizer = false;
        c
    }),
    Fault::new(
        "instruction-set-shows",
        "the paired kernel leaves out the last column of down_proj",
        "BitNet #547, PR #580; candle #3707",
        "determinism/instruction_sets",
        || Arc::new(InstructionSetShows),
    ),
];

struct UndeclaredBatch;

impl Deviation for UndeclaredBatch {
    fn takes_batches(&self, _: &Capabilities) -> bool {
        true
    }

    fn forward(&self, engine: &mut Naive, ids: &Tensor, cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        let mut output = engine.honest_forward(ids, cache)?;
        let batch = output.logits.dims().first().copied().unwrap_or(1);
        if batch > 1 {
            output.logits = output.logits.narrow(0, 0, 1)?.repeat((batch, 1, 1))?;
        }
        Ok(output)
    }
}

/// Takes outputs and threads whatever is declared.
struct AnyOutput;

impl Deviation for AnyOutput {
    fn options(&self, options: &CreateOptions, declared: &Capabilities) -> Result<CreateOptions> {
        let everything = declared.clone().with_attention_weights().with_hidden_states().with_threads();
        Honest.options(options, &everything)
    }
}

/// Takes instruction sets of any name.
struct AnyInstructionSet;

impl Deviation for AnyInstructionSet {
    fn options(&self, options: &CreateOptions, declared: &Capabilities) -> Result<CreateOptions> {
        Honest.options(options, &declared.clone().with_instruction_sets(options.isa.clone()))
    }
}

struct ThreadSafeAnyway;

impl Deviation for ThreadSafeAnyway {
    fn thread_safe(&self, _: &Capabilities) -> bool {
        true
    }
}

struct StopTextsIgnored;

impl Deviation for StopTextsIgnored {
    fn ignores_stop_texts(&self) -> bool {
        true
    }

    fn stop_text(&self, _: &str, _: &str, _: &bitnet_contracts::GenerationConfig) -> Option<usize> {
        None
    }
}

struct InstructionSetShows;

impl Deviation for InstructionSetShows {
    fn dots(&self, at: &At<'_>, matrix: &Ternary, codes: &[i16]) -> Vec<i32> {
        let paired = at.call.options.isa.as_deref() == Some("paired") && at.site == Site::Down;
        let used = matrix.columns - usize::from(paired);
        let dot = |trits: &[i8]| trits[..used].iter().zip(codes).map(|(&t, &c)| i32::from(t) * i32::from(c)).sum();
        matrix.each_row().map(dot).collect()
    }
}
