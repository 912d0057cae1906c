//! `model.safetensors.index.json`: which tensor is in which of several files.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use bitnet_contracts::{InferenceError, ModelError, Result};
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

use super::safetensors_header::Names;
use super::safetensors_limits::MAX_SHARDS;

/// Shards by number, and the number of each tensor's shard.
#[derive(Debug)]
pub(super) struct ShardIndex {
    pub(super) shards: Vec<String>,
    pub(super) tensors: BTreeMap<String, usize>,
}

impl ShardIndex {
    /// Reads an index; `path` is for the error.
    ///
    /// # Errors
    /// `ModelError::InvalidFormat` for text that is no such JSON, a tensor that is there twice, and sizes beyond the limits;
    /// `::ValidationFailed` for a shard that would lie elsewhere.
    pub(super) fn from_json(json: &[u8], path: &Path) -> Result<Self> {
        let file: IndexFile = serde_json::from_slice(json).map_err(|e| ModelError::InvalidFormat {
            format: format!("{}: {e}", path.display()),
            expected: "a safetensors index with a weight_map".to_string(),
        })?;
        let mut numbers = BTreeMap::<String, usize>::new();
        let (mut shards, mut tensors) = (Vec::new(), BTreeMap::new());
        for (tensor, shard) in file.weight_map.0 {
            let number = match numbers.get(&shard) {
                Some(&number) => number,
                None => {
                    // A shard lies beside its index: a name that leads elsewhere is no shard name.
                    if Path::new(&shard).file_name() != Some(shard.as_ref()) {
                        return Err(refused(path, &format!("shard {shard:?} of {tensor:?} is not a plain file name")));
                    }
                    if shards.len() == MAX_SHARDS {
                        return Err(refused(path, &format!("more than {MAX_SHARDS} shards")));
                    }
                    shards.push(shard.clone());
                    numbers.insert(shard, shards.len() - 1);
                    shards.len() - 1
                }
            };
            tensors.insert(tensor, number);
        }
        Ok(Self { shards, tensors })
    }
}

/// An index that contradicts itself or its shards.
pub(super) fn refused(path: &Path, what: &str) -> InferenceError {
    ModelError::ValidationFailed { reason: format!("{}: {what}", path.display()) }.into()
}

#[derive(Deserialize)]
struct IndexFile {
    weight_map: WeightMap,
}

/// Tensors and their shards. A plain map would keep the last of two entries of one name.
struct WeightMap(Vec<(String, String)>);

impl<'de> Deserialize<'de> for WeightMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_map(WeightMapVisitor)
    }
}

struct WeightMapVisitor;

impl<'de> Visitor<'de> for WeightMapVisitor {
    type Value = WeightMap;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("weight_map, an object of tensors and file names")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<WeightMap, A::Error> {
        let (mut names, mut entries) = (Names::default(), Vec::new());
        while let Some((tensor, shard)) = map.next_entry::<String, String>()? {
            names.add(&tensor)?;
            entries.push((tensor, shard));
        }
        Ok(WeightMap(entries))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> std::result::Result<ShardIndex, String> {
        ShardIndex::from_json(json.as_bytes(), Path::new("f/i.json")).map_err(|e| e.to_string())
    }

    #[test]
    fn shards_are_counted_once() {
        let index = read(r#"{"metadata": {}, "weight_map": {"a": "1", "b": "2", "c": "1"}}"#).unwrap();
        assert_eq!(index.shards, ["1", "2"]);
        assert_eq!(
            index.tensors.into_iter().collect::<Vec<_>>(),
            [("a", 0), ("b", 1), ("c", 0)].map(|(t, n)| (t.to_string(), n))
        );
    }

    #[rstest::rstest]
    #[case(r#"{"weight_map": {"a": "1", "a": "2"}}"#, "\"a\" is there twice")]
    #[case(r#"{"weight_map": {}, "weight_map": {}}"#, "weight_map")]
    #[case(r#"{"weight_map": {"a": "../1"}}"#, "\"../1\" of \"a\"")]
    #[case(r#"{"weight_map": {"a": "/1"}}"#, "\"/1\"")]
    #[case(r#"{"weight_map": {"a": ".."}}"#, "\"..\"")]
    #[case(r#"{"weight_map": {"a": "."}}"#, "\".\"")]
    #[case(r#"{"weight_map": {"a": ""}}"#, "\"\"")]
    #[case(r#"{"weight_map": {"a": "1/"}}"#, "\"1/\"")]
    #[case(r#"{"weight_map": {"a": 1}}"#, "integer")]
    #[case(r#"{"weight_map": []}"#, "weight_map")]
    #[case("{}", "weight_map")]
    fn what_is_wrong_is_named(#[case] json: &str, #[case] word: &str) {
        let error = read(json).unwrap_err();
        assert!(error.contains("f/i.json") && error.contains(word), "{error}");
    }

    #[test]
    fn shards_are_limited() {
        let json = |n: usize| {
            let entries: Vec<_> = (0..n).map(|i| format!(r#""{i}": "s{i}""#)).collect();
            format!(r#"{{"weight_map": {{{}}}}}"#, entries.join(","))
        };
        assert_eq!(read(&json(MAX_SHARDS)).unwrap().shards.len(), MAX_SHARDS);
        assert!(read(&json(MAX_SHARDS + 1)).unwrap_err().contains("more than 512 shards"));
    }
}
