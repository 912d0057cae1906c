//! The programs of this package do what they say, and refuse what they do not know.

use std::process::{Command, Output};

use benches::cases::{SMALL, small};
use bitnet_engine::kernels::Isa;

fn kernel_once(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kernel_once")).args(args).output().expect("kernel_once starts")
}

/// Every kernel on every instruction set that there is, not only on those whose instructions are counted.
#[test]
fn every_small_case_is_right() {
    for isa in Isa::available() {
        for name in SMALL {
            let mut case = small(name, isa).expect("a case");
            case.run().expect("a run");
            case.verify().unwrap_or_else(|wrong| panic!("{isa}/{name}: {wrong}"));
        }
    }
}

/// What nobody computed is wrong: the checks can fail.
#[test]
fn a_case_that_did_not_run_is_not_right() {
    for name in SMALL.iter().filter(|name| **name != "norm-and-quantise") {
        let case = small(name, Isa::Portable).expect("a case");
        assert!(case.verify().is_err(), "{name}");
    }
}

#[test]
fn kernels_run_by_name_and_unknown_names_are_refused() {
    let done = kernel_once(&["portable/head", "portable/gemv-two-bits"]);
    assert!(done.status.success());
    assert_eq!(String::from_utf8_lossy(&done.stdout), "portable/head\nportable/gemv-two-bits\n");
    for unknown in ["head", "portable/no-such-kernel", "avx9/head"] {
        let done = kernel_once(&[unknown]);
        assert_eq!(done.status.code(), Some(1), "{unknown}");
        assert!(done.stdout.is_empty() && !done.stderr.is_empty(), "{unknown}");
    }
}

#[test]
fn limits_takes_no_arguments() {
    let done = Command::new(env!("CARGO_BIN_EXE_limits")).arg("--help").output().expect("limits starts");
    assert!(!done.status.success() && done.stdout.is_empty());
}
