//! The wrapper that shares an engine: same answers as alone, and a panic is one caller's affair.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bitnet_contracts::*;
use rstest::rstest;

use crate::toy::{PANIC_TOKEN, Toy};

fn greedy() -> GenerationConfig {
    GenerationConfig::greedy()
}

fn serialised() -> ConcurrentInferenceEngine {
    ConcurrentInferenceEngine::new(Box::new(Toy::new()))
}

fn parallel() -> ConcurrentInferenceEngine {
    ConcurrentInferenceEngine::from_thread_safe(Arc::new(Toy::new()))
}

#[test]
fn trait_objects_can_cross_threads() {
    fn crosses<T: Send + Sync + ?Sized>() {}
    crosses::<dyn BitNetInference>();
    crosses::<dyn ThreadSafeInference>();
    crosses::<ConcurrentInferenceEngine>();
    crosses::<KVCache>();
    crosses::<InferenceError>();
}

#[rstest]
#[case::serialised(serialised())]
#[case::parallel(parallel())]
fn many_callers_get_what_each_would_get_alone(#[case] engine: ConcurrentInferenceEngine) {
    let threads: Vec<_> = (0..8_u32)
        .map(|i| {
            let mut handle = engine.clone();
            std::thread::spawn(move || {
                let prompt = [i, 2 * i, 3];
                let shared = handle.generate_concurrent(&prompt, 20, &greedy()).unwrap().generated_tokens;
                let own = handle.generate_deterministic(&prompt, 20, u64::from(i)).unwrap().generated_tokens;
                (i, shared, own)
            })
        })
        .collect();
    for thread in threads {
        let (i, shared, own) = thread.join().unwrap();
        let prompt = [i, 2 * i, 3];
        assert_eq!(shared, Toy::alone(&prompt, 20, &greedy()), "caller {i}");
        let seeded = GenerationConfig { seed: Some(u64::from(i)), ..Default::default() };
        assert_eq!(own, Toy::alone(&prompt, 20, &seeded), "caller {i}");
    }
}

#[rstest]
#[case::serialised(serialised())]
#[case::parallel(parallel())]
fn a_panicking_caller_does_not_stop_the_others(#[case] mut engine: ConcurrentInferenceEngine) {
    let expected = Toy::alone(&[1, 2], 5, &greedy());
    for _ in 0..2 {
        assert!(catch_unwind(AssertUnwindSafe(|| engine.generate(&[PANIC_TOKEN], 5, &greedy()))).is_err());
        // Questions that compute nothing are answered even now.
        assert!(engine.supports_quantization(QuantizationType::I2S));
        assert!(!engine.supports_quantization(QuantizationType::TL2));
        engine.memory_usage();

        let clone = engine.clone();
        let other = std::thread::spawn(move || clone.generate_concurrent(&[1, 2], 5, &greedy()));
        assert_eq!(other.join().unwrap().unwrap().generated_tokens, expected);
        assert_eq!(engine.generate(&[1, 2], 5, &greedy()).unwrap().generated_tokens, expected);
    }
}

#[test]
fn an_engine_that_cannot_be_reset_stays_closed_until_it_can() {
    let toy = Toy::new();
    let failures = Arc::clone(&toy.reset_failures);
    let engine = ConcurrentInferenceEngine::new(Box::new(toy));
    assert!(catch_unwind(AssertUnwindSafe(|| engine.generate_concurrent(&[PANIC_TOKEN], 5, &greedy()))).is_err());

    failures.store(1, Ordering::SeqCst);
    let error = engine.generate_concurrent(&[1, 2], 5, &greedy()).unwrap_err();
    assert!(matches!(error, InferenceError::Device(DeviceError::SynchronizationFailed { .. })), "{error:?}");
    let result = engine.generate_concurrent(&[1, 2], 5, &greedy()).unwrap();
    assert_eq!(result.generated_tokens, Toy::alone(&[1, 2], 5, &greedy()));
}

#[test]
fn a_parallel_handle_makes_its_copy_once_and_only_when_needed() {
    let toy = Toy::new();
    let copies = Arc::clone(&toy.copies);
    let mut engine = ConcurrentInferenceEngine::from_thread_safe(Arc::new(toy));
    engine.generate_concurrent(&[1], 2, &greedy()).unwrap();
    engine.reset().unwrap();
    assert_eq!(copies.load(Ordering::SeqCst), 0);

    let ids = Tensor::new(&[[1_u32, 2]], &Device::Cpu).unwrap();
    engine.forward(&ids, None).unwrap().validate(1, 2, 32).unwrap();
    engine.generate(&[1], 2, &greedy()).unwrap();
    assert_eq!(copies.load(Ordering::SeqCst), 1);
    assert_eq!(engine.memory_usage().kv_cache, 3 * 4, "the handle's own state is what it reports");
    engine.reset().unwrap();
    assert_eq!(engine.memory_usage().kv_cache, 0);

    let mut clone = engine.clone();
    assert_eq!(copies.load(Ordering::SeqCst), 1, "a clone costs nothing until it needs a copy");
    clone.generate(&[1], 2, &greedy()).unwrap();
    assert_eq!(copies.load(Ordering::SeqCst), 2, "a clone has a copy of its own");
    assert_eq!(engine.memory_usage().kv_cache, 0, "and its state does not show here");
}

#[test]
fn handles_of_a_serialised_engine_share_it() {
    let engine = serialised();
    let mut copy = engine.thread_local_copy().unwrap();
    copy.generate(&[1, 2], 3, &greedy()).unwrap();
    assert_eq!(engine.memory_usage().kv_cache, 5 * 4);
    copy.reset().unwrap();
    assert_eq!(engine.memory_usage().kv_cache, 0);
}

#[rstest]
#[case::serialised(serialised())]
#[case::parallel(parallel())]
fn workers(#[case] engine: ConcurrentInferenceEngine) {
    assert!(engine.supports_concurrent_generation());
    assert!(engine.create_workers(0).unwrap().is_empty());
    let workers = engine.create_workers(3).unwrap();
    assert_eq!(workers.len(), 3);
    for mut worker in workers {
        assert_eq!(worker.config(), engine.config());
        assert!(worker.device().same_device(engine.device()));
        let result = worker.generate(&[4, 5], 4, &greedy()).unwrap();
        assert_eq!(result.generated_tokens, Toy::alone(&[4, 5], 4, &greedy()));
    }
    for too_many in [MAX_WORKERS + 1, usize::MAX] {
        let Err(InferenceError::Configuration(ConfigurationError::InvalidParameter { parameter, .. })) =
            engine.create_workers(too_many)
        else {
            panic!("{too_many} workers were made");
        };
        assert_eq!(parameter, "num_workers");
    }
}

#[rstest]
#[case::serialised(serialised())]
#[case::parallel(parallel())]
fn errors_and_caches_pass_through(#[case] mut engine: ConcurrentInferenceEngine) {
    assert_eq!(engine.generate(&[], 3, &greedy()), Err(TokenizationError::EmptySequence.into()));

    let ids = Tensor::new(&[[1_u32, 2]], &Device::Cpu).unwrap();
    let mut cache = KVCache::new(3);
    engine.forward(&ids, Some(&mut cache)).unwrap();
    assert_eq!(cache.len(), 2);
    assert!(engine.forward(&ids, Some(&mut cache)).is_err(), "two more do not fit");
    assert_eq!(cache.len(), 2);
}
