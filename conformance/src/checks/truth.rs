//! What the golden oracle says of a model that a check made for itself, and how near to it a backend must come.
//!
//! In `w1.58a8` semantics two right evaluations differ wherever an activation lies so near a rounding tie that float
//! noise decides its code. The oracle says how near: where no activation of a prompt is, every logit is known to a few
//! units in the last place, and a backend in float32 arithmetic is held to that. So prompts are chosen for it.

use super::edit::Model;
use super::stats::Rows;
use super::support::{prompt, reach};
use crate::backend::{Noise, Semantics};
use crate::case::{Context, Stop};
use crate::model::{ModelFacts, ModelFixture};
use crate::tolerance::{self, Tolerance};
use bitnet_contracts::{BitNetInference, InferenceError, ThreadSafeInference};
use fixtures::{Eos, GAUSSIAN_ZEROS, Layout, LinearClass, NormStyle, Preset, RopeSpelling, Spec, Storage};
use golden::oracle::Oracle;
use std::cell::OnceCell;
use std::collections::HashMap;
use std::fmt::Display;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

/// A small model that a check starts from: two layers, grouped heads, its own head, f32, every size a multiple of 16.
pub(super) const SMALL: Spec = Spec {
    hidden: 32,
    ffn: 48,
    layers: 2,
    heads: 4,
    kv_heads: 2,
    vocab: 64,
    context: 16,
    tied: false,
    rope_theta: 10_000.0,
    rope: RopeSpelling::Theta,
    eps: 1e-5,
    storage: Storage::F32,
    layout: Layout::Packed(LinearClass::AutoBitLinear),
    norms: NormStyle::Plain,
    zeros: GAUSSIAN_ZEROS,
    bos: 1,
    eos: Eos::One(2),
    shards: 1,
};

/// A model so small that long sequences take no time.
pub(super) const NARROW: Spec = Spec { hidden: 16, ffn: 16, layers: 1, heads: 2, kv_heads: 1, vocab: 48, ..SMALL };

/// The seed of the models that checks make.
const SEED: u64 = 3;

/// Prompts among which the clearest of ties is looked for.
const CANDIDATES: u64 = 40;

/// What was made or evaluated before in this process: the same question has the same answer for every backend.
struct Memo<K, V>(LazyLock<Mutex<HashMap<K, V>>>);

impl<K: Eq + Hash, V: Clone> Memo<K, V> {
    const fn new() -> Self {
        Self(LazyLock::new(Mutex::default))
    }

    fn get(&self, key: K, make: impl FnOnce() -> Result<V, Stop>) -> Result<V, Stop> {
        let known = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(value) = known().get(&key) {
            return Ok(value.clone());
        }
        let value = make()?;
        known().insert(key, value.clone());
        Ok(value)
    }
}

/// A model of this specification, in memory.
pub(super) fn synthetic(ctx: &Context<'_>, name: &str, spec: &Spec) -> Result<Model, Stop> {
    static DRAWN: Memo<String, Arc<Model>> = Memo::new();
    let drawn = DRAWN.get(format!("{spec:?}"), || {
        let dir = ctx.scratch().join(format!("{name}-drawn"));
        let preset = Preset { name: "drawn", doc: "", spec: spec.clone() };
        fixtures::synthesize(&preset, SEED, &dir, &mut |_| ())
            .map_err(|e| Stop::Inconclusive(format!("model {name}: {e}")))?;
        Ok(Arc::new(Model::read(&dir)?))
    })?;
    Ok(Model::clone(&drawn))
}

/// A model on disk as a check made it, and what the oracle makes of it.
pub(super) struct Subject {
    /// The folder as a fixture.
    pub fixture: ModelFixture,
    /// Of the folder's contents.
    fingerprint: u64,
    /// Read when it is first asked for something new.
    oracle: OnceCell<Oracle>,
    semantics: Semantics,
}

/// Attention probabilities of a sequence, layer after layer: `[position][head][position seen]`.
pub(super) type Attention = Arc<Vec<Vec<f64>>>;

