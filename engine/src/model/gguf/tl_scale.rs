//! The scale of a TL1 or TL2 matrix.
//!
//! bitnet.cpp's kernels read the f32 behind the codes (behind the next multiple of 32 for TL2). Its converter writes that f32 as a tensor of
//! its own, `<name>_scale`, placed so that it lies there. Either is read; where there are both, they must agree.

use bitnet_contracts::Result;

use super::file::GgufFile;
use super::{GgufTensor, TensorType, contradiction};
use crate::ternary::usable_scale;

/// The dense value of trit 1 of the TL tensor `name`.
pub(super) fn read(file: &GgufFile, name: &str, tensor: &GgufTensor) -> Result<f32> {
    let named = format!("{name}_scale");
    let behind = match tensor.ty {
        TensorType::Tl2 => tensor.bytes.next_multiple_of(32),
        _ => tensor.bytes,
    };
    let start = tensor.start.saturating_add(behind);
    let f32_at = |start: usize| -> Option<f32> {
        let bytes = file.range(start, 4).ok()?;
        Some(f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    };
    match file.tensors().get(&named) {
        Some(scale) if scale.ty == TensorType::F32 && scale.shape.iter().product::<usize>() == 1 => {
            let value = usable_scale(&named, f32_at(scale.start).unwrap_or(f32::NAN))?;
            // Where the two places differ, the second is only a scale if nothing else lies there.
            let taken = file.tensors().values().any(|t| t.start < start + 4 && start < t.start + t.bytes);
            let other = f32_at(start).filter(|&other| !taken && other != 0.0 && other != value);
            match other {
                Some(other) => Err(contradiction(
                    file.path(),
                    format_args!("tensor {named:?} is {value}, the scale behind the codes of {name:?} is {other}"),
                )),
                None => Ok(value),
            }
        }
        Some(scale) => Err(contradiction(
            file.path(),
            format_args!("tensor {named:?} is {} of shape {:?}, expected one F32", scale.ty.name(), scale.shape),
        )),
        None => usable_scale(&named, f32_at(start).unwrap_or(f32::NAN)),
    }
}
