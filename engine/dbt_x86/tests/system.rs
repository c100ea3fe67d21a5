//! System-level behaviour on the translator: the interpreter's own tests, see there.

#[path = "../../interp/tests/system/events.rs"]
mod events;
#[path = "../../interp/tests/system/hostile.rs"]
mod hostile;
#[path = "../../interp/tests/system/long.rs"]
mod long;
#[path = "../../interp/tests/system/machine.rs"]
mod machine;
#[path = "../../interp/tests/system/protected.rs"]
mod protected;
#[path = "../../interp/tests/system/real.rs"]
mod real;
#[path = "../../interp/tests/system/task.rs"]
mod task;
#[path = "../../interp/tests/system/v86.rs"]
mod v86;

/// The engine under test.
fn engine() -> &'static dyn lodger_vcpu::Engine {
    &lodger_dbt_x86::DbtEngine { exact_flags: false }
}
