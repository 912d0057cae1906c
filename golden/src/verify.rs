//! Checking the committed data: recompute, compare, measure.

use std::collections::BTreeSet;

use crate::cases::{PROMPTS_JSON, prompts};
use crate::file::{Data, Derivation, GoldenFile};
use crate::manifest::{self, Manifest, committed, sha256};
use crate::{Gap, GoldenError, data, derive};

/// Bound on the gap of the two derivations in the fp32 semantics. Both are f64 and are stored as f32: where they round
/// to neighbouring floats, 9.5e-7 at a logit between 8 and 16. Measured: see `MANIFEST.json`. The smallest fault known
/// to show (a wrong epsilon) moves logits by 1.8e-4.
pub const FP32_TOLERANCE: f64 = 1e-6;

/// Bound on the gap in the w1.58a8 semantics at a position without a rounding flip: 1e-5, or 2e-6 of the row's largest
/// logit where that is more.
///
/// What is left there is the noise of transformers' f32 sums, which grows with the logits. Measured: below 8e-6 in every
/// such row of the synthetic cases (logits up to 12); 1.5e-5 at a logit of 15, or 1.0e-6 of it, in the trained model, where
/// 4 rows of 78 are above 1e-5 (transformers' own two attention implementations are 1.05e-5 apart there). A single flip
/// moves a row by about 0.1.
pub fn flip_free_tolerance(row: &[f32]) -> f64 {
    let largest = row.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    (2e-6 * f64::from(largest)).max(1e-5)
}

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
    let files = Derivation::ALL.map(|d| data::embedded(name, d).unwrap_or_default());
    verify_files(name, &committed()?, files, progress)
}

fn verify_files(
    name: &str,
    manifest: &Manifest,
    files: [&[u8]; 2],
    progress: &mut dyn FnMut(),
) -> Result<Verdict, GoldenError> {
    let prompts = prompts()?;
    let case = prompts.case(name)?;
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
    if gap.w158a8_flip_free_beyond > 0 {
        breaches.push(format!(
            "w1.58a8: the derivations are further apart than rounding noise at {} positions without a flip, by up to {:.3e}",
            gap.w158a8_flip_free_beyond, gap.w158a8_flip_free_max_abs
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

#[cfg(test)]
mod tests {
    use super::*;

    const CASE: &str = "odd-vocab-257";

    /// Changes one number of one of the two files, brings the manifest up to date with it, and verifies.
    fn breaches_after(which: Derivation, tensor: &str, change: f32) -> Vec<String> {
        let mut files = Derivation::ALL.map(|d| data::embedded(CASE, d).unwrap().to_vec());
        let index = Derivation::ALL.iter().position(|d| *d == which).unwrap();
        let mut file = GoldenFile::parse(CASE, &files[index]).unwrap();
        let Some((_, Data::F32(values))) = file.tensors.get_mut(tensor) else { panic!("no {tensor}") };
        values[5] += change;
        files[index] = file.to_bytes(CASE).unwrap();
        let files = [files[0].as_slice(), files[1].as_slice()];
        let prompts = prompts().unwrap();
        let mut manifest = committed().unwrap();
        let record = manifest.cases.iter_mut().find(|c| c.case == CASE).unwrap();
        *record = manifest::record(prompts.case(CASE).unwrap(), prompts.new_tokens, files).unwrap();
        verify_files(CASE, &manifest, files, &mut || ()).unwrap().breaches
    }

    #[test]
    fn an_altered_file_is_a_breach_even_when_the_manifest_agrees_with_it() {
        let of = |which, tensor, change| breaches_after(which, tensor, change).join("; ");
        assert_eq!(of(Derivation::Transformers, "b1_t1.fp32.logits", 0.0), "");
        let oracle = of(Derivation::Oracle, "b1_t1.fp32.logits", 1e-6);
        assert!(oracle.contains("recomputed"), "{oracle}");
        let fp32 = of(Derivation::Transformers, "b1_t1.fp32.logits", 1e-5);
        assert!(fp32.contains("fp32"), "{fp32}");
        let int8 = of(Derivation::Transformers, "b1_t1.w1.58a8.logits", 1e-4);
        assert!(int8.contains("w1.58a8"), "{int8}");
        let nan = of(Derivation::Transformers, "b1_t1.w1.58a8.logits", f32::NAN);
        assert!(nan.contains("w1.58a8"), "{nan}");
    }

    #[test]
    fn a_file_that_the_manifest_does_not_name_is_a_breach() {
        let mut manifest = committed().unwrap();
        let record = manifest.cases.iter_mut().find(|c| c.case == CASE).unwrap();
        record.derivations[1].sha256.replace_range(0..1, "x");
        record.model.sha256.clear();
        let files = Derivation::ALL.map(|d| data::embedded(CASE, d).unwrap());
        let breaches = verify_files(CASE, &manifest, files, &mut || ()).unwrap().breaches;
        assert_eq!(breaches.len(), 2, "{breaches:?}");
    }
}
