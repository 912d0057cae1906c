//! The arithmetic. Every kernel is written once, in [`ternary_tile`] and [`float`], and compiled for each instruction set behind
//! one table of function pointers, [`Kernels`]. All instruction sets give the same bits: the integer part because it is exact, the
//! float part because the order of every reduction is written out (sixteen lanes, one tree) and no multiply-add is fused.

mod columns;
pub(crate) mod float;
mod head_matmul;
mod isa;
mod portable;
mod ternary_matmul;
mod ternary_tile;
mod threads;
#[cfg(target_arch = "x86_64")]
mod x86_64;

pub(crate) use head_matmul::head_matmul;
pub use isa::{ISA_VARIABLE, Isa};
pub use ternary_matmul::{QuantizedActivations, TernaryJob, ternary_matmul};
pub use threads::Threads;

use crate::model::FloatRows;

/// One query head group's attention at one position: see [`float::attend`].
pub(crate) struct AttendArgs<'a> {
    /// Query heads of one group, `[group, head_dim]`, RoPE applied.
    pub(crate) queries: &'a [f32],
    /// Key pages of the group's KV head, each `[page positions, head_dim]`.
    pub(crate) keys: &'a dyn Fn(usize) -> &'a [f32],
    /// Value pages, like `keys`.
    pub(crate) values: &'a dyn Fn(usize) -> &'a [f32],
    /// Positions a page holds.
    pub(crate) page: usize,
    /// Positions to attend to: `0..total`.
    pub(crate) total: usize,
    /// Floats a head.
    pub(crate) head_dim: usize,
}

