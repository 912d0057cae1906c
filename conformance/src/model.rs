//! The models that backends are tested on: which there are, what is known of each, and how one gets onto the disk.

use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// The seed of every synthetic model of the suite.
pub const PRESET_SEED: u64 = 1;

/// The name of the trained fixture model, which stands for all models in checks that hold for any.
pub const TINY: &str = "tiny";

/// What `config.json` says of a model, in the terms the checks need.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ModelFacts {
    /// Token ids run from 0 to this, exclusive.
    pub vocab_size: usize,
    /// The longest sequence, in positions.
    pub max_positions: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward part.
    pub intermediate_size: usize,
    /// Layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head: `hidden_size / heads`.
    pub head_dim: usize,
    /// RoPE base.
    pub rope_theta: f64,
    /// Epsilon of the norms.
    pub rms_eps: f64,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// Beginning of text, where the model names one.
    pub bos: Option<u32>,
    /// End of text ids, where the model names any.
    pub eos: Vec<u32>,
    /// Whether the folder has a `tokenizer.json`.
    pub has_tokenizer: bool,
    /// Which prompts the checks make for this model.
    #[serde(default)]
    pub prompts: PromptShape,
}

/// Which prompts the checks make. The default changes nothing; a reproducer asks for plainer ones.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PromptShape {
    /// Added to the seed of every prompt.
    #[serde(default)]
    pub salt: u64,
    /// Draw from this many ordinary tokens only, those of the lowest ids.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alphabet: Option<usize>,
    /// The most tokens of a prompt, in the checks that can do with any number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub longest: Option<usize>,
}

impl ModelFacts {
    /// Weights of all kinds; saturates for sizes that no model has.
    pub fn parameters(&self) -> u64 {
        let times = |a: usize, b: usize| (a as u64).saturating_mul(b as u64);
        let (hidden, ffn, kv) = (self.hidden_size, self.intermediate_size, self.kv_heads.saturating_mul(self.head_dim));
        let attention = times(hidden, hidden.saturating_add(kv)).saturating_mul(2);
        let layer = attention.saturating_add(times(hidden, ffn).saturating_mul(3)).saturating_add(ffn as u64);
        let tables = times(self.vocab_size, hidden).saturating_mul(if self.tied { 1 } else { 2 });
        layer.saturating_mul(self.layers as u64).saturating_add(tables)
    }

    /// Whether the oracle evaluates the model's standard prompts in seconds ([`golden::MAX_WORK`]), so that a model
    /// without committed golden data can be given some.
    pub fn within_the_oracle(&self) -> bool {
        let positions = golden::standard_work(self.vocab_size, self.max_positions);
        self.parameters().saturating_mul(positions) <= golden::MAX_WORK
    }
}

/// A model in a folder on disk, in the Hugging Face layout.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ModelFixture {
    /// The name in case ids.
    name: String,
    /// The folder: `config.json`, `model.safetensors` or shards, perhaps `tokenizer.json`.
    dir: PathBuf,
    /// What `config.json` says.
    pub config: ModelFacts,
    /// The golden case made from this very model, where there is one.
    pub golden: Option<String>,
    /// SHA-256 of the weights in hexadecimal, for built-in models.
    pub weights_sha256: Option<String>,
}

impl ModelFixture {
    /// A model of the caller's own, from its folder.
    ///
    /// # Errors
    /// [`ModelError::Config`] where `config.json` is missing, unreadable or describes no model.
    pub fn open(name: impl Into<String>, dir: impl Into<PathBuf>) -> Result<Self, ModelError> {
        let dir = dir.into();
        let config = read_facts(&dir)?;
        Ok(Self { name: name.into(), dir, config, golden: None, weights_sha256: None })
    }

    /// A built-in model, written into a new folder below `root`.
    ///
    /// # Errors
    /// [`ModelError::Unknown`] for a name that is not built in, [`ModelError::Fixture`] where it cannot be written.
    pub fn built_in(name: &str, root: &Path) -> Result<Self, ModelError> {
        Model::named(name)?.materialize(root)
    }

    /// The name in case ids.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The model's folder. It is shared by all cases of a run: read it, never write to it.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The same claims about another folder, which is not looked at: for folders that lack what a model needs.
    #[must_use]
    pub fn relocated(&self, dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into(), golden: None, weights_sha256: None, ..self.clone() }
    }
}

