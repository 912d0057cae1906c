//! How a crate puts its own backend to the test: this file is all of it.
//!
//! As a test target (`tests/conformance.rs` with `harness = false` in `Cargo.toml`) every case becomes one test of
//! `cargo test`. Here it is an example, so try
//! `cargo run -p conformance --example register_backend -- --list`, or without `--list` to run it.
#![forbid(unsafe_code)]

mod oracle_backend;

use conformance::Registry;
use oracle_backend::OracleFactory;

fn main() -> std::process::ExitCode {
    conformance::main(Registry::new().with(OracleFactory))
}
