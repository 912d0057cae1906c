//! Times with criterion, and says how near the limit the fastest sample came.

use std::time::{Duration, Instant};

use benches::cases::Work;
use bitnet_engine::kernels::Limits;
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput};

/// A group whose runs may take long.
pub fn group<'a>(c: &'a mut Criterion, name: &str, work: Work) -> BenchmarkGroup<'a, WallTime> {
    let mut group = c.benchmark_group(name);
    group.sample_size(10).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(2));
    group.throughput(match work {
        Work::Memory(bytes) | Work::Cache(bytes) => Throughput::Bytes(bytes as u64),
        Work::Products(macs) => Throughput::Elements(macs as u64),
    });
    group
}

/// Times `run`, which does `work`.
pub fn time(
    group: &mut BenchmarkGroup<'_, WallTime>,
    id: impl Into<String>,
    work: Work,
    limits: &Limits,
    mut run: impl FnMut(),
) {
    let id = id.into();
    let mut best = f64::INFINITY;
    group.bench_function(BenchmarkId::from_parameter(&id), |b| {
        b.iter_custom(|times| {
            let start = Instant::now();
            (0..times).for_each(|_| run());
            let taken = start.elapsed();
            best = best.min(taken.as_secs_f64() / times as f64);
            taken
        })
    });
    // A filter may have left it out.
    if best.is_finite() {
        println!("{id}: {}\n", work.beside(limits, best));
    }
}
