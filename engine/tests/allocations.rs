//! What a step of generation allocates: nothing. Alone in its process, so that every allocation that is counted is this test's.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use bitnet_contracts::GenerationConfig;
use bitnet_engine::{CpuEngine, EngineOptions};

static COUNT: AtomicUsize = AtomicUsize::new(0);

/// Counts allocations, those of every thread.
struct Counting;

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(place, layout) }
    }

    unsafe fn realloc(&self, place: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.realloc(place, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Positions of one block of the cache.
const BLOCK: usize = 64;

#[test]
fn a_step_allocates_nothing() {
    let mut engine = CpuEngine::embedded(&EngineOptions::default().with_threads(2)).unwrap();
    let prompt: Vec<u32> = (0..70).map(|i| i * 31 % 4096).collect();
    let greedy = GenerationConfig { do_sample: false, ..GenerationConfig::default() };
    let top_k = GenerationConfig { seed: Some(3), ..GenerationConfig::default() };
    let whole_head = GenerationConfig { top_k: None, ..top_k.clone() };
    for (name, config) in [("greedy", greedy), ("top-k", top_k), ("whole head", whole_head)] {
        let config = GenerationConfig { min_new_tokens: 56, ..config };
        // A round in which a thread has its first part of some kind still makes that thread's buffers; the next one need not.
        let mut round = || {
            let mut seen = Vec::with_capacity(56);
            engine.generate_streaming(&prompt, 56, &config, &mut |_| seen.push(COUNT.load(Ordering::Relaxed))).unwrap();
            assert_eq!(seen.len(), 56);
            let steps = seen.windows(2).map(|pair| pair[1] - pair[0]).enumerate();
            // A block of the cache that begins may be new.
            steps.filter(|(i, count)| *count > 0 && !(prompt.len() + i + 1).is_multiple_of(BLOCK)).collect::<Vec<_>>()
        };
        let mut last = round();
        for _ in 0..50 {
            if last.is_empty() {
                break;
            }
            last = round();
        }
        assert!(last.is_empty(), "{name}: allocations at steps {last:?}");
    }
}
