//! `bitnet`: the reference engine on the command line.
//!
//! Exit codes: 0 success, 1 the work failed (the message on standard error says where and what), 2 wrong usage.

#![forbid(unsafe_code)]

mod backends;
mod bench;
mod convert;
mod diff;
mod generate;
mod inspect;
mod logits;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use bitnet_engine::EngineOptions;
use bitnet_engine::kernels::KvFormat;
use bitnet_engine::model::{Activation, ModelSource, PackedWeights};
use bitnet_engine::ternary::{I2sLayout, Quantization};
use clap::{Args, Parser, Subcommand};

/// BitNet b1.58 inference: ternary weights, int8 activations.
#[derive(Parser)]
#[command(name = "bitnet", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Continue a prompt, writing the text as it comes.
    Generate(generate::GenerateArgs),
    /// Write the logits of token sequences to a safetensors file.
    Logits(logits::LogitsArgs),
    /// Show a model's architecture, tensors and sizes.
    Inspect(inspect::InspectArgs),
    /// Write a model in another format.
    Convert(convert::ConvertArgs),
    /// Make trits of a master checkpoint by absmean and write them.
    Quantize(convert::ConvertArgs),
    /// Compare two models tensor by tensor; exit code 1 when they differ.
    Diff(diff::DiffArgs),
    /// Measure prefill and decode speed.
    Bench(bench::BenchArgs),
    /// List the backends that are compiled in and the instruction sets of this CPU.
    Backends(backends::BackendsArgs),
}

/// What a GGUF file does not say about itself.
#[derive(Args)]
struct GgufArgs {
    /// Interleaving of I2_S tensors in a GGUF file: x86 or arm (default: as the file or its weights say).
    #[arg(long, value_name = "LAYOUT")]
    i2s_layout: Option<I2sLayout>,
    /// The kernel_config.ini that a GGUF file with TL1 or TL2 tensors was made with.
    #[arg(long, value_name = "FILE.ini")]
    kernel_config: Option<PathBuf>,
    /// Activation of a GGUF file: relu2 or silu (default: that of its architecture).
    #[arg(long, value_name = "NAME")]
    activation: Option<Activation>,
}

impl GgufArgs {
    /// The folder or GGUF file at `path`, or the embedded model.
    fn source(&self, path: Option<&Path>) -> bitnet_contracts::Result<ModelSource> {
        let mut source = path.map_or(ModelSource::Embedded, ModelSource::from_path);
        if let ModelSource::Gguf(gguf) = &mut source {
            gguf.options.i2s_layout = self.i2s_layout;
            gguf.options.activation = self.activation;
            if let Some(path) = &self.kernel_config {
                gguf.options = std::mem::take(&mut gguf.options).with_kernel_config(path)?;
            }
        }
        Ok(source)
    }
}

/// Which model, on how many threads.
#[derive(Args)]
struct ModelArgs {
    /// Folder with config.json and model.safetensors, or GGUF file (default: the embedded tiny model).
    #[arg(long, value_name = "DIR|FILE.gguf")]
    model: Option<PathBuf>,
    #[command(flatten)]
    gguf: GgufArgs,
    /// Threads (default: as many as the process may use).
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Packed weights in a file beside the model: never, use (read it where there is one) or keep (make one where there is none).
    #[arg(long, default_value_t = PackedWeights::Use, value_name = "WHEN")]
    packed: PackedWeights,
    /// Kernels that the weights are packed for, whatever the file's format: auto, i2s, tl1 or tl2. The logits are the same.
    #[arg(long, default_value_t = Quantization::Auto, value_name = "TYPE")]
    quantization: Quantization,
    /// How keys and values are kept: f32, f16 or int8.
    #[arg(long, default_value_t = KvFormat::F32, value_name = "FORMAT")]
    kv: KvFormat,
}

impl ModelArgs {
    fn source(&self) -> bitnet_contracts::Result<ModelSource> {
        self.gguf.source(self.model.as_deref())
    }

    fn options(&self) -> EngineOptions {
        let options = EngineOptions::default();
        let options = options.with_kv(self.kv).with_packed(self.packed).with_quantization(self.quantization);
        match self.threads {
            Some(threads) => options.with_threads(threads),
            None => options,
        }
    }

    fn name(&self) -> String {
        self.model.as_ref().map_or_else(|| "tiny (embedded)".to_string(), |dir| dir.display().to_string())
    }
}

/// Any failure of a subcommand.
type Outcome = Result<(), Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn")).init();
    let outcome = match Cli::parse().command {
        Command::Generate(args) => generate::run(&args),
        Command::Logits(args) => logits::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Convert(args) => convert::convert(&args),
        Command::Quantize(args) => convert::quantize(&args),
        Command::Diff(args) => diff::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Backends(args) => backends::run(&args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        // A reader that has seen enough (`bitnet inspect | head`) is no failure.
        Err(error) if is_broken_pipe(error.as_ref()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn is_broken_pipe(error: &(dyn std::error::Error + 'static)) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}