/// The kernels of one instruction set. Obtained from [`Kernels::of`] only, which checks that this CPU has it.
pub struct Kernels {
    isa: Isa,
    tile: fn(&[u8], &[i8], usize, &mut [i32]),
    rms_norm: fn(&[f32], &[f32], f32, &mut [f32]) -> bool,
    quantize: fn(&[f32], &mut [i8]) -> Option<float::ActivationScale>,
    relu2_gate: fn(&[f32], &mut [f32]),
    silu_gate: fn(&[f32], &mut [f32]),
    add: fn(&mut [f32], &[f32]),
    attend: fn(&AttendArgs<'_>, &mut [f32], &mut [f32]),
    head: fn(FloatRows<'_>, &[f32], usize, &mut [f32]),
    all_finite: fn(&[f32]) -> bool,
}

impl Kernels {
    /// The kernels of `isa`.
    ///
    /// # Errors
    /// `DeviceError::InsufficientCapability` when this CPU lacks the instruction set.
    pub fn of(isa: Isa) -> bitnet_contracts::Result<&'static Kernels> {
        isa.require()?;
        Ok(match isa {
            Isa::Portable => &portable::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => &x86_64::avx2::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => &x86_64::avx512vnni::KERNELS,
            // `require` has refused every instruction set that this architecture does not have.
            #[cfg(not(target_arch = "x86_64"))]
            _ => &portable::KERNELS,
        })
    }

    /// The instruction set these kernels were compiled for.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// RMSNorm of one row: `out[i] = gain[i] * (x[i] / sqrt(mean(x^2) + eps))`. False when the mean square overflows or is NaN.
    #[must_use]
    pub(crate) fn rms_norm(&self, x: &[f32], gain: &[f32], eps: f32, out: &mut [f32]) -> bool {
        (self.rms_norm)(x, gain, eps, out)
    }

    /// Per-token absmax int8 quantisation (`k = (1 / absmax) * 127`, round half to even). None for NaN or infinity.
    /// `out` may be longer than `x`; the rest is zeroed.
    pub(crate) fn quantize(&self, x: &[f32], out: &mut [i8]) -> Option<float::ActivationScale> {
        (self.quantize)(x, out)
    }

    /// `up[i] = relu(gate[i])^2 * up[i]`.
    pub(crate) fn relu2_gate(&self, gate: &[f32], up: &mut [f32]) {
        (self.relu2_gate)(gate, up)
    }

    /// `up[i] = gate[i] / (1 + e^-gate[i]) * up[i]`.
    pub(crate) fn silu_gate(&self, gate: &[f32], up: &mut [f32]) {
        (self.silu_gate)(gate, up)
    }

    /// `x[i] += y[i]`.
    pub(crate) fn add(&self, x: &mut [f32], y: &[f32]) {
        (self.add)(x, y)
    }

    /// Attention of one head group at one position. `scores` is `[group, total]` and holds the probabilities afterwards,
    /// `out` is `[group, head_dim]`.
    pub(crate) fn attend(&self, args: &AttendArgs<'_>, scores: &mut [f32], out: &mut [f32]) {
        (self.attend)(args, scores, out)
    }

    /// Dot products of some rows of the output head with `tokens` hidden states `[tokens, hidden]`; `out` is `[rows, tokens]`.
    pub(crate) fn head(&self, rows: FloatRows<'_>, hidden: &[f32], tokens: usize, out: &mut [f32]) {
        (self.head)(rows, hidden, tokens, out)
    }

    /// Whether no value is NaN or infinite.
    pub(crate) fn all_finite(&self, x: &[f32]) -> bool {
        (self.all_finite)(x)
    }
}

/// Compiles the generic kernels for one instruction set and puts them in a table.
macro_rules! kernel_table {
    ($isa:expr, $lanes:ty $(, $feature:literal)?) => {
        mod entry {
            use super::*;
            use $crate::kernels::{AttendArgs, float, ternary_tile};
            use $crate::model::FloatRows;

            $(#[target_feature(enable = $feature)])?
            pub(super) fn tile(w: &[u8], a: &[i8], tokens: usize, out: &mut [i32]) {
                ternary_tile::tile::<$lanes>(w, a, tokens, out)
            }
            $(#[target_feature(enable = $feature)])?
            pub(super) fn rms_norm(x: &[f32], gain: &[f32], eps: f32, out: &mut [f32]) -> bool {
                float::rms_norm(x, gain, eps, out)
            }
            $(#[target_feature(enable = $feature)])?
            pub(super) fn quantize(x: &[f32], out: &mut [i8]) -> Option<float::ActivationScale> {
                float::quantize(x, out)
            }
            $(#[target_feature(enable = $feature)])?
            pub(super) fn relu2_gate(gate: &[f32], up: &mut [f32]) {
                float::relu2_gate(gate, up)
            }
            $(#[target_feature(enable = $feature)])?
            pub(super) fn silu_gate(gate: &[f32], up: &mut [f32]) {
                float::silu_gate(gate, up)
            }
            $(#[target_feature(enable = $feature)])?
            pub(super) fn add(x: &mut [f32], y: &[f32]) {
                float::add(x, y)
            }
            $(#[target_feature(enable = $feature)])?
            pub(super) fn attend(args: &AttendArgs<'_>, scores: &mut [f32], out: &mut [f32]) {
                float::attend(args, scores, out)
            }
            $(#[target_feature(enable = $feature)])?
            pub(super) fn head(rows: FloatRows<'_>, hidden: &[f32], tokens: usize, out: &mut [f32]) {
                float::head(rows, hidden, tokens, out)
            }
            $(#[target_feature(enable = $feature)])?
            pub(super) fn all_finite(x: &[f32]) -> bool {
                float::all_finite(x)
            }
        }

        // SAFETY (of every block in the table): the table is reachable through `Kernels::of` only, which has checked that the CPU
        // has the features that the entries were compiled with; the portable table needs none.
        #[allow(unused_unsafe)]
        pub(in $crate::kernels) static KERNELS: $crate::kernels::Kernels = $crate::kernels::Kernels {
            isa: $isa,
            tile: |w, a, tokens, out| unsafe { entry::tile(w, a, tokens, out) },
            rms_norm: |x, gain, eps, out| unsafe { entry::rms_norm(x, gain, eps, out) },
            quantize: |x, out| unsafe { entry::quantize(x, out) },
            relu2_gate: |gate, up| unsafe { entry::relu2_gate(gate, up) },
            silu_gate: |gate, up| unsafe { entry::silu_gate(gate, up) },
            add: |x, y| unsafe { entry::add(x, y) },
            attend: |args, scores, out| unsafe { entry::attend(args, scores, out) },
            head: |rows, hidden, tokens, out| unsafe { entry::head(rows, hidden, tokens, out) },
            all_finite: |x| unsafe { entry::all_finite(x) },
        };
    };
}
use kernel_table;
