//! The committed golden data, compiled in, as values.

use std::collections::BTreeMap;

use crate::cases::{CaseSpec, PromptSpec, prompts};
use crate::file::{Derivation, GoldenFile, key};
use crate::oracle::Semantics;
use crate::{GoldenError, manifest};

/// Names the cases and embeds their two files. A new case is added here after its files exist.
macro_rules! embed {
    ($($case:literal),* $(,)?) => {
        const CASES: &[&str] = &[$($case),*];
        const FILES: &[[&[u8]; 2]] = &[$([
            include_bytes!(concat!("../data/", $case, "/oracle.safetensors")),
            include_bytes!(concat!("../data/", $case, "/transformers.safetensors")),
        ]),*];
    };
}

embed![
    "tiny",
    "c02-h256-gqa2-untied",
    "c05-h512-gqa4-tied",
    "c07-h256-bitlinear",
    "c09-h512-gguf",
    "gqa1-tied-bf16",
    "gqa2-untied-f32",
    "gqa4-tied-f16",
    "gqa4-untied-f16",
    "odd-vocab-257",
    "bitlinear-tied-bf16",
    "bitlinear-default-untied-f32",
    "dead-channels-bf16",
    "dead-channels-f16",
    "context-32",
    "rope-parameters-two-eos",
    "master-bf16",
    "sharded-untied-f32",
];

/// Names of all cases: the trained model, the four checkpoints drawn with PyTorch, and every small preset of `fixtures`
/// at seed 1.
pub fn cases() -> &'static [&'static str] {
    CASES
}

/// The committed file of a case, if there is such a case.
pub(crate) fn embedded(case: &str, derivation: Derivation) -> Option<&'static [u8]> {
    let index = CASES.iter().position(|name| *name == case)?;
    let which = match derivation {
        Derivation::Oracle => 0,
        Derivation::Transformers => 1,
    };
    FILES.get(index).map(|files| files[which])
}

/// The golden data of a case.
///
/// # Errors
/// [`GoldenError::UnknownCase`]; a [`GoldenError::Format`] would mean that the committed data is damaged.
pub fn load(case: &str) -> Result<Golden, GoldenError> {
    let prompts = prompts()?;
    let spec = prompts.case(case)?;
    let files = Derivation::ALL.map(|d| embedded(case, d).unwrap_or_default());
    let sha256 = manifest::committed()?.case(case)?.model.sha256.clone();
    Golden::assemble(spec, prompts.new_tokens, sha256, files)
}

/// The golden data of one model.
#[derive(Debug, Clone)]
pub struct Golden {
    /// Name of the case, which is also that of the model (see [`crate::model`]).
    pub case: String,
    /// SHA-256 of the model's weights ([`fixtures::Fixture::sha256`]).
    pub model_sha256: String,
    /// The prompts with what follows from them.
    pub prompts: Vec<Prompt>,
    /// The intermediate activations of one prompt.
    pub trace: Option<Trace>,
}

/// A prompt and its golden results. Row-major: sequence, position, vocabulary.
#[derive(Debug, Clone)]
pub struct Prompt {
    /// Name, unique within the case.
    pub name: String,
    /// Number of sequences B.
    pub batch: usize,
    /// Positions of each sequence T.
    pub seq: usize,
    /// Size of the vocabulary V.
    pub vocab: usize,
    /// Token ids `[batch][position]`.
    pub input_ids: Vec<Vec<u32>>,
    /// What the ids say, one text per sequence, for prompts that were made from text.
    pub text: Option<Vec<String>>,
    results: Vec<Results>,
}

/// What one derivation gives for a prompt in one of the semantics.
#[derive(Debug, Clone)]
struct Results {
    derivation: Derivation,
    semantics: Semantics,
    logits: Vec<f32>,
    greedy: Vec<Vec<u32>>,
    margins: Vec<Vec<f32>>,
    codes: Vec<i64>,
}

impl Prompt {
    fn results(&self, semantics: Semantics, derivation: Derivation) -> Option<&Results> {
        self.results.iter().find(|r| r.semantics == semantics && r.derivation == derivation)
    }

    /// Logits \[B,T,V\].
    pub fn logits(&self, semantics: Semantics, derivation: Derivation) -> &[f32] {
        self.results(semantics, derivation).map_or(&[], |r| &r.logits)
    }

