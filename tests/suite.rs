//! Tests of the program against what we did not write: qemu-img, qemu-io, the kernel, an independent reader.

mod cli;
mod interop;
mod support;
