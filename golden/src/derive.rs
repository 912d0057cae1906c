//! The first derivation: a golden file from the oracle.

use std::collections::BTreeMap;

use crate::cases::{CaseSpec, PromptSpec};
use crate::file::{GoldenFile, key};
use crate::metrics::{margin, top1};
use crate::oracle::{ORACLE_VERSION, Oracle, OracleError, Semantics};
use crate::{GoldenError, metrics};

/// What the oracle's files name as their maker.
pub(crate) fn made_by() -> String {
    format!("golden oracle {ORACLE_VERSION}")
}

/// Positions that [`derive`] evaluates for a case, for a progress bar.
pub(crate) fn work(case: &CaseSpec, new_tokens: usize) -> u64 {
    2 * case.prompts.iter().map(|p| (p.batch() * (p.seq() + new_tokens)) as u64).sum::<u64>()
}

/// Evaluates every prompt of a case in both semantics. `progress` is called after each position.
pub(crate) fn derive(
    case: &CaseSpec,
    new_tokens: usize,
    progress: &mut dyn FnMut(),
) -> Result<GoldenFile, GoldenError> {
    let fixture = case.model()?;
    let shards: Vec<&[u8]> = fixture.weight_files().map(|(_, bytes)| bytes).collect();
    let oracle = Oracle::from_shards(fixture.config_json(), &shards).map_err(GoldenError::oracle(&case.case))?;
    derive_by(&oracle, case, new_tokens, progress)
}

/// The same of a model that is read already.
pub(crate) fn derive_by(
    oracle: &Oracle,
    case: &CaseSpec,
    new_tokens: usize,
    progress: &mut dyn FnMut(),
) -> Result<GoldenFile, GoldenError> {
    let mut file = GoldenFile { made_by: made_by(), ..GoldenFile::default() };
    for prompt in &case.prompts {
        let ids = prompt.input_ids.iter().flatten().map(|&id| i64::from(id)).collect();
        file.add_i64(format!("{}.input_ids", prompt.name), &[prompt.batch(), prompt.seq()], ids);
        let steps = new_tokens.min(oracle.context().saturating_sub(prompt.seq()));
        for semantics in Semantics::ALL {
            let traced = prompt.name == case.trace;
            let results = prompt.input_ids.iter().map(|ids| evaluate(oracle, ids, semantics, steps, traced, progress));
            let results = results.collect::<Result<Vec<_>, _>>().map_err(GoldenError::oracle(&case.case))?;
            write(&mut file, prompt, semantics, oracle, steps, results);
        }
    }
    Ok(file)
}

/// What one sequence gives.
struct Sequence {
    logits: Vec<f32>,
    codes: Vec<u64>,
    greedy: Vec<i64>,
    margins: Vec<f32>,
    trace: BTreeMap<String, Vec<f64>>,
}

fn evaluate(
    oracle: &Oracle,
    ids: &[u32],
    semantics: Semantics,
    steps: usize,
    traced: bool,
    progress: &mut dyn FnMut(),
) -> Result<Sequence, OracleError> {
    let mut run = oracle.start(semantics);
    run.trace = traced.then(BTreeMap::new);
    let mut logits = Vec::new();
    let mut last = Vec::new();
    for &id in ids {
        last = run.step(id)?;
        logits.extend(last.iter().map(|&x| x as f32));
        progress();
    }
    let trace = run.trace.take().unwrap_or_default();
    let codes = run.codes.clone();
    let (mut greedy, mut margins) = (Vec::new(), Vec::new());
    for step in 0..steps {
        let token = top1(&last).unwrap_or_default() as u32;
        greedy.push(i64::from(token));
        margins.push(margin(&last) as f32);
        if step + 1 < steps {
            last = run.step(token)?;
        }
        progress();
    }
    Ok(Sequence { logits, codes, greedy, margins, trace })
}

