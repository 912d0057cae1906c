//! Types of tensors, and which tool's numbers a file uses.
//!
//! The numbers 36 to 39 mean different things in different families: bitnet.cpp has I2_S, I8_S, TL1 and TL2 there, llama.cpp has had
//! repacked IQ4_NL at 36 to 38 and has MXFP4 at 39. The type of the whole file tells them apart: bitnet.cpp writes
//! `general.file_type` 40 for I2_S, 38 for TL1 and 39 for TL2, llama.cpp writes 38 for a file of MXFP4. Where that key is missing or says
//! something else, only what the caller says counts; nothing is guessed.

use super::GgufOptions;
use crate::ternary::{i2_s, iq1_bn, iq2_bn, tl1, tl2, tq1_0, tq2_0};

/// The types that are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TensorType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// Blocks of 32 at 4 bits with an f16 scale.
    Q4_0,
    /// Blocks of 32 at 8 bits with an f16 scale.
    Q8_0,
    /// Blocks of 256 at 6 bits with 16 scales of 8 bits and one of f16.
    Q6K,
    /// See [`crate::ternary::tq1_0`].
    Tq1_0,
    /// See [`crate::ternary::tq2_0`].
    Tq2_0,
    /// See [`crate::ternary::i2_s`].
    I2S,
    /// See [`crate::ternary::tl1`].
    Tl1,
    /// See [`crate::ternary::tl2`].
    Tl2,
    /// See [`crate::ternary::iq1_bn`].
    Iq1Bn,
    /// See [`crate::ternary::iq2_bn`].
    Iq2Bn,
}

impl TensorType {
    /// The number in the file.
    pub fn id(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q8_0 => 8,
            Self::Q6K => 14,
            Self::Bf16 => 30,
            Self::Tq1_0 => 34,
            Self::Tq2_0 => 35,
            Self::I2S => 36,
            Self::Tl1 => 38,
            Self::Tl2 => 39,
            Self::Iq1Bn => 134,
            Self::Iq2Bn => 135,
        }
    }

    /// The name that its tools use.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Q4_0 => "Q4_0",
            Self::Q8_0 => "Q8_0",
            Self::Q6K => "Q6_K",
            Self::Bf16 => "BF16",
            Self::Tq1_0 => "TQ1_0",
            Self::Tq2_0 => "TQ2_0",
            Self::I2S => "I2_S",
            Self::Tl1 => "TL1",
            Self::Tl2 => "TL2",
            Self::Iq1Bn => "IQ1_BN",
            Self::Iq2Bn => "IQ2_BN",
        }
    }

    /// Whether the type can hold nothing but trits.
    pub fn is_ternary(self) -> bool {
        !matches!(self, Self::F32 | Self::F16 | Self::Bf16 | Self::Q4_0 | Self::Q8_0 | Self::Q6K)
    }

    /// Columns that are stored together: the columns of a matrix must be a multiple.
    pub fn block(self) -> usize {
        match self {
            Self::Q4_0 | Self::Q8_0 => 32,
            Self::Q6K | Self::Tq1_0 | Self::Tq2_0 => 256,
            Self::Iq1Bn | Self::Iq2Bn => 64,
            _ => 1,
        }
    }

    /// Bytes of `[rows, columns]`; None when the columns do not fit the type or there are too many bytes to count.
    pub fn bytes(self, rows: usize, columns: usize) -> Option<usize> {
        let n = rows.checked_mul(columns)?;
        if !columns.is_multiple_of(self.block()) {
            return None;
        }
        match self {
            Self::F32 => n.checked_mul(4),
            Self::F16 | Self::Bf16 => n.checked_mul(2),
            Self::Q4_0 => (n / 32).checked_mul(18),
            Self::Q8_0 => (n / 32).checked_mul(34),
            Self::Q6K => (n / 256).checked_mul(210),
            Self::Tq1_0 => tq1_0::bytes(rows, columns),
            Self::Tq2_0 => tq2_0::bytes(rows, columns),
            Self::I2S => i2_s::bytes(rows, columns),
            Self::Tl1 => tl1::bytes(rows, columns),
            Self::Tl2 => tl2::bytes(rows, columns),
            Self::Iq1Bn => iq1_bn::bytes(rows, columns),
            Self::Iq2Bn => iq2_bn::bytes(rows, columns),
        }
    }

    /// The type that number `id` means in a file of this architecture and `general.file_type`.
    ///
    /// # Errors
    /// What is wrong with the number, in words that follow the tensor's name.
    pub(super) fn resolve(
        id: u32,
        architecture: Option<&str>,
        file_type: Option<i128>,
        options: &GgufOptions,
    ) -> Result<Self, String> {
        let said = match file_type {
            Some(n) => format!("general.file_type {n}"),
            None => "no general.file_type".to_string(),
        };
        // Architectures that only bitnet.cpp and ik_llama.cpp have, which agree on 36.
        let own = matches!(architecture, Some("bitnet-b1.58" | "bitnet-25"));
        match (id, file_type) {
            (0, _) => Ok(Self::F32),
            (1, _) => Ok(Self::F16),
            (2, _) => Ok(Self::Q4_0),
            (8, _) => Ok(Self::Q8_0),
            (14, _) => Ok(Self::Q6K),
            (30, _) => Ok(Self::Bf16),
            (34, _) => Ok(Self::Tq1_0),
            (35, _) => Ok(Self::Tq2_0),
            (134, _) => Ok(Self::Iq1Bn),
            (135, _) => Ok(Self::Iq2Bn),
            (36, Some(40)) => Ok(Self::I2S),
            (38, Some(38)) => Ok(Self::Tl1),
            (39, Some(39)) => Ok(Self::Tl2),
            (36, None) if own => Ok(Self::I2S),
            (36, _) if options.i2s_layout.is_some() => Ok(Self::I2S),
            (39, Some(38)) => Err(format!("is of type 39 with {said}: MXFP4 of llama.cpp, which is not read")),
            (38, _) if !options.kernels.is_empty() => Ok(Self::Tl1),
            (39, _) if !options.kernels.is_empty() => Ok(Self::Tl2),
            (36, _) => Err(format!(
                "is of type 36, which is I2_S in files of bitnet.cpp only, and the file has {said}: if it is one, say so by naming the \
                 I2_S layout"
            )),
            (38 | 39, _) => Err(format!(
                "is of type {id}, which is TL{} in files of bitnet.cpp only, and the file has {said}: if it is one, say so by giving its \
                 kernel configuration",
                id - 37
            )),
            (335, _) => {
                Err("is of type 335 (IQ2_BN_R4, rows interleaved at run time); convert it to IQ2_BN".to_string())
            }
            _ => Err(format!(
                "is of type {id}, which is not read; the types read are F32, F16, BF16, Q8_0, Q6_K, Q4_0, TQ1_0, TQ2_0, I2_S, TL1, TL2, \
                 IQ1_BN, IQ2_BN"
            )),
        }
    }
}
