//! Comparing two files of logits position by position.

use std::path::Path;

use safetensors::{Dtype, SafeTensors};

use crate::GoldenError;
use crate::metrics::{kl_divergence, max_abs_diff, nmse, pearson, slope, top1};

/// One position of one sequence, compared.
#[derive(Debug, Clone)]
pub struct Position {
    /// Name of the tensor.
    pub tensor: String,
    /// Number of the sequence in its batch.
    pub sequence: usize,
    /// Position in the sequence.
    pub position: usize,
    /// Largest absolute difference.
    pub max_abs: f64,
    /// Pearson correlation.
    pub pearson: f64,
    /// Divergence of A from B in nats.
    pub kl: f64,
    /// Normalised mean squared error.
    pub nmse: f64,
    /// Slope of A over B.
    pub slope: f64,
    /// Whether both have the same most likely token.
    pub top1_agrees: bool,
}

/// Logits \[B,T,V\] by tensor name.
#[derive(Debug, Clone)]
struct Logits {
    name: String,
    shape: [usize; 3],
    values: Vec<f32>,
}

/// Compares the logits of two files, worst position first (largest difference; a NaN is worst of all).
///
/// Both golden files: tensors of the same name. Otherwise one tensor of each: `pick_a` and `pick_b` name them, and may be
/// left out where the file has a single one, or a single one of the other's shape.
pub fn diff(a: &Path, b: &Path, pick_a: Option<&str>, pick_b: Option<&str>) -> Result<Vec<Position>, GoldenError> {
    let (a_all, b_all) = (read(a, pick_a)?, read(b, pick_b)?);
    let mut pairs: Vec<(&Logits, &Logits)> =
        a_all.iter().filter_map(|a| Some((a, b_all.iter().find(|b| a.name == b.name)?))).collect();
    if pairs.is_empty() {
        let same_shape = |one: &Logits, many: &[Logits]| many.iter().filter(|m| m.shape == one.shape).count();
        pairs = match (a_all.as_slice(), b_all.as_slice()) {
            ([a], many) if same_shape(a, many) == 1 => {
                many.iter().filter(|b| b.shape == a.shape).map(|b| (a, b)).collect()
            }
            (many, [b]) if same_shape(b, many) == 1 => {
                many.iter().filter(|a| a.shape == b.shape).map(|a| (a, b)).collect()
            }
            _ => {
                return Err(GoldenError::Incomparable(format!(
                    "no unique pair of tensors to compare; A has {}; B has {}",
                    list(&a_all),
                    list(&b_all)
                )));
            }
        };
    }
    let mut positions = Vec::new();
    for (a, b) in pairs {
        if a.shape != b.shape {
            return Err(GoldenError::Incomparable(format!(
                "A's {} has shape {:?}, B's {} {:?}",
                a.name, a.shape, b.name, b.shape
            )));
        }
        let [_, seq, vocab] = a.shape;
        let rows = a.values.chunks_exact(vocab.max(1)).zip(b.values.chunks_exact(vocab.max(1)));
        positions.extend(rows.enumerate().map(|(i, (x, y))| Position {
            tensor: b.name.clone(),
            sequence: i / seq.max(1),
            position: i % seq.max(1),
            max_abs: max_abs_diff(x, y),
            pearson: pearson(x, y),
            kl: kl_divergence(x, y),
            nmse: nmse(x, y),
            slope: slope(x, y),
            top1_agrees: top1(x).is_some() && top1(x) == top1(y),
        }));
    }
    // total_cmp puts a positive NaN above everything; a NaN of either sign is worst here.
    let rank = |p: &Position| {
        if p.max_abs.is_nan() { f64::INFINITY } else { p.max_abs }
    };
    positions.sort_by(|x, y| rank(y).total_cmp(&rank(x)));
    Ok(positions)
}

/// The logits of a file: the tensor `logits`, or every tensor whose name ends in `.logits`; only `pick` if it is given.
fn read(path: &Path, pick: Option<&str>) -> Result<Vec<Logits>, GoldenError> {
    let file = path.display().to_string();
    let bytes = std::fs::read(path).map_err(GoldenError::io(path))?;
    let tensors = SafeTensors::deserialize(&bytes).map_err(|e| GoldenError::format(&file, e))?;
    let mut found = Vec::new();
    for (name, view) in tensors.iter() {
        let wanted = match pick {
            Some(pick) => name == pick,
            None => name == "logits" || name.ends_with(".logits"),
        };
        if !wanted {
            continue;
        }
        let shape = match (view.dtype(), view.shape()) {
            (Dtype::F32, &[b, t, v]) => [b, t, v],
            (dtype, shape) => {
                return Err(GoldenError::format(
                    &file,
                    format!("{name} is {dtype:?} {shape:?}, not f32 [batch, seq, vocab]"),
                ));
            }
        };
        let values = view.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        found.push(Logits { name: name.to_owned(), shape, values });
    }
    if found.is_empty() {
        let names = tensors.names().into_iter().take(20).collect::<Vec<_>>().join(", ");
        let wanted = pick.unwrap_or("logits");
        return Err(GoldenError::format(&file, format!("no tensor {wanted:?}; it has {names}")));
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

fn list(all: &[Logits]) -> String {
    all.iter().map(|l| format!("{} {:?}", l.name, l.shape)).collect::<Vec<_>>().join(", ")
}
