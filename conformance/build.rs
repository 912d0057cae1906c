//! Tells the suite which compiler built it, for the report's environment.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let version = std::process::Command::new(rustc).arg("--version").output();
    let version = version.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_string()).unwrap_or_default();
    println!("cargo:rustc-env=CONFORMANCE_RUSTC={version}");
}
