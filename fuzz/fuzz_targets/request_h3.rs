#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| litegate::fuzz::request_h3(data));