/// Why a model cannot be tested on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// Neither a built-in model nor a folder.
    #[error("no model {name:?}: it is neither a folder nor one of {}", known.join(", "))]
    Unknown {
        /// The name asked for.
        name: String,
        /// The built-in names.
        known: Vec<String>,
    },
    /// `config.json` does not describe a model.
    #[error("{}: {reason}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A built-in model could not be made or written.
    #[error("model {name}: {source}")]
    Fixture {
        /// The model.
        name: String,
        /// The cause.
        source: fixtures::FixtureError,
    },
}

/// A model that can be tested on, before it is on disk.
#[derive(Debug, Clone)]
pub struct Model {
    name: String,
    facts: ModelFacts,
    golden: Option<String>,
    source: Source,
}

#[derive(Debug, Clone)]
enum Source {
    Tiny,
    Oracle(&'static str),
    Preset(&'static str),
    Synthetic(Box<fixtures::Spec>, u64),
    Folder(PathBuf),
}

impl Model {
    /// Every built-in model: the trained one, the oracle's cases, the synthetic presets.
    pub fn built_in() -> Vec<Self> {
        let embedded = |fixture: fixtures::Fixture, source: Source| {
            let facts = parse_facts(fixture.config_json(), fixture.tokenizer_json().is_some()).ok()?;
            Some(Self { name: fixture.name().to_string(), facts, golden: golden_case(fixture.name()), source })
        };
        let tiny = embedded(fixtures::tiny(), Source::Tiny);
        let oracle = fixtures::ORACLE_CASES
            .iter()
            .filter_map(|name| embedded(fixtures::oracle_case(name)?, Source::Oracle(name)));
        let presets = fixtures::presets().iter().map(|preset| Self {
            name: preset.name.to_string(),
            facts: preset_facts(&preset.spec),
            golden: golden_case(preset.name),
            source: Source::Preset(preset.name),
        });
        tiny.into_iter().chain(oracle).chain(presets).collect()
    }

    /// The built-in model of a name.
    ///
    /// # Errors
    /// [`ModelError::Unknown`].
    pub fn named(name: &str) -> Result<Self, ModelError> {
        let unknown = || ModelError::Unknown { name: name.to_string(), known: built_in_names() };
        Self::built_in().into_iter().find(|m| m.name == name).ok_or_else(unknown)
    }

    /// A synthetic model of any specification, with the seed of its weights.
    pub fn synthetic(name: &str, spec: &fixtures::Spec, seed: u64) -> Self {
        let source = Source::Synthetic(Box::new(spec.clone()), seed);
        Self { name: name.to_string(), facts: preset_facts(spec), golden: None, source }
    }

    /// The specification and the seed of the weights, where the model is a synthetic one.
    pub fn spec(&self) -> Option<(fixtures::Spec, u64)> {
        match &self.source {
            Source::Preset(name) => Some((fixtures::find_preset(name).ok()?.spec.clone(), PRESET_SEED)),
            Source::Synthetic(spec, seed) => Some((spec.as_ref().clone(), *seed)),
            _ => None,
        }
    }

    /// A model of the caller's own. Its name is the folder's.
    ///
    /// # Errors
    /// As [`ModelFixture::open`].
    pub fn folder(dir: &Path) -> Result<Self, ModelError> {
        let facts = read_facts(dir)?;
        let full = dir.canonicalize().unwrap_or_else(|_| dir.to_path_buf());
        let name = full.file_name().map_or_else(|| "model".to_string(), |n| n.to_string_lossy().into_owned());
        let name = name.chars().map(|c| if c == '/' || c.is_whitespace() { '-' } else { c }).collect();
        Ok(Self { name, facts, golden: None, source: Source::Folder(full) })
    }

    /// The name in case ids.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What is known of the model.
    pub fn facts(&self) -> &ModelFacts {
        &self.facts
    }

    /// The golden case made from this very model, where there is one.
    pub fn golden(&self) -> Option<&str> {
        self.golden.as_deref()
    }

    /// What `--model` takes to choose this model: its name, or its folder.
    pub fn argument(&self) -> String {
        match &self.source {
            Source::Folder(dir) => dir.display().to_string(),
            _ => self.name.clone(),
        }
    }

    /// Whether this is a folder of the caller's.
    pub fn is_folder(&self) -> bool {
        matches!(self.source, Source::Folder(_))
    }

    /// Whether this is made from a specification that has no name.
    pub fn is_synthetic(&self) -> bool {
        matches!(self.source, Source::Synthetic(..))
    }

    /// Puts the model on disk below `root` (a folder of the caller's stays where it is).
    ///
    /// # Errors
    /// [`ModelError::Fixture`] where it cannot be made or written.
    pub fn materialize(&self, root: &Path) -> Result<ModelFixture, ModelError> {
        let failed = |source| ModelError::Fixture { name: self.name.clone(), source };
        let unknown = || ModelError::Unknown { name: self.name.clone(), known: built_in_names() };
        let fixture = match &self.source {
            Source::Folder(dir) => {
                let (name, config) = (self.name.clone(), self.facts.clone());
                return Ok(ModelFixture { name, dir: dir.clone(), config, golden: None, weights_sha256: None });
            }
            Source::Tiny => fixtures::tiny(),
            Source::Oracle(name) => fixtures::oracle_case(name).ok_or_else(unknown)?,
            Source::Preset(name) => fixtures::preset(name, PRESET_SEED).map_err(failed)?,
            Source::Synthetic(spec, seed) => fixtures::in_memory(&self.name, spec, *seed).map_err(failed)?,
        };
        let dir = root.join(&self.name);
        fixture.write_to(&dir).map_err(failed)?;
        Ok(ModelFixture {
            name: self.name.clone(),
            dir,
            config: self.facts.clone(),
            golden: self.golden.clone(),
            weights_sha256: Some(fixture.sha256()),
        })
    }
}

fn built_in_names() -> Vec<String> {
    let presets = fixtures::presets().iter().map(|p| p.name);
    std::iter::once(TINY).chain(fixtures::ORACLE_CASES.iter().copied()).chain(presets).map(str::to_string).collect()
}

fn golden_case(model: &str) -> Option<String> {
    golden::cases().iter().find(|case| **case == model).map(|case| (*case).to_string())
}

fn preset_facts(spec: &fixtures::Spec) -> ModelFacts {
    ModelFacts {
        vocab_size: spec.vocab,
        max_positions: spec.context,
        hidden_size: spec.hidden,
        intermediate_size: spec.ffn,
        layers: spec.layers,
        heads: spec.heads,
        kv_heads: spec.kv_heads,
        head_dim: spec.hidden / spec.heads.max(1),
        rope_theta: spec.rope_theta,
        rms_eps: spec.eps,
        tied: spec.tied,
        bos: Some(spec.bos),
        eos: match spec.eos {
            fixtures::Eos::One(id) => vec![id],
            fixtures::Eos::Two(ids) => ids.to_vec(),
            _ => Vec::new(),
        },
        has_tokenizer: false,
        prompts: PromptShape::default(),
    }
}

fn read_facts(dir: &Path) -> Result<ModelFacts, ModelError> {
    let path = dir.join("config.json");
    let bytes = std::fs::read(&path)
        .map_err(|e| ModelError::Config { path: path.clone(), reason: format!("cannot be read: {e}") })?;
    parse_facts(&bytes, dir.join("tokenizer.json").is_file()).map_err(|reason| ModelError::Config { path, reason })
}

/// The fields of `config.json` that matter here, with the defaults of `BitNetConfig` for those that may be left out.
#[derive(Deserialize)]
struct HfConfig {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    max_position_embeddings: Option<usize>,
    rope_theta: Option<f64>,
    rope_parameters: Option<RopeParameters>,
    rms_norm_eps: Option<f64>,
    tie_word_embeddings: Option<bool>,
    bos_token_id: Option<u32>,
    eos_token_id: Option<EosIds>,
}

#[derive(Deserialize)]
struct RopeParameters {
    rope_theta: Option<f64>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum EosIds {
    One(u32),
    Many(Vec<u32>),
}

fn parse_facts(bytes: &[u8], has_tokenizer: bool) -> Result<ModelFacts, String> {
    let config: HfConfig = serde_json::from_slice(bytes).map_err(|e| format!("not a model configuration: {e}"))?;
    let heads = config.num_attention_heads;
    let facts = ModelFacts {
        vocab_size: config.vocab_size,
        max_positions: config.max_position_embeddings.unwrap_or(2048),
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        layers: config.num_hidden_layers,
        heads,
        kv_heads: config.num_key_value_heads.unwrap_or(heads),
        head_dim: config.hidden_size.checked_div(heads).ok_or("num_attention_heads is zero")?,
        rope_theta: config.rope_parameters.and_then(|p| p.rope_theta).or(config.rope_theta).unwrap_or(500_000.0),
        rms_eps: config.rms_norm_eps.unwrap_or(1e-5),
        tied: config.tie_word_embeddings.unwrap_or(false),
        bos: config.bos_token_id,
        eos: match config.eos_token_id {
            None => Vec::new(),
            Some(EosIds::One(id)) => vec![id],
            Some(EosIds::Many(ids)) => ids,
        },
        has_tokenizer,
        prompts: PromptShape::default(),
    };
    let counts = [facts.vocab_size, facts.max_positions, facts.hidden_size, facts.intermediate_size, facts.layers];
    if counts.contains(&0) || facts.kv_heads == 0 {
        return Err("a dimension is zero".to_string());
    }
    Ok(facts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_preset_described_by_its_spec_is_what_its_config_says() {
        for model in Model::built_in() {
            let Source::Preset(name) = model.source else { continue };
            let fixture = fixtures::preset(name, PRESET_SEED).expect("preset");
            let parsed = parse_facts(fixture.config_json(), false).expect("config");
            assert_eq!(parsed, model.facts, "{name}");
        }
    }

    #[test]
    fn built_in_models_have_unique_names_and_tiny_is_first() {
        let names: Vec<String> = Model::built_in().iter().map(|m| m.name.clone()).collect();
        assert_eq!(names, built_in_names());
        let unique: std::collections::BTreeSet<&String> = names.iter().collect();
        assert_eq!(unique.len(), names.len());
        assert_eq!(names[0], TINY);
    }

    #[test]
    fn the_oracle_takes_small_models_only() {
        let facts = |name| Model::built_in().into_iter().find(|m| m.name() == name).expect("built in").facts().clone();
        let tiny = facts(TINY);
        assert!(tiny.within_the_oracle() && facts("gqa4-tied-f16").within_the_oracle());
        let large = ModelFacts { hidden_size: 2560, intermediate_size: 6912, layers: 30, vocab_size: 128_256, ..tiny };
        assert!(!large.within_the_oracle());
        assert!(!ModelFacts { hidden_size: usize::MAX, ..large }.within_the_oracle());
    }

    #[test]
    fn parameters_are_those_in_the_file() {
        let model = fixtures::preset("gqa2-untied-f32", PRESET_SEED).expect("preset");
        let facts = parse_facts(model.config_json(), false).expect("config");
        let file = safetensors::SafeTensors::deserialize(model.weights()).expect("weights");
        let trits = |name: &str| name.ends_with("proj.weight");
        let counted: usize = file
            .tensors()
            .iter()
            .filter(|(name, _)| !name.ends_with("weight_scale"))
            .map(|(name, view)| view.shape().iter().product::<usize>() * if trits(name) { 4 } else { 1 })
            .sum();
        // Of the norms only the widest is counted: the rest is a few thousandths.
        let off = facts.parameters().abs_diff(counted as u64) as f64 / counted as f64;
        assert!(off < 0.01, "{} for {counted}", facts.parameters());
    }

    #[test]
    fn every_golden_case_has_its_model() {
        let models = Model::built_in();
        for case in golden::cases() {
            assert!(models.iter().any(|m| m.golden() == Some(case)), "no built-in model for golden case {case}");
        }
    }

    #[test]
    fn both_rope_spellings_and_all_eos_spellings_are_read() {
        let base =
            r#""vocab_size":8,"hidden_size":8,"intermediate_size":8,"num_hidden_layers":1,"num_attention_heads":2"#;
        let facts = |extra: &str| parse_facts(format!("{{{base}{extra}}}").as_bytes(), false).expect("config");
        assert_eq!(facts(r#","rope_theta":7.0"#).rope_theta, 7.0);
        assert_eq!(facts(r#","rope_parameters":{"rope_theta":9.0}"#).rope_theta, 9.0);
        assert_eq!(facts("").kv_heads, 2);
        assert!(facts(r#","eos_token_id":null"#).eos.is_empty());
        assert_eq!(facts(r#","eos_token_id":3"#).eos, [3]);
        assert_eq!(facts(r#","eos_token_id":[3,4]"#).eos, [3, 4]);
        assert!(parse_facts(br#"{"vocab_size":8}"#, false).is_err());
        assert!(parse_facts(base.replace(":2", ":0").as_bytes(), false).is_err());
    }
}
