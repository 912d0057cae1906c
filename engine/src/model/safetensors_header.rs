//! The header of a safetensors file: a JSON object of tensors.
//!
//! Read here and not by the `safetensors` crate, which keeps the last of two tensors of one name, has no limits but 100 MB, and does not
//! name the tensor that is wrong. What it checks is checked here: types, offsets, that tensors and nothing else fill the file.

use std::collections::BTreeSet;
use std::fmt;

use safetensors::Dtype;
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};

use super::safetensors_limits::{MAX_HEADER_BYTES, MAX_NAME_BYTES, MAX_RANK, MAX_TENSORS};

/// Bytes of the header's length in front of it.
const LENGTH_BYTES: usize = 8;

/// A tensor of a file.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct TensorEntry {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    /// First byte, and the one behind the last, of the data section.
    pub(super) offsets: (usize, usize),
}

/// The place of the data section and all tensors, in the order of their data. The error says what is wrong.
pub(super) fn read(bytes: &[u8]) -> Result<(usize, Vec<TensorEntry>), String> {
    let Some((length, rest)) = bytes.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(format!("truncated: {} bytes, and the length of the header takes {LENGTH_BYTES}", bytes.len()));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_BYTES {
        return Err(format!("the header has {length} bytes, more than {MAX_HEADER_BYTES}"));
    }
    let Some((header, data)) = rest.split_at_checked(length as usize) else {
        return Err(format!("truncated: the header has {length} bytes, and {} are left", rest.len()));
    };
    let Header(mut tensors) = serde_json::from_slice(header).map_err(|e| format!("the header: {e}"))?;
    tensors.sort_by(|a, b| (a.offsets, &a.name).cmp(&(b.offsets, &b.name)));
    check_places(&tensors, data.len())?;
    Ok((LENGTH_BYTES + header.len(), tensors))
}

/// Every tensor has the bytes that its type and shape ask for, and they follow each other up to the end of the file. Each is looked at
/// alone first: one that lies far off would make its neighbours seem wrong.
fn check_places(tensors: &[TensorEntry], data: usize) -> Result<(), String> {
    tensors.iter().try_for_each(|tensor| check_alone(tensor, data))?;
    let mut before: Option<&TensorEntry> = None;
    for tensor in tensors {
        let (name, start) = (&tensor.name, tensor.offsets.0);
        let expected = before.map_or(0, |tensor| tensor.offsets.1);
        match before {
            Some(other) if start < expected => {
                return Err(format!("tensors {:?} and {name:?} overlap", other.name));
            }
            _ if start != expected => {
                return Err(format!("tensor {name:?} starts at {start}, and the one before it ends at {expected}"));
            }
            _ => before = Some(tensor),
        }
    }
    let end = before.map_or(0, |tensor| tensor.offsets.1);
    if end != data {
        return Err(format!("{} bytes behind the last tensor", data - end));
    }
    Ok(())
}

fn check_alone(tensor: &TensorEntry, data: usize) -> Result<(), String> {
    let (name, (start, end)) = (&tensor.name, tensor.offsets);
    let elements = tensor.shape.iter().try_fold(1usize, |n, &dimension| n.checked_mul(dimension));
    let Some(bits) = elements.and_then(|n| n.checked_mul(tensor.dtype.bitsize())) else {
        return Err(format!("tensor {name:?} has more elements than can be counted: {:?}", tensor.shape));
    };
    if end < start {
        return Err(format!("tensor {name:?} ends at {end}, before its start at {start}"));
    }
    if end > data {
        return Err(format!("truncated: tensor {name:?} ends at byte {end} of the data, which has {data}"));
    }
    if !bits.is_multiple_of(8) || end - start != bits / 8 {
        return Err(format!(
            "tensor {name:?} has {} bytes, and {:?} of {:?} takes {}",
            end - start,
            tensor.shape,
            tensor.dtype,
            bits.div_ceil(8)
        ));
    }
    Ok(())
}

/// Names met so far: none twice, none too long, not too many.
#[derive(Default)]
pub(super) struct Names(BTreeSet<String>);

