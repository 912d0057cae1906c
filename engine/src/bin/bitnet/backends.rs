//! `bitnet backends`: what is compiled in and what this CPU has.

use std::io::{Write, stdout};

use bitnet_engine::backends::BACKENDS;
use bitnet_engine::kernels::{ISA_VARIABLE, Isa};
use clap::Args;
use comfy_table::Table;
use serde_json::json;

use crate::Outcome;

/// Arguments of `bitnet backends`.
#[derive(Args)]
pub(crate) struct BackendsArgs {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &BackendsArgs) -> Outcome {
    let isa = Isa::from_environment()?;
    let available: Vec<_> = Isa::available().into_iter().map(Isa::name).collect();
    let mut out = stdout().lock();
    if args.json {
        let list: Vec<_> = BACKENDS
            .iter()
            .map(|b| json!({"name": b.name, "semantics": b.semantics, "description": b.description}))
            .collect();
        let report = json!({"backends": list, "isa": isa.name(), "isa_available": available});
        writeln!(out, "{report:#}")?;
        return Ok(());
    }
    let mut table = Table::new();
    table.load_style(comfy_table::presets::UTF8_HORIZONTAL_ONLY);
    table.set_header(["backend", "semantics", "what it is"]);
    for b in BACKENDS {
        table.add_row([b.name, b.semantics, b.description]);
    }
    writeln!(out, "{table}")?;
    writeln!(
        out,
        "instruction set of the cpu backend: {isa} (this CPU has {}; {ISA_VARIABLE} forces one)",
        available.join(", ")
    )?;
    Ok(())
}
