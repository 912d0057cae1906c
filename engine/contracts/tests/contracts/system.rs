//! Readings of the machine.

use bitnet_contracts::*;

#[test]
fn readings_are_real() {
    let before = SystemState::current();
    assert!(before.available_memory > 0);
    assert!(before.used_memory > 0);
    assert!(before.process_memory > 1 << 20, "a test process has more than a mebibyte");
    assert!(before.cpu_count >= 1);
    assert!(available_cpu_memory().unwrap() > 0);
}

#[test]
fn memory_written_to_is_seen() {
    const SIZE: usize = 256 << 20;
    let before = SystemState::current().process_memory;
    let block = vec![1_u8; SIZE];
    let after = SystemState::current().process_memory;
    assert!(block.iter().step_by(4096).all(|&byte| byte == 1));
    // Other tests of this process free less than half of this meanwhile.
    assert!(after > before + SIZE / 2, "{before} then {after}");
}

#[cfg(target_os = "linux")]
#[test]
fn threads_of_this_process_are_counted() {
    use std::sync::{Arc, Barrier};
    // More threads than the test runner could end meanwhile.
    const THREADS: usize = 64;
    let done = Arc::new(Barrier::new(THREADS + 1));
    let threads: Vec<_> = (0..THREADS)
        .map(|_| {
            let done = Arc::clone(&done);
            std::thread::spawn(move || done.wait())
        })
        .collect();
    let count = SystemState::current().thread_count.unwrap();
    done.wait();
    threads.into_iter().for_each(|thread| {
        thread.join().unwrap();
    });
    assert!(count > THREADS, "{count} threads");
}

#[test]
fn a_state_survives_json() {
    let state = SystemState::current();
    let text = serde_json::to_string(&state).unwrap();
    assert_eq!(serde_json::from_str::<SystemState>(&text).unwrap(), state);
}