/// Puts the sequences of a prompt one after another into the file's tensors.
fn write(
    file: &mut GoldenFile,
    prompt: &PromptSpec,
    semantics: Semantics,
    oracle: &Oracle,
    steps: usize,
    of: Vec<Sequence>,
) {
    let (batch, seq) = (prompt.batch(), prompt.seq());
    let key = |what: &str| key(&prompt.name, semantics, what);
    file.add_f32(
        key("logits"),
        &[batch, seq, oracle.vocab()],
        of.iter().flat_map(|s| s.logits.iter().copied()).collect(),
    );
    file.add_i64(key("greedy"), &[batch, steps], of.iter().flat_map(|s| s.greedy.iter().copied()).collect());
    file.add_f32(key("greedy_margin"), &[batch, steps], of.iter().flat_map(|s| s.margins.iter().copied()).collect());
    if semantics == Semantics::W158A8 {
        // The same 64 bits, as the signed integers that PyTorch has.
        let codes = of.iter().flat_map(|s| s.codes.iter().map(|&code| code as i64)).collect();
        file.add_i64(key("codes"), &[batch, seq, oracle.layers(), 4], codes);
    }
    let mut trace: BTreeMap<&String, Vec<f32>> = BTreeMap::new();
    for (name, values) in of.iter().flat_map(|s| &s.trace) {
        trace.entry(name).or_default().extend(values.iter().map(|&x| x as f32));
    }
    for (name, values) in trace {
        let width = values.len() / (batch * seq).max(1);
        file.add_f32(format!("trace.{}.{name}", semantics.name()), &[batch, seq, width], values);
    }
}

/// The gap between the two derivations of a case, as the manifest records it.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Gap {
    /// Positions compared.
    pub rows: usize,
    /// Largest difference of any logit in the fp32 semantics.
    pub fp32_max_abs: f64,
    /// Positions whose int8 codes, and those of all earlier positions of the sequence, are the same in both derivations.
    pub w158a8_flip_free_rows: usize,
    /// How many of those positions have every logit within 1e-5.
    pub w158a8_flip_free_within_1e5: usize,
    /// How many of those positions are beyond [`crate::flip_free_tolerance`]: none, or `golden verify` fails.
    pub w158a8_flip_free_beyond: usize,
    /// Largest difference of any logit in those positions.
    pub w158a8_flip_free_max_abs: f64,
    /// Largest difference of any logit at any position.
    pub w158a8_max_abs: f64,
    /// Smallest Pearson correlation of any position.
    pub w158a8_worst_pearson: f64,
}

impl Gap {
    /// Share of the positions without a rounding flip.
    pub fn flip_free_share(&self) -> f64 {
        self.w158a8_flip_free_rows as f64 / self.rows.max(1) as f64
    }

    /// Measures two loaded derivations.
    pub(crate) fn measure(golden: &crate::Golden) -> Self {
        use crate::Derivation::{Oracle, Transformers};
        let mut gap = Gap {
            rows: 0,
            fp32_max_abs: 0.0,
            w158a8_flip_free_rows: 0,
            w158a8_flip_free_within_1e5: 0,
            w158a8_flip_free_beyond: 0,
            w158a8_flip_free_max_abs: 0.0,
            w158a8_max_abs: 0.0,
            w158a8_worst_pearson: 1.0,
        };
        // A NaN must not vanish in a maximum.
        let worse = |a: f64, b: f64| if b > a || b.is_nan() { b } else { a };
        for prompt in &golden.prompts {
            let rows = |s, d| prompt.rows(s, d);
            for (a, e) in rows(Semantics::Fp32, Oracle).zip(rows(Semantics::Fp32, Transformers)) {
                gap.fp32_max_abs = worse(gap.fp32_max_abs, metrics::max_abs_diff(a, e));
            }
            let both = rows(Semantics::W158A8, Oracle).zip(rows(Semantics::W158A8, Transformers));
            for ((a, e), flip_free) in both.zip(prompt.flip_free()) {
                let difference = metrics::max_abs_diff(a, e);
                gap.rows += 1;
                gap.w158a8_max_abs = worse(gap.w158a8_max_abs, difference);
                gap.w158a8_worst_pearson = -worse(-gap.w158a8_worst_pearson, -metrics::pearson(a, e));
                if flip_free {
                    gap.w158a8_flip_free_rows += 1;
                    gap.w158a8_flip_free_within_1e5 += usize::from(difference <= 1e-5);
                    // A NaN is beyond every tolerance.
                    let within = difference <= crate::flip_free_tolerance(e);
                    gap.w158a8_flip_free_beyond += usize::from(!within);
                    gap.w158a8_flip_free_max_abs = worse(gap.w158a8_flip_free_max_abs, difference);
                }
            }
        }
        for figure in [
            &mut gap.fp32_max_abs,
            &mut gap.w158a8_flip_free_max_abs,
            &mut gap.w158a8_max_abs,
            &mut gap.w158a8_worst_pearson,
        ] {
            // Nine digits: no more mean anything, and a JSON reader restores them exactly.
            *figure = format!("{figure:.8e}").parse().unwrap_or(*figure);
        }
        gap
    }
}
