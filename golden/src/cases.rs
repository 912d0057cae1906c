//! Which models the golden data covers, and with which prompts.

use serde::Deserialize;

use crate::GoldenError;

/// `prompts.json`: the one definition of every prompt, for both derivations.
pub(crate) const PROMPTS_JSON: &[u8] = include_bytes!("../prompts.json");

/// The content of `prompts.json`.
#[derive(Debug, Clone, Deserialize)]
pub struct Prompts {
    /// Greedy tokens that follow each prompt, where the context has room for them.
    pub new_tokens: usize,
    /// The cases in the order in which they are reported.
    pub cases: Vec<CaseSpec>,
}

/// One case: a model and its prompts.
#[derive(Debug, Clone, Deserialize)]
pub struct CaseSpec {
    /// Name, which is also that of the model.
    pub case: String,
    /// Seed of a synthetic model; absent for the embedded ones.
    pub seed: Option<u64>,
    /// Name of the prompt whose intermediate activations are kept.
    pub trace: String,
    /// The prompts.
    pub prompts: Vec<PromptSpec>,
}

/// One prompt.
#[derive(Debug, Clone, Deserialize)]
pub struct PromptSpec {
    /// Name, unique within the case.
    pub name: String,
    /// What the token ids say, one text per sequence, if they say anything.
    pub text: Option<Vec<String>>,
    /// Token ids `[batch][position]`, every sequence of one length.
    pub input_ids: Vec<Vec<u32>>,
}

impl PromptSpec {
    /// Number of sequences.
    pub fn batch(&self) -> usize {
        self.input_ids.len()
    }

    /// Number of positions of each sequence.
    pub fn seq(&self) -> usize {
        self.input_ids.first().map_or(0, Vec::len)
    }
}

/// All cases.
pub fn prompts() -> Result<Prompts, GoldenError> {
    serde_json::from_slice(PROMPTS_JSON).map_err(|e| GoldenError::format("prompts.json", e))
}

impl Prompts {
    /// The case of this name.
    pub fn case(&self, name: &str) -> Result<&CaseSpec, GoldenError> {
        self.cases.iter().find(|c| c.case == name).ok_or_else(|| GoldenError::UnknownCase {
            name: name.to_owned(),
            known: self.cases.iter().map(|c| c.case.as_str()).collect::<Vec<_>>().join(", "),
        })
    }
}

impl CaseSpec {
    /// The case's model.
    pub fn model(&self) -> Result<fixtures::Fixture, GoldenError> {
        if self.case == "tiny" {
            return Ok(fixtures::tiny());
        }
        match fixtures::oracle_case(&self.case) {
            Some(fixture) => Ok(fixture),
            None => Ok(fixtures::preset(&self.case, self.seed.unwrap_or_default())?),
        }
    }
}

/// The model of a case.
pub fn model(case: &str) -> Result<fixtures::Fixture, GoldenError> {
    prompts()?.case(case)?.model()
}
