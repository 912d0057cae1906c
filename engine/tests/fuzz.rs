//! The fuzz targets on their seeds and on changed seeds: the same inputs every time, no coverage to guide them. `ci/fuzz.sh` has that.
//!
//! `FUZZ_EXECUTIONS` asks for another number of inputs a target. A target that fails leaves its input in `target/tmp`.

// Where the allocator counts what an input takes: this test is alone in its process.
#[path = "../fuzz/src/lib.rs"]
#[allow(dead_code)]
mod targets;

use std::panic::catch_unwind;
use std::path::Path;

/// Name, function, and how many inputs take about four seconds.
type Target = (&'static str, fn(&[u8]), usize);

const TARGETS: [Target; 5] = [
    ("gguf", targets::gguf::run, 3_000),
    ("safetensors_config", targets::safetensors_config::run, 6_000),
    ("pack_roundtrip", targets::pack_roundtrip::run, 1_000),
    ("kernel_diff", targets::kernel_diff::run, 1_000),
    // Last: it silences what panics print.
    ("tokenizer", targets::tokenizer::run, 3_000),
];

/// Numbers that readers stumble over, in the low bytes of each.
const NUMBERS: [u64; 12] = [0, 1, 2, 3, 0x7f, 0x80, 0xff, 0x7fff, 0xffff, 0x7fff_ffff, 0xffff_ffff, u64::MAX];

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `end`, which is not zero.
    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }
}

/// One to four changes of `input`, some of them with a piece of `other`.
fn change(input: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    for _ in 0..=random.below(4) {
        let at = random.below(input.len() + 1);
        let len = random.below(16).min(input.len() - at);
        match random.below(7) {
            0 if at < input.len() => input[at] ^= 1 << random.below(8),
            1 if at < input.len() => input[at] = random.next() as u8,
            2 => {
                let number = NUMBERS[random.below(NUMBERS.len())].to_le_bytes();
                let len = [1, 2, 4, 8][random.below(4)].min(input.len() - at);
                input[at..at + len].copy_from_slice(&number[..len]);
            }
            3 => drop(input.drain(at..at + len)),
            4 => drop(input.splice(at..at, input[at..at + len].to_vec())),
            5 if !other.is_empty() => {
                let from = random.below(other.len());
                let piece = other[from..].iter().take(1 + random.below(32)).copied();
                drop(input.splice(at..at + len, piece));
            }
            _ => input.truncate(at),
        }
    }
}

fn seeds(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds").join(target);
    let mut paths: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|path| std::fs::read(path).unwrap()).collect()
}

#[test]
fn changed_seeds_end_in_results_or_errors() {
    let asked = std::env::var("FUZZ_EXECUTIONS").ok().map(|count| count.parse::<usize>().expect("FUZZ_EXECUTIONS"));
    for (name, run, usual) in TARGETS {
        let (seeds, mut random) = (seeds(name), Random(usual as u64));
        assert!(seeds.len() > 1, "{name}");
        let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fuzz-{name}"));
        for number in 0..asked.unwrap_or(usual).max(seeds.len()) {
            let mut input = seeds[number % seeds.len()].clone();
            if number >= seeds.len() {
                let other = random.below(seeds.len());
                change(&mut input, &seeds[other], &mut random);
            }
            // Before it runs: an allocation beyond the bound ends the process.
            std::fs::write(&kept, &input).unwrap();
            assert!(catch_unwind(|| run(&input)).is_ok(), "{name}: input {number}, kept as {}", kept.display());
        }
        std::fs::remove_file(&kept).unwrap();
    }
}