    /// Logits row by row: B * T slices of length V.
    pub fn rows(&self, semantics: Semantics, derivation: Derivation) -> impl Iterator<Item = &[f32]> {
        self.logits(semantics, derivation).chunks_exact(self.vocab.max(1))
    }

    /// The greedy tokens of each sequence, as transformers gives them. Up to 16, fewer where the context ends.
    pub fn greedy(&self, semantics: Semantics) -> &[Vec<u32>] {
        self.greedy_of(semantics, Derivation::Transformers)
    }

    /// Best minus second-best logit at each of those steps: how firmly the token stands.
    pub fn margins(&self, semantics: Semantics) -> &[Vec<f32>] {
        self.margins_of(semantics, Derivation::Transformers)
    }

    /// The greedy tokens of either derivation.
    pub fn greedy_of(&self, semantics: Semantics, derivation: Derivation) -> &[Vec<u32>] {
        self.results(semantics, derivation).map_or(&[], |r| &r.greedy)
    }

    /// The margins of either derivation.
    pub fn margins_of(&self, semantics: Semantics, derivation: Derivation) -> &[Vec<f32>] {
        self.results(semantics, derivation).map_or(&[], |r| &r.margins)
    }

    /// Hashes of the int8 codes of each quantised input in the w1.58a8 semantics, \[B,T,L,4\]: the input of q, k and v;
    /// of o; of gate and up; of down.
    pub fn codes(&self, derivation: Derivation) -> &[i64] {
        self.results(Semantics::W158A8, derivation).map_or(&[], |r| &r.codes)
    }

    /// For each of the B * T rows: whether both derivations quantised this position and all earlier ones of its sequence
    /// to the same int8 codes, so that nothing but the order of summation separates their w1.58a8 logits.
    pub fn flip_free(&self) -> Vec<bool> {
        let (a, b) = (self.codes(Derivation::Oracle), self.codes(Derivation::Transformers));
        let per_row = a.len() / (self.batch * self.seq).max(1);
        let same: Vec<bool> = a.chunks(per_row.max(1)).zip(b.chunks(per_row.max(1))).map(|(a, b)| a == b).collect();
        let one_sequence = |rows: &[bool]| {
            let mut so_far = true;
            rows.iter()
                .map(|same| {
                    so_far &= same;
                    so_far
                })
                .collect::<Vec<_>>()
        };
        same.chunks(self.seq.max(1)).flat_map(one_sequence).collect()
    }
}

/// Activations inside the forward pass of one prompt, both semantics, both derivations.
///
/// Names: `embed`; `layer0.` with `input_norm`, `q`, `k` (before rotation), `v`, `attn_out`, `attn_sub_norm`, `o`,
/// `post_attn_norm`, `gate`, `up`, `ffn_act`, `ffn_sub_norm`, `down`; `layerN.out`; `final_norm`. They see what logits
/// cannot: a sub-norm follows v, gate and up and cancels any error of their scales.
#[derive(Debug, Clone)]
pub struct Trace {
    /// Name of the prompt.
    pub prompt: String,
    tensors: BTreeMap<(Derivation, String), (Vec<usize>, Vec<f32>)>,
}

impl Trace {
    /// Shape \[B,T,n\] and values of an activation.
    pub fn get(&self, semantics: Semantics, derivation: Derivation, name: &str) -> Option<(&[usize], &[f32])> {
        let key = (derivation, format!("{}.{name}", semantics.name()));
        self.tensors.get(&key).map(|(shape, values)| (shape.as_slice(), values.as_slice()))
    }

    /// The names that [`Trace::get`] knows, in alphabetical order.
    pub fn names(&self) -> Vec<&str> {
        let prefix = format!("{}.", Semantics::Fp32.name());
        self.tensors
            .keys()
            .filter(|(d, _)| *d == Derivation::Oracle)
            .filter_map(|(_, name)| name.strip_prefix(&prefix))
            .collect()
    }
}

impl Golden {
    /// Puts the two files of a case together, checking that they hold what the case's prompts promise.
    pub(crate) fn assemble(
        spec: &CaseSpec,
        new_tokens: usize,
        model_sha256: String,
        files: [&[u8]; 2],
    ) -> Result<Self, GoldenError> {
        let parse = |(derivation, bytes): (Derivation, &[u8])| {
            Ok((derivation, GoldenFile::parse(&file_name(spec, derivation), bytes)?))
        };
        let files = Derivation::ALL.into_iter().zip(files).map(parse).collect::<Result<Vec<_>, GoldenError>>()?;
        Self::from_files(spec, new_tokens, model_sha256, files)
    }