/// Logits as they should be.
pub(super) struct Truth {
    /// The prompt.
    pub tokens: Vec<u32>,
    /// `[position × vocab]`.
    pub logits: Vec<f32>,
    /// Whether float noise can move no activation to another code.
    pub clear: bool,
    /// The same of each position's own activations alone.
    pub clear_rows: Vec<bool>,
    vocab: usize,
}

impl Truth {
    /// The logits of one position.
    pub(super) fn row(&self, position: usize) -> &[f32] {
        &self.logits[position * self.vocab..][..self.vocab]
    }
}

impl Subject {
    /// Writes a model into a folder of the case's own.
    pub(super) fn write(ctx: &Context<'_>, name: &str, model: &Model) -> Result<Self, Stop> {
        let dir = ctx.scratch().join(name);
        model.write(&dir)?;
        Self::of(ctx, name, &dir, model)
    }

    /// Takes a folder as it is.
    pub(super) fn open(ctx: &Context<'_>, name: &str, dir: &Path) -> Result<Self, Stop> {
        Self::of(ctx, name, dir, &Model::read(dir)?)
    }

    fn of(ctx: &Context<'_>, name: &str, dir: &Path, model: &Model) -> Result<Self, Stop> {
        let mut hasher = DefaultHasher::new();
        model.config.to_string().hash(&mut hasher);
        for (name, held) in &model.tensors {
            (name, &held.shape, format!("{:?}", held.dtype), &held.data).hash(&mut hasher);
        }
        let fixture = ModelFixture::open(name, dir)?;
        let semantics = ctx.capabilities().semantics;
        Ok(Self { fixture, fingerprint: hasher.finish(), oracle: OnceCell::new(), semantics })
    }

    /// What the model's `config.json` says.
    pub(super) fn facts(&self) -> &ModelFacts {
        &self.fixture.config
    }

    /// A fresh engine of the backend under test.
    pub(super) fn engine(&self, ctx: &Context<'_>) -> Result<Box<dyn BitNetInference>, Stop> {
        let failed = |e: InferenceError| Stop::Unexpected(format!("model {}: create failed: {e}", self.fixture.name()));
        ctx.factory().create(&self.fixture).map_err(failed)
    }

    /// A fresh engine for many threads.
    pub(super) fn thread_safe(&self, ctx: &Context<'_>) -> Result<Arc<dyn ThreadSafeInference>, Stop> {
        let shared = ctx.factory().create_thread_safe(&self.fixture);
        let shared = shared.ok_or_else(|| Stop::Unexpected("create_thread_safe gives no engine".to_string()))?;
        shared.map_err(|e| Stop::Unexpected(format!("model {}: create_thread_safe failed: {e}", self.fixture.name())))
    }

    fn oracle(&self) -> Result<&Oracle, Stop> {
        if let Some(oracle) = self.oracle.get() {
            return Ok(oracle);
        }
        let oracle = Oracle::load(self.fixture.dir())
            .map_err(|e| Stop::Inconclusive(format!("model {}: {e}", self.fixture.name())))?;
        Ok(self.oracle.get_or_init(|| oracle))
    }

    /// The oracle's logits of a prompt.
    pub(super) fn truth(&self, tokens: &[u32]) -> Result<Arc<Truth>, Stop> {
        static TRUTHS: Memo<(u64, Semantics, Vec<u32>), Arc<Truth>> = Memo::new();
        TRUTHS.get((self.fingerprint, self.semantics, tokens.to_vec()), || {
            let oracle = self.oracle()?;
            let mut run = oracle.start(self.semantics.oracle());
            let mut logits = Vec::with_capacity(tokens.len() * oracle.vocab());
            let mut clear_rows = Vec::with_capacity(tokens.len());
            for &token in tokens {
                run.nearest_tie = f64::INFINITY;
                let row = run.step(token).map_err(|e| Stop::Inconclusive(e.to_string()))?;
                logits.extend(row.into_iter().map(|x| x as f32));
                clear_rows.push(run.nearest_tie >= tolerance::CLEAR_OF_TIES.limit());
            }
            let clear = clear_rows.iter().all(|clear| *clear);
            Ok(Arc::new(Truth { tokens: tokens.to_vec(), logits, clear, clear_rows, vocab: oracle.vocab() }))
        })
    }

