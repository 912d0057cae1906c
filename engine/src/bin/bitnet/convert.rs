//! `bitnet convert` and `bitnet quantize`: a model in another format.

use std::path::PathBuf;

use bitnet_engine::model::gguf::{ExportOptions, GgufFormat, TensorType, export};
use bitnet_engine::model::{Checkpoint, write_hf_packed};
use bitnet_engine::ternary::I2sLayout;
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};

use crate::{GgufArgs, Outcome};

/// Formats that are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Target {
    /// Hugging Face folder, four trits a byte, as `transformers` loads it.
    HfPacked,
    /// bitnet.cpp, 2 bits a weight.
    #[value(name = "gguf-i2_s")]
    GgufI2S,
    /// llama.cpp, 1.69 bits a weight.
    #[value(name = "gguf-tq1_0")]
    GgufTq1_0,
    /// llama.cpp, 2.06 bits a weight.
    #[value(name = "gguf-tq2_0")]
    GgufTq2_0,
    /// bitnet.cpp's table look-up for ARM.
    GgufTl1,
    /// bitnet.cpp's table look-up for x86.
    GgufTl2,
    /// ik_llama.cpp, 1.625 bits a weight.
    #[value(name = "gguf-iq1_bn")]
    GgufIq1Bn,
    /// ik_llama.cpp, 2 bits a weight.
    #[value(name = "gguf-iq2_bn")]
    GgufIq2Bn,
    /// Half precision.
    GgufF16,
}

/// Types of the embedding and head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Head {
    F16,
    #[value(name = "q8_0")]
    Q8_0,
    #[value(name = "q6_k")]
    Q6K,
}

/// Arguments of `bitnet convert` and `bitnet quantize`.
#[derive(Args)]
pub(crate) struct ConvertArgs {
    /// Folder or GGUF file to read.
    source: PathBuf,
    /// Folder (hf-packed, not there yet) or file to write. It has this name once it is whole.
    destination: PathBuf,
    /// Format to write.
    #[arg(long, value_enum)]
    to: Target,
    /// Type of the embedding and head in a GGUF file (default: as they are).
    #[arg(long, value_enum)]
    head: Option<Head>,
    /// Interleaving of I2_S to write: x86 or arm.
    #[arg(long, default_value = "x86", value_name = "LAYOUT")]
    to_i2s_layout: I2sLayout,
    /// `general.architecture` of a GGUF file: bitnet-b1.58, bitnet-25 or bitnet (default: bitnet, the only one that llama.cpp knows,
    /// for its own formats; bitnet-b1.58 for the others). llama.cpp runs `bitnet` with SiLU, whatever the model was trained with.
    #[arg(long, value_name = "NAME")]
    architecture: Option<String>,
    #[command(flatten)]
    gguf: GgufArgs,
}

/// Another format of the same weights.
pub(crate) fn convert(args: &ConvertArgs) -> Outcome {
    run(args, false)
}

/// Trits from master weights, by absmean.
pub(crate) fn quantize(args: &ConvertArgs) -> Outcome {
    run(args, true)
}

fn run(args: &ConvertArgs, from_master: bool) -> Outcome {
    let checkpoint = Checkpoint::open(&args.gguf.source(Some(&args.source))?)?;
    match (checkpoint.is_master()?, from_master) {
        (true, false) => {
            return Err(
                format!("{} has master weights; `bitnet quantize` makes trits of them", args.source.display()).into()
            );
        }
        (false, true) => {
            return Err(
                format!("{} has no master weights; `bitnet convert` writes its trits", args.source.display()).into()
            );
        }
        _ => (),
    }
    let bar = ProgressBar::new(0);
    bar.set_style(ProgressStyle::with_template("{bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}")?);
    let mut progress = |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    };
    let format = match args.to {
        Target::HfPacked if args.head.is_some() => return Err("--head is for GGUF files".into()),
        Target::HfPacked => None,
        Target::GgufI2S => Some(GgufFormat::I2S(args.to_i2s_layout)),
        Target::GgufTq1_0 => Some(GgufFormat::Tq1_0),
        Target::GgufTq2_0 => Some(GgufFormat::Tq2_0),
        Target::GgufTl1 => Some(GgufFormat::Tl1),
        Target::GgufTl2 => Some(GgufFormat::Tl2),
        Target::GgufIq1Bn => Some(GgufFormat::Iq1Bn),
        Target::GgufIq2Bn => Some(GgufFormat::Iq2Bn),
        Target::GgufF16 => Some(GgufFormat::F16),
    };
    match format {
        None => write_hf_packed(&checkpoint, &args.destination, &mut progress)?,
        Some(format) => {
            let head = args.head.map(|head| match head {
                Head::F16 => TensorType::F16,
                Head::Q8_0 => TensorType::Q8_0,
                Head::Q6K => TensorType::Q6K,
            });
            let options = ExportOptions { head, architecture: args.architecture.clone(), ..ExportOptions::new(format) };
            export(&checkpoint, &args.destination, &options, &mut progress)?;
        }
    }
    bar.finish_and_clear();
    Ok(())
}
