//! The targets, and what they share: the bound on memory, and a source of small numbers. `engine/tests/fuzz.rs` runs them, too.

pub mod gguf;
pub mod kernel_diff;
pub mod pack_roundtrip;
pub mod safetensors_config;
pub mod tokenizer;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use bitnet_contracts::Result;
use bitnet_engine::model::{Checkpoint, Part};

/// Bytes that are allowed beyond twice the input.
const CONSTANT: usize = 64 << 20;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static LIMIT: AtomicUsize = AtomicUsize::new(usize::MAX);

/// The system's allocator, which ends the process when more is held than [`bounded`] allows.
struct Bounded;

#[global_allocator]
static ALLOCATOR: Bounded = Bounded;

fn add(bytes: usize) {
    let live = LIVE.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes);
    let limit = LIMIT.load(Ordering::Relaxed);
    if live > limit {
        LIMIT.store(usize::MAX, Ordering::Relaxed);
        eprintln!("{live} bytes are held after {bytes} more, {limit} are allowed");
        std::process::abort();
    }
}

// SAFETY: every call goes to the system's allocator as it came; beside that only numbers are counted.
unsafe impl GlobalAlloc for Bounded {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        add(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        add(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, place: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Both may be there at once.
        add(size);
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(place, layout, size) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(place, layout) }
    }
}

/// Runs `f`, which may hold twice the input's bytes and 64 MiB at any time.
pub fn bounded<R>(input: &[u8], f: impl FnOnce() -> R) -> R {
    LIMIT.store(LIVE.load(Ordering::Relaxed) + 2 * input.len() + CONSTANT, Ordering::Relaxed);
    let result = f();
    LIMIT.store(usize::MAX, Ordering::Relaxed);
    result
}

/// Reads every tensor of a checkpoint, as an engine does that loads it.
pub fn read_all(checkpoint: &Checkpoint) -> Result<()> {
    for part in checkpoint.description().parts() {
        match part {
            Part::Vector { name, len } => drop(checkpoint.vector(&name, len)?),
            Part::Floats { name, rows, columns } => drop(checkpoint.matrix(&name, rows, columns)?),
            Part::Ternary { name, rows, columns } => drop(checkpoint.ternary(&name, rows, columns)?.trits()?),
        }
    }
    Ok(())
}

/// Numbers from the bytes of an input; zeroes when there are no more.
pub struct Numbers<'a>(pub &'a [u8]);

impl Numbers<'_> {
    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        first
    }

    /// A number of `1..=most`, at most 256.
    pub fn size(&mut self, most: usize) -> usize {
        usize::from(self.byte()) % most + 1
    }

    /// A number of any bits.
    pub fn float(&mut self) -> f32 {
        f32::from_le_bytes(std::array::from_fn(|_| self.byte()))
    }

    /// `count` trits, the input's bytes again and again.
    pub fn trits(&mut self, count: usize) -> Vec<i8> {
        let source = if self.0.is_empty() { &[0] } else { self.0 };
        // A second factor so that the pattern of a short input does not fit the blocks of a format.
        (0..count).map(|i| ((usize::from(source[i % source.len()]) + i / source.len() * 7) % 3) as i8 - 1).collect()
    }
}
