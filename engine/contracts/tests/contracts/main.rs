//! Tests of the public contract, written from outside the crate as a backend's author would.
//!
//! One binary, a module an area: `toy` is a small complete engine that the tests of traits and wrappers run on.

mod concurrency;
mod config;
mod errors;
mod generation;
mod kv_cache;
mod metrics;
mod never_panics;
mod output;
mod sla;
mod system;
mod toy;
mod validation;
