//! Checks of a forward pass's output.

use bitnet_contracts::*;
use rstest::rstest;

fn output(logits: Tensor) -> InferenceOutput {
    InferenceOutput {
        logits,
        attention_weights: None,
        hidden_states: None,
        metrics: ForwardPassMetrics::new(),
        memory_usage: MemoryUsage::default(),
    }
}

fn zeros(shape: &[usize]) -> InferenceOutput {
    output(Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap())
}

fn invalid_shape(expected: &[usize], actual: &[usize]) -> InferenceError {
    OutputValidationError::InvalidShape {
        tensor: "logits".to_string(),
        expected: expected.to_vec(),
        actual: actual.to_vec(),
    }
    .into()
}

#[rstest]
#[case(&[2, 3, 5])]
#[case(&[2, 3, 4, 1])]
#[case(&[2, 12])]
#[case(&[])]
fn wrong_shapes_are_named(#[case] shape: &[usize]) {
    assert_eq!(zeros(shape).validate(2, 3, 4), Err(invalid_shape(&[2, 3, 4], shape)));
}

#[rstest]
#[case(DType::F64)]
#[case(DType::F32)]
#[case(DType::F16)]
#[case(DType::BF16)]
fn all_kinds_of_bad_values_are_counted(#[case] dtype: DType) {
    let values = [1.0_f64, f64::NAN, f64::INFINITY, 0.0, -2.0, f64::NEG_INFINITY];
    let logits = Tensor::new(&values, &Device::Cpu).unwrap().to_dtype(dtype).unwrap().reshape((1, 2, 3)).unwrap();
    let expected = OutputValidationError::NumericalInstability {
        tensor: "logits".to_string(),
        invalid_values: 3,
        total_values: 6,
    };
    assert_eq!(output(logits).validate(1, 2, 3), Err(expected.into()));
}

#[test]
fn a_large_but_finite_f64_is_finite() {
    let logits = Tensor::new(&[[[1e300_f64, -1e300]]], &Device::Cpu).unwrap();
    output(logits).validate(1, 1, 2).unwrap();
}

#[test]
fn a_transposed_tensor_is_read_in_full() {
    // [1, 2, 3] transposed to [1, 3, 2] shares its memory with the original.
    let values = [0.0_f32, 1.0, 2.0, 3.0, 4.0, f32::NAN];
    let logits = Tensor::new(&values, &Device::Cpu).unwrap().reshape((1, 2, 3)).unwrap().transpose(1, 2).unwrap();
    assert!(!logits.is_contiguous());
    let last = output(logits.clone()).next_token_logits().unwrap().to_vec2::<f32>().unwrap();
    assert_eq!(last[0][0], 2.0);
    assert!(last[0][1].is_nan());
    assert!(output(logits).validate(1, 3, 2).is_err());

    // A slice must not be blamed for a NaN that lies beside it.
    let wide = Tensor::new(&values, &Device::Cpu).unwrap().reshape((1, 1, 6)).unwrap();
    output(wide.narrow(2, 0, 5).unwrap()).validate(1, 1, 5).unwrap();
}

#[test]
fn a_bad_value_beyond_the_first_chunk_is_found() {
    let mut values = vec![0.0_f32; (1 << 20) + 2];
    values[1 << 20] = f32::NAN;
    let total_values = values.len();
    let logits = Tensor::from_vec(values, (1, 1, total_values), &Device::Cpu).unwrap();
    let expected =
        OutputValidationError::NumericalInstability { tensor: "logits".to_string(), invalid_values: 1, total_values };
    assert_eq!(output(logits).validate(1, 1, total_values), Err(expected.into()));
}

#[test]
fn integer_logits_are_refused() {
    let logits = Tensor::zeros((1, 1, 2), DType::U32, &Device::Cpu).unwrap();
    assert!(matches!(
        output(logits).validate(1, 1, 2),
        Err(InferenceError::OutputValidation(OutputValidationError::InconsistentOutput { .. }))
    ));
}

#[test]
fn the_last_position_of_every_sequence() {
    let values: Vec<f32> = (0..12).map(|i| i as f32).collect();
    let logits = Tensor::from_vec(values, (2, 3, 2), &Device::Cpu).unwrap();
    let last = output(logits).next_token_logits().unwrap();
    assert_eq!(last.to_vec2::<f32>().unwrap(), [[4.0, 5.0], [10.0, 11.0]]);
}

#[rstest]
#[case(&[], &[1, 1, 0])]
#[case(&[7], &[1, 1, 7])]
#[case(&[2, 7], &[1, 1, 7])]
#[case(&[1, 1, 2, 7], &[1, 1, 7])]
#[case(&[2, 0, 7], &[2, 1, 7])]
fn next_token_logits_of_a_wrong_shape(#[case] shape: &[usize], #[case] expected: &[usize]) {
    assert_eq!(zeros(shape).next_token_logits().unwrap_err(), invalid_shape(expected, shape));
}
