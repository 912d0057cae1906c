//! How near a run came to what the machine allows, and where its time went.

use std::io::{self, Write};

use bitnet_engine::kernels::Limits;
use bitnet_engine::{CpuEngine, StepBytes, Times};
use serde_json::{Map, Value, json};

/// A run beside the limits of its machine.
pub(super) struct Report {
    limits: Limits,
    /// Bytes of a decode step at the middle of the run.
    bytes: StepBytes,
    decode_gb_s: f64,
    products: usize,
    prefill_gmac_s: f64,
    prefill: Parts,
    decode: Parts,
}

/// Time by part, summed over the runs, and the whole.
#[derive(Default)]
pub(super) struct Parts {
    times: Vec<Times>,
    whole_s: f64,
}

impl Parts {
    /// Adds the parts of one run.
    pub(super) fn add(&mut self, times: Times, whole_s: f64) {
        self.times.push(times);
        self.whole_s += whole_s;
    }

    /// Percent of the whole by part; the last is what no part accounts for.
    fn percent(&self) -> [(&'static str, f64); 7] {
        let sum = |part: &dyn Fn(&Times) -> f64| 100.0 * self.times.iter().map(part).sum::<f64>() / self.whole_s;
        let mut percent = [
            ("embedding", sum(&|t| t.embedding.as_secs_f64())),
            ("attention_products", sum(&|t| t.attention.as_secs_f64())),
            ("attention_scores", sum(&|t| t.attention_scores.as_secs_f64())),
            ("feed_forward_products", sum(&|t| t.feed_forward.as_secs_f64())),
            ("norm_and_quantise", sum(&|t| (t.normalization + t.quantization).as_secs_f64())),
            ("head", sum(&|t| t.logits.as_secs_f64())),
            ("other", 0.0),
        ];
        percent[6].1 = 100.0 - percent.iter().map(|(_, share)| share).sum::<f64>();
        percent
    }
}

impl Report {
    /// Measures the machine's limits with the engine's instruction set and threads. `depth` is the number of positions before the first
    /// of `steps` decode steps; speeds are in tokens a second.
    pub(super) fn measure(
        engine: &CpuEngine,
        (depth, steps): (usize, usize),
        (prefill_speed, decode_speed): (f64, f64),
        (prefill, decode): (Parts, Parts),
    ) -> bitnet_contracts::Result<Report> {
        let bytes = engine.step_bytes(depth + steps.div_ceil(2));
        let products = engine.products_per_token();
        Ok(Report {
            limits: engine.limits()?,
            bytes,
            decode_gb_s: bytes.total() as f64 * decode_speed / 1e9,
            products,
            prefill_gmac_s: products as f64 * prefill_speed / 1e9,
            prefill,
            decode,
        })
    }

    fn percent_of_memory(&self) -> f64 {
        100.0 * self.decode_gb_s / self.limits.dram_read_gb_s
    }

    fn percent_of_products(&self) -> f64 {
        100.0 * self.prefill_gmac_s / self.limits.gmac_s
    }

    /// The keys that this report adds to the JSON object.
    pub(super) fn json(&self) -> Map<String, Value> {
        let parts = |parts: &Parts| -> Value {
            let shares = parts.percent().into_iter().map(|(name, share)| (name.to_string(), json!(share)));
            Value::Object(shares.collect())
        };
        let object = json!({
            "limits": {
                "dram_read_gb_per_s": self.limits.dram_read_gb_s,
                "cache_read_gb_per_s": self.limits.cache_read_gb_s,
                "gmac_per_s": self.limits.gmac_s,
            },
            "decode_reads": {
                "weight_bytes": self.bytes.weights,
                "screen_bytes": self.bytes.screen,
                "key_and_value_bytes": self.bytes.keys_and_values,
                "bytes_per_token": self.bytes.total(),
                "gb_per_s": self.decode_gb_s,
                "percent_of_dram_limit": self.percent_of_memory(),
            },
            "prefill_products": {
                "macs_per_token": self.products,
                "gmac_per_s": self.prefill_gmac_s,
                "percent_of_mac_limit": self.percent_of_products(),
            },
            "prefill_percent": parts(&self.prefill),
            "decode_percent": parts(&self.decode),
        });
        match object {
            Value::Object(map) => map,
            _ => Map::new(),
        }
    }

    /// The same as text.
    pub(super) fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        let mb = |bytes: usize| bytes as f64 / 1e6;
        let Limits { dram_read_gb_s: memory, cache_read_gb_s: cache, gmac_s: products, .. } = self.limits;
        writeln!(out, "limits    {memory:10.1} GB/s of memory, {cache:.1} GB/s of cache, {products:.1} GMAC/s")?;
        writeln!(
            out,
            "decode    {:10.1} MB a token (weights {:.1}, screen {:.1}, keys and values {:.1}): {:.1} GB/s, {:.0} % of memory's limit",
            mb(self.bytes.total()),
            mb(self.bytes.weights),
            mb(self.bytes.screen),
            mb(self.bytes.keys_and_values),
            self.decode_gb_s,
            self.percent_of_memory()
        )?;
        writeln!(
            out,
            "prefill   {:10.1} M ternary products a token: {:.1} GMAC/s, {:.0} % of their limit",
            self.products as f64 / 1e6,
            self.prefill_gmac_s,
            self.percent_of_products()
        )?;
        for (name, parts) in [("prefill", &self.prefill), ("decode", &self.decode)] {
            let shares = parts.percent().map(|(name, share)| format!("{} {share:.1} %", name.replace('_', " ")));
            writeln!(out, "{name:8}  {}", shares.join(", "))?;
        }
        Ok(())
    }
}
