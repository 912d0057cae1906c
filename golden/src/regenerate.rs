//! Making the oracle's files and the manifest anew.

use std::io::Write;
use std::path::Path;

use crate::cases::{CaseSpec, prompts};
use crate::file::Derivation;
use crate::manifest::{self, Manifest};
use crate::{GoldenError, data, derive};

/// How far [`regenerate`] has come.
#[derive(Debug, Clone)]
pub struct Progress<'a> {
    /// The case at work.
    pub case: &'a str,
    /// Positions evaluated so far, of all cases.
    pub done: u64,
    /// Positions to evaluate.
    pub total: u64,
}

/// Evaluates the cases (all, or the named ones) with the oracle, and writes `CASE/oracle.safetensors` and `MANIFEST.json`
/// into `out`. A rerun gives the same bytes. The transformers files stay as they are; where `out` has none, the
/// committed ones are copied there. Records of cases that were not asked for are kept.
pub fn regenerate(
    out: &Path,
    only: &[String],
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Manifest, GoldenError> {
    let prompts = prompts()?;
    for name in only {
        prompts.case(name)?;
    }
    let asked = |case: &&CaseSpec| only.is_empty() || only.contains(&case.case);
    let total = prompts.cases.iter().filter(asked).map(|c| derive::work(c, prompts.new_tokens)).sum();
    let mut done = 0;
    let mut manifest = Manifest::new(&prompts);
    let manifest_path = out.join("MANIFEST.json");
    let before = std::fs::read(&manifest_path).ok().and_then(|json| manifest::parse(&json).ok());
    for case in &prompts.cases {
        if !asked(&case) {
            let kept = before.iter().flat_map(|m| &m.cases).find(|c| c.case == case.case);
            manifest.cases.extend(kept.cloned());
            continue;
        }
        let transformers = transformers_file(out, case)?;
        let end = done + derive::work(case, prompts.new_tokens);
        let file = derive::derive(case, prompts.new_tokens, &mut || {
            done += 1;
            progress(Progress { case: &case.case, done, total });
        })?;
        // A context that ends early leaves steps out.
        done = end;
        progress(Progress { case: &case.case, done, total });
        let name = format!("{}/oracle.safetensors", case.case);
        let oracle = file.to_bytes(&name)?;
        write_atomically(&out.join(&name), &oracle)?;
        manifest.cases.push(manifest::record(case, prompts.new_tokens, [&oracle, &transformers])?);
    }
    write_atomically(&manifest_path, &manifest.to_json()?)?;
    Ok(manifest)
}

/// The second derivation of a case: the file in `out`, or else the committed one, which is then copied there.
fn transformers_file(out: &Path, case: &CaseSpec) -> Result<Vec<u8>, GoldenError> {
    let path = out.join(&case.case).join("transformers.safetensors");
    match std::fs::read(&path) {
        Ok(bytes) => Ok(bytes),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let bytes = data::embedded(&case.case, Derivation::Transformers).ok_or_else(|| {
                GoldenError::format(
                    &path.display().to_string(),
                    "no such file: run golden/transformers/make_golden.py first",
                )
            })?;
            write_atomically(&path, bytes)?;
            Ok(bytes.to_vec())
        }
        Err(e) => Err(GoldenError::io(&path)(e)),
    }
}

/// Writes a whole file or none: under a temporary name in the same folder, then renamed.
fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), GoldenError> {
    let dir = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(dir).map_err(GoldenError::io(dir))?;
    let write = || {
        let mut builder = tempfile::Builder::new();
        #[cfg(unix)]
        {
            // Temporary files are private by default; this one is to stay.
            use std::os::unix::fs::PermissionsExt;
            builder.permissions(std::fs::Permissions::from_mode(0o644));
        }
        let mut file = builder.tempfile_in(dir)?;
        file.write_all(bytes)?;
        file.persist(path).map_err(|e| e.error)
    };
    write().map_err(GoldenError::io(path))?;
    Ok(())
}
