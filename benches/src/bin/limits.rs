//! `cargo run --release -p benches --bin limits`: what this machine allows, for every instruction set that it has, on one thread and on
//! all. Takes some seconds and 512 MiB of memory.

#![forbid(unsafe_code)]

use bitnet_engine::kernels::{Isa, Kernels, Limits, Threads};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    if std::env::args().len() > 1 {
        return Err("usage: limits".into());
    }
    println!("instruction set  threads  memory GB/s  cache GB/s   GMAC/s");
    for isa in Isa::available() {
        let kernels = Kernels::of(isa)?;
        let all = Threads::new(None)?;
        let mut teams = vec![Threads::new(Some(1))?];
        if all.count() > 1 {
            teams.push(all);
        }
        for threads in teams {
            let Limits { dram_read_gb_s: memory, cache_read_gb_s: cache, gmac_s, .. } =
                Limits::measure(kernels, &threads)?;
            println!("{:15} {:8} {memory:12.1} {cache:11.1} {gmac_s:8.1}", isa.name(), threads.count());
        }
    }
    Ok(())
}
