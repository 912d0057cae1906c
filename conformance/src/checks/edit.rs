//! A model folder in memory: read, changed value by value, written elsewhere. What the hostile and the metamorphic
//! checks make their models from.

use crate::case::Stop;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::{Path, PathBuf};

/// One tensor, as stored.
#[derive(Debug, Clone)]
pub(super) struct Held {
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// Bytes, little endian, row-major.
    pub data: Vec<u8>,
}

/// A model's configuration and tensors.
#[derive(Debug, Clone)]
pub(super) struct Model {
    /// `config.json`.
    pub config: Value,
    /// The tensors of all its files.
    pub tensors: BTreeMap<String, Held>,
}

fn unusable(what: impl Display, error: impl Display) -> Stop {
    Stop::Inconclusive(format!("{what}: {error}"))
}

impl Model {
    /// Reads a folder, sharded or not.
    pub(super) fn read(dir: &Path) -> Result<Self, Stop> {
        let config = std::fs::read(dir.join("config.json"))?;
        let config = serde_json::from_slice(&config).map_err(|e| unusable("config.json", e))?;
        let mut tensors = BTreeMap::new();
        let mut files: Vec<PathBuf> = std::fs::read_dir(dir)?.filter_map(|e| e.ok().map(|e| e.path())).collect();
        files.retain(|f| f.extension().is_some_and(|e| e == "safetensors"));
        files.sort();
        for file in files {
            let bytes = std::fs::read(&file)?;
            let parsed = SafeTensors::deserialize(&bytes).map_err(|e| unusable(file.display(), e))?;
            for (name, view) in parsed.tensors() {
                let held = Held { dtype: view.dtype(), shape: view.shape().to_vec(), data: view.data().to_vec() };
                tensors.insert(name, held);
            }
        }
        Ok(Self { config, tensors })
    }

    /// Writes `config.json` and one `model.safetensors` into a folder, which is made.
    pub(super) fn write(&self, dir: &Path) -> Result<(), Stop> {
        std::fs::create_dir_all(dir)?;
        std::fs::write(dir.join("config.json"), self.config.to_string())?;
        std::fs::write(dir.join("model.safetensors"), self.weights()?)?;
        Ok(())
    }

    /// The bytes of the weights as one safetensors file.
    pub(super) fn weights(&self) -> Result<Vec<u8>, Stop> {
        let views: Result<Vec<_>, _> = self
            .tensors
            .iter()
            .map(|(name, t)| TensorView::new(t.dtype, t.shape.clone(), &t.data).map(|view| (name.as_str(), view)))
            .collect();
        let views = views.map_err(|e| unusable("edited tensors", e))?;
        safetensors::serialize(views, None).map_err(|e| unusable("edited tensors", e))
    }

    /// A tensor that must be there.
    pub(super) fn tensor(&mut self, name: &str) -> Result<&mut Held, Stop> {
        self.tensors.get_mut(name).ok_or_else(|| Stop::Inconclusive(format!("the model has no tensor {name}")))
    }

    /// The head's matrix, `[vocab × hidden]`: its own, or the embedding where it is tied.
    pub(super) fn head(&mut self) -> Result<Vec<f32>, Stop> {
        let name = self.head_name();
        self.tensor(name)?.floats()
    }

    /// The name of the head's matrix.
    pub(super) fn head_name(&self) -> &'static str {
        if self.tensors.contains_key("lm_head.weight") { "lm_head.weight" } else { "model.embed_tokens.weight" }
    }

    /// Sets a key of `config.json`; `Null` removes it.
    pub(super) fn set(&mut self, key: &str, value: Value) {
        if let Some(object) = self.config.as_object_mut() {
            match value {
                Value::Null => object.remove(key),
                value => object.insert(key.to_string(), value),
            };
        }
    }
}

impl Held {
    /// The values of a float tensor.
    pub(super) fn floats(&self) -> Result<Vec<f32>, Stop> {
        let halves = || self.data.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
        match self.dtype {
            Dtype::F32 => Ok(self.data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()),
            Dtype::BF16 => Ok(halves().map(|h| f32::from_bits(u32::from(h) << 16)).collect()),
            Dtype::F16 => Ok(halves().map(f16_to_f32).collect()),
            other => Err(Stop::Inconclusive(format!("a tensor of {other:?} has no float values"))),
        }
    }

    /// Replaces the values of an f32 or bf16 tensor; bf16 takes the upper half of each value's bits.
    pub(super) fn set_floats(&mut self, values: &[f32]) -> Result<(), Stop> {
        self.data = match self.dtype {
            Dtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Dtype::BF16 => values.iter().flat_map(|v| ((v.to_bits() >> 16) as u16).to_le_bytes()).collect(),
            other => return Err(Stop::Inconclusive(format!("no float values can be put into a tensor of {other:?}"))),
        };
        Ok(())
    }

