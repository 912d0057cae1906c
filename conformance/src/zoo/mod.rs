//! Backends that must be caught and backends that must pass: what proves that the suite can tell them apart.

pub mod proof;
