//! What a file claims does not decide what is allocated. Alone in its process, so that the process's peak is this test's.
#![cfg(target_os = "linux")]

#[path = "gguf/raw.rs"]
#[allow(dead_code)]
mod raw;

use bitnet_engine::model::gguf::GgufOptions;
use raw::RawModel;

/// Peak of the address space, in bytes: counts what is reserved and not touched, too.
fn peak() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmPeak:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
}

#[test]
fn no_claim_of_a_header_is_believed() {
    let original = raw::Raw::model();
    original.read().unwrap();
    let (bytes, header) = original.bytes();
    let before = peak();
    // Every place of the header as a count of every size, and many of those are counts.
    for at in (0..header - 8).filter(|at| bytes[*at + 3..*at + 8] == [0; 5]) {
        for power in [16, 20, 24, 30, 31, 32, 40, 48, 62, 63] {
            let mut spoiled = bytes.clone();
            spoiled[at..at + 8].copy_from_slice(&(1u64 << power).to_le_bytes());
            let _ = raw::read(spoiled, &GgufOptions::default());
        }
    }
    let grown = peak() - before;
    assert!(grown <= 2 * bytes.len() + (64 << 20), "{grown} bytes for a file of {}", bytes.len());
}