impl Names {
    /// Takes one more.
    pub(super) fn add<E: Error>(&mut self, name: &str) -> Result<(), E> {
        if name.len() > MAX_NAME_BYTES {
            return Err(E::custom(format_args!("a name of {} bytes, more than {MAX_NAME_BYTES}", name.len())));
        }
        // The table of a file may hold one key that is no tensor.
        if self.0.len() > MAX_TENSORS {
            return Err(E::custom(format_args!("more than {MAX_TENSORS} tensors")));
        }
        if !self.0.insert(name.to_string()) {
            return Err(E::custom(format_args!("tensor {name:?} is there twice")));
        }
        Ok(())
    }
}

struct Header(Vec<TensorEntry>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
        let (mut names, mut tensors) = (Names::default(), Vec::new());
        while let Some(name) = map.next_key::<String>()? {
            names.add(&name)?;
            if name == "__metadata__" {
                map.next_value_seed(Texts)?;
                continue;
            }
            let entry: Entry = map.next_value().map_err(|e| A::Error::custom(format_args!("tensor {name:?}: {e}")))?;
            tensors.push(TensorEntry { name, dtype: entry.dtype, shape: entry.shape.0, offsets: entry.data_offsets });
        }
        Ok(Header(tensors))
    }
}

/// An object of strings, of which nothing is kept.
struct Texts;

impl<'de> DeserializeSeed<'de> for Texts {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Texts {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("__metadata__, an object of strings")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while map.next_entry::<String, String>()?.is_some() {}
        Ok(())
    }
}

#[derive(Deserialize)]
struct Entry {
    dtype: Dtype,
    shape: Shape,
    data_offsets: (usize, usize),
}

/// Dimensions, no more than may be.
struct Shape(Vec<usize>);

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(ShapeVisitor)
    }
}

struct ShapeVisitor;

