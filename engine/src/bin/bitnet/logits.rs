//! `bitnet logits`: the logits of token sequences, for other tools to compare.

use std::collections::HashMap;
use std::path::PathBuf;

use bitnet_contracts::{Device, Tensor};
use bitnet_engine::backends;
use clap::Args;
use safetensors::tensor::{Dtype, TensorView, serialize};

use crate::{ModelArgs, Outcome};

/// Arguments of `bitnet logits`.
#[derive(Args)]
pub(crate) struct LogitsArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Token ids: commas between the ids of a sequence, semicolons between sequences of equal length.
    #[arg(long, value_name = "\"1,2,3;4,5,6\"")]
    tokens: String,
    /// Backend (see `bitnet backends`).
    #[arg(long, default_value = "cpu", value_name = "NAME")]
    backend: String,
    /// File to write: tensors `logits`, f32 [batch, seq, vocab], and `input_ids`, i64 [batch, seq].
    #[arg(long, value_name = "FILE.safetensors")]
    out: PathBuf,
}

pub(crate) fn run(args: &LogitsArgs) -> Outcome {
    let rows = parse(&args.tokens)?;
    let (batch, seq) = (rows.len(), rows[0].len());
    let ids: Vec<u32> = rows.into_iter().flatten().collect();
    let mut engine = backends::open(&args.backend, &args.model.source()?, &args.model.options())?;
    let input = Tensor::from_slice(&ids, (batch, seq), &Device::Cpu)?;
    let output = engine.forward(&input, None)?;
    output.validate(batch, seq, engine.config().vocab_size)?;
    let vocabulary = engine.config().vocab_size;
    let logits = output.logits.flatten_all()?.to_vec1::<f32>()?;
    let logits: Vec<u8> = logits.iter().flat_map(|x| x.to_le_bytes()).collect();
    let ids: Vec<u8> = ids.iter().flat_map(|&x| i64::from(x).to_le_bytes()).collect();
    let tensors = [
        ("input_ids", TensorView::new(Dtype::I64, vec![batch, seq], &ids)?),
        ("logits", TensorView::new(Dtype::F32, vec![batch, seq, vocabulary], &logits)?),
    ];
    // No metadata: the file depends on the model and the tokens only, so that files of different runs can be compared as bytes.
    let bytes = serialize(tensors, None::<HashMap<String, String>>)?;
    // Written aside and renamed: a file of the final name is whole.
    let aside = args.out.with_extension("partial");
    std::fs::write(&aside, bytes)
        .and_then(|()| std::fs::rename(&aside, &args.out))
        .map_err(|e| format!("cannot write {}: {e}", args.out.display()))?;
    Ok(())
}

/// `1,2,3;4,5,6` → rows of equal length.
fn parse(tokens: &str) -> Result<Vec<Vec<u32>>, String> {
    let rows = tokens
        .split(';')
        .map(|row| row.split(',').map(|id| id.trim().parse().map_err(|e| format!("token id {id:?}: {e}"))).collect())
        .collect::<Result<Vec<Vec<u32>>, String>>()?;
    match rows.iter().find(|row| row.len() != rows[0].len()) {
        Some(row) => {
            Err(format!("sequences of {} and {} tokens: give sequences of one length", rows[0].len(), row.len()))
        }
        None => Ok(rows),
    }
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn sequences_are_parsed_and_bad_ones_refused() {
        assert_eq!(parse("1,2, 3;4,5,6").unwrap(), [[1, 2, 3], [4, 5, 6]]);
        assert_eq!(parse("7").unwrap(), [[7]]);
        for bad in ["", "1,,2", "1;2,3", "-1", "1,x", "4294967296", "1;"] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }
}
