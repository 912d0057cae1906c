//! `bitnet diff`: two models, tensor by tensor, whatever their formats.

use std::io::{Write, stdout};
use std::path::PathBuf;

use bitnet_contracts::Result;
use bitnet_engine::model::{Checkpoint, ModelDescription, Part};
use clap::Args;
use comfy_table::Table;
use serde_json::{Value, json};

use crate::{GgufArgs, Outcome};

/// Arguments of `bitnet diff`.
#[derive(Args)]
pub(crate) struct DiffArgs {
    /// Folder or GGUF file.
    a: PathBuf,
    /// Folder or GGUF file.
    b: PathBuf,
    #[command(flatten)]
    gguf: GgufArgs,
    /// List equal tensors, too.
    #[arg(long)]
    all: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// A tensor in both models.
struct Compared {
    name: String,
    /// Elements that differ.
    differing: usize,
    elements: usize,
    /// Largest difference of two elements; of trits in units of the scale of `a`.
    largest: f64,
    /// Scales of ternary matrices.
    scales: Option<(f32, f32)>,
}

impl Compared {
    fn is_equal(&self) -> bool {
        self.differing == 0 && self.scales.is_none_or(|(a, b)| a == b)
    }
}

pub(crate) fn run(args: &DiffArgs) -> Outcome {
    let open = |path: &PathBuf| Checkpoint::open(&args.gguf.source(Some(path))?);
    let (a, b) = (open(&args.a)?, open(&args.b)?);
    let facts = facts(&a, &b);
    // Tensors of other shapes cannot be laid side by side; the facts above say which they are.
    let shapes = |d: &ModelDescription| d.parts();
    let comparable = shapes(a.description()) == shapes(b.description());
    let tensors = if comparable {
        shapes(a.description()).iter().map(|part| compare(&a, &b, part)).collect::<Result<Vec<_>>>()?
    } else {
        Vec::new()
    };
    let unequal = tensors.iter().filter(|t| !t.is_equal()).count();
    let mut out = stdout().lock();
    let shown = tensors.iter().filter(|t| args.all || !t.is_equal());
    if args.json {
        let list: Vec<Value> = shown
            .map(|t| {
                json!({"name": t.name, "equal": t.is_equal(), "differing": t.differing, "elements": t.elements,
                    "largest_difference": t.largest, "scale_a": t.scales.map(|s| s.0), "scale_b": t.scales.map(|s| s.1)})
            })
            .collect();
        let facts: Vec<Value> = facts.iter().map(|(name, a, b)| json!({"name": name, "a": a, "b": b})).collect();
        let equal = comparable && unequal == 0 && facts.is_empty();
        writeln!(out, "{:#}", json!({"equal": equal, "description": facts, "tensors": list}))?;
    } else {
        let mut table = Table::new();
        table.load_style(comfy_table::presets::UTF8_HORIZONTAL_ONLY);
        table.set_header(["", "A", "B"]);
        for (name, a, b) in &facts {
            table.add_row([name, a, b]);
        }
        if !facts.is_empty() {
            writeln!(out, "{table}")?;
        }
        let mut table = Table::new();
        table.load_style(comfy_table::presets::UTF8_HORIZONTAL_ONLY);
        table.set_header(["tensor", "differing", "largest difference", "scale A", "scale B"]);
        let scale = |s: Option<f32>| s.map_or(String::new(), |s| s.to_string());
        for t in shown {
            let share = format!("{} of {}", t.differing, t.elements);
            let largest = format!("{:e}", t.largest);
            table.add_row([t.name.clone(), share, largest, scale(t.scales.map(|s| s.0)), scale(t.scales.map(|s| s.1))]);
        }
        if table.row_count() > 0 {
            writeln!(out, "{table}")?;
        }
        if comparable {
            writeln!(out, "{unequal} of {} tensors differ", tensors.len())?;
        } else {
            writeln!(out, "the shapes differ")?;
        }
    }
    if comparable && unequal == 0 && facts.is_empty() { Ok(()) } else { Err("the models differ".into()) }
}

/// What differs in the descriptions: name, A, B.
fn facts(a: &Checkpoint, b: &Checkpoint) -> Vec<(String, String, String)> {
    let list = |c: &Checkpoint| {
        let d = c.description();
        [
            ("hidden size", d.hidden_size.to_string()),
            ("feed-forward size", d.intermediate_size.to_string()),
            ("layers", d.num_layers.to_string()),
            ("query heads", d.num_attention_heads.to_string()),
            ("key/value heads", d.num_key_value_heads.to_string()),
            ("vocabulary", d.vocab_size.to_string()),
            ("context", d.max_position_embeddings.to_string()),
            ("RoPE theta", d.rope_theta.to_string()),
            ("RMSNorm epsilon", format!("{:e}", d.rms_norm_eps)),
            ("head is the embedding", d.tie_word_embeddings.to_string()),
            ("activation", d.activation.name().to_string()),
            ("begin of sequence", format!("{:?}", d.bos_token_id)),
            ("end of sequence", format!("{:?}", d.eos_token_ids)),
            ("tokens", c.tokenizer().map_or("no tokenizer".to_string(), |t| t.vocab_size().to_string())),
            ("chat template", c.chat_template().unwrap_or("none").to_string()),
        ]
    };
    let pairs = list(a).into_iter().zip(list(b));
    pairs.filter(|((_, a), (_, b))| a != b).map(|((name, a), (_, b))| (name.to_string(), a, b)).collect()
}

fn compare(a: &Checkpoint, b: &Checkpoint, part: &Part) -> Result<Compared> {
    let mut compared =
        Compared { name: part.name().to_string(), differing: 0, elements: 0, largest: 0.0, scales: None };
    let mut look = |x: f64, y: f64| {
        compared.elements += 1;
        if x != y {
            compared.differing += 1;
            compared.largest = compared.largest.max((x - y).abs());
        }
    };
    match part {
        Part::Vector { name, len } => {
            let (x, y) = (a.vector(name, *len)?, b.vector(name, *len)?);
            x.iter().zip(&y).for_each(|(x, y)| look(f64::from(*x), f64::from(*y)));
        }
        Part::Floats { name, rows, columns } => {
            let (x, y) = (a.matrix(name, *rows, *columns)?, b.matrix(name, *rows, *columns)?);
            let (mut p, mut q) = (vec![0f32; *columns], vec![0f32; *columns]);
            for row in 0..*rows {
                x.row(row, &mut p);
                y.row(row, &mut q);
                p.iter().zip(&q).for_each(|(x, y)| look(f64::from(*x), f64::from(*y)));
            }
        }
        Part::Ternary { name, rows, columns } => {
            let (x, y) = (a.ternary(name, *rows, *columns)?, b.ternary(name, *rows, *columns)?);
            x.trits()?.iter().zip(&y.trits()?).for_each(|(x, y)| look(f64::from(*x), f64::from(*y)));
            compared.scales = Some((x.scale(), y.scale()));
            a.release(&format!("{name}.weight"));
            b.release(&format!("{name}.weight"));
        }
    }
    Ok(compared)
}
