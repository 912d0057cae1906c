//! Golden data for a model that has none: the standard prompts, by the oracle, when they are asked for.

use std::path::Path;

use sha2::{Digest, Sha256};

use crate::cases::{CaseSpec, PromptSpec};
use crate::derive::{derive_by, work};
use crate::file::Derivation;
use crate::oracle::{Oracle, read_folder};
use crate::{Golden, GoldenError};

/// The shapes of the standard prompts: sequences and positions of each.
const SHAPES: [(usize, usize); 4] = [(1, 1), (1, 3), (1, 7), (2, 13)];

/// Greedy tokens after each of them, where the context has room.
const NEW_TOKENS: usize = 8;

/// The largest number of parameters, times the positions of [`standard_work`], for which golden data is made: some
/// seconds on one core.
pub const MAX_WORK: u64 = 4_000_000_000;

/// The standard prompts of a model: a fixed draw from its vocabulary, as long as its context allows.
fn standard_case(name: &str, vocab: usize, context: usize) -> CaseSpec {
    let mut state = 0u64;
    let mut token = || {
        // splitmix64
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % vocab.max(1) as u64) as u32
    };
    let fits = SHAPES.iter().filter(|(_, seq)| *seq <= context);
    let prompts = fits
        .map(|&(batch, seq)| PromptSpec {
            name: format!("b{batch}_t{seq}"),
            text: None,
            input_ids: (0..batch).map(|_| (0..seq).map(|_| token()).collect()).collect(),
        })
        .collect();
    CaseSpec { case: name.to_owned(), seed: None, trace: String::new(), prompts }
}

/// Positions that [`from_folder`] evaluates for a model of this vocabulary and context.
pub fn standard_work(vocab: usize, context: usize) -> u64 {
    work(&standard_case("", vocab, context), NEW_TOKENS)
}

/// Golden data of the model in a folder (`config.json` and `model*.safetensors`), derived by the oracle alone.
///
/// # Errors
/// [`GoldenError::Oracle`] for a model that the oracle cannot read or does not cover.
pub fn from_folder(name: &str, dir: &Path) -> Result<Golden, GoldenError> {
    let (config, files) = read_folder(dir).map_err(GoldenError::oracle(name))?;
    let shards: Vec<&[u8]> = files.iter().map(Vec::as_slice).collect();
    let oracle = Oracle::from_shards(&config, &shards).map_err(GoldenError::oracle(name))?;
    let case = standard_case(name, oracle.vocab(), oracle.context());
    let file = derive_by(&oracle, &case, NEW_TOKENS, &mut || ())?;
    let mut hash = Sha256::new();
    files.iter().for_each(|bytes| hash.update(bytes));
    let hash = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Golden::from_files(&case, NEW_TOKENS, hash, vec![(Derivation::Oracle, file)])
}