impl<'de> Visitor<'de> for ShapeVisitor {
    type Value = Shape;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a list of dimensions")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Shape, A::Error> {
        let mut shape = Vec::new();
        while let Some(dimension) = seq.next_element()? {
            if shape.len() == MAX_RANK {
                return Err(A::Error::custom(format_args!("more than {MAX_RANK} dimensions")));
            }
            shape.push(dimension);
        }
        Ok(Shape(shape))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: usize) -> Vec<u8> {
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; data]].concat()
    }

    /// Two vectors, the second of which can be spoilt.
    fn with(second: &str) -> String {
        format!(r#"{{"a": {{"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, {second}}}"#)
    }

    #[test]
    fn what_the_crate_writes_is_read() {
        use safetensors::tensor::{TensorView, serialize};
        let (a, b) = ([1u8, 2, 3, 4], [5u8; 6]);
        let views = [
            ("b", TensorView::new(Dtype::BF16, vec![3], &b).unwrap()),
            ("a", TensorView::new(Dtype::U8, vec![2, 2], &a).unwrap()),
        ];
        let metadata = [("format".to_string(), "pt".to_string())].into_iter().collect();
        let bytes = serialize(views, Some(metadata)).unwrap();
        let (data, tensors) = read(&bytes).unwrap();
        assert_eq!(bytes.len() - data, 10);
        for tensor in tensors {
            let (dtype, shape, values) =
                if tensor.name == "a" { (Dtype::U8, vec![2, 2], &a[..]) } else { (Dtype::BF16, vec![3], &b[..]) };
            assert_eq!((tensor.dtype, tensor.shape), (dtype, shape));
            assert_eq!(&bytes[data..][tensor.offsets.0..tensor.offsets.1], values);
        }
        assert_eq!(read(&file("{}", 0)).unwrap().1, []);
    }

    #[rstest::rstest]
    #[case(r#""a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}"#, &["\"a\"", "twice"])]
    #[case(r#""b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}"#, &["\"a\"", "\"b\"", "overlap"])]
    #[case(r#""b": {"dtype": "F32", "shape": [1], "data_offsets": [12, 16]}"#, &["\"b\"", "starts at 12", "8"])]
    #[case(r#""b": {"dtype": "F32", "shape": [3], "data_offsets": [8, 20]}"#, &["\"b\"", "truncated", "20", "16"])]
    #[case(r#""b": {"dtype": "F32", "shape": [3], "data_offsets": [8, 16]}"#, &["\"b\"", "8 bytes", "12"])]
    #[case(r#""b": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}"#, &["4 bytes behind"])]
    #[case(r#""b": {"dtype": "F32", "shape": [2], "data_offsets": [16, 8]}"#, &["\"b\"", "before its start"])]
    #[case(r#""b": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [8, 16]}"#, &["\"b\"", "counted"])]
    #[case(r#""b": {"dtype": "F32", "shape": [2305843009213693952], "data_offsets": [8, 16]}"#, &["\"b\"", "counted"])]
    #[case(r#""b": {"dtype": "F32", "shape": [1,1,1,1,1,1,1,1,2], "data_offsets": [8, 16]}"#, &["\"b\"", "more than 8 dim"])]
    #[case(r#""b": {"dtype": "F31", "shape": [2], "data_offsets": [8, 16]}"#, &["\"b\"", "F31"])]
    #[case(r#""b": {"dtype": "F4", "shape": [1], "data_offsets": [8, 8]}"#, &["\"b\"", "F4"])]
    #[case(r#""b": {"dtype": "F32", "shape": [-2], "data_offsets": [8, 16]}"#, &["\"b\"", "-2"])]
    #[case(r#""b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 99999999999999999999]}"#, &["\"b\""])]
    #[case(r#""b": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [8, 16]}"#, &["\"b\"", "duplicate"])]
    #[case(r#""b": {"dtype": "F32", "data_offsets": [8, 16]}"#, &["\"b\"", "shape"])]
    #[case(r#""b": 7"#, &["\"b\""])]
    #[case(r#""__metadata__": {"a": 7}"#, &["7"])]
    #[case(r#""__metadata__": {}, "__metadata__": {}"#, &["\"__metadata__\"", "twice"])]
    fn what_is_wrong_is_named(#[case] second: &str, #[case] words: &[&str]) {
        let error = read(&file(&with(second), 16)).unwrap_err();
        for word in words {
            assert!(error.contains(word), "{word:?} is not in {error}");
        }
    }

    #[test]
    fn sizes_are_held_against_limits_and_the_file() {
        let huge = [&(MAX_HEADER_BYTES + 1).to_le_bytes()[..], b"{}"].concat();
        assert!(read(&huge).unwrap_err().contains("more than 16777216"));
        let long = [&100u64.to_le_bytes()[..], b"{}"].concat();
        assert!(read(&long).unwrap_err().contains("truncated"));
        assert!(read(&[0; 7]).unwrap_err().contains("truncated"));
        let entry = |name: &str| format!(r#""{name}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#);
        let named = |len: usize| read(&file(&format!("{{{}}}", entry(&"x".repeat(len))), 0));
        assert_eq!(named(MAX_NAME_BYTES).unwrap().1.len(), 1);
        assert!(named(MAX_NAME_BYTES + 1).unwrap_err().contains("more than 256"));
        let many = (0..MAX_TENSORS + 2).map(|n| entry(&n.to_string())).collect::<Vec<_>>().join(",");
        assert!(read(&file(&format!("{{{many}}}"), 0)).unwrap_err().contains("more than 65536 tensors"));
    }

    #[test]
    fn no_json_is_an_error() {
        let deep = r#"{"a":"#.repeat(100_000);
        let lists = format!(r#"{{"a": {{"shape": {}"#, "[".repeat(100_000));
        let unknown = format!(r#"{{"a": {{"more": {}"#, "[".repeat(100_000));
        for header in ["", "{", "[]", "null", "{}x", &deep, &lists, &unknown] {
            assert!(read(&file(header, 0)).is_err(), "{header:.20}");
        }
        assert!(read(&[&4u64.to_le_bytes()[..], b"{\"\xff\""].concat()).is_err());
    }
}
