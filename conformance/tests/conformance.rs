//! Every check of the suite against the project's own backends, each case one test.
#![forbid(unsafe_code)]

#[path = "../src/bin/own_backends/mod.rs"]
mod own_backends;

fn main() -> std::process::ExitCode {
    conformance::main(own_backends::registry())
}
