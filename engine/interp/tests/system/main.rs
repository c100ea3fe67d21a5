//! System-level behaviour of the interpreter: protection, interrupts, mode switches, task switches. Small bare-metal
//! programs run in a machine whose tables the tests set up.

mod events;
mod hostile;
mod long;
mod machine;
mod protected;
mod real;
mod task;
mod v86;

/// The engine under test. The binary translator runs the same tests.
fn engine() -> &'static dyn lodger_vcpu::Engine {
    &lodger_interp::InterpEngine
}