    /// The same from files in memory, of one derivation or of both.
    pub(crate) fn from_files(
        spec: &CaseSpec,
        new_tokens: usize,
        model_sha256: String,
        files: Vec<(Derivation, GoldenFile)>,
    ) -> Result<Self, GoldenError> {
        let mut prompts: Vec<Prompt> = Vec::new();
        let mut tensors = BTreeMap::new();
        for (derivation, file) in files {
            let name = file_name(spec, derivation);
            for (i, prompt) in spec.prompts.iter().enumerate() {
                if prompts.len() <= i {
                    prompts.push(Prompt::new(prompt));
                }
                prompts[i].read(&name, &file, derivation, new_tokens)?;
            }
            for (name, (shape, data)) in file.tensors {
                if let (Some(name), crate::file::Data::F32(values)) = (name.strip_prefix("trace."), data) {
                    tensors.insert((derivation, name.to_owned()), (shape, values));
                }
            }
        }
        let trace = (!tensors.is_empty()).then(|| Trace { prompt: spec.trace.clone(), tensors });
        Ok(Golden { case: spec.case.clone(), model_sha256, prompts, trace })
    }

    /// The derivation that backends are held to: transformers where it is there, else the oracle.
    pub fn derivation(&self) -> Derivation {
        let has = |d| self.prompts.iter().all(|p| !p.logits(Semantics::Fp32, d).is_empty());
        if has(Derivation::Transformers) { Derivation::Transformers } else { Derivation::Oracle }
    }

    /// The prompt of this name.
    pub fn prompt(&self, name: &str) -> Option<&Prompt> {
        self.prompts.iter().find(|p| p.name == name)
    }
}

/// What errors call the file of a case.
fn file_name(spec: &CaseSpec, derivation: Derivation) -> String {
    format!("{}/{}.safetensors", spec.case, derivation.name())
}

impl Prompt {
    fn new(spec: &PromptSpec) -> Self {
        Prompt {
            name: spec.name.clone(),
            batch: spec.batch(),
            seq: spec.seq(),
            vocab: 0,
            input_ids: spec.input_ids.clone(),
            text: spec.text.clone(),
            results: Vec::new(),
        }
    }

    /// Takes this prompt's tensors of one derivation.
    fn read(
        &mut self,
        name: &str,
        file: &GoldenFile,
        derivation: Derivation,
        new_tokens: usize,
    ) -> Result<(), GoldenError> {
        let (batch, seq) = (self.batch, self.seq);
        let ids = file.i64(name, &format!("{}.input_ids", self.name), &[batch, seq])?;
        if !self.input_ids.iter().flatten().map(|&id| i64::from(id)).eq(ids.iter().copied()) {
            return Err(GoldenError::format(name, format!("{} was made from other token ids", self.name)));
        }
        let shape = |what: &str| {
            let key = key(&self.name, Semantics::W158A8, what);
            file.tensors.get(&key).map(|(shape, _)| shape.as_slice()).unwrap_or_default()
        };
        let vocab = shape("logits").last().copied().unwrap_or_default();
        let steps = shape("greedy").last().copied().unwrap_or_default().min(new_tokens);
        let layers = shape("codes").get(2).copied().unwrap_or_default();
        for semantics in Semantics::ALL {
            let key = |what: &str| key(&self.name, semantics, what);
            let greedy = file.i64(name, &key("greedy"), &[batch, steps])?;
            let margins = file.f32(name, &key("greedy_margin"), &[batch, steps])?;
            let codes = match semantics {
                Semantics::Fp32 => Vec::new(),
                Semantics::W158A8 => file.i64(name, &key("codes"), &[batch, seq, layers, 4])?.to_vec(),
            };
            let per_sequence = |i: usize| i * steps..(i + 1) * steps;
            self.results.push(Results {
                derivation,
                semantics,
                logits: file.f32(name, &key("logits"), &[batch, seq, vocab])?.to_vec(),
                greedy: (0..batch).map(|i| greedy[per_sequence(i)].iter().map(|&id| id as u32).collect()).collect(),
                margins: (0..batch).map(|i| margins[per_sequence(i)].to_vec()).collect(),
                codes,
            });
        }
        self.vocab = vocab;
        Ok(())
    }
}
