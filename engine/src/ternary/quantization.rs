//! Which kernels a model runs on, whatever format its file has: the contracts' quantization types as an option of the engine.

use std::fmt;
use std::str::FromStr;

use bitnet_contracts::{ConfigurationError, QuantizationType};

use super::interleaved::Packing;

/// The quantization of an engine's weights, which are packed for it when they are loaded. All give the same logits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Quantization {
    /// Integer multiply-add ([`QuantizationType::I2S`]), the weights in two bits or in base three, whichever is faster.
    #[default]
    Auto,
    /// Integer multiply-add on weights of two bits.
    I2s,
    /// Tables of pairs.
    Tl1,
    /// Tables of triples.
    Tl2,
}

impl Quantization {
    /// All choices.
    pub const ALL: [Quantization; 4] = [Quantization::Auto, Quantization::I2s, Quantization::Tl1, Quantization::Tl2];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Quantization::Auto => "auto",
            Quantization::I2s => "i2s",
            Quantization::Tl1 => "tl1",
            Quantization::Tl2 => "tl2",
        }
    }

    /// As the contracts call it.
    pub fn kind(self) -> QuantizationType {
        match self {
            Quantization::Auto | Quantization::I2s => QuantizationType::I2S,
            Quantization::Tl1 => QuantizationType::TL1,
            Quantization::Tl2 => QuantizationType::TL2,
        }
    }

    /// How the weights are packed where multiply-add is fastest on `fastest`.
    pub(crate) fn packing(self, fastest: Packing) -> Packing {
        match self {
            Quantization::Auto => fastest,
            Quantization::I2s => Packing::TwoBits,
            Quantization::Tl1 => Packing::Pairs,
            Quantization::Tl2 => Packing::Triples,
        }
    }
}

impl fmt::Display for Quantization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Quantization {
    type Err = bitnet_contracts::InferenceError;

    fn from_str(name: &str) -> bitnet_contracts::Result<Quantization> {
        Self::ALL.into_iter().find(|quantization| quantization.name() == name).ok_or_else(|| {
            ConfigurationError::InvalidParameter {
                parameter: "quantization".to_string(),
                value: name.to_string(),
                valid_range: Self::ALL.map(Self::name).join(", "),
            }
            .into()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_unknown_ones_are_refused() {
        for quantization in Quantization::ALL {
            assert_eq!(quantization.to_string().parse::<Quantization>().unwrap(), quantization);
        }
        let error = "tl3".parse::<Quantization>().unwrap_err().to_string();
        assert!(error.contains("tl3") && error.contains("auto, i2s, tl1, tl2"), "{error}");
    }
}
