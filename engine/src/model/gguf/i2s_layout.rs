//! Which of its two layouts an I2_S file has.
//!
//! Nothing in the bytes says it: read in the wrong one, the weights of a row are shuffled within blocks of 128 and every code is still
//! valid. What can give it away is the model. Columns of q, k, v, gate and up and rows of o and down belong to the same channels of the
//! residual stream, and in trained models channels differ in how many of their weights are zero, on both sides. Rows are in place in
//! either layout; so the layout in which the columns' profile goes with the rows' (either way) is the right one. In the embedded model
//! it is 9 standard deviations from chance in the right layout and 2 in the wrong one.

use bitnet_contracts::Result;

use super::contradiction;
use super::file::GgufFile;
use crate::model::description::ModelDescription;
use crate::ternary::{I2S, I2sLayout, PackedRows};

/// The key under which this engine writes the layout, a string: `x86` or `arm`.
pub const LAYOUT_KEY: &str = "bitnet.i2_s.layout";

/// Weights that are looked at; layers beyond are not needed.
const ENOUGH: usize = 64 << 20;
/// Correlations of channels without a relation scatter with a standard deviation of `1 / sqrt(channels)`. One layout must be this many
/// of them away from zero to be believed,
const SIGMAS: f64 = 5.0;
/// and this many further away than the other.
const MARGIN: f64 = 3.0;

/// What the weights say.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Evidence {
    For(I2sLayout),
    None,
}

/// The layout to read with: the caller's, the file's own key, what the weights suggest, x86.
///
/// # Errors
/// `ModelError::ValidationFailed` for an unknown name in the file's key, and when the weights clearly speak against x86 and nobody has
/// said which layout it is: that is more often a mistake than a file from ARM.
pub(super) fn choose(file: &GgufFile, d: &ModelDescription, said: Option<I2sLayout>) -> Result<I2sLayout> {
    let key = file.text(LAYOUT_KEY)?;
    let written = match &key {
        Some(name) => {
            Some(name.parse::<I2sLayout>().map_err(|e| contradiction(file.path(), format_args!("{LAYOUT_KEY}: {e}")))?)
        }
        None => None,
    };
    if let (Some(said), Some(written)) = (said, written)
        && said != written
    {
        return Err(contradiction(
            file.path(),
            format_args!("{LAYOUT_KEY} is {}, not {} as asked for", written.name(), said.name()),
        ));
    }
    if let Some(layout) = written {
        return Ok(layout);
    }
    if let Some(layout) = said {
        if let Evidence::For(other) = evidence(file, d)
            && other != layout
        {
            log::warn!(
                "{}: read in the {} layout of I2_S, though its weights look like {}",
                file.path().display(),
                layout.name(),
                other.name()
            );
        }
        return Ok(layout);
    }
    match evidence(file, d) {
        Evidence::For(I2sLayout::X86) => Ok(I2sLayout::X86),
        Evidence::For(I2sLayout::Arm) => Err(contradiction(
            file.path(),
            "the I2_S weights look like the layout of ARM, and the file does not say: name the layout (--i2s-layout arm, or x86)",
        )),
        Evidence::None => {
            log::warn!(
                "{}: nothing tells in which of its two layouts the I2_S weights are; read as x86 (see --i2s-layout)",
                file.path().display()
            );
            Ok(I2sLayout::X86)
        }
    }
}

fn evidence(file: &GgufFile, d: &ModelDescription) -> Evidence {
    let Some((read, written)) = profiles(file, d) else { return Evidence::None };
    let mut shuffled = vec![0.0; read.len()];
    for (column, sum) in read.iter().enumerate() {
        shuffled[on_arm(column)] = *sum;
    }
    let score = |read: &[f64]| pearson(read, &written).abs() * (read.len() as f64).sqrt();
    let (x86, arm) = (score(&read), score(&shuffled));
    log::debug!("{}: I2_S layout scores {x86:.1} (x86), {arm:.1} (ARM)", file.path().display());
    match (x86.max(arm) > SIGMAS, x86 - arm) {
        (true, margin) if margin > MARGIN => Evidence::For(I2sLayout::X86),
        (true, margin) if margin < -MARGIN => Evidence::For(I2sLayout::Arm),
        _ => Evidence::None,
    }
}

/// Where the weight that x86 has in column `column` is for ARM.
fn on_arm(column: usize) -> usize {
    let (block, within) = (column / 128, column % 128);
    let (k, j) = (within / 32, within % 32);
    128 * block + 64 * (j / 16) + 16 * k + j % 16
}

/// Non-zero weights, by channel, of the matrices that read the residual stream (columns, as x86 has them) and that write it (rows).
fn profiles(file: &GgufFile, d: &ModelDescription) -> Option<(Vec<f64>, Vec<f64>)> {
    const PARTS: [(&str, bool); 7] = [
        ("attn_q", true),
        ("attn_k", true),
        ("attn_v", true),
        ("ffn_gate", true),
        ("ffn_up", true),
        ("attn_output", false),
        ("ffn_down", false),
    ];
    let h = d.hidden_size;
    let (mut read, mut written) = (vec![0f64; h], vec![0f64; h]);
    let mut seen = 0;
    for layer in 0..d.num_layers {
        if !h.is_multiple_of(128) || seen >= ENOUGH {
            break;
        }
        for (part, reads) in PARTS {
            let name = format!("blk.{layer}.{part}.weight");
            let tensor = file.tensors().get(&name).filter(|t| t.ty == super::TensorType::I2S)?;
            let (rows, columns) = tensor.matrix();
            if (if reads { columns } else { rows }) != h {
                return None;
            }
            let view = I2S::new(&name, file.data(tensor).ok()?, rows, columns, I2sLayout::X86).ok()?;
            let mut trits = vec![0i8; columns];
            for r in 0..rows {
                view.row(&name, r, &mut trits).ok()?;
                if reads {
                    read.iter_mut().zip(&trits).for_each(|(sum, &t)| *sum += f64::from(t.abs()));
                } else if let Some(written) = written.get_mut(r) {
                    *written += trits.iter().map(|&t| f64::from(t.abs())).sum::<f64>() / columns as f64;
                }
            }
            seen += rows * columns;
        }
    }
    (seen > 0).then_some((read, written))
}

/// 0 when one side is constant.
fn pearson(a: &[f64], b: &[f64]) -> f64 {
    let n = a.len() as f64;
    let (mean_a, mean_b) = (a.iter().sum::<f64>() / n, b.iter().sum::<f64>() / n);
    let (mut ab, mut aa, mut bb) = (0.0, 0.0, 0.0);
    for (x, y) in a.iter().zip(b) {
        let (x, y) = (x - mean_a, y - mean_b);
        ab += x * y;
        aa += x * x;
        bb += y * y;
    }
    if aa > 0.0 && bb > 0.0 { ab / (aa * bb).sqrt() } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ternary::i2_s;

    #[test]
    fn columns_go_where_the_other_layout_has_them() {
        for column in 0..256 {
            let mut trits = vec![0i8; 256];
            trits[column] = 1;
            let bytes = i2_s::pack("w", &trits, 1, 256, 1.0, I2sLayout::X86).unwrap();
            let mut as_arm = vec![0i8; 256];
            I2S::new("w", &bytes, 1, 256, I2sLayout::Arm).unwrap().row("w", 0, &mut as_arm).unwrap();
            assert_eq!(as_arm.iter().position(|&t| t == 1), Some(on_arm(column)));
        }
    }
}
