//! The engine's kernels without the engine. The modules are the engine's own files, tests included; the rest are stand-ins for the few
//! things of it that they name.

// What the engine does with them is not here.
#![allow(dead_code, unused_imports)]

// The contracts under the name that the modules know them by; candle only as far as the error tree names it.
extern crate self as bitnet_contracts;
extern crate self as candle_core;

#[path = "../../../engine/contracts/src/error/mod.rs"]
pub mod error;
#[path = "../../../engine/src/kernels/mod.rs"]
pub mod kernels;
pub mod model;
pub mod ternary;

pub use error::*;

/// Stands in for candle's error.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// As candle's.
    #[error("{0}")]
    Msg(String),
    /// As candle's.
    #[error("{inner}")]
    WithBacktrace {
        /// The error itself.
        inner: Box<Error>,
    },
}

/// Stands in for the reading of the machine that errors carry.
#[derive(Debug, Clone, Default)]
pub struct SystemState;

impl SystemState {
    /// Reads nothing.
    pub fn current() -> Self {
        Self
    }
}

#[cfg(test)]
mod tests {
    use crate::kernels::Isa;

    /// The script names what the processor that it asked for has: nothing is tested by being left out.
    #[test]
    fn this_processor_has_the_instruction_sets_that_are_to_be_tested() {
        let Ok(expected) = std::env::var("EXPECTED_ISAS") else { return };
        let available: Vec<_> = Isa::available().into_iter().map(Isa::name).collect();
        assert_eq!(available.join(" "), expected);
    }
}