    /// Replaces one value.
    pub(super) fn put(&mut self, index: usize, value: f32) -> Result<(), Stop> {
        let mut values = self.floats()?;
        let slot = values.get_mut(index).ok_or_else(|| Stop::Inconclusive(format!("no element {index}")))?;
        *slot = value;
        self.set_floats(&values)
    }

    /// Replaces all values by one.
    pub(super) fn fill(&mut self, value: f32) -> Result<(), Stop> {
        let values = vec![value; self.floats()?.len()];
        self.set_floats(&values)
    }
}

impl Held {
    /// The same values stored as bf16, of which each must be one.
    pub(super) fn as_bf16(&self) -> Result<Self, Stop> {
        let mut held = Self { dtype: Dtype::BF16, ..self.clone() };
        held.set_floats(&self.floats()?)?;
        Ok(held)
    }

    /// Rounds the values of an f32 tensor, toward zero, to what bf16 can hold.
    pub(super) fn truncate_to_bf16(&mut self) -> Result<(), Stop> {
        let values: Vec<f32> = self.floats()?.iter().map(|v| f32::from_bits(v.to_bits() & 0xffff_0000)).collect();
        self.set_floats(&values)
    }

    /// Packs trits `[rows × columns]` given by a function of row and column.
    pub(super) fn set_trits(&mut self, trit: impl Fn(usize, usize) -> i8) -> Result<(), Stop> {
        let &[quarter, columns] = &self.shape[..] else {
            return Err(Stop::Inconclusive(format!("a tensor of shape {:?} holds no packed trits", self.shape)));
        };
        let byte = |row: usize, column: usize| {
            (0..4).fold(0u8, |byte, i| byte | (((trit(i * quarter + row, column) + 1) as u8) << (2 * i)))
        };
        self.data = (0..quarter * columns).map(|i| byte(i / columns, i % columns)).collect();
        Ok(())
    }
}

fn f16_to_f32(half: u16) -> f32 {
    let sign = if half >> 15 == 1 { -1.0 } else { 1.0 };
    let (exponent, fraction) = (i32::from(half >> 10 & 0x1f), f32::from(half & 0x3ff));
    sign * match exponent {
        0 => fraction * 2f32.powi(-24),
        31 if fraction == 0.0 => f32::INFINITY,
        31 => f32::NAN,
        _ => (1.0 + fraction / 1024.0) * 2f32.powi(exponent - 15),
    }
}

/// Rewrites the JSON header of a safetensors file and leaves the data behind it as it is.
pub(super) fn with_header(file: &[u8], change: impl FnOnce(&mut Value)) -> Result<Vec<u8>, Stop> {
    let length = file.first_chunk::<8>().map(|b| u64::from_le_bytes(*b) as usize);
    let header = length.and_then(|n| file.get(8..8 + n));
    let header = header.ok_or_else(|| Stop::Inconclusive("not a safetensors file".to_string()))?;
    let mut json: Value = serde_json::from_slice(header).map_err(|e| unusable("header", e))?;
    change(&mut json);
    let text = json.to_string();
    let mut out = (text.len() as u64).to_le_bytes().to_vec();
    out.extend(text.as_bytes());
    out.extend(&file[8 + header.len()..]);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_read_as_ieee_says() {
        let cases =
            [(0x3c00, 1.0), (0xc000, -2.0), (0x0001, 5.960_464_5e-8), (0x7bff, 65504.0), (0x7c00, f32::INFINITY)];
        for (bits, value) in cases {
            assert_eq!(f16_to_f32(bits), value, "{bits:#06x}");
        }
        assert!(f16_to_f32(0x7e00).is_nan());
    }

    #[test]
    fn a_rewritten_model_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        let data = [1.0f32, -2.5].iter().flat_map(|v| v.to_le_bytes()).collect();
        let held = Held { dtype: Dtype::F32, shape: vec![2], data };
        let mut model = Model { config: serde_json::json!({"a": 1}), tensors: BTreeMap::from([("x".into(), held)]) };
        model.set("a", Value::Null);
        model.set("b", 2.into());
        model.tensor("x").unwrap().put(1, f32::NAN).unwrap();
        model.write(dir.path()).unwrap();
        let mut back = Model::read(dir.path()).unwrap();
        assert_eq!(back.config, serde_json::json!({"b": 2}));
        let values = back.tensor("x").unwrap().floats().unwrap();
        assert!(values[0] == 1.0 && values[1].is_nan());
        let lied = with_header(&back.weights().unwrap(), |h| h["x"]["shape"] = serde_json::json!([3])).unwrap();
        assert!(SafeTensors::deserialize(&lied).is_err());
    }
}
