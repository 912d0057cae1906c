//! The arithmetic. Every kernel is written once, in [`ternary_tile`], [`ternary_panel`], [`lookup`], [`attention`] and [`float`], and
//! compiled for each instruction set behind one table of function pointers, [`Kernels`]. All instruction sets give the same bits: the
//! integer part because it is exact, the float part because the order of every reduction is written out (sixteen lanes, one tree) and no
//! multiply-add is fused.

#[cfg(target_arch = "aarch64")]
mod aarch64;
mod activations;
mod attention;
pub(crate) mod chunks;
mod columns;
#[cfg(test)]
mod edges;
pub(crate) mod float;
#[cfg(test)]
pub(crate) mod guarded;
mod head_matmul;
mod head_screen;
mod isa;
mod kv_page;
mod limits;
mod lookup;
mod pages;
mod portable;
mod team;
mod ternary_matmul;
mod ternary_panel;
mod ternary_tile;
#[cfg(test)]
mod tests;
mod threads;
#[cfg(target_arch = "x86_64")]
mod x86_64;

pub use activations::QuantizedActivations;
pub(crate) use activations::RowFailure;
pub(crate) use attention::PAGE;
pub(crate) use head_matmul::head_matmul;
pub(crate) use head_screen::{HeadAndState, HeadScreen, ScreenScratch};
pub use isa::{ISA_VARIABLE, Isa};
pub use kv_page::KvFormat;
pub(crate) use kv_page::{KvPage, Order, write as write_kv};
pub use limits::Limits;
pub(crate) use pages::Pages;
pub use ternary_matmul::{TernaryJob, ternary_matmul};
pub use threads::Threads;

use crate::model::FloatRows;
use crate::ternary::interleaved::Packing;

/// One query head group's attention at one position: see [`Kernels::attend`].
pub(crate) struct AttendArgs<'a> {
    /// Query heads of one group, `[group, head_dim]`, RoPE applied.
    pub(crate) queries: &'a [f32],
    /// Key pages of the group's KV head, each `[head_dim, PAGE]`.
    pub(crate) keys: &'a dyn Fn(usize) -> KvPage<'a>,
    /// Value pages, each `[PAGE, head_dim]`.
    pub(crate) values: &'a dyn Fn(usize) -> KvPage<'a>,
    /// Positions to attend to: `0..total`.
    pub(crate) total: usize,
    /// Numbers a head.
    pub(crate) head_dim: usize,
}

impl AttendArgs<'_> {
    /// Query heads.
    pub(crate) fn group(&self) -> usize {
        self.queries.len() / self.head_dim
    }

    /// Floats of the scores: `[pages, group, 64]`.
    pub(crate) fn score_floats(&self) -> usize {
        self.total.div_ceil(PAGE) * self.group() * PAGE
    }
}

