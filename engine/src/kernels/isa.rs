//! Instruction sets: what there is, what this CPU has, what the user forces.

use std::fmt;
use std::str::FromStr;

use bitnet_contracts::{ConfigurationError, DeviceError, Result};

/// The environment variable that forces an instruction set.
pub const ISA_VARIABLE: &str = "BITNET_ISA";

/// An instruction set that the kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Plain Rust for the compilation target's baseline: the definition of every kernel.
    Portable,
    /// x86-64 with AVX2 and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, VL and VNNI.
    Avx512Vnni,
    /// AArch64 with NEON: all of them.
    Neon,
    /// AArch64 with NEON and dot products (ARMv8.2 and later).
    DotProd,
}

impl Isa {
    /// All instruction sets, the plainest first.
    pub const ALL: [Isa; 5] = [Isa::Portable, Isa::Avx2, Isa::Avx512Vnni, Isa::Neon, Isa::DotProd];

    /// The name used by `BITNET_ISA`.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512Vnni => "avx512vnni",
            Isa::Neon => "neon",
            Isa::DotProd => "dotprod",
        }
    }

    /// Whether this CPU can run it.
    pub fn is_available(self) -> bool {
        match self {
            Isa::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c"),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => std::arch::is_aarch64_feature_detected!("neon"),
            #[cfg(target_arch = "aarch64")]
            Isa::DotProd => {
                std::arch::is_aarch64_feature_detected!("neon") && std::arch::is_aarch64_feature_detected!("dotprod")
            }
            // Another architecture's.
            _ => false,
        }
    }

    /// The instruction sets that this CPU has, the plainest first.
    pub fn available() -> Vec<Isa> {
        Self::ALL.into_iter().filter(|isa| isa.is_available()).collect()
    }

    /// The fastest instruction set of this CPU.
    pub fn best() -> Isa {
        Self::ALL.into_iter().rev().find(|isa| isa.is_available()).unwrap_or(Isa::Portable)
    }

    /// What `BITNET_ISA` forces, else the fastest.
    ///
    /// # Errors
    /// `ConfigurationError::InvalidParameter` for an unknown name, `DeviceError::InsufficientCapability` for one that this CPU
    /// does not have.
    pub fn from_environment() -> Result<Isa> {
        match std::env::var_os(ISA_VARIABLE) {
            None => Ok(Self::best()),
            Some(value) => {
                let isa: Isa = value.to_string_lossy().parse()?;
                isa.require()?;
                Ok(isa)
            }
        }
    }

    pub(super) fn require(self) -> Result<()> {
        if self.is_available() {
            return Ok(());
        }
        let available: Vec<_> = Self::available().into_iter().map(Isa::name).collect();
        Err(DeviceError::InsufficientCapability { required: self.name().to_string(), available: available.join(", ") }
            .into())
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Isa {
    type Err = bitnet_contracts::InferenceError;

    fn from_str(name: &str) -> Result<Isa> {
        Self::ALL.into_iter().find(|isa| isa.name() == name).ok_or_else(|| {
            ConfigurationError::InvalidParameter {
                parameter: ISA_VARIABLE.to_string(),
                value: name.to_string(),
                valid_range: Self::ALL.map(Isa::name).join(", "),
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
        for isa in Isa::ALL {
            assert_eq!(isa.name().parse::<Isa>().unwrap(), isa);
        }
        assert!("avx9".parse::<Isa>().unwrap_err().to_string().contains("portable, avx2, avx512vnni, neon, dotprod"));
    }

    #[test]
    fn an_instruction_set_that_is_missing_is_a_typed_error() {
        for isa in Isa::ALL {
            assert_eq!(isa.require().is_ok(), Isa::available().contains(&isa));
        }
    }
}
