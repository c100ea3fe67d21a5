//! The instruction set, proved: data lines with expected results, random instruction sequences against the host
//! processor, several vCPUs on shared memory, self-modifying code, breakpoints and exact instruction counts.

// UNSAFETY: the host processor as an oracle: generated machine code is run, and its faults are caught as signals.
#![allow(unsafe_code)]

mod cases;
mod code;
mod differential;
mod host;
mod lines;
mod machine;
mod program;
mod random;
mod smp;
mod variants;

/// Status flags that the engine may have forgotten at an exception, because the program does not use them any more.
const FORGOTTEN: u64 = 0;

/// The engine under test. The binary translator runs the same tests.
fn engine() -> &'static dyn lodger_vcpu::Engine {
    &lodger_interp::InterpEngine
}
