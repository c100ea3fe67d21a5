//! The instruction set on the translator with exact flags at exceptions: the interpreter's own tests, see there.

// UNSAFETY: the host processor as an oracle: generated machine code is run, and its faults are caught as signals.
#![allow(unsafe_code)]

#[path = "../../interp/tests/isa/cases.rs"]
mod cases;
#[path = "../../interp/tests/isa/code.rs"]
mod code;
#[path = "../../interp/tests/isa/differential.rs"]
mod differential;
#[path = "../../interp/tests/isa/host.rs"]
mod host;
#[path = "../../interp/tests/isa/lines.rs"]
mod lines;
#[path = "../../interp/tests/isa/machine.rs"]
mod machine;
#[path = "../../interp/tests/isa/program.rs"]
mod program;
#[path = "../../interp/tests/isa/random.rs"]
mod random;
#[path = "../../interp/tests/isa/smp.rs"]
mod smp;
#[path = "../../interp/tests/isa/variants.rs"]
mod variants;

/// Status flags that the engine may have forgotten at an exception, because the program does not use them any more.
const FORGOTTEN: u64 = 0;

/// The engine under test.
fn engine() -> &'static dyn lodger_vcpu::Engine {
    &lodger_dbt_x86::DbtEngine { exact_flags: true }
}
