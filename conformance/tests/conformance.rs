//! t.
fn main() {}
