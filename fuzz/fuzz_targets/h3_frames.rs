#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| litegate::fuzz::h3_frames(data));
