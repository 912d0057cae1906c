//! Checking the committed data: recompute, compare, measure.

use std::collections::BTreeSet;

use crate::cases::{PROMPTS_JSON, prompts};
use crate::file::{Data, Derivation, GoldenFile};
use crate::manifest::{self, committed, sha256};
use crate::{Gap, GoldenError, data, derive};

/// Bound on the gap of the two derivations in the fp32 semantics. Both are f64 and are stored as f32: where they round
/// to neighbouring floats, 9.5e-7 at a logit between 8 and 16. Measured: see `MANIFEST.json`. The smallest fault known
/// to show (a wrong epsilon) moves logits by 1.8e-4.
pub const FP32_TOLERANCE: f64 = 1e-6;

/// Bound in the w1.58a8 semantics at positions without a rounding flip, where transformers' f32 sums remain: 4e-6 in
/// earlier evaluations of this kind. One flip moves a row by 0.1.
pub const FLIP_FREE_TOLERANCE: f64 = 1e-5;

/// The result of [`verify_case`].
#[derive(Debug, Clone)]
pub struct Verdict {
    /// The case.
    pub case: String,
    /// The gap between the committed derivations.
    pub gap: Gap,
    /// What is wrong; empty when all is well.
    pub breaches: Vec<String>,
}

/// Recomputes a case with the oracle and checks the committed data: the files' hashes, the model's hash, equality with
/// the recomputed values, the manifest's figures, and the gap between the derivations. `progress` is called after each
/// position.
pub fn verify_case(name: &str, progress: &mut dyn FnMut()) -> Result<Verdict, GoldenError> {
    let prompts = prompts()?;
    let case = prompts.case(name)?;
    let manifest = committed()?;
    let files = Derivation::ALL.map(|d| data::embedded(name, d).unwrap_or_default());
    let mut breaches = Vec::new();

    if manifest.prompts_sha256 != sha256(PROMPTS_JSON) || manifest.new_tokens != prompts.new_tokens {
        breaches.push("prompts.json is not the one that MANIFEST.json names".to_owned());
    }
    let record = manifest::record(case, prompts.new_tokens, files)?;
    let recorded = manifest.case(name)?;
    if record.model != recorded.model {
        breaches.push(format!("the model is {:?}, the manifest says {:?}", record.model, recorded.model));
    }
    for (seen, said) in record.derivations.iter().zip(&recorded.derivations) {
        if seen != said {
            breaches.push(format!("{}.safetensors is {seen:?}, the manifest says {said:?}", seen.name));
        }
    }
    if (&record.prompts, &record.trace, record.gap) != (&recorded.prompts, &recorded.trace, recorded.gap) {
        breaches.push(format!("the manifest's prompts or gap differ from the measured {:?}", record.gap));
    }

    let file = format!("{name}/oracle.safetensors");
    let stored = GoldenFile::parse(&file, files[0])?;
    let computed = derive::derive(case, prompts.new_tokens, progress)?;
    breaches.extend(difference(&stored, &computed).map(|what| format!("{file}: {what}")));

    let gap = record.gap;
    if gap.fp32_max_abs.is_nan() || gap.fp32_max_abs > FP32_TOLERANCE {
        breaches.push(format!("fp32: the derivations differ by {:.3e}, above {FP32_TOLERANCE:.0e}", gap.fp32_max_abs));
    }
    if gap.w158a8_flip_free_max_abs.is_nan() || gap.w158a8_flip_free_max_abs > FLIP_FREE_TOLERANCE {
        breaches.push(format!(
            "w1.58a8: the derivations differ by {:.3e} at a position without a flip, above {FLIP_FREE_TOLERANCE:.0e}",
            gap.w158a8_flip_free_max_abs
        ));
    }
    if gap.w158a8_flip_free_rows == 0 {
        breaches.push("w1.58a8: no position is without a flip, so nothing was compared".to_owned());
    }
    Ok(Verdict { case: name.to_owned(), gap, breaches })
}

/// The first tensor in which two files differ, and by how much.
fn difference(stored: &GoldenFile, computed: &GoldenFile) -> Option<String> {
    if stored.made_by != computed.made_by {
        return Some(format!("made by {:?}, recomputed by {:?}", stored.made_by, computed.made_by));
    }
    let names: BTreeSet<&String> = stored.tensors.keys().chain(computed.tensors.keys()).collect();
    for name in names {
        match (stored.tensors.get(name), computed.tensors.get(name)) {
            (Some(a), Some(b)) if a == b => (),
            (Some((shape, Data::F32(a))), Some((other, Data::F32(b)))) if shape == other => {
                let worst = crate::metrics::max_abs_diff(a, b);
                return Some(format!("{name} differs from the recomputed values by up to {worst:.3e}"));
            }
            (Some(_), Some(_)) => {
                return Some(format!("{name} differs from the recomputed values"));
            }
            _ => {
                return Some(format!("{name} is not in both the file and the recomputation"));
            }
        }
    }
    None
}
