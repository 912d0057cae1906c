//! bitnet.
fn main() {}
