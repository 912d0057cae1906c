//! golden.
fn main() {}
