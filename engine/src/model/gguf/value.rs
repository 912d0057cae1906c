//! Metadata values: their types on disk, and reading them where they lie.

use std::fmt::Display;
use std::path::Path;

use bitnet_contracts::Result;

use super::cursor::{Cursor, broken};
use super::limits::{MAX_ARRAY_DEPTH, MAX_ARRAY_LEN, MAX_STRING_BYTES};

/// Types of metadata values, by the numbers of the format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ValueType {
    /// 0
    U8,
    /// 1
    I8,
    /// 2
    U16,
    /// 3
    I16,
    /// 4
    U32,
    /// 5
    I32,
    /// 6
    F32,
    /// 7
    Bool,
    /// 8
    String,
    /// 9
    Array,
    /// 10
    U64,
    /// 11
    I64,
    /// 12
    F64,
}

impl ValueType {
    const ALL: [Self; 13] = [
        Self::U8,
        Self::I8,
        Self::U16,
        Self::I16,
        Self::U32,
        Self::I32,
        Self::F32,
        Self::Bool,
        Self::String,
        Self::Array,
        Self::U64,
        Self::I64,
        Self::F64,
    ];

    /// The number in the file.
    pub fn id(self) -> u32 {
        self as u32
    }

    /// Name in lower case.
    pub fn name(self) -> &'static str {
        ["u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "string", "array", "u64", "i64", "f64"][self as usize]
    }

    /// Bytes of a value, None for strings and arrays.
    fn size(self) -> Option<u64> {
        match self {
            Self::U8 | Self::I8 | Self::Bool => Some(1),
            Self::U16 | Self::I16 => Some(2),
            Self::U32 | Self::I32 | Self::F32 => Some(4),
            Self::U64 | Self::I64 | Self::F64 => Some(8),
            Self::String | Self::Array => None,
        }
    }

    /// The fewest bytes that a value takes.
    fn least(self) -> u64 {
        match self {
            Self::Array => 12,
            other => other.size().unwrap_or(8),
        }
    }
}

/// Reads the type of a value.
pub(super) fn value_type(cursor: &mut Cursor, path: &Path, what: &dyn Display) -> Result<ValueType> {
    let id = cursor.u32(&format_args!("the type of {what}"))?;
    ValueType::ALL
        .get(id as usize)
        .copied()
        .ok_or_else(|| broken(path, format!("{what} has type {id}; the types of values are 0 to 12")))
}

/// Checks a value and steps over it.
pub(super) fn skip(cursor: &mut Cursor, path: &Path, ty: ValueType, what: &dyn Display, depth: usize) -> Result<()> {
    match ty {
        ValueType::String => cursor.string(MAX_STRING_BYTES, what).map(|_| ()),
        ValueType::Array => {
            if depth == MAX_ARRAY_DEPTH {
                return Err(broken(path, format!("{what} has arrays in arrays more than {MAX_ARRAY_DEPTH} deep")));
            }
            let (element, len) = array_header(cursor, path, what)?;
            match element.size() {
                Some(size) if element != ValueType::Bool => cursor.take(len * size, what).map(|_| ()),
                _ => (0..len).try_for_each(|_| skip(cursor, path, element, what, depth + 1)),
            }
        }
        ValueType::Bool => match cursor.u8(what)? {
            0 | 1 => Ok(()),
            other => Err(broken(path, format!("{what} is a boolean of value {other}"))),
        },
        other => cursor.take(other.least(), what).map(|_| ()),
    }
}

/// Element type and length of an array, the length checked.
pub(super) fn array_header(cursor: &mut Cursor, path: &Path, what: &dyn Display) -> Result<(ValueType, u64)> {
    let element = value_type(cursor, path, &format_args!("the elements of {what}"))?;
    let len = cursor.count(MAX_ARRAY_LEN, element.least(), &format_args!("the length of {what}"))?;
    Ok((element, len))
}

/// A number as the file has it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Number {
    /// Any of the integer types.
    Integer(i128),
    /// f32, as the shortest decimal that gives it: 1e-5 comes out as the f64 1e-5, as a JSON file would have it.
    Single(f32),
    /// f64.
    Double(f64),
    /// A boolean.
    Bool(bool),
}

/// Reads a number or a boolean of type `ty`; None for strings and arrays.
pub(super) fn number(cursor: &mut Cursor, ty: ValueType, what: &dyn Display) -> Result<Option<Number>> {
    let Some(size) = ty.size() else { return Ok(None) };
    let bytes = cursor.take(size, what)?;
    let unsigned = bytes.iter().rev().fold(0u64, |n, &b| n << 8 | u64::from(b));
    let unused = 64 - 8 * size as u32;
    Ok(Some(match ty {
        ValueType::I8 | ValueType::I16 | ValueType::I32 | ValueType::I64 => {
            Number::Integer(i128::from((unsigned << unused) as i64 >> unused))
        }
        ValueType::F32 => Number::Single(f32::from_bits(unsigned as u32)),
        ValueType::F64 => Number::Double(f64::from_bits(unsigned)),
        ValueType::Bool => Number::Bool(unsigned != 0),
        _ => Number::Integer(i128::from(unsigned)),
    }))
}
