//! `data/MANIFEST.json`: what the golden data is, where it came from, and how far its two derivations are apart.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::cases::{CaseSpec, PROMPTS_JSON, Prompts};
use crate::file::{Derivation, GoldenFile};
use crate::{Gap, Golden, GoldenError};

const MANIFEST_JSON: &[u8] = include_bytes!("../data/MANIFEST.json");

/// The manifest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// SHA-256 of `prompts.json`.
    pub prompts_sha256: String,
    /// Greedy tokens after each prompt, where the context has room.
    pub new_tokens: usize,
    /// The cases.
    pub cases: Vec<CaseRecord>,
}

/// One case of the manifest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CaseRecord {
    /// Name.
    pub case: String,
    /// The model.
    pub model: ModelRecord,
    /// Each prompt's shape by its name: sequences x positions.
    pub prompts: BTreeMap<String, String>,
    /// Name of the prompt whose activations are kept.
    pub trace: String,
    /// The two files.
    pub derivations: Vec<DerivationRecord>,
    /// The measured gap between the two.
    pub gap: Gap,
}

/// Where a case's model comes from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelRecord {
    /// `embedded`, or the version of the synthetic generator.
    pub source: String,
    /// Seed of a synthetic model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// SHA-256 of the weights.
    pub sha256: String,
}

/// One file of golden data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DerivationRecord {
    /// `oracle` or `transformers`.
    pub name: String,
    /// Program and version that made the file.
    pub made_by: String,
    /// SHA-256 of the file.
    pub sha256: String,
}

/// The committed manifest.
pub fn committed() -> Result<Manifest, GoldenError> {
    parse(MANIFEST_JSON)
}

pub(crate) fn parse(json: &[u8]) -> Result<Manifest, GoldenError> {
    serde_json::from_slice(json).map_err(|e| GoldenError::format("MANIFEST.json", e))
}

impl Manifest {
    /// A manifest of no cases yet.
    pub(crate) fn new(prompts: &Prompts) -> Self {
        Manifest { prompts_sha256: sha256(PROMPTS_JSON), new_tokens: prompts.new_tokens, cases: Vec::new() }
    }

    /// The record of a case.
    pub fn case(&self, name: &str) -> Result<&CaseRecord, GoldenError> {
        let found = self.cases.iter().find(|c| c.case == name);
        found.ok_or_else(|| GoldenError::format("MANIFEST.json", format!("no record of case {name}")))
    }

    /// The file's text.
    pub(crate) fn to_json(&self) -> Result<Vec<u8>, GoldenError> {
        let mut json = serde_json::to_vec_pretty(self).map_err(|e| GoldenError::format("MANIFEST.json", e))?;
        json.push(b'\n');
        Ok(json)
    }
}

/// The record of a case whose two files are at hand.
pub(crate) fn record(case: &CaseSpec, new_tokens: usize, files: [&[u8]; 2]) -> Result<CaseRecord, GoldenError> {
    let fixture = case.model()?;
    let source = match case.seed {
        None => "embedded".to_owned(),
        Some(_) => format!("fixtures generator {}", fixtures::GENERATOR_VERSION),
    };
    let model = ModelRecord { source, seed: case.seed, sha256: fixture.sha256() };
    let golden = Golden::assemble(case, new_tokens, model.sha256.clone(), files)?;
    let derivations = Derivation::ALL.into_iter().zip(files).map(|(derivation, bytes)| {
        let made_by = GoldenFile::parse(derivation.name(), bytes)?.made_by;
        Ok(DerivationRecord { name: derivation.name().to_owned(), made_by, sha256: sha256(bytes) })
    });
    Ok(CaseRecord {
        case: case.case.clone(),
        model,
        prompts: case.prompts.iter().map(|p| (p.name.clone(), format!("{}x{}", p.batch(), p.seq()))).collect(),
        trace: case.trace.clone(),
        derivations: derivations.collect::<Result<_, GoldenError>>()?,
        gap: Gap::measure(&golden),
    })
}

/// SHA-256 in lower-case hexadecimal.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}