    /// The prompt of this length that is the clearest of ties, among some that depend on the salt.
    pub(super) fn clear_prompt(&self, length: usize, salt: u64) -> Result<Arc<Truth>, Stop> {
        static CLEAREST: Memo<(u64, Semantics, usize, u64), Vec<u32>> = Memo::new();
        let tokens = CLEAREST.get((self.fingerprint, self.semantics, length, salt), || {
            let oracle = self.oracle()?;
            let mut best: Option<(f64, Vec<u32>)> = None;
            for candidate in 0..CANDIDATES {
                let tokens = prompt(self.facts(), length, (salt << 8) + candidate);
                let mut run = oracle.start(self.semantics.oracle());
                for &token in &tokens {
                    run.step(token).map_err(|e| Stop::Inconclusive(e.to_string()))?;
                }
                if best.as_ref().is_none_or(|(tie, _)| run.nearest_tie > *tie) {
                    best = Some((run.nearest_tie, tokens));
                }
            }
            Ok(best.map(|(_, tokens)| tokens).unwrap_or_default())
        })?;
        self.truth(&tokens)
    }

    /// The oracle's attention probabilities of a sequence.
    pub(super) fn attention(&self, tokens: &[u32]) -> Result<Attention, Stop> {
        static ATTENTIONS: Memo<(u64, Semantics, Vec<u32>), Attention> = Memo::new();
        ATTENTIONS.get((self.fingerprint, self.semantics, tokens.to_vec()), || {
            let mut run = self.oracle()?.start(self.semantics.oracle());
            run.attention = Some(Vec::new());
            for &token in tokens {
                run.step(token).map_err(|e| Stop::Inconclusive(e.to_string()))?;
            }
            Ok(Arc::new(run.attention.unwrap_or_default()))
        })
    }
}

/// Asserts that logits are the true ones, as far as the backend's semantics and noise let them be.
#[track_caller]
pub(super) fn check_truth(ctx: &mut Context<'_>, what: impl Display, seen: &[f32], truth: &Truth) -> bool {
    check_truth_within(ctx, what, seen, truth, &tolerance::FP32_LOGIT)
}

/// The same with another tolerance for `fp32` semantics.
#[track_caller]
pub(super) fn check_truth_within(
    ctx: &mut Context<'_>,
    what: impl Display,
    seen: &[f32],
    truth: &Truth,
    fp32: &'static Tolerance,
) -> bool {
    let (semantics, noise) = (ctx.capabilities().semantics, ctx.capabilities().noise);
    let reach = reach(&truth.logits).max(tolerance::SMALL_REACH.limit());
    match (semantics, noise, truth.clear) {
        (Semantics::Fp32, Noise::F32, _) => ctx.check_close_within(what, seen, &truth.logits, reach, fp32),
        (Semantics::W158A8, Noise::F32, true) => {
            ctx.check_close_within(what, seen, &truth.logits, reach, &tolerance::CLEAR_ROW)
        }
        _ => {
            if seen.len() != truth.logits.len() {
                return ctx.check_eq(format!("{what}: values"), seen.len(), truth.logits.len());
            }
            let mut rows = Rows::default();
            rows.add(seen, &truth.logits, truth.vocab);
            ctx.compared(seen.len());
            let (row, worst) = rows.worst_pearson();
            let what = format!("{what}: 1 - correlation of the worst row (row {row}) with the oracle");
            match noise {
                Noise::F32 => ctx.check_at_most(what, 1.0 - worst, tolerance::FP32_CORRELATION.limit()),
                Noise::Coarse => ctx.check_within(what, 1.0 - worst, &tolerance::COARSE_CORRELATION),
            }
        }
    }
}
