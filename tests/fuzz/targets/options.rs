#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| dedup_img_fuzz::options(input));
