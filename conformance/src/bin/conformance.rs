//! `conformance`: the suite against the project's own backends.
#![forbid(unsafe_code)]

mod own_backends;

fn main() -> std::process::ExitCode {
    conformance::cli::main(own_backends::registry())
}