/// The kernels of one instruction set. Obtained from [`Kernels::of`] only, which checks that this CPU has it.
#[derive(Clone)]
pub struct Kernels {
    isa: Isa,
    packing: Packing,
    panel_groups: usize,
    tile_tokens: usize,
    product: fn(&ternary_matmul::Product<'_>, usize, usize, &mut ternary_panel::PanelScratch),
    rms_norm: fn(&[f32], &[f32], f32, &mut [f32]) -> bool,
    quantize: fn(&[f32], &mut [i8]) -> Option<float::ActivationScale>,
    relu2_gate: fn(&[f32], &[f32], &mut [f32]),
    silu_gate: fn(&[f32], &[f32], &mut [f32]),
    scores: fn(&AttendArgs<'_>, usize, &mut [f32]),
    probabilities: fn(&mut [f32], usize),
    weighted_values: fn(&AttendArgs<'_>, &[f32], usize, &mut [f32]),
    head: fn(FloatRows<'_>, &[f32], usize, &mut [f32]),
    screen: fn(&head_screen::ScreenPass<'_>, usize, &mut [f32]),
    screen_codes: fn(&[f32], &[f32], &mut [u8]) -> f32,
    all_finite: fn(&[f32]) -> bool,
    pack: fn(Packing, &[u32], &mut [u8]),
    tables: fn(Packing, &[i8], &mut [ternary_tile::Line]),
    /// See [`limits`].
    read_limit: fn(&[u8]) -> u64,
    mac_limit: fn(usize) -> u64,
}

/// The kernels of one instruction set: for the fastest packing, and for each of [`Packing::ALL`].
struct Tables {
    fastest: Kernels,
    packed: [Kernels; 4],
}

impl Kernels {
    /// The kernels of `isa`, for the packing that is fastest there.
    ///
    /// # Errors
    /// `DeviceError::InsufficientCapability` when this CPU lacks the instruction set.
    pub fn of(isa: Isa) -> bitnet_contracts::Result<&'static Kernels> {
        isa.require()?;
        Ok(&Self::tables_of(isa).fastest)
    }

    /// The tables of an instruction set that this CPU has.
    fn tables_of(isa: Isa) -> &'static Tables {
        match isa {
            Isa::Portable => &portable::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => &x86_64::avx2::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => &x86_64::avx512vnni::KERNELS,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => &aarch64::neon::KERNELS,
            #[cfg(target_arch = "aarch64")]
            Isa::DotProd => &aarch64::dotprod::KERNELS,
            // `require` has refused every instruction set that this architecture does not have.
            _ => &portable::KERNELS,
        }
    }

    /// The instruction set these kernels were compiled for.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// How weights are packed for these kernels.
    pub fn packing(&self) -> Packing {
        self.packing
    }

    /// The same kernels for weights in another packing.
    #[must_use]
    pub fn with_packing(&self, packing: Packing) -> &'static Kernels {
        &Self::tables_of(self.isa).packed[packing as usize]
    }

    /// Row groups of one panel of [`ternary_panel`].
    pub(crate) fn panel_groups(&self) -> usize {
        self.panel_groups
    }

    /// Tokens of one tile of [`ternary_panel`].
    pub(crate) fn tile_tokens(&self) -> usize {
        self.tile_tokens
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

    /// `out[i] = relu(gate[i])^2 * up[i]`.
    pub(crate) fn relu2_gate(&self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        (self.relu2_gate)(gate, up, out)
    }

    /// `out[i] = gate[i] / (1 + e^-gate[i]) * up[i]`.
    pub(crate) fn silu_gate(&self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        (self.silu_gate)(gate, up, out)
    }

    /// Attention of one head group at one position: `softmax(q . k_j / sqrt(d))` over the positions, then the weighted sum of the values.
    /// `scores`, `[pages, group, 64]`, holds the probabilities afterwards; `out` is `[group, head_dim]`.
    pub(crate) fn attend(&self, args: &AttendArgs<'_>, scores: &mut [f32], out: &mut [f32]) {
        self.scores(args, 0, scores);
        self.probabilities(scores, args.total);
        self.weighted_values(args, scores, 0, out);
    }

    /// The first step of [`Self::attend`], for some pages: see [`attention::scores`].
    pub(crate) fn scores(&self, args: &AttendArgs<'_>, first: usize, out: &mut [f32]) {
        (self.scores)(args, first, out)
    }

    /// The second step of [`Self::attend`]: see [`attention::probabilities`].
    pub(crate) fn probabilities(&self, scores: &mut [f32], total: usize) {
        (self.probabilities)(scores, total)
    }

    /// The third step of [`Self::attend`], for some dimensions: see [`attention::weighted_values`].
    pub(crate) fn weighted_values(&self, args: &AttendArgs<'_>, probabilities: &[f32], at: usize, out: &mut [f32]) {
        (self.weighted_values)(args, probabilities, at, out)
    }

    /// Dot products of some rows of the output head with `tokens` hidden states `[tokens, hidden]`; `out` is `[rows, tokens]`.
    pub(crate) fn head(&self, rows: FloatRows<'_>, hidden: &[f32], tokens: usize, out: &mut [f32]) {
        (self.head)(rows, hidden, tokens, out)
    }

    /// Estimated logits of the row groups from `first` on: see [`head_screen`].
    fn screen(&self, pass: &head_screen::ScreenPass<'_>, first: usize, out: &mut [f32]) {
        (self.screen)(pass, first, out)
    }

    /// The 4-bit codes of one row of the head, a byte each, and their step: see [`head_screen`].
    fn screen_codes(&self, row: &[f32], offsets: &[f32], out: &mut [u8]) -> f32 {
        (self.screen_codes)(row, offsets, out)
    }

    /// Packs the lanes of sixteen rows, `[columns / 4, 16]`, columns a multiple of the packing's block.
    pub(crate) fn pack(&self, lanes: &[u32], out: &mut [u8]) {
        (self.pack)(self.packing, lanes, out)
    }

    /// The tables of one token's activations: see [`lookup`].
    fn tables(&self, activations: &[i8], out: &mut [ternary_tile::Line]) {
        (self.tables)(self.packing, activations, out)
    }

    /// Whether no value is NaN or infinite.
    pub(crate) fn all_finite(&self, x: &[f32]) -> bool {
        (self.all_finite)(x)
    }
}

/// Compiles the generic kernels for one instruction set and puts them in a table.
macro_rules! kernel_table {
    ($isa:expr, $lanes:ty, $packing:expr, panel: ($groups:literal, $tokens:literal), heads: ($heads:literal, $width:literal) $(, $feature:literal)?) => {
        // Unsafe functions: safe ones with target features need Rust 1.86.
        mod entry {
            use super::*;
            use $crate::kernels::head_screen::ScreenPass;
            use $crate::kernels::ternary_matmul::Product;
            use $crate::kernels::{AttendArgs, attention, float, head_screen, limits, lookup, ternary_panel, ternary_tile};
            use $crate::kernels::ternary_panel::PanelScratch;
            use $crate::model::FloatRows;
            use $crate::ternary::interleaved::{self, Packing};

            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn product(product: &Product<'_>, first: usize, end: usize, scratch: &mut PanelScratch) {
                if product.is_tiled() {
                    for panel in (first..end).step_by($groups) {
                        if end - panel < $groups {
                            for group in panel..end {
                                ternary_panel::panel::<$lanes, 1, $tokens>(product, group, scratch);
                            }
                        } else {
                            ternary_panel::panel::<$lanes, $groups, $tokens>(product, panel, scratch);
                        }
                    }
                } else if product.weights.packing().has_tables() {
                    lookup::stream::<$lanes>(product, first, end);
                } else {
                    for group in first..end {
                        ternary_tile::stream::<$lanes>(product, group);
                    }
                }
            }
            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn rms_norm(x: &[f32], gain: &[f32], eps: f32, out: &mut [f32]) -> bool {
                float::rms_norm(x, gain, eps, out)
            }
            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn quantize(x: &[f32], out: &mut [i8]) -> Option<float::ActivationScale> {
                float::quantize(x, out)
            }
            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn relu2_gate(gate: &[f32], up: &[f32], out: &mut [f32]) {
                float::relu2_gate(gate, up, out)
            }
            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn silu_gate(gate: &[f32], up: &[f32], out: &mut [f32]) {
                float::silu_gate(gate, up, out)
            }
            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn scores(args: &AttendArgs<'_>, first: usize, out: &mut [f32]) {
                attention::scores::<$lanes, $heads, $width>(args, first, out)
            }
            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn probabilities(scores: &mut [f32], total: usize) {
                attention::probabilities(scores, total)
            }
            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn weighted_values(args: &AttendArgs<'_>, probabilities: &[f32], at: usize, out: &mut [f32]) {
                attention::weighted_values::<$lanes, $heads, $width>(args, probabilities, at, out)
            }
            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn head(rows: FloatRows<'_>, hidden: &[f32], tokens: usize, out: &mut [f32]) {
                float::head(rows, hidden, tokens, out)
            }
            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn screen(pass: &ScreenPass<'_>, first: usize, out: &mut [f32]) {
                head_screen::screen::<$lanes>(pass, first, out)
            }
            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn screen_codes(row: &[f32], offsets: &[f32], out: &mut [u8]) -> f32 {
                head_screen::codes(row, offsets, out)
            }
            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn all_finite(x: &[f32]) -> bool {
                float::all_finite(x)
            }
            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn pack(packing: Packing, lanes: &[u32], out: &mut [u8]) {
                interleaved::pack_lanes(packing, lanes, out)
            }
            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn tables(packing: Packing, activations: &[i8], out: &mut [ternary_tile::Line]) {
                lookup::write_tables(packing, activations, out)
            }
            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn read_limit(bytes: &[u8]) -> u64 {
                limits::read::<$lanes>(bytes)
            }
            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn mac_limit(passes: usize) -> u64 {
                limits::multiply::<$lanes, $groups, $tokens>(passes)
            }
        }

        // SAFETY (of every block in the table): the table is reachable through `Kernels::of` first, which has checked that the CPU
        // has the features that the entries were compiled with; the portable table needs none.
        const TABLE: $crate::kernels::Kernels = $crate::kernels::Kernels {
            isa: $isa,
            packing: $packing,
            panel_groups: $groups,
            tile_tokens: $tokens,
            product: |product, first, end, scratch| unsafe { entry::product(product, first, end, scratch) },
            rms_norm: |x, gain, eps, out| unsafe { entry::rms_norm(x, gain, eps, out) },
            quantize: |x, out| unsafe { entry::quantize(x, out) },
            relu2_gate: |gate, up, out| unsafe { entry::relu2_gate(gate, up, out) },
            silu_gate: |gate, up, out| unsafe { entry::silu_gate(gate, up, out) },
            scores: |args, first, out| unsafe { entry::scores(args, first, out) },
            probabilities: |scores, total| unsafe { entry::probabilities(scores, total) },
            weighted_values: |args, probabilities, at, out| unsafe {
                entry::weighted_values(args, probabilities, at, out)
            },
            head: |rows, hidden, tokens, out| unsafe { entry::head(rows, hidden, tokens, out) },
            screen: |pass, first, out| unsafe { entry::screen(pass, first, out) },
            screen_codes: |row, offsets, out| unsafe { entry::screen_codes(row, offsets, out) },
            all_finite: |x| unsafe { entry::all_finite(x) },
            pack: |packing, lanes, out| unsafe { entry::pack(packing, lanes, out) },
            tables: |packing, activations, out| unsafe { entry::tables(packing, activations, out) },
            read_limit: |bytes| unsafe { entry::read_limit(bytes) },
            mac_limit: |passes| unsafe { entry::mac_limit(passes) },
        };
        pub(in $crate::kernels) static KERNELS: $crate::kernels::Tables = $crate::kernels::Tables {
            fastest: TABLE,
            packed: [
                $crate::kernels::Kernels { packing: Packing::ALL[0], ..TABLE },
                $crate::kernels::Kernels { packing: Packing::ALL[1], ..TABLE },
                $crate::kernels::Kernels { packing: Packing::ALL[2], ..TABLE },
                $crate::kernels::Kernels { packing: Packing::ALL[3], ..TABLE },
            ],
        };
    };
}
use kernel_table;
