#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| litegate::fuzz::answer_h2(data));
