//! Kernels on made-up input, each with a plain computation that its output is held to.

mod attention;
mod head;
mod norm;
mod ternary;

pub use attention::AttentionCase;
pub use head::{HeadCase, ScreenedHeadCase};
pub use norm::NormCase;
pub use ternary::{Shape, TernaryCase, TernaryWeights};

use bitnet_engine::kernels::{Isa, Kernels, Limits, Threads};
use bitnet_engine::ternary::interleaved::Packing;

/// Any failure of a case: what the engine reports, or an output that is not right.
pub type Outcome = Result<(), Box<dyn std::error::Error>>;

/// What one run of a case does, by what bounds it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Work {
    /// Reads so many bytes of memory.
    Memory(usize),
    /// Reads so many bytes that lie in a cache.
    Cache(usize),
    /// Does so many integer multiply-accumulates.
    Products(usize),
}

impl Work {
    /// Speed in a run of `seconds`, beside the limit.
    pub fn beside(self, limits: &Limits, seconds: f64) -> String {
        let (done, unit, limit, name) = match self {
            Work::Memory(bytes) => (bytes, "GB/s", limits.dram_read_gb_s, "memory"),
            Work::Cache(bytes) => (bytes, "GB/s", limits.cache_read_gb_s, "a cache"),
            Work::Products(macs) => (macs, "GMAC/s", limits.gmac_s, "the instruction set"),
        };
        let speed = done as f64 / seconds / 1e9;
        format!("{speed:.1} {unit}, {:.0} % of the {limit:.1} that {name} allows", 100.0 * speed / limit)
    }
}

/// One kernel and its input.
pub trait Case {
    /// Computes once.
    ///
    /// # Errors
    /// What the engine reports.
    fn run(&mut self) -> bitnet_contracts::Result<()>;

    /// Holds what was computed last to a plain computation.
    ///
    /// # Errors
    /// Names the element that is wrong.
    fn verify(&self) -> Outcome;

    /// What a run does.
    fn work(&self) -> Work;
}

/// An error unless `right`.
fn check(right: bool, what: impl FnOnce() -> String) -> Outcome {
    if right { Ok(()) } else { Err(what().into()) }
}

/// A number in [-1, 1), the same on every machine.
fn number(i: usize) -> f32 {
    let z = (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((z ^ (z >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 40) as f32 / (1 << 23) as f32 - 1.0
}

/// The names of [`small`].
pub const SMALL: [&str; 9] = [
    "gemv-two-bits",
    "gemv-base-three",
    "gemm-two-bits",
    "gemm-base-three",
    "norm-and-quantise",
    "head",
    "screened-head",
    "attention",
    "attention-rows",
];

/// A case of moderate size by name, for counting its instructions: one thread, `isa` whatever the environment says.
///
/// # Errors
/// For an unknown name, and an instruction set that this CPU lacks.
pub fn small(name: &str, isa: Isa) -> Result<Box<dyn Case>, Box<dyn std::error::Error>> {
    let threads = Threads::new(Some(1))?;
    let kernels = Kernels::of(isa)?;
    let ternary = |packing, tokens| -> Result<Box<dyn Case>, Box<dyn std::error::Error>> {
        // Neither rows nor columns are whole blocks.
        let weights = TernaryWeights::new(Shape { rows: 250, columns: 1290 }, packing, &threads)?;
        Ok(Box::new(TernaryCase::new(weights.into(), kernels, &threads, tokens)?))
    };
    Ok(match name {
        "gemv-two-bits" => ternary(Packing::TwoBits, 1)?,
        "gemv-base-three" => ternary(Packing::BaseThree, 1)?,
        "gemm-two-bits" => ternary(Packing::TwoBits, 13)?,
        "gemm-base-three" => ternary(Packing::BaseThree, 13)?,
        "norm-and-quantise" => Box::new(NormCase::new(kernels, &threads, 16, 1290)),
        "head" => Box::new(HeadCase::new(kernels, &threads, 500, 642)?),
        "screened-head" => Box::new(ScreenedHeadCase::new(kernels, &threads, 1500, 642)?),
        "attention" => Box::new(AttentionCase::new(kernels, (2, 4, 64), 200..201)?),
        "attention-rows" => Box::new(AttentionCase::new(kernels, (1, 3, 64), 60..70)?),
        _ => return Err(format!("there is no kernel {name}: {}", SMALL.join(", ")).into()),
    })
}
