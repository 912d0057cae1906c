#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| bitnet_engine_fuzz::pack_roundtrip::run(data));
