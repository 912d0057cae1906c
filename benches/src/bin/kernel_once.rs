//! Runs kernels once each, for counting their instructions: `kernel_once ISA/KERNEL..`, or `kernel_once` for all. What counts is what
//! happens within [`counted`], whose second run is the same on every machine; `ci/instructions.sh` has callgrind watch it.
//!
//! Prints the names in the order in which they were run.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use benches::cases::{self, Case};
use bitnet_engine::kernels::Isa;

/// What is counted: every kernel on the instruction sets that valgrind knows. Not base three on the portable path: nothing packs it so
/// there, and whether the compiler makes vectors of it hangs on code that has nothing to do with it.
fn names_to_count() -> Vec<String> {
    let names =
        [Isa::Portable, Isa::Avx2].into_iter().flat_map(|isa| cases::SMALL.map(|kernel| format!("{isa}/{kernel}")));
    names.filter(|name| !(name.starts_with("portable/") && name.ends_with("-base-three"))).collect()
}

#[inline(never)]
fn counted(case: &mut dyn Case) -> bitnet_contracts::Result<()> {
    case.run()
}

fn once(name: &str) -> cases::Outcome {
    let (isa, kernel) = name.split_once('/').ok_or_else(|| format!("{name} is not ISA/KERNEL"))?;
    let mut case = cases::small(kernel, isa.parse()?)?;
    // Buffers grow in the first run.
    case.run()?;
    counted(case.as_mut())?;
    case.verify().map_err(|wrong| format!("{name}: {wrong}").into())
}

fn main() -> ExitCode {
    let mut names: Vec<String> = std::env::args().skip(1).collect();
    if names.is_empty() {
        names = names_to_count();
    }
    for name in names {
        if let Err(error) = once(&name) {
            eprintln!("kernel_once: {error}");
            return ExitCode::FAILURE;
        }
        println!("{name}");
    }
    ExitCode::SUCCESS
}
